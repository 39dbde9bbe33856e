"""Counts to fit and counts to predict: two ways to take a table of counts apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from pnmf_pyro.analysis.statistics import Table
from pnmf_pyro.data.counts import CountsLike, as_counts
from pnmf_pyro.data.exposure import NONE, Exposure
from pnmf_pyro.data.tables import numeric_matrix
from pnmf_pyro.models.deviance import deviance


@dataclass(frozen=True)
class Split:
    """Counts to fit, and counts to predict from that.

    Attributes
    ----------
    train, test : ndarray or sparse matrix of shape (n, d)
        Counts to fit and counts to predict.
    seen, judged : ndarray of bool, shape (n, d), or None
        Entries that the fit sees, and those that are predicted; all of them for None.
    growth : float
        Rates of the counts to predict, relative to those to fit.
    """

    train: Table
    test: Table
    seen: np.ndarray | None
    judged: np.ndarray | None
    growth: float = 1.0

    def of_features(self, features: np.ndarray) -> Split:
        """Return the split of some features, by number."""
        seen, judged = (m if m is None else m[:, features] for m in (self.seen, self.judged))
        return Split(self.train[:, features], self.test[:, features], seen, judged, self.growth)

    def deviance(
        self, factors: np.ndarray, loadings: np.ndarray, exposure: Exposure = NONE
    ) -> float:
        """Return the mean deviance of what is predicted.

        Parameters
        ----------
        factors, loadings : ndarray of shape (n, L) and (d, L)
            Of the fit; factors are times size factors, where it has any.
        exposure : Exposure
            That of the fit, whose effects, such as those of batches, scale the rates.
        """
        factors = self.growth * factors
        if exposure.effects is None:
            return deviance(self.test, (factors, loadings), mask=self.judged)
        effects = Exposure(None, exposure.design, exposure.codes, exposure.effects)
        scale = effects.block(slice(None))
        assert scale is not None
        return deviance(self.test, factors @ loadings.T * scale.cpu().numpy(), mask=self.judged)


def thinned(
    table: Table, seen: np.ndarray | None, fraction: float, random: np.random.RandomState
) -> Split:
    """Fit a part of the events of each entry, and predict the others, see :func:`thin_counts`."""
    train, test = thin_counts(table, fraction, random)
    return Split(train, test, seen, seen, (1 - fraction) / fraction)


def entries_apart(
    table: Table, seen: np.ndarray | None, fraction: float, random: np.random.RandomState
) -> Split:
    """Fit a part of the entries, and predict the others."""
    drawn = random.random_sample(table.shape) < fraction
    known = np.ones(table.shape, bool) if seen is None else seen
    train = table.multiply(drawn).tocsr() if sp.issparse(table) else table * drawn
    return Split(train, table, known & drawn, known & ~drawn)


@dataclass(frozen=True)
class HoldOut:
    """A way to hold counts out.

    Attributes
    ----------
    split : callable
        Function of a table, which of its entries are known (all for None), the share to fit and a
        RandomState, to a :class:`Split`.
    fraction : float
        Share to fit, unless another one is asked for.
    called : str
        What several splits are called.
    caveat : str
        What its results do not show.
    """

    split: Callable[[Any, np.ndarray | None, float, np.random.RandomState], Split]
    fraction: float
    called: str
    caveat: str


HOLD_OUT = {
    "thinning": HoldOut(
        thinned,
        0.5,
        "thinnings",
        "It takes the counts for Poisson: with overdispersion the two parts of a thinned table "
        "share their noise, and the curve goes on falling because components fit it. "
        "posterior_predictive_check tells whether that is so; hold_out='entries' takes less for "
        "granted.",
    ),
    "entries": HoldOut(
        entries_apart,
        0.9,
        "sets of hidden entries",
        "It takes the noise of an entry to be independent of that of the others, of whatever kind "
        "it is.",
    ),
}


def thin_counts(
    X: CountsLike, fraction: float, random: np.random.RandomState
) -> tuple[np.ndarray | sp.csr_matrix, np.ndarray | sp.csr_matrix]:
    """Split counts X (n, d) into two tables that are independent if X is Poisson.

    Each count goes to the first table with probability `fraction`, and to the second otherwise
    (binomial thinning). Sparse counts give CSR matrices; X must hold whole numbers.
    """
    matrix = as_counts(numeric_matrix(X)).numpy()
    entries = matrix.data if sp.issparse(matrix) else matrix
    whole = np.asarray(entries).astype(np.int64)
    if not np.array_equal(whole, entries):
        raise ValueError(
            "X must hold whole numbers to be thinned; pass the raw counts, or hold_out='entries'."
        )
    drawn = random.binomial(whole, fraction).astype(matrix.dtype)
    if not sp.issparse(matrix):
        return drawn, matrix - drawn
    first = matrix.copy()
    first.data = drawn
    second = matrix - first
    first.eliminate_zeros()
    second.eliminate_zeros()
    return first, second
