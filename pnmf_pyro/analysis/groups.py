r"""What components are to groups of samples, such as types of cells at shared places.

A fit with `groups` has a field of each group at every place, whether a sample of the group is there
or not. With :math:`f_{il}^{(g)} = E \exp F_l(x_i, g)` the factor at place i as if of group g, the
level of component l in group g is its mean over all places of the fit,

.. math:: a_{gl} = \frac1N \sum_i f_{il}^{(g)},

so that groups differ in it by what they are and not by where they are. Of more than 1,000 places it
is the mean over 1,000 of them, drawn at random, the same for all groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_number
from pnmf_pyro.data.places import GroupCodes
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.transforms import get_factors

if TYPE_CHECKING:
    from pandas import DataFrame

# Kinds of components, from those of all groups to those of one.
UNIVERSAL, ENRICHED, SPECIFIC = "universal", "enriched", "specific"
KINDS = (UNIVERSAL, ENRICHED, SPECIFIC)

# Places over which levels are means, at most: of more, as many are drawn.
PLACES = 1000

# Smallest level that is told from smaller ones, relative to the highest.
LEAST = 1e-12


def predict_as(
    fit: PNMF,
    group: Hashable | Mapping[Hashable, Hashable],
    coordinates: ArrayLike | None = None,
) -> np.ndarray:
    """Return the factors at all places as if all samples were of one group.

    They are E exp F of the field of that group given the counts of all groups; of samples of the
    group as well, to which nothing is added that a place has for itself.

    Of a fit whose groups are pairs, such as a section and a type, a group is a pair, or what all
    samples are in one column, by its name: `{"type": "neuron"}` leaves each in its section.

    Parameters
    ----------
    fit : PNMF
        Fitted estimator with groups.
    group : label, pair of labels, or dict
        Name of the group, one of `groups_`; or a label by the name of its column, one of
        `group_columns_`, or by its number where columns have no names.
    coordinates : array-like of shape (n, p), optional
        Places; those of the samples of the fit unless given. Not with a label of one column alone.

    Returns
    -------
    ndarray of shape (n, n_components)
    """
    told = _told(fit, group)
    if coordinates is None:
        return _as_if(fit, told)
    width = len(GroupCodes(_groups_of(fit)).sizes)
    if len(told) < width:
        raise ValueError(
            "group must say both labels of a pair where coordinates are given, since the samples "
            f"of other places are not known; got {group!r}."
        )
    labels = np.empty((len(np.asarray(coordinates)), width), dtype=object)
    for column, label in told.items():
        labels[:, column] = label
    return _factors(fit, coordinates, labels)


@dataclass(frozen=True)
class GroupLevels:
    """Levels of components in groups, and what kind of component they make each.

    Attributes
    ----------
    groups : list of label
        Names of the groups.
    levels : ndarray of shape (n_groups, n_components)
        Mean of each factor over all places as if of a group.
    loadings : ndarray of shape (n_features, n_components)
        Loadings W of the fit.
    fold : float
        Number of times by which groups of a component must stand out.
    """

    groups: list[Hashable]
    levels: np.ndarray
    loadings: np.ndarray
    fold: float

    @property
    def table(self) -> DataFrame | np.ndarray:
        """One row for each component, with what it was sorted by.

        Columns `component`, `kind`, `groups` (a tuple of those that stand out, the highest first),
        `fold` (the lowest of these over the highest of the others, the largest such gap) and `tau`,
        the mean of 1 - level / highest level over other groups: 0 for equal levels, 1 for a
        component of one group alone (Yanai et al. 2005). A structured array without pandas.
        """
        rows = [self._row(levels) for levels in self.levels.T]
        kinds, groups, folds, taus = zip(*rows, strict=True)
        columns: dict[str, Sequence] = {
            "component": range(len(rows)),
            "kind": kinds,
            "groups": groups,
            "fold": folds,
            "tau": taus,
        }
        return as_table(columns)

    @property
    def kinds(self) -> np.ndarray:
        """Kind of each component, of str."""
        return np.asarray([self._row(levels)[0] for levels in self.levels.T])

    def loadings_of(self, group: Hashable) -> np.ndarray:
        """Return the counts that a sample of a group, at a place like any, is expected to have.

        They are :math:`W_{jl} a_{gl}`, of shape (n_features, n_components): the loadings as the
        group uses them.
        """
        if group not in self.groups:
            raise ValueError(f"group must be one of {self.groups}; got {group!r}.")
        return self.loadings * self.levels[self.groups.index(group)]

    def _row(self, levels: np.ndarray) -> tuple[str, tuple[Hashable, ...], float, float]:
        """Kind, groups that stand out, fold and tau of a component of these levels, (G,)."""
        order = np.argsort(-levels, kind="stable")
        ranked = np.maximum(levels[order], max(LEAST * levels.max(), np.finfo(float).tiny))
        G = len(levels)
        ratios = (ranked[:-1] / ranked[1:])[: G // 2]
        n = int(ratios.argmax()) + 1
        tau = float((1 - ranked / ranked[0]).sum() / (G - 1))
        fold = float(ratios[n - 1])
        if fold < self.fold:
            return UNIVERSAL, (), fold, tau
        kind = SPECIFIC if n == 1 else ENRICHED
        return kind, tuple(self.groups[g] for g in order[:n]), fold, tau


def group_levels(fit: PNMF, fold: float = 2.0, column: Hashable | None = None) -> GroupLevels:
    """Return the levels of components in groups, and which are universal, enriched or specific.

    Groups are ranked by the level of a component and divided where the ratio of one level to the
    next is the largest, with at most half of them above. Where that is `fold` at least the
    component is *specific* to the one group above, or *enriched* in the several; any other is
    *universal*.

    Parameters
    ----------
    fit : PNMF
        Fitted estimator with two groups at least, such as types of cells.
    fold : float
        Number of times by which groups of a component must stand out, larger than 1.
    column : str or int, optional
        Column of groups that are pairs, by its name in `group_columns_` or its number: levels are
        of what occurs in it, each sample being in the other column what it is. Of all pairs unless
        given.

    Returns
    -------
    GroupLevels
    """
    check_number("fold", fold, 1.0, 1e6)
    names = _groups_of(fit)
    asked: list = names
    if column is not None:
        number = _number_of_column(fit, column)
        names = _labels_of(names, number)
        asked = [{column: name} for name in names]
    n = fit.model_.prior.N
    rows = np.sort(np.random.RandomState(0).permutation(n)[:PLACES]) if n > PLACES else None
    factors = (_as_if(fit, _told(fit, one), rows) for one in asked)
    levels = np.stack([one.mean(0, dtype=np.float64) for one in factors])
    return GroupLevels(names, levels, fit.components_.T.astype(np.float64), float(fold))


def _as_if(fit: PNMF, told: dict[int, Hashable], rows: np.ndarray | None = None) -> np.ndarray:
    """Factors at the places of samples, all unless given, of groups that are told by column."""
    codes, places = GroupCodes(_groups_of(fit)), fit.model_.prior.places
    assert places is not None
    some = places.to(torch.device("cpu"))
    some = some.take(None if rows is None else torch.from_numpy(rows))
    assert some.groups is not None
    labels = codes.decode(some.groups).astype(object).reshape(-1, len(codes.sizes))
    for column, label in told.items():
        labels[:, column] = label
    return _factors(fit, some.coordinates.numpy(), labels)


def _factors(fit: PNMF, coordinates: ArrayLike, labels: np.ndarray) -> np.ndarray:
    """E exp F at places, whose groups are labels (n, 1), or pairs of them (n, 2)."""
    groups = labels[:, 0] if labels.shape[1] == 1 else labels
    return np.asarray(get_factors(fit, coordinates=coordinates, groups=groups))


def _groups_of(fit: PNMF) -> list[Hashable]:
    """Names of the groups of a fit; a ValueError for a fit without, or with one alone."""
    names = getattr(fit, "groups_", None)
    if names is None or len(names) < 2:
        raise ValueError(
            "fit must be a fitted PNMF with several groups: pass groups= to pnmf_pyro.fit, such "
            f"as the types of cells; it has {'none' if names is None else names}."
        )
    return list(names)


def _told(fit: PNMF, group: Any) -> dict[int, Hashable]:
    """What a group says of a sample, checked: a label for each column that it names, by number."""
    names = _groups_of(fit)
    is_pair = isinstance(names[0], tuple)
    if is_pair and isinstance(group, Mapping) and group:
        told = {_number_of_column(fit, column): label for column, label in group.items()}
        for number, label in told.items():
            known = _labels_of(names, number)
            if label not in known:
                raise ValueError(f"group must be of {known} in its column; got {label!r}.")
        return told
    if isinstance(group, Mapping) or group not in names:
        kind = "pairs" if is_pair else "groups"
        raise ValueError(f"group must be one of the {kind} of the fit, {names}; got {group!r}.")
    return dict(enumerate(group)) if is_pair else {0: group}


def _labels_of(names: Sequence[Any], number: int) -> list[Hashable]:
    """What occurs in a column of groups that are pairs, in its order."""
    return list(dict.fromkeys(pair[number] for pair in names))


def _number_of_column(fit: PNMF, column: Hashable) -> int:
    """Number of a column of groups that are pairs, by its name or number."""
    is_pair = isinstance(_groups_of(fit)[0], tuple)
    columns = list(fit.group_columns_ or (0, 1)) if is_pair else []
    if column not in columns:
        raise ValueError(
            f"column must be one of the columns of groups, {columns or 'of which there is one'}; "
            f"got {column!r}."
        )
    return columns.index(column)
