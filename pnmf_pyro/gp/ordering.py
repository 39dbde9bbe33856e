"""An ordering of points in which each is as far as possible from all before it.

The max-min ordering (Guinness 2018) makes the Vecchia approximation accurate at every scale
(Katzfuss and Guinness 2021; Schaefer, Katzfuss and Owhadi 2021). It is exact up to `EXACT_UP_TO`
points, and in its first `EXACT_PICKS` positions of more. Later positions are filled rung by rung: a
rung adds points at least rho apart from each other and from all before, until none is left, and
the next rung has a smaller rho. The distance of a point is then within a factor of sqrt(2) of the
exact one, and the cost is near linear.

Points that are as far as one another stand in random order, always the same. Row after row of a
lattice would make chains in which each point waits for the one before, see
:mod:`~pnmf_pyro.gp.fronts`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from pnmf_pyro.data.places import Places

EXACT_UP_TO = 4000
EXACT_PICKS = 500
# Places from which distances between groups are estimated.
SAMPLED = 1000

# Covariance between places of shape (..., n) and (..., m), of shape (..., n, m), float64.
Covariance = Callable[[Places, Places], Tensor]


def max_min_order(points: np.ndarray) -> np.ndarray:
    """Return the numbers of points (N, p) so ordered that each is far from all before it, (N,)."""
    N = len(points)
    shuffled = np.random.RandomState(0).permutation(N)
    points = points[shuffled]
    picks, distance = _farthest_points(points, N if N <= EXACT_UP_TO else EXACT_PICKS)
    order, placed = [picks], np.zeros(N, bool)
    placed[picks] = True
    while (remaining := np.flatnonzero(~placed)).size:
        farthest = distance[remaining].max()
        if farthest == 0:  # only repetitions of earlier points are left
            order.append(remaining)
            break
        radius = farthest / np.sqrt(2)
        picks = _rung(points, remaining[distance[remaining] >= radius], distance, radius)
        order.append(picks)
        placed[picks] = True
        remaining = remaining[~placed[remaining]]
        found, _ = tree_query(cKDTree(points[picks]), points[remaining], 1)
        distance[remaining] = np.minimum(distance[remaining], found[:, 0])
    return shuffled[np.concatenate(order)]


def group_embedding(places: Places, covariance: Covariance) -> np.ndarray:
    """Return further coordinates of places in G groups, which put groups as far apart as they are.

    Two groups are c apart where a pair of places of both, r from each other in space, has the
    covariance that two places of one group have at sqrt(r^2 + c^2); taken from the nearest such
    pairs among `SAMPLED` places. So max-min ordering orders groups together where they share their
    field, and each by itself where they do not. The result, (N, at most G - 1), is the same for all
    places of a group.
    """
    assert places.groups is not None
    labels = np.unique(places.groups.numpy(), return_inverse=True)[1]
    G = labels.max() + 1
    each = max(2, SAMPLED // G)
    members = (np.flatnonzero(labels == g) for g in range(G))
    sample = np.concatenate([m[np.linspace(0, len(m) - 1, each).astype(int)] for m in members])
    sampled = places[sample]
    points = sampled.coordinates.numpy()
    values = covariance(sampled, sampled).detach().numpy()
    squared = ((points[:, None] - points[None]) ** 2).sum(-1)
    same = labels[sample, None] == labels[None, sample]
    rising = np.argsort(values[same], kind="stable")
    equivalent = np.interp(values, values[same][rising], squared[same][rising])
    shape = (G, each, G, each)
    beyond = (equivalent - squared).reshape(shape).swapaxes(1, 2).reshape(G, G, -1)
    near = squared.reshape(shape).swapaxes(1, 2).reshape(G, G, -1).argsort(-1)
    nearest = np.take_along_axis(beyond, near[..., : max(1, each * each // 20)], -1)
    apart = np.maximum(np.median(nearest, -1), 0)
    np.fill_diagonal(apart, 0)
    centre = np.eye(G) - 1 / G
    strength, axes = np.linalg.eigh(-0.5 * centre @ (apart + apart.T) @ centre / 2)
    real = strength > 1e-9 * max(strength.max(), np.finfo(float).tiny)
    return (axes[:, real] * np.sqrt(strength[real]))[labels]


def _farthest_points(points: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pick n points, each the farthest from those before; O(n N).

    Return the picks, and the distance of every point to the nearest of them.
    """
    columns = np.ascontiguousarray(points.T)
    squared = np.full(len(points), np.inf)
    order = np.empty(n, np.int64)
    pick = int(((points - points.mean(0)) ** 2).sum(1).argmin())
    for position in range(n):
        order[position] = pick
        np.minimum(squared, ((columns - columns[:, [pick]]) ** 2).sum(0), out=squared)
        squared[pick] = -1.0  # a repetition, at 0, comes before a pick that has been
        pick = int(squared.argmax())
    squared[order] = 0.0
    return order, np.sqrt(squared)


def _rung(
    points: np.ndarray, candidates: np.ndarray, distance: np.ndarray, radius: float
) -> np.ndarray:
    """Choose candidates at least `radius` apart, and so many that no other could be added.

    The numbers of the chosen are in order: their points are shuffled.

    A grid cell of diameter `radius` can give one at most. Cells of a class are `radius` apart, so
    that all choose at once, each its farthest candidate.
    """
    dimensions = points.shape[1]
    between = 1 + int(np.ceil(np.sqrt(dimensions)))
    low = points[candidates].min(0)
    cells = np.floor((points[candidates] - low) * (np.sqrt(dimensions) / radius)).astype(np.int64)
    classes = (cells % between) @ between ** np.arange(dimensions)
    order = np.lexsort((-distance[candidates], *cells.T, classes))
    candidates, cells, classes = candidates[order], cells[order], classes[order]
    free = np.ones(len(candidates), bool)
    chosen = []
    for one in np.unique(classes):
        span = slice(*np.searchsorted(classes, (one, one + 1)))
        members = span.start + np.flatnonzero(free[span])
        if not members.size:
            continue
        first = np.r_[True, (cells[members[1:]] != cells[members[:-1]]).any(1)]
        picks = candidates[members[first]]
        chosen.append(picks)
        later = span.stop + np.flatnonzero(free[span.stop :])
        if later.size:
            found, _ = tree_query(cKDTree(points[picks]), points[candidates[later]], 1)
            free[later] = found[:, 0] >= radius
    return np.sort(np.concatenate(chosen))


def tree_query(tree: cKDTree, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and numbers of the k nearest points of a tree, each of shape (n, k)."""
    distance, index = tree.query(points, k, workers=torch.get_num_threads())
    return distance.reshape(len(points), k), index.reshape(len(points), k)
