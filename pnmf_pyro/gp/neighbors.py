"""Which spots a spot is conditioned on: an ordering, and K nearest predecessors in it.

The Vecchia approximation (Vecchia 1988) writes the joint density of a field as a product of
conditionals, each given at most K spots that come earlier in an ordering::

    p(f) = prod_i p(f_i | f_c(i)),   c(i) among 1 ... i - 1,   |c(i)| <= K.

The ordering is max-min, see :mod:`pnmf_pyro.ordering`. The neighbours are exact: trees over growing
prefixes of the ordering, each asked for more until K early enough are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from pnmf_pyro.data.checks import check_choice, warn
from pnmf_pyro.data.random_state import RandomState, check_random_state, gumbel_noise
from pnmf_pyro.gp.ordering import Covariance, group_embedding, max_min_order, tree_query

METHODS = ("knn", "probabilistic")
# A tree over a prefix of the ordering serves the spots of its last fifth.
PREFIX_GROWTH = 1.25
# Of how many nearest, relative to K, the method "probabilistic" draws K.
CANDIDATES = 3
# Numbers that one block of a search may hold.
BLOCK = 1 << 22
NAMED_AT_MOST = 5


@dataclass(frozen=True)
class NeighborGraph:
    """An ordering of N spots, and for each at most K predecessors in it.

    Attributes
    ----------
    order : ndarray of int64, shape (N,)
        The spot at each position of the ordering.
    predecessors : ndarray of int32, shape (N, K)
        Positions of the spots that the spot at a position is conditioned on; -1 where there are
        fewer than K.
    """

    order: np.ndarray
    predecessors: np.ndarray

    @property
    def N(self) -> int:
        """Number of spots."""
        return len(self.order)

    @property
    def K(self) -> int:
        """Largest number of predecessors."""
        return self.predecessors.shape[1]

    @cached_property
    def position(self) -> np.ndarray:
        """Position of each spot in the ordering, int64, shape (N,)."""
        position = np.empty_like(self.order)
        position[self.order] = np.arange(self.N)
        return position

    def neighbors_of(self, spots: Any = None) -> np.ndarray:
        """Return the spots that `spots` (all if None) are conditioned on, (n, K), -1 for none."""
        rows = self.predecessors[self.position if spots is None else self.position[spots]]
        return np.where(rows < 0, -1, self.order[rows])


def build_graph(
    coordinates: Any,
    K: int,
    *,
    method: str = "knn",
    groups: Any = None,
    covariance: Covariance | None = None,
    features: Any = None,
    random_state: RandomState = None,
) -> NeighborGraph:
    """Order spots by max-min distance, and find the predecessors to condition each on.

    Parameters
    ----------
    coordinates : ndarray or Tensor of shape (N, p)
        Any p of 1 or more. Identical spots are allowed.
    K : int
        Number of predecessors; where it is larger than N - 1, N - 1 with a UserWarning.
    method : {'knn', 'probabilistic'}
        The K nearest, or K drawn without replacement from the 3 K nearest, with probability
        in proportion to the covariance with the spot.
    groups : array of int, shape (N,), optional
        Near is then what the kernel says it is: the K nearest within each group, and of these the
        K of largest covariance; the ordering is that of :func:`order_spots`.
    covariance : callable, optional
        ``covariance(A, B)`` of shape (..., n, m) for rows A (..., n, q) and B (..., m, q) of
        `features`, float64. Needed with `groups` and for ``'probabilistic'``.
    features : ndarray or Tensor of shape (N, q), optional
        What the covariance is a function of; the coordinates unless given.
    random_state : int, RandomState, Generator or None
        For ``'probabilistic'``.

    Raises
    ------
    ValueError
        For coordinates that are not finite numbers in two dimensions, K below 1, arrays whose
        lengths differ, or a missing covariance.
    """
    points, labels, rows = _checked(coordinates, groups, features)
    K = _checked_K(K, len(points))
    _check_method(method, groups, covariance)
    order = _ordered(points, labels, rows, covariance)
    points, labels, rows = points[order], labels[order], rows[order]
    everything = np.arange(len(points))
    predecessors = _search(
        points, labels, rows, points, rows, everything, K, method, covariance, random_state
    )
    return NeighborGraph(order, predecessors)


def order_spots(
    coordinates: Any,
    *,
    groups: Any = None,
    covariance: Covariance | None = None,
    features: Any = None,
) -> np.ndarray:
    """Return the max-min ordering alone, int64, (N,); see :func:`build_graph`.

    With groups, these are as far apart as the covariance says:
    :func:`~pnmf_pyro.gp.ordering.group_embedding`.
    """
    points, labels, rows = _checked(coordinates, groups, features)
    _check_method("knn", groups, covariance)
    return _ordered(points, labels, rows, covariance)


def _ordered(
    points: np.ndarray, labels: np.ndarray, rows: np.ndarray, covariance: Covariance | None
) -> np.ndarray:
    if covariance is not None and labels.any():
        apart = group_embedding(points, labels, rows, covariance)
        points = np.concatenate([points, apart[labels]], 1)
    return max_min_order(points)[0]


def neighbors_of_batch(
    order: np.ndarray,
    spots: Any,
    coordinates: Any,
    K: int,
    *,
    method: str = "knn",
    groups: Any = None,
    covariance: Covariance | None = None,
    features: Any = None,
    random_state: RandomState = None,
) -> np.ndarray:
    """Find the predecessors of some spots alone, where those of all would take too much memory.

    Parameters
    ----------
    order : ndarray of int, shape (N,)
        The spot at each position, from :func:`order_spots`.
    spots : array of int, shape (n,)

    Returns
    -------
    ndarray of int64, shape (n, K)
        What `neighbors_of(spots)` of the graph would return. For the other parameters and errors
        see :func:`build_graph`.
    """
    points, labels, rows = _checked(coordinates, groups, features)
    K = _checked_K(K, len(points))
    _check_method(method, groups, covariance)
    position = np.empty(len(points), np.int64)
    position[order] = np.arange(len(points))
    found = _search(
        *(points[order], labels[order], rows[order], points[spots], rows[spots]),
        *(position[spots], K, method, covariance, random_state),
    )
    return np.where(found < 0, -1, order[found])


def nearest(
    coordinates: Any,
    new_coordinates: Any,
    K: int,
    *,
    groups: Any = None,
    covariance: Covariance | None = None,
    features: Any = None,
    new_features: Any = None,
) -> np.ndarray:
    """Find the K spots nearest to new places.

    Parameters
    ----------
    coordinates, groups, features
        Of the N spots, as in :func:`build_graph`.
    new_coordinates : ndarray or Tensor of shape (n, p)
    K : int
        N where it is larger, with a UserWarning.
    covariance : callable, optional
        As in :func:`build_graph`; needed with `groups`.
    new_features : ndarray or Tensor of shape (n, q), optional
        What the covariance is a function of; `new_coordinates` unless given.

    Returns
    -------
    ndarray of int32, shape (n, K)

    Raises
    ------
    ValueError
        As in :func:`build_graph`, and where new and old places differ in their number of columns.
    """
    points, labels, rows = _checked(coordinates, groups, features)
    new_points, _, new_rows = _checked(new_coordinates, None, new_features, "new_")
    for name, old, new in (("coordinates", points, new_points), ("features", rows, new_rows)):
        if old.shape[1] != new.shape[1]:
            raise ValueError(
                f"new_{name} must have {old.shape[1]} columns, as {name} has; got {new.shape[1]}."
            )
    K = _checked_K(K, len(points) + 1)
    _check_method("knn", groups, covariance)
    everything = np.full(len(new_points), len(points))
    return _search(
        points, labels, rows, new_points, new_rows, everything, K, "knn", covariance, None
    )


def _search(
    points: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    new_points: np.ndarray,
    new_rows: np.ndarray,
    counts: np.ndarray,
    K: int,
    method: str,
    covariance: Covariance | None,
    random_state: RandomState,
) -> np.ndarray:
    """Find K of the first `counts` points for each new point."""
    wanted = K if method == "knn" else CANDIDATES * K
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        within = np.searchsorted(members, counts)
        near = _nearest_of_prefix(points[members], new_points, within, wanted)
        found.append(np.where(near < 0, -1, members[near]).astype(np.int32))
    candidates = np.concatenate(found, axis=1)
    if covariance is None:
        return candidates
    key = None
    if method == "probabilistic":
        key = int(check_random_state(random_state).randint(2**63 - 1, dtype=np.int64))
    chosen = np.empty((len(candidates), K), np.int32)
    step = max(1, BLOCK // max(1, candidates.shape[1]))
    for part in _slices(len(candidates), step):
        block = candidates[part]
        score = _log_covariance(rows, new_rows[part], block, covariance)
        if key is not None:
            score = _perturbed(score, wanted, gumbel_noise(key, counts[part, None], block))
        best = np.argsort(-score, axis=1, kind="stable")[:, :K]
        chosen[part] = np.take_along_axis(block, best, 1)
    return chosen


def _nearest_of_prefix(
    points: np.ndarray, new_points: np.ndarray, counts: np.ndarray, K: int
) -> np.ndarray:
    """Find, for each new point, the K nearest among the first `counts` points; (n, K), -1 for none.

    A tree over a prefix serves all new points whose count lies in the last part of the prefix: of
    its nearest neighbours few have to be passed over because they come too late.
    """
    nearest = np.full((len(new_points), K), -1, np.int64)
    by_count = np.argsort(counts, kind="stable")
    start, stop, most = 1, min(max(64, 2 * K), len(points)), len(points)
    while start <= most:
        todo = by_count[slice(*np.searchsorted(counts[by_count], (start, stop + 1)))]
        if todo.size:
            tree = cKDTree(points[:stop])
            for part in _slices(len(todo), max(1, BLOCK // (2 * K))):
                _fill(nearest, tree, todo[part], new_points, counts, K)
        start, stop = stop + 1, min(int(PREFIX_GROWTH * stop) + 1, most)
    return nearest


def _fill(
    nearest: np.ndarray,
    tree: Any,
    todo: np.ndarray,
    new_points: np.ndarray,
    counts: np.ndarray,
    K: int,
) -> None:
    """Write the K nearest that come early enough; ask for more until there are K."""
    asked = K if counts[todo].min() == tree.n else int(1.6 * K) + 2
    while todo.size:
        asked = min(asked, tree.n)
        _, near = tree_query(tree, new_points[todo], asked)
        early = near < counts[todo, None]
        rank = early.cumsum(1)
        row, column = np.nonzero(early & (rank <= K))
        nearest[todo[row], rank[row, column] - 1] = near[row, column]
        todo = todo[rank[:, -1] < np.minimum(K, counts[todo])]
        asked *= 2


def _log_covariance(
    rows: np.ndarray, new_rows: np.ndarray, candidates: np.ndarray, covariance: Covariance
) -> np.ndarray:
    """Log covariance of new places with their candidates; the smallest number where it is 0."""
    of_candidates = torch.from_numpy(rows[candidates])
    values = covariance(torch.from_numpy(new_rows[:, None]), of_candidates).detach().numpy()[:, 0]
    score = np.log(np.maximum(values, np.finfo(float).tiny))
    return np.where(candidates < 0, -np.inf, score)


def _perturbed(score: np.ndarray, wanted: int, noise: np.ndarray) -> np.ndarray:
    """Add Gumbel noise to the log weights of the `wanted` largest: the largest sums are draws.

    Without replacement, with probability in proportion to the weights (Kool, van Hoof and Welling
    2019).
    """
    if score.shape[1] > wanted:
        floor = -np.partition(-score, wanted - 1, axis=1)[:, [wanted - 1]]
        score = np.where(score < floor, -np.inf, score)
    return score + noise


def _slices(n: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _checked(
    coordinates: Any, groups: Any, features: Any, prefix: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points = _checked_points(f"{prefix}coordinates", coordinates)
    rows = points if features is None else _checked_points(f"{prefix}features", features)
    labels = np.zeros(len(points), int)
    if groups is not None:
        labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    for name, array in ((f"{prefix}features", rows), ("groups", labels)):
        if len(array) != len(points):
            raise ValueError(
                f"{name} must have one entry for each of the {len(points)} rows of "
                f"{prefix}coordinates; got {len(array)}."
            )
    return points, labels, rows


def _checked_points(name: str, value: Any) -> np.ndarray:
    value = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if value.ndim != 2 or 0 in value.shape or value.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} must be numbers of shape (places, columns), one of each at least; got "
            f"{value.dtype} of shape {value.shape}."
        )
    bad = np.flatnonzero(~np.isfinite(value).all(1))
    if bad.size:
        more = " and more" if bad.size > NAMED_AT_MOST else ""
        raise ValueError(
            f"{name} must be finite; rows {bad[:NAMED_AT_MOST].tolist()}{more} are not. "
            "Drop these places or give them numbers."
        )
    return np.ascontiguousarray(value, np.float64)


def _checked_K(K: int, N: int) -> int:
    if isinstance(K, bool) or not isinstance(K, (int, np.integer)) or K < 1:
        raise ValueError(f"K must be an integer of at least 1; got {K!r}.")
    if K > N - 1:
        warn(f"K={K} neighbours were asked for where there are only {N - 1}; using K={N - 1}.")
    return min(int(K), N - 1)


def _check_method(method: str, groups: Any, covariance: Covariance | None) -> None:
    check_choice("method", method, METHODS)
    if covariance is None and (groups is not None or method == "probabilistic"):
        what = "groups" if groups is not None else "method='probabilistic'"
        raise ValueError(
            f"{what} needs a covariance, which says how near a spot is; pass covariance=."
        )
