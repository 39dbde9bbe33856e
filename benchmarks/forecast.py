"""The plan of a fit against the fit: time and memory, each data set in a process of its own."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

import pnmf_pyro
from benchmarks import tables
from benchmarks.measure import in_new_process, peak_memory_mib, report, table
from pnmf_pyro.estimator import calibration
from pnmf_pyro.training.progress import Progress

# Small and large, in space and not, real and simulated.
CHOSEN = (
    "digits,eco_mite,st_mob_rep11,iss_ca1_cells,sim_nsf_S1,osmfish_cortex,"
    "simulated:20000:2000:0.05,tissue:20000:300:0.1"
)


def plan(options: argparse.Namespace) -> None:
    """Predicted and real time and memory of fits, `--data` of them, as they come."""
    rows = [["data", "planned s", "s", "ratio", "planned MB", "MB", "ratio", "planning s"]]
    for name in (CHOSEN if options.data == "all" else options.data).split(","):
        found = in_new_process("plan_once", data=name, L=options.L)
        report(**found)
        keys = ("planned_seconds", "seconds", "planned_mb", "mb")
        planned, seconds, memory, peak = (found[key] for key in keys)
        ratios = planned / seconds, memory / peak
        cells = [planned, seconds, ratios[0], memory, peak, ratios[1], found["planning"]]
        rows.append([name, *(f"{number:.3g}" for number in cells)])
    sys.stdout.write(table(rows))


def plan_once(options: argparse.Namespace) -> dict[str, Any]:
    """Plan a fit, then do it; seconds are of the CPU, so that other processes count little."""
    warnings.simplefilter("ignore")
    calibration.clock = time.process_time
    X, coords = _data(options.data)
    started = time.process_time()
    planned = pnmf_pyro.plan(X, coords, n_components=options.L)
    with stages_timed() as taken:
        model = pnmf_pyro.fit(X, coords, n_components=options.L)
    done = time.process_time()
    ready = taken[0][1]
    return report(
        benchmark="plan",
        data=options.data,
        shape=X.shape,
        stored=X.nnz,
        L=options.L,
        prior=planned.prior,
        planned_seconds=planned.seconds,
        seconds=done - ready,
        planned_mb=planned.memory / 1e6,
        mb=peak_memory_mib() * 1.048576,
        planning=ready - started,
        planned_steps={stage.name: stage.steps for stage in planned.stages if stage.steps},
        steps={name: last - first for name, first, last in model.history_.stages},
        stages=[(name, round(after - before, 3)) for (name, before), (_, after) in pairwise(taken)],
        planned_stages=[(stage.name, round(stage.seconds, 3)) for stage in planned.stages],
    )


@contextmanager
def stages_timed(log: bool = False) -> Iterator[list[tuple[str, float]]]:
    """List the stages of a fit and the CPU seconds at which each began, from its start to its end.

    With `log` each is said on the standard error as it begins, with the largest memory so far.
    """
    begin, taken = Progress.begin, [("start", time.process_time())]

    def noted(progress: Progress, name: str) -> None:
        taken.append((name, time.process_time()))
        if log:
            seconds = taken[-1][1] - taken[0][1]
            sys.stderr.write(f"{name}: at {seconds:.0f} CPU s, {peak_memory_mib():.0f} MiB\n")
        begin(progress, name)

    Progress.begin = noted
    try:
        yield taken
    finally:
        Progress.begin = begin
        taken.append(("end", time.process_time()))


def _data(name: str) -> tuple[sp.csr_matrix, np.ndarray | None]:
    """Counts and coordinates, if any: real ones by name, or simulated, KIND:N:D:DENSITY."""
    kind, *numbers = name.split(":")
    if numbers:
        N, D, density = int(numbers[0]), int(numbers[1]), float(numbers[2])
        if kind == "tissue":
            X, coords, *_ = tables.tissue(N, D, density)
            return X, coords
        return tables.simulated(N, D, density), None
    if kind == "digits":
        X, coords = tables.real(name), None
    else:
        adata = tables.adata(name)
        X, coords = tables.counts_of(adata), adata.obsm.get("spatial")
    return X[:, np.asarray(X.sum(0)).ravel() > 0], coords
