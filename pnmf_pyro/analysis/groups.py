r"""What components are to groups of samples, such as types of cells at shared places.

A fit with `groups` has a field of each group at every place, whether a sample of the group is there
or not. With :math:`f_{il}^{(g)} = E \exp F_l(x_i, g)` the factor at place i as if of group g, the
level of component l in group g is its mean over all places of the fit,

.. math:: a_{gl} = \frac1N \sum_i f_{il}^{(g)},

so that groups differ in it by what they are and not by where they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_number
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.transforms import get_factors

if TYPE_CHECKING:
    from pandas import DataFrame

# Kinds of components, from those of all groups to those of one.
UNIVERSAL, ENRICHED, SPECIFIC = "universal", "enriched", "specific"
KINDS = (UNIVERSAL, ENRICHED, SPECIFIC)

# Smallest level that is told from smaller ones, relative to the highest.
LEAST = 1e-12


def predict_as(fit: PNMF, group: Hashable, coordinates: ArrayLike | None = None) -> np.ndarray:
    """Return the factors at all places as if all samples were of one group.

    They are E exp F of the field of that group given the counts of all groups; of samples of the
    group as well, to which nothing is added that a place has for itself.

    Parameters
    ----------
    fit : PNMF
        Fitted estimator with groups.
    group : label
        Name of the group, one of `groups_`.
    coordinates : array-like of shape (n, p), optional
        Places; those of the samples of the fit unless given.

    Returns
    -------
    ndarray of shape (n, n_components)
    """
    names = _groups_of(fit)
    if group not in names:
        raise ValueError(f"group must be one of the groups of the fit, {names}; got {group!r}.")
    if coordinates is None:
        places = fit.model_.prior.places
        assert places is not None
        coordinates = places.coordinates.cpu().numpy()
    labels = np.full(len(np.asarray(coordinates)), group, dtype=object)
    return np.asarray(get_factors(fit, coordinates=coordinates, groups=labels))


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


def group_levels(fit: PNMF, fold: float = 2.0) -> GroupLevels:
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

    Returns
    -------
    GroupLevels
    """
    check_number("fold", fold, 1.0, 1e6)
    names = _groups_of(fit)
    levels = np.stack([predict_as(fit, name).mean(0, dtype=np.float64) for name in names])
    return GroupLevels(names, levels, fit.components_.T.astype(np.float64), float(fold))


def _groups_of(fit: PNMF) -> list[Hashable]:
    """Names of the groups of a fit; a ValueError for a fit without, or with one alone."""
    names = getattr(fit, "groups_", None)
    if names is None or len(names) < 2:
        raise ValueError(
            "fit must be a fitted PNMF with several groups: pass groups= to pnmf_pyro.fit, such "
            f"as the types of cells; it has {'none' if names is None else names}."
        )
    return list(names)
