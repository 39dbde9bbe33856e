"""Which places a place is conditioned on: an ordering, and K nearest predecessors in it.

The Vecchia approximation (Vecchia 1988) writes the joint density of a field as a product of
conditionals, each given at most K places that come earlier in an ordering::

    p(f) = prod_i p(f_i | f_c(i)),   c(i) among 1 ... i - 1,   |c(i)| <= K.

The neighbours are exact: trees over growing prefixes of the ordering, each asked for more until K
early enough are found. With groups, they are the K of largest covariance among the K nearest
places of the groups at each distance. Every function here takes checked places on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.fronts import in_fronts
from pnmf_pyro.gp.ordering import Covariance, group_embedding, max_min_order, tree_query

METHODS = ("knn", "probabilistic")
# A tree over a prefix of the ordering serves the places of its last fifth.
PREFIX_GROWTH = 1.25
# K probabilistic neighbours are drawn from this many times K nearest places.
CANDIDATES = 3
# Neighbours from which a sample is predicted, of its own group and of others.
NEAREST = 16
NEAREST_ELSEWHERE = 8

# Neighbours at one and the same place, at most: the others say how the field varies.
AT_A_PLACE = 4
# Numbers that one block of a search may hold.
BLOCK = 1 << 22


@dataclass(frozen=True)
class NeighborGraph:
    """An ordering of N places, and for each at most K predecessors in it.

    Attributes
    ----------
    order : ndarray of int64, shape (N,)
        Number of the place at each position of the ordering.
    predecessors : ndarray of int32, shape (N, K)
        Positions of the places that the place at a position is conditioned on; -1 for none.
    """

    order: np.ndarray
    predecessors: np.ndarray

    @property
    def N(self) -> int:
        """Number of places."""
        return len(self.order)

    @cached_property
    def position(self) -> np.ndarray:
        """Position of each place in the ordering, int64, shape (N,)."""
        position = np.empty_like(self.order)
        position[self.order] = np.arange(self.N)
        return position

    def in_fronts(self) -> NeighborGraph:
        """Return the same graph in an order in which solves are fast."""
        numbers, predecessors = in_fronts(self.predecessors)
        return NeighborGraph(self.order[numbers], predecessors)


def build_graph(
    places: Places,
    K: int,
    covariance: Covariance | None = None,
    random: np.random.RandomState | None = None,
) -> NeighborGraph:
    """Order N places by max-min distance, and find the K predecessors to condition each on.

    Places in groups are ordered in a space that sets groups apart, see
    :func:`~pnmf_pyro.gp.ordering.group_embedding`. The predecessors are the K nearest; with
    `random`, the method 'probabilistic', K drawn without replacement from the 3 K nearest, in
    proportion to the covariance. Groups and draws need the covariance between places.
    """
    points = places.coordinates.numpy()
    if places.groups is not None:
        assert covariance is not None
        points = np.concatenate([points, group_embedding(places, covariance)], 1)
    order = max_min_order(points)
    predecessors = nearest_before(places[order], K, 0, covariance, random)
    return NeighborGraph(order, predecessors)


def nearest_before(
    places: Places,
    K: int,
    start: int,
    covariance: Covariance | None = None,
    random: np.random.RandomState | None = None,
) -> np.ndarray:
    """Find, for each place from number `start` on, the K nearest of those with smaller numbers.

    For the parameters see :func:`build_graph`. The result, (N - start, K), has -1 for none.
    """
    counts = np.arange(start, len(places))
    return nearest(places, places[start:], K, covariance, random, counts)


def nearest(
    places: Places,
    new_places: Places,
    K: int,
    covariance: Covariance | None = None,
    random: np.random.RandomState | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Find the K places nearest to each of n new ones, int32, (n, K); -1 where there are fewer.

    Of the places, the first `counts`, (n,), may be chosen; all unless given.
    """
    counts = np.full(len(new_places), len(places)) if counts is None else counts
    wanted = K if random is None else CANDIDATES * K
    points, new_points = places.coordinates.numpy(), new_places.coordinates.numpy()
    groups, new_groups = (
        np.zeros(len(p), np.int64) if p.groups is None else p.groups.numpy()
        for p in (places, new_places)
    )
    present, which = np.unique(groups, return_inverse=True)
    classes = {group: _alike(group, present, which, covariance) for group in np.unique(new_groups)}
    most = max(map(len, classes.values()), default=0)
    candidates = np.full((len(new_points), most * wanted), -1, np.int32)
    for group, alike in classes.items():
        rows = np.flatnonzero(new_groups == group)
        for number, members in enumerate(alike):
            within = np.searchsorted(members, counts[rows])
            near = _nearest_of_prefix(points[members], new_points[rows], within, wanted)
            columns = slice(number * wanted, (number + 1) * wanted)
            candidates[rows, columns] = np.where(near < 0, -1, members[near])
    if places.groups is None and random is None:
        return candidates
    assert covariance is not None
    chosen = np.empty((len(candidates), K), np.int32)
    for part in _slices(len(candidates), max(1, BLOCK // max(1, candidates.shape[1]))):
        block = candidates[part]
        score = _log_covariance(places, new_places[part], block, covariance)
        if random is not None:
            score = _perturbed(score, wanted, random.gumbel(size=score.shape))
        best = np.argsort(-score, axis=1, kind="stable")[:, :K]
        chosen[part] = np.take_along_axis(block, best, 1)
    return chosen


def _alike(
    group: int, present: np.ndarray, which: np.ndarray, covariance: Covariance | None
) -> list[np.ndarray]:
    """Numbers of the places of groups that are as far from a group, for each such distance.

    Among them the nearest in space have the largest covariance with a place of the group. The group
    of each place is the one of these numbers, `which`, among those `present`.
    """
    parts, kinds = getattr(covariance, "group_parts", None), present
    if parts is not None:
        codes = torch.from_numpy(present)
        apart = torch.stack(list(parts(torch.full_like(codes, int(group)), codes).values()))
        kinds = apart.unique(dim=1, return_inverse=True)[1].numpy()
    kinds = kinds[which]
    return [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]


def neighbours_of(
    places: Places, judged: Tensor, criterion: str, sizes: Sequence[int] = ()
) -> Tensor:
    """Return the numbers of the samples from which each judged one is predicted, (n, K).

    The nearest of its own group, and of the other groups where there are any. Where groups are
    pairs, of G and H parts, `sizes`, these are such as share the first of the pair, and such as
    share the second. Where there are fewer than asked for, the sample's own number fills up: it is
    masked.
    """
    points, chosen = Places(places.coordinates.cpu()), judged.cpu().numpy()
    few = _number_at_place(places.inputs.cpu().numpy()) < AT_A_PLACE
    codes = np.zeros(len(points)) if places.groups is None else places.groups.cpu().numpy()
    parts = [codes // sizes[1], codes % sizes[1]] if len(sizes) == 2 else [np.zeros_like(codes)]
    K = NEAREST if places.groups is None else NEAREST + NEAREST_ELSEWHERE * len(parts)
    found = np.repeat(chosen[:, None], K, 1)
    for code in np.unique(codes[chosen]):
        rows, mine = codes[chosen] == code, codes == code
        found[rows, :NEAREST] = _nearest_others(points, chosen[rows], mine & few, NEAREST)
        for number, part in enumerate(parts):
            others = (part == part[mine][0]) & ~mine
            if others.any():
                elsewhere = _nearest_others(points, chosen[rows], others & few, NEAREST_ELSEWHERE)
                start = NEAREST + number * NEAREST_ELSEWHERE
                found[rows, start : start + NEAREST_ELSEWHERE] = elsewhere
    if criterion == "elbo":  # each given those before it: the chain rule
        found = np.where(found < chosen[:, None], found, chosen[:, None])
    return torch.from_numpy(found).to(judged.device)


def _number_at_place(inputs: np.ndarray) -> np.ndarray:
    """How many samples before each are at its place, of the same group, (N,)."""
    _, place = np.unique(inputs, axis=0, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], place[order])
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order)) - starts
    return number


