"""Statistics of a table of counts, for comparing it with tables that a model makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike
from sklearn.neighbors import kneighbors_graph

from pnmf_pyro.data.places import GroupCodes, Places, check_coordinates

# Counts (N, D) as an ndarray or a scipy csr_array, whose operators are the same.
Table = Any

# Features between which correlations are taken: of the highest totals.
CORRELATED = 50

# Neighbours of a sample in Moran's I.
NEIGHBORS = 6


@dataclass(frozen=True)
class Statistic:
    """A number, or one for each sample, feature or anything else, from a table of counts.

    Parameters
    ----------
    name : str
        Name of the statistic.
    of : str
        Unit that has a number: "sample", "feature", "pair of features" or any other word.
    function : callable
        Function of a table of shape (N, D), an ndarray or a scipy csr_array like the data, to a
        number or an array of shape (m,).
    above, below, mixed : str
        Meaning of numbers that are higher in the data than in the model's tables, lower, or too
        high for some and too low for others.
    labels : sequence, optional
        Names of the m numbers.
    """

    name: str
    of: str
    function: Callable[[Table], ArrayLike]
    above: str = ""
    below: str = ""
    mixed: str = ""
    labels: Sequence | None = None

    def __call__(self, table: Table) -> np.ndarray:
        """Return the values for a table, shape (m,), float64."""
        try:
            return np.atleast_1d(np.asarray(self.function(table), dtype=np.float64)).ravel()
        except (TypeError, ValueError) as error:
            raise ValueError(f"statistic {self.name!r} must give numbers: {error}.") from error


def total(table: Table, axis: int) -> np.ndarray:
    """Sum along an axis: 1 for that of each sample, 0 for that of each feature."""
    return _vector(table.sum(axis=axis, dtype=np.float64))


def variance_to_mean(table: Table, axis: int) -> np.ndarray:
    """Variance along an axis divided by the mean, 1 for a Poisson; 0 where all counts are 0."""
    n = table.shape[axis]
    mean = total(table, axis) / n
    variance = _vector((table**2).sum(axis=axis, dtype=np.float64)) / n - mean**2
    return np.divide(variance, mean, out=np.zeros_like(mean), where=mean > 0)


def zero_fraction(table: Table, axis: int) -> np.ndarray:
    """Share of zeros along an axis."""
    return 1 - _vector((table != 0).sum(axis=axis)) / table.shape[axis]


def maximum(table: Table, axis: int) -> np.ndarray:
    """Largest count along an axis."""
    return _vector(table.max(axis=axis))


def correlations(table: Table, features: np.ndarray) -> np.ndarray:
    """Pearson correlations over samples of the pairs of m features; 0 where one is constant."""
    chosen = table[:, features]
    centred = np.asarray(chosen.toarray() if sp.issparse(chosen) else chosen, dtype=np.float64)
    centred = centred - centred.mean(0)
    length = np.sqrt((centred**2).sum(0))
    scaled = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    return (scaled.T @ scaled)[np.triu_indices(len(features), 1)]


def neighbor_weights(places: Places, k: int = NEIGHBORS) -> sp.csr_array:
    """Return weights (N, N) of the k nearest other samples of each sample's own group.

    Each row sums to one, or is empty for a sample that is alone in its group. A group with fewer
    than k others gives all of them. Places that are all the same are a ValueError.
    """
    points = places.coordinates.cpu().numpy()
    if len(points) > 1 and (points == points[0]).all():
        raise ValueError(
            "coordinates must differ between samples, or none has neighbours; all are the same. "
            "Pass where each sample is."
        )
    groups = np.zeros(len(points)) if places.groups is None else places.groups.cpu().numpy()
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    blocks = []
    for group in members:
        near = min(k, len(group) - 1)
        graph = kneighbors_graph(points[group], near, include_self=False) / near if near else None
        blocks.append(sp.csr_array((1, 1)) if graph is None else sp.csr_array(graph))
    position = np.argsort(np.concatenate(members))
    return sp.csr_array(sp.block_diag(blocks, format="csr"))[position][:, position]


def moran(table: Table, weights: sp.csr_array) -> np.ndarray:
    r"""Moran's I of each feature, its spatial autocorrelation; 0 where it does not vary.

    With x the counts less their mean, and w the weights (N, N),

    .. math:: I = \frac{N}{\sum_{ik} w_{ik}} \frac{\sum_{ik} w_{ik} x_i x_k}{\sum_i x_i^2}.

    The mean is taken off after the sums, so that a sparse table stays sparse (Moran 1950).
    """
    n, all_weights = len(weights.indptr) - 1, weights.sum()
    mean = total(table, 0) / n
    square = _vector((table**2).sum(axis=0, dtype=np.float64)) - n * mean**2
    ends = weights.sum(0) + weights.sum(1)
    product = _vector((table * (weights @ table)).sum(axis=0, dtype=np.float64))
    product = product - mean * _vector(ends @ table) + mean**2 * all_weights
    varies = square > 1e-9 * n * mean**2
    return np.divide(n * product, all_weights * square, out=np.zeros(len(mean)), where=varies)


def _vector(values: Table) -> np.ndarray:
    return np.asarray(values.toarray() if sp.issparse(values) else values).ravel()


NAMES = ("total", "variance_to_mean", "zero_fraction", "maximum", "correlation", "moran")
_ON_AXES = {f.__name__: f for f in (total, variance_to_mean, zero_fraction, maximum)}

# What a user may ask for; None for all the names that apply.
Wanted = str | Statistic | Callable[[Table], ArrayLike] | Sequence | None

# What it means that a statistic, by name and what it is of, is higher, lower, or both in the data.
Meanings = Callable[[str, str], tuple[str, str, str]]


def places_of_samples(
    coordinates: ArrayLike | None, groups: ArrayLike | None, n_samples: int
) -> Places:
    """Return coordinates and groups of samples as checked places."""
    codes = None
    if groups is not None:
        codes = GroupCodes.of(groups, n_samples).encode(groups, n_samples)
    return Places(check_coordinates(coordinates, n_samples), codes)


def chosen_statistics(
    wanted: Wanted,
    table: Table,
    places: Places | None,
    feature_names: Sequence,
    meanings: Meanings,
) -> list[Statistic]:
    """Return the statistics that a user asks for; all the names that apply if None.

    `places` are those of the samples, which "moran" needs, and `feature_names` label the pairs of
    "correlation", which are taken among the most abundant features of `table`, (N, D).
    `meanings` tells what the named ones mean for the fit.
    """
    if not (wanted is None or callable(wanted) or isinstance(wanted, str | Collection)):
        raise ValueError(
            f"statistics must be names among {', '.join(map(repr, NAMES))}, or functions; got "
            f"{wanted!r}."
        )
    if wanted is None:
        wanted = [name for name in NAMES if name != "moran" or places is not None]
    elif isinstance(wanted, str) or callable(wanted):
        wanted = [wanted]
    chosen: list[Statistic] = []
    for one in wanted:
        if one in NAMES:
            chosen += named_statistics(one, table, places, feature_names, meanings)
        elif callable(one):
            chosen.append(one if isinstance(one, Statistic) else _of_function(one, table))
        else:
            raise ValueError(
                f"statistics must be among {', '.join(map(repr, NAMES))}, or functions of a table; "
                f"got {one!r}."
            )
    if not chosen:
        raise ValueError("statistics must name at least one; got none. Leave it out for all.")
    return chosen


def _of_function(function: Callable[[Table], ArrayLike], table: Table) -> Statistic:
    """The statistic of a user's function; what its numbers are for follows from how many."""
    size, (n, d) = np.size(function(table)), table.shape
    kinds = {1: "table", d: "feature", n: "sample" if n != d else "value"}
    of = kinds.get(size, "value")
    return Statistic(getattr(function, "__name__", "statistic"), of, function)


def named_statistics(
    name: str,
    table: Table,
    places: Places | None,
    feature_names: Sequence,
    meanings: Meanings,
) -> list[Statistic]:
    """Return the statistics of one of `NAMES`, see :func:`chosen_statistics`."""
    if name == "moran":
        if places is None:
            raise ValueError(
                "the statistic 'moran' needs to know where the samples are: pass coordinates=, or "
                "check a spatial model."
            )
        weights = neighbor_weights(places).astype(table.dtype)
        if not weights.nnz:
            raise ValueError(
                "groups must have several samples, or the statistic 'moran' has no neighbours; "
                "each sample is alone in its group."
            )
        told = meanings(name, "feature")
        return [Statistic(name, "feature", partial(moran, weights=weights), *told)]
    if name == "correlation":
        chosen = np.sort(np.argsort(-total(table, 0), kind="stable")[:CORRELATED])
        labels = list(combinations([feature_names[number] for number in chosen], 2))
        function, of = partial(correlations, features=chosen), "pair of features"
        return [Statistic(name, of, function, *meanings(name, of), labels)] if labels else []
    return [
        Statistic(name, of, partial(_ON_AXES[name], axis=axis), *meanings(name, of))
        for of, axis in (("feature", 0), ("sample", 1))
    ]
