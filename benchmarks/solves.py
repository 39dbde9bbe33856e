"""Triangular solves of Vecchia factors against SuperLU, one object for each component."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu

from benchmarks.measure import report
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.fronts import fronts, grid_sizes
from pnmf_pyro.gp.neighbors import build_graph
from pnmf_pyro.gp.triangular import Triangle


def solves(options: argparse.Namespace) -> dict[str, Any]:
    """CPU milliseconds of a solve and one with the transpose, L components with their own weights.

    `--N` places, `--K` neighbours, `--L` components; with one right-hand side, and with eight.
    """
    N, K, L = options.N, options.K, options.L
    random = np.random.default_rng(0)
    places = Places(torch.from_numpy(random.uniform(0, N**0.5, (N, 2))))
    predecessors = build_graph(places, K).in_fronts().predecessors
    present = predecessors >= 0
    B = random.random((N, L, K)) / K * present[:, None]
    triangle = Triangle(predecessors, torch.from_numpy(B).float())
    starts = np.r_[0, present.sum(1).cumsum()]
    identity = sp.identity(N, format="csr")
    lower = [
        splu(
            (
                identity
                - sp.csr_matrix((B[:, l][present], predecessors[present], starts), shape=(N, N))
            ).tocsc(),
            permc_spec="NATURAL",
            diag_pivot_thresh=0.0,
        )
        for l in range(L)
    ]
    sizes = [0, *grid_sizes(N)]
    found: dict[str, Any] = {
        "fronts": sum(len(fronts(predecessors, *ends)) for ends in pairwise(sizes))
    }
    for R in (1, 8):
        x = torch.randn(N, L, R)
        columns = [np.ascontiguousarray(x[:, l].double()) for l in range(L)]
        calls: dict[str, Callable[[], Any]] = {
            "fronts, float32": lambda x=x: (triangle.solve(x), triangle.solve_transposed(x)),
            "SuperLU": lambda b=columns: [
                (one.solve(c), one.solve(c, trans="T")) for one, c in zip(lower, b, strict=True)
            ],
        }
        found[f"R={R}"] = {
            name: _milliseconds(call, options.repeats) for name, call in calls.items()
        }
    return report(benchmark="solves", N=N, K=K, L=L, **found)


def _milliseconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        before = time.process_time()
        call()
        times.append(time.process_time() - before)
    return round(1e3 * float(np.median(times)), 1)
