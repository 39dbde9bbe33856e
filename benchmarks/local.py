"""Fields that condition each place on its neighbours, on simulated tissues of any size."""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np

import pnmf_pyro
from benchmarks import ours, tables
from benchmarks.forecast import stages_timed
from benchmarks.measure import in_new_process, peak_memory_mib, report, table, timed
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.stages import Settle


def lcgp(options: argparse.Namespace) -> None:
    """Locally conditioned fields on simulated tissues as they grow: time, memory, recovery.

    `--sizes` are numbers of places, `--D`, `--density`, `--L` and `--K` the rest.
    """
    rows = [["places", "fit s", "s a step", "steps", "MiB", "recovery: lowest", "mean"]]
    shape = {"D": options.D, "density": options.density, "L": options.L, "K": options.K}
    measured = []
    for N in options.sizes.split(","):
        line = in_new_process("local_fit", N=int(N), **shape, init=options.init)
        measured.append(report(**{**line, "benchmark": "lcgp"}))
        found, seconds = line["recovery"], line["seconds"]
        numbers = (line["N"], seconds, seconds / line["steps"], line["steps"])
        numbers += (line["mib_in_all"], min(found), np.mean(found))
        rows.append([f"{number:.4g}" for number in numbers])
    sys.stdout.write(table(rows))
    if len(measured) > 1:
        x, y = ([line[key] for line in measured] for key in ("N", "cpu_seconds"))
        slope = np.polyfit(np.log(x), np.log(y), 1)[0]
        sys.stdout.write(f"log-log slope of the CPU time of a fit: {slope:.2f}\n")


def local_fit(options: argparse.Namespace) -> dict[str, Any]:
    """One fit of a simulated tissue with locally conditioned fields."""
    X, coordinates, log_factors, _ = tables.tissue(options.N, options.D, options.density, options.L)
    settings = {"local": True, "K": options.K}
    if options.init is not None:
        settings["init"] = options.init
    cpu_before = time.process_time()
    with stages_timed(log=True) as taken:
        seconds, model = timed(
            lambda: ours.quietly(
                lambda: pnmf_pyro.fit(X, coordinates, n_components=options.L, **settings)
            )
        )
    return report(
        benchmark="local_fit",
        N=options.N,
        D=options.D,
        stored=X.nnz,
        L=options.L,
        K=options.K,
        seconds=seconds,
        cpu_seconds=time.process_time() - cpu_before,
        stages=[(name, round(after - before, 1)) for (name, before), (_, after) in pairwise(taken)],
        kernel=str(model.kernel_),
        steps=model.n_iter_,
        elbo=model.elbo_,
        recovery=ours.recovery(model, log_factors),
        mib_in_all=peak_memory_mib(),
    )


def local_bound(options: argparse.Namespace) -> dict[str, Any]:
    """Recovery of a simulated tissue where loadings, levels and kernels are the true ones."""
    X, coordinates, log_factors, loadings = tables.tissue(
        options.N, options.D, options.density, options.L
    )
    lengthscales = tables.lengthscales(options.L)
    found = ours.log_factors_given(X, coordinates, loadings, lengthscales, options.K)
    return report(
        benchmark="local_bound",
        N=options.N,
        K=options.K,
        recovery=ours.correlations(found, log_factors),
    )


def local_step(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of what a fit with locally conditioned fields consists of, without learning.

    The start (with neighbours, weights and the first solve), and full steps.
    """
    X, coordinates, *_ = tables.tissue(options.N, options.D, options.density, options.L)
    times = [time.perf_counter()]
    model = PNMF(
        options.L,
        **ours.NATURAL,
        spatial=True,
        local=True,
        K=options.K,
        lengthscale=8.0,
        max_iter=options.steps,
        tol=0,
        stages=[Settle()],
        random_state=0,
    )
    note = lambda *_: times.append(time.perf_counter())  # noqa: E731 - a callback of three arguments
    ours.quietly(lambda: model.fit(X, coordinates=coordinates, callback=note, callback_interval=1))
    taken = np.diff(times)
    return report(
        benchmark="local_step",
        N=options.N,
        D=options.D,
        stored=X.nnz,
        K=options.K,
        start_and_first_step=taken[0],
        step_seconds=taken[1:].tolist(),
        mib_in_all=peak_memory_mib(),
    )
