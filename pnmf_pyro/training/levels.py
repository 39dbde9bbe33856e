r"""Coarse levels of places, on which components can be seen that the noise of single places hides.

Where the fields are constant within a bin b of places, the added counts of its samples follow the
same model with added size factors,

.. math:: \sum_{i \in b} X_{ij} \sim \mathrm{Poisson}\Bigl(\sum_{i \in b} s_i
    \sum_l W_{jl} \exp F_{bl}\Bigr),

and are so many that single components stand out of the noise. The bins of a level are the places
nearest to each of the first places of the max-min ordering, which cover the whole evenly
(Guinness 2018). Loadings and factors that have settled on a level are where the next finer one
starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from pnmf_pyro.data.counts import Counts, as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.ordering import max_min_order, tree_query

# Counts that a bin of the finest level has where there are enough places, how many times as large
# the bins of the next coarser level are, how many levels there are at most, and bins that the
# finest level and any other have for each component.
ENOUGH = 400
GROWTH = 4
LEVELS = 2
FINEST_BINS = 20
BINS = 5


@dataclass(frozen=True)
class Level:
    """The counts of M bins of places.

    Attributes
    ----------
    counts : Counts of shape (M, D)
        Added counts of the samples of each bin.
    size_factors : Tensor of shape (M,)
        Added size factors.
    bins : ndarray of int64, shape (N,)
        Number of the bin of each sample.
    centres : ndarray of int64, shape (M,)
        Number of the sample at the centre of each bin.
    """

    counts: Counts
    size_factors: Tensor
    bins: np.ndarray
    centres: np.ndarray


def coarse_levels(counts: Counts, places: Places, size_factors: Tensor, L: int) -> list[Level]:
    """Return the levels from which L components of the counts go down, the coarsest first.

    There are none where the samples are so few that the finest level would have few bins.

    Parameters
    ----------
    counts : Counts of shape (N, D)
        Counts of the samples.
    places : Places of shape (N,)
        Places of the samples. A bin has samples of one group.
    size_factors : Tensor of shape (N,)
        Size factors of the samples.
    L : int
        Number of components.
    """
    sizes = bin_sizes(counts, L)
    if not sizes:
        return []
    parts = _ordered_groups(places)
    return [_level(counts, places, size_factors, parts, size) for size in sizes]


def bin_sizes(counts: Counts, L: int) -> list[int]:
    """Return how many samples the bins of each level have on average, the coarsest first."""
    N, mean_total = counts.shape[0], float(counts.row_totals.mean())
    sizes = [GROWTH**k for k in range(1, 20) if N // GROWTH**k >= FINEST_BINS * L]
    if not sizes:
        return []
    finest = next((size for size in sizes if size * mean_total >= ENOUGH), sizes[-1])
    coarser = [finest * GROWTH**k for k in range(1, LEVELS)]
    return [*(size for size in reversed(coarser) if N // size >= BINS * L), finest]


def numbers_of_bins(sizes: Sequence[int], groups: Tensor | None, N: int) -> list[int]:
    """Return how many bins levels have whose bins have these sizes, at N distinct places."""
    members = [N] if groups is None else groups.unique(return_counts=True)[1].tolist()
    return [sum(-(-n // size) for n in members) for size in sizes]


def _ordered_groups(places: Places) -> list[np.ndarray]:
    """Return the numbers of the samples of each group in max-min order."""
    points = places.coordinates.cpu().numpy()
    codes = np.zeros(len(points)) if places.groups is None else places.groups.cpu().numpy()
    members = (np.flatnonzero(codes == code) for code in np.unique(codes))
    return [part[max_min_order(points[part])] for part in members]


def _level(
    counts: Counts, places: Places, size_factors: Tensor, parts: list[np.ndarray], size: int
) -> Level:
    """Return the level whose bins have `size` samples, on average."""
    points, N = places.coordinates.cpu().numpy(), len(places)
    centre_of = np.empty(N, np.int64)
    for part in parts:
        centres = part[: -(-len(part) // size)]
        nearest = tree_query(cKDTree(points[centres]), points[part], 1)[1][:, 0]
        centre_of[part] = centres[nearest]
    centres, bins = np.unique(centre_of, return_inverse=True)
    matrix = counts.numpy()
    entries = np.ones(N, matrix.dtype), (bins, np.arange(N))
    added = as_counts(sp.csr_matrix(entries, shape=(len(centres), N)) @ matrix)
    index = torch.from_numpy(bins).to(size_factors.device)
    factors = size_factors.new_zeros(len(centres)).index_add_(0, index, size_factors)
    return Level(added.to(counts.device), factors, bins, centres)
