"""Numbers of components: fits that start from the next larger one, and fits that start afresh."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import scipy.sparse as sp

from benchmarks import ours, tables
from benchmarks.measure import report, table
from pnmf_pyro import select_n_components
from pnmf_pyro.estimator.recipe import RECIPE

STARTS = {"from the next larger": {}, "afresh": {"init": RECIPE["init"]}}


def select(options: argparse.Namespace) -> None:
    """CPU seconds and held-out deviance of a selection up to `--L` components, in both ways."""
    ours.fit(tables.simulated(50, 20, 0.2), 2)  # the first fit of a process compiles
    rows = [["data", "CPU s", "afresh", "ratio", "deviance / afresh: mean", "highest", "chosen"]]
    for name in options.data.split(","):
        X = sp.csr_matrix(tables.real(name))
        totals = np.asarray(X.sum(0)).ravel()
        X = X[:, np.sort(np.argsort(-totals, kind="stable")[: options.D])]
        X = X[:, np.asarray(X.sum(0)).ravel() > 0]
        seconds, found = {}, {}
        for how, given in STARTS.items():
            began = time.process_time()
            found[how] = ours.quietly(
                lambda X=X, given=given: select_n_components(
                    X, range(1, options.L + 1), n_seeds=options.repeats, random_state=2, **given
                )
            )
            seconds[how] = time.process_time() - began
            report(
                benchmark="select",
                data=name,
                shape=X.shape,
                how=how,
                cpu_seconds=seconds[how],
                deviance=found[how].mean_deviance.tolist(),
                chosen=found[how].chosen,
            )
        (warm, cold), (fast, slow) = found.values(), seconds.values()
        ratio = warm.mean_deviance / cold.mean_deviance
        numbers = (fast, slow, fast / slow, ratio.mean(), ratio.max())
        rows.append(
            [name, *(f"{number:.4g}" for number in numbers), f"{warm.chosen}, {cold.chosen}"]
        )
    sys.stdout.write(table(rows))
