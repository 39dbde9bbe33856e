r"""Which features mark a component, and how sure that is.

The profile of a component is the share of its expected counts that each feature has,
:math:`p_{jl} = W_{jl} / \sum_{j'} W_{j'l}`. What is compared between components is its logarithm,
which no level of a component enters. Half a count is added to each loading, so that there is a
logarithm where a component has none of a feature.

The error of a logarithm has two sides. A component without a count of a feature may have nearly
none of it, or a count more: the way up is short. So which sign a log-ratio has is told by its error
towards zero. Upwards for the lower logarithm, that is the mean of the way up and the usual error,
since a fit may also have given the counts of a feature to another component. `se` is the usual one.

Log-ratios are shrunk by what they are like over all features (adaptive shrinkage, Stephens 2017):
an estimate b with standard error s is normal about the truth, which is a mixture of zero and of
normals of mean zero, whose weights maximise the likelihood. The local false sign rate (lfsr) is the
posterior probability that the truth does not have the sign of which it is surest; among features
with lfsr below 0.05, fewer than one in twenty signs are wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from scipy.special import ndtr

from pnmf_pyro.analysis.interpretation import contributions
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_choice
from pnmf_pyro.estimator.results import results_of
from pnmf_pyro.training.fitted import Fitted, fitted_module
from pnmf_pyro.transforms import errors_of_loadings

if TYPE_CHECKING:
    from pandas import DataFrame

IntLike: TypeAlias = "int | np.signedinteger"

# Counts that each loading is raised by.
PSEUDOCOUNT = 0.5

# Weight, in features, that prefers a truth of zero; Stephens (2017) takes the same.
NULL_WEIGHT = 10.0

# Rounds of expectation and maximisation at most, and the change of weights that makes an end.
ROUNDS, SETTLED = 500, 1e-5


class Shrunk(NamedTuple):
    """Posterior of each truth: its mean, standard deviation, P(truth <= 0) and P(truth >= 0)."""

    mean: np.ndarray
    sd: np.ndarray
    not_above: np.ndarray
    not_below: np.ndarray


def differential_features(fit: Fitted, against: str = "closest") -> DataFrame | np.ndarray:
    """Compare the share of each feature in a component with that in the others.

    Parameters
    ----------
    fit : PNMF, ModelFit or PoissonFactorization
        Fit of Poisson counts.
    against : {'closest', 'each'}
        `closest` compares with one other component, that for which it is the least sure that the
        feature is more frequent in this one. So a positive log-ratio with a small lfsr marks the
        component against all others. A component is passed over that expects fewer counts than
        half of one for each feature: nothing is known of its profile. `each` compares with each of
        the others.

    Returns
    -------
    DataFrame
        One row for each component and feature, and with `each` for each other component, with
        columns `component`, `feature`, `against`, `log2_ratio` and `se`, the estimate and its
        standard error, `mean` and `sd`, those of its posterior, and `lfsr`. Logarithms have base 2.
        A structured array without pandas.

    Raises
    ------
    ValueError
        For a fit of one component, and for a model without standard errors of its loadings, see
        :func:`~pnmf_pyro.transforms.results.loading_uncertainty`.

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> rng = np.random.default_rng(1)
    >>> W = np.kron(np.eye(2), np.full((5, 1), 4.0)) + 0.5
    >>> X = rng.poisson(rng.gamma(1.0, 1.0, size=(200, 2)) @ W.T)
    >>> table = pnmf_pyro.differential_features(pnmf_pyro.fit(X, n_components=2))
    >>> int(((table["lfsr"] < 0.05) & (table["mean"] > 0)).sum())
    10
    """
    check_choice("against", against, ("closest", "each"))
    logs, covariances = log_profiles(fit)
    D, L = logs.shape
    if L == 1:
        raise ValueError("fit must have at least two components to compare; it has one.")
    shape = (L, L, D)
    estimate, se = np.zeros(shape), np.zeros(shape)
    posterior = Shrunk(*(np.full(shape, np.nan) for _ in Shrunk._fields))
    for l, m in zip(*np.tril_indices(L, -1), strict=True):
        b = logs[:, l] - logs[:, m]
        s = error_of_ratio(covariances, l, m)
        found = shrunk(b, error_of_ratio(covariances, l, m, np.sign(b)))
        estimate[l, m], estimate[m, l], se[l, m], se[m, l] = b, -b, s, s
        for values, one in zip(posterior, found, strict=True):
            values[l, m] = one
        mirrored = Shrunk(-found.mean, found.sd, found.not_below, found.not_above)
        for values, one in zip(posterior, mirrored, strict=True):
            values[m, l] = one
    empty = contributions(fit).sum(0) < PSEUDOCOUNT * D
    others = _others(posterior.not_above - 2.0 * empty[:, None], against)
    return _table(results_of(fit).feature_names, others, estimate, se, posterior)


def error_of_ratio(
    covariances: np.ndarray, l: IntLike, m: IntLike, sign: np.ndarray | float = 0.0
) -> np.ndarray:
    """Standard error of log p_l - log p_m, (D,): the usual one, or that towards zero from a sign.

    Towards zero the lower logarithm goes up: by log(1 + e / x) for an error e of a share x, where
    e / x is the usual error. Their mean is taken.
    """
    variances = np.diagonal(covariances, axis1=1, axis2=2)
    relative = np.sqrt(np.maximum(variances, np.finfo(float).tiny))
    up = (1 + np.log1p(relative) / relative) / 2
    a, c = np.where(sign < 0, up[:, l], 1.0), np.where(sign > 0, up[:, m], 1.0)
    of_both = 2 * a * c * covariances[:, l, m]
    variance = a**2 * covariances[:, l, l] + c**2 * covariances[:, m, m] - of_both
    return np.sqrt(np.maximum(variance, np.finfo(float).tiny))


def _others(not_above: np.ndarray, against: str) -> np.ndarray:
    """Numbers of the components that each is compared with, (L, n, D)."""
    L, _, D = not_above.shape
    if against == "each":
        each = np.stack([np.delete(np.arange(L), l) for l in range(L)])
        return np.broadcast_to(each[..., None], (L, L - 1, D))
    return np.nanargmax(not_above, axis=1)[:, None, :]


def _table(
    names: np.ndarray,
    others: np.ndarray,
    estimate: np.ndarray,
    se: np.ndarray,
    posterior: Shrunk,
) -> DataFrame | np.ndarray:
    component, _, feature = (index.ravel() for index in np.indices(others.shape))
    chosen = component, others.ravel(), feature
    bits = 1 / np.log(2)
    return as_table(
        {
            "component": component,
            "feature": names[feature],
            "against": others.ravel(),
            "log2_ratio": bits * estimate[chosen],
            "se": bits * se[chosen],
            "mean": bits * posterior.mean[chosen],
            "sd": bits * posterior.sd[chosen],
            "lfsr": np.minimum(posterior.not_above, posterior.not_below)[chosen],
        }
    )


def log_profiles(fit: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """Return log p, (D, L), and the covariance of each feature's log p, (D, L, L)."""
    module = fitted_module(fit, "fit")
    W = module.W.data.detach().double()
    covariances = errors_of_loadings(module).covariances(W, profiles=True).cpu().numpy()
    raised = (W + PSEUDOCOUNT / module.levels().double()).cpu().numpy()
    logs = np.log(raised) - np.log(raised.sum(0))
    return logs, covariances / raised[:, :, None] / raised[:, None, :]


