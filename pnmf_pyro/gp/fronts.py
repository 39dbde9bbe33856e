"""Grids and fronts: the parts of an ordering in which triangular solves go.

A *grid* is a first part of a max-min ordering, which covers the whole evenly: all N places, the
first N / 2, N / 4 and so on. A *front* is a run of positions none of which is conditioned on
another of the run, so that a solve does all of them at once. Places are renumbered so that between
one grid and the next they stand front by front. What each is conditioned on stays the same.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

COARSENING = 2
COARSEST = 10


def grid_sizes(N: int) -> list[int]:
    """Return the numbers of places of all grids, N the last."""
    sizes = [N]
    while sizes[-1] // COARSENING >= COARSEST:
        sizes.append(sizes[-1] // COARSENING)
    return sizes[::-1]


def in_fronts(predecessors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber positions so that what can be solved at once stands together.

    Parameters
    ----------
    predecessors : ndarray of int32, shape (N, K)
        Earlier positions that each position is conditioned on, or -1 for none.

    Returns
    -------
    numbers : ndarray of int64, shape (N,)
        Old position of each new one. A grid has the same places as before.
    predecessors : ndarray of int32, shape (N, K)
        Those of the new positions.
    """
    N = len(predecessors)
    numbers, done = [], np.zeros(N + 1, bool)
    done[-1] = True  # for -1
    for start, stop in pairwise([0, *grid_sizes(N)]):
        waiting = np.arange(start, stop)
        while waiting.size:
            ready = done[predecessors[waiting]].all(1)
            numbers.append(waiting[ready])
            done[numbers[-1]] = True
            waiting = waiting[~ready]
    old = np.concatenate(numbers)
    new = np.full(N + 1, -1, np.int32)
    new[old] = np.arange(N, dtype=np.int32)
    return old, new[predecessors[old]]


def fronts(predecessors: np.ndarray, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the first and last + 1 positions of the fronts from `start` to `stop`."""
    latest = predecessors[start:stop].max(1, initial=-1)
    firsts = [start]
    for position in range(start + 1, stop):
        if latest[position - start] >= firsts[-1]:
            firsts.append(position)
    return list(pairwise([*firsts, stop]))