def _nearest_others(points: Places, samples: np.ndarray, pool: np.ndarray, K: int) -> np.ndarray:
    """The K nearest of the pool that are not the sample itself, filled up by the sample."""
    members = np.flatnonzero(pool)
    near = nearest(points[members], points[samples], min(K + 1, len(members)))
    found = np.c_[members[near], np.repeat(samples[:, None], K, 1)]
    itself_last = np.argsort(found == samples[:, None], axis=1, kind="stable")
    return np.take_along_axis(found, itself_last, 1)[:, :K]


def _nearest_of_prefix(
    points: np.ndarray, new_points: np.ndarray, counts: np.ndarray, K: int
) -> np.ndarray:
    """Find, for each new point, the K nearest among the first `counts` points; (n, K), -1 for none.

    A tree over a prefix serves the new points whose count lies in its last part, so that few of
    its nearest neighbours come too late.
    """
    nearest = np.full((len(new_points), K), -1, np.int64)
    by_count = np.argsort(counts, kind="stable")
    start, stop, most = 1, min(max(64, 2 * K), len(points)), len(points)
    while start <= most:
        todo = by_count[slice(*np.searchsorted(counts[by_count], (start, stop + 1)))]
        if todo.size:
            tree = cKDTree(points[:stop])
            for part in _slices(len(todo), max(1, BLOCK // (2 * K))):
                _fill(nearest, tree, todo[part], new_points, counts)
        start, stop = stop + 1, min(int(PREFIX_GROWTH * stop) + 1, most)
    return nearest


def _fill(
    nearest: np.ndarray, tree: cKDTree, todo: np.ndarray, new_points: np.ndarray, counts: np.ndarray
) -> None:
    """Write the K nearest that come early enough; ask for more until there are K."""
    K = nearest.shape[1]
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
    places: Places, new_places: Places, candidates: np.ndarray, covariance: Covariance
) -> np.ndarray:
    """Log covariance of new places with their candidates; the smallest number where it is 0."""
    near = places[torch.from_numpy(candidates).long()]
    values = covariance(new_places[:, None], near).detach().numpy()[:, 0]
    score = np.log(np.maximum(values, np.finfo(float).tiny))
    return np.where(candidates < 0, -np.inf, score)


def _perturbed(score: np.ndarray, wanted: int, noise: np.ndarray) -> np.ndarray:
    """Add Gumbel noise to the log weights of the `wanted` largest: the largest sums are draws.

    The draws are without replacement, in proportion to the weights (Kool, van Hoof, Welling 2019).
    """
    if score.shape[1] > wanted:
        floor = -np.partition(-score, wanted - 1, axis=1)[:, [wanted - 1]]
        score = np.where(score < floor, -np.inf, score)
    return score + noise


def _slices(n: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