def shrunk(estimates: np.ndarray, errors: np.ndarray) -> Shrunk:
    """Shrink estimates by a mixture of zero and normals of mean zero that is learned from them.

    Parameters
    ----------
    estimates, errors : ndarray of shape (n,)
        Estimates b, and their standard errors, positive.
    """
    b, v = estimates[:, None], np.square(errors)[:, None]
    widest = 2 * np.sqrt(np.maximum(np.square(estimates) - np.square(errors), 0).max(initial=0))
    narrowest = errors.min() / 10
    n = max(0, int(np.ceil(2 * np.log2(max(widest, narrowest) / narrowest))))
    tau = np.concatenate([[0.0], narrowest * 2 ** (0.5 * np.arange(n + 1))]) ** 2
    log_p = -(np.log(v + tau) + np.square(b) / (v + tau)) / 2
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    counts = np.where(tau > 0, 0.0, NULL_WEIGHT)
    weights = np.full(len(tau), 1 / len(tau))
    for _ in range(ROUNDS):
        last = weights
        share = p * weights
        share /= share.sum(1, keepdims=True)
        weights = share.sum(0) + counts
        weights /= weights.sum()
        if np.abs(weights - last).max() < SETTLED:
            break
    share = p * weights
    share /= share.sum(1, keepdims=True)
    mean, variance = b * tau / (v + tau), v * tau / (v + tau)
    z = mean / np.sqrt(np.where(tau > 0, variance, 1.0))
    zero = tau == 0
    not_above = (share * np.where(zero, 1.0, ndtr(-z))).sum(1)
    not_below = (share * np.where(zero, 1.0, ndtr(z))).sum(1)
    whole = (share * mean).sum(1)
    spread = (share * (variance + np.square(mean))).sum(1) - np.square(whole)
    return Shrunk(whole, np.sqrt(np.maximum(spread, 0)), not_above, not_below)
