"""Counts in a store against the same in memory: seconds of a pass, and peak memory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import anndata
import torch

import pnmf_pyro
from benchmarks import tables
from benchmarks.measure import peak_memory_mib, report
from pnmf_pyro.data.checks import check_counts
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.log_rate import log_rate_with_gradients
from pnmf_pyro.data.stores import opened, stored_counts


def stored(options: argparse.Namespace) -> None:
    """Print the seconds of passes over `--data` (.h5ad or .zarr), and of a fit of `--steps` steps.

    With `--judge held-out` counts are read into memory, and there is no fit. A file that is not
    there is only written, of `--N` x `--D` simulated counts.
    """
    path, found = Path(options.data), dict[str, Any]()
    if not path.exists():
        X = tables.simulated(options.N, options.D, options.density, options.L)
        getattr(anndata.AnnData(X), f"write_{path.suffix[1:]}")(path)
        return
    if options.judge == "held-out":
        read = getattr(anndata, f"read_{path.suffix[1:]}")
        found = _pass(check_counts(read(path).X), options.L)
        report(benchmark="stored", where="memory", data=path.name, **found)
        return
    with opened(path) as store:
        start = time.perf_counter()
        counts = stored_counts(store, path.name)
        found["first_pass_seconds"] = time.perf_counter() - start
        found |= _pass(counts, options.L)
        shape, n_stored = counts.shape, counts.values.numel()
    start, chosen = time.perf_counter(), {"init": options.init} if options.init else {}
    model = pnmf_pyro.fit(path, n_components=options.L, max_iter=options.steps, **chosen)
    found |= {"fit_seconds": time.perf_counter() - start, "steps": model.n_iter_}
    found |= {"elbo": model.elbo_, "peak_mib": peak_memory_mib()}
    report(benchmark="stored", where=path.suffix, shape=shape, n_stored=n_stored, **found)


def batches(options: argparse.Namespace) -> None:
    """Print the ELBO and the passes over `--data` of a fit by full passes, and of one by batches.

    Both without draws and points (`lower-bound`), from one start. A pass is one over the samples
    by steps; the start, the first pass and the end read the table as well.
    """
    chosen = {"mode": "lower-bound", "init": options.init or "nndsvda", "n_components": options.L}
    for size in (None, options.batch_size):
        start, cpu = time.perf_counter(), time.process_time()
        model = pnmf_pyro.fit(options.data, batch_size=size, **chosen)
        share = 1.0 if size is None else size / model.model_.N
        found = {"passes": model.n_iter_ * share, "stages": model.history_.stages}
        found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        report(benchmark="batches", batch_size=size, elbo=model.elbo_, **found)


def _pass(counts: Counts, L: int) -> dict[str, float]:
    """Seconds and CPU seconds of the sparse statistics of a step, each the best of three."""
    generator = torch.Generator().manual_seed(0)
    A, W = (torch.rand(n, L, generator=generator).to(counts.dtype) for n in counts.shape)
    times = []
    for _ in range(3):
        start, cpu = time.perf_counter(), time.process_time()
        log_rate_with_gradients(counts, A, W)
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    seconds, cpu_seconds = map(min, zip(*times, strict=True))
    return {"pass_seconds": seconds, "pass_cpu_seconds": cpu_seconds}
