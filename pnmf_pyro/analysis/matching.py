"""Which component of one fit is which of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from pnmf_pyro.data.checks import check_array
from pnmf_pyro.estimator.results import Fit, is_fit, results_of


@dataclass(frozen=True)
class FactorMatch:
    """Components of a fit beside those of another that are most like them.

    Attributes
    ----------
    permutation : ndarray of int, shape (L_a,)
        The component of b for each of a; -1 for those that are left over where a has more.
    similarities : ndarray of shape (L_a,)
        Cosine between the two; NaN for those that are left over.
    cosine : ndarray of shape (L_a, L_b)
        Cosine between every two components.
    """

    permutation: np.ndarray
    similarities: np.ndarray
    cosine: np.ndarray

    @property
    def similarity(self) -> float:
        """Mean cosine of the components that have a partner."""
        return float(np.nanmean(self.similarities))


def match_factors(a: Fit | ArrayLike, b: Fit | ArrayLike, *, key: str = "pnmf") -> FactorMatch:
    r"""Match the components of two fits one to one, by the cosine between their loadings.

    .. math:: \cos_{lm} = \frac{\sum_j W^a_{jl} W^b_{jm}}{|W^a_{.l}| \, |W^b_{.m}|}

    needs no scaling of components. Of all one-to-one matchings the one with the largest sum of
    cosines is taken (assignment problem, Kuhn 1955). Non-negative loadings are never further apart
    than 0, and components of the same abundant features look alike: judge a cosine beside the
    others of its row.

    Parameters
    ----------
    a, b : PNMF, AnnData, ModelFit, PoissonFactorization or array-like
        Fits, see :func:`~pnmf_pyro.estimator.results.results_of`, or loadings of shape
        (n_features, n_components). Any columns can be matched, such as factors of the same samples.
    key : str
        `key_added` of the fits, for AnnData.

    Returns
    -------
    FactorMatch

    Examples
    --------
    >>> import numpy as np
    >>> from pnmf_pyro import match_factors
    >>> W = np.random.default_rng(0).gamma(0.5, size=(30, 3))
    >>> match = match_factors(W, 2 * W[:, [2, 0, 1]])
    >>> match.permutation
    array([1, 2, 0])
    """
    first, second = _unit_columns("a", a, key), _unit_columns("b", b, key)
    if len(first) != len(second):
        raise ValueError(
            f"a and b must be about the same features; a has {len(first)} and b has {len(second)}. "
            "Select those that both have, in the same order."
        )
    cosine = first.T @ second
    rows, columns = linear_sum_assignment(-cosine)
    permutation = np.full(len(cosine), -1)
    permutation[rows] = columns
    similarities = np.full(len(cosine), np.nan)
    similarities[rows] = cosine[rows, columns]
    return FactorMatch(permutation, similarities, cosine)


def _unit_columns(name: str, given: Fit | ArrayLike, key: str) -> np.ndarray:
    """Loadings with columns of length one, or zero."""
    loadings = results_of(given, key).loadings if is_fit(given) else given
    values = check_array(name, loadings).astype(np.float64)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(
            f"{name} must be a fit or a finite array of shape (n_features, n_components); "
            f"got shape {values.shape}."
        )
    length = np.linalg.norm(values, axis=0)
    return np.divide(values, length, out=np.zeros_like(values), where=length > 0)
