r"""Whether ranks are uniform, at all of them at once.

With R_k the number of n ranks below k, of K in all,

.. math:: \gamma = 2 \min_k \min\{P(B_k \le R_k), \; P(B_k \ge R_k)\}, \qquad
    B_k \sim \mathrm{Binomial}(n, k / K)

is small where the distribution of ranks is off anywhere. Its own distribution, for uniform ranks,
gives the p-value, and the band in which all of the empirical distribution function stays at once
(Säilynoja, Bürkner and Vehtari 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from scipy.stats import binom

# Sets of uniform ranks from which p-values and bands are found.
UNIFORM_SETS = 4000


def gamma(counted: np.ndarray, n: int) -> np.ndarray:
    """The statistic of sets of n ranks, (m,), from their numbers below k, (m, n_draws)."""
    K = counted.shape[1] + 1
    share = np.arange(1, K) / K
    at_most = binom.cdf(np.arange(n + 1)[:, None], n, share)
    at_least = binom.sf(np.arange(n + 1)[:, None] - 1, n, share)
    tails = 2 * np.minimum(at_most, at_least)
    return np.concatenate([tails[rows, np.arange(K - 1)].min(1) for rows in _parts(counted)])


def _parts(counted: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time."""
    yield from np.array_split(counted, max(1, len(counted) // 500))


@cache
def uniform_gammas(n: int, n_draws: int) -> np.ndarray:
    """The statistic of sets of n uniform ranks, from a seed of its own."""
    K = n_draws + 1
    drawn = np.random.default_rng(0).multinomial(n, np.full(K, 1 / K), size=UNIFORM_SETS)
    return gamma(drawn.cumsum(1)[:, :-1], n)
