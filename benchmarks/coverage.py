"""How often intervals hold the truth that made the counts, and how good standard errors are.

Data are drawn from the model. `known` has the loadings known, `fit` learns them (jointly at the
end) and matches components, each of which is shifted by its mean level: what factors gain, loadings
lose. `loadings` compares standard errors of W with the spread of W over tables of one truth, and
`markers` counts false discoveries among features that are alike in all components.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm

import pnmf_pyro
from benchmarks import ours, tables
from benchmarks.measure import median, report, timed
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.estimator import Settle, SettleJointly, WarmUp
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.transforms import (
    factor_uncertainty,
    loading_uncertainty,
    log_factors,
    log_factors_from_prior,
    transform_F,
    uncertainty_from_prior,
)

LEVELS = (0.5, 0.8, 0.9, 0.95)
MEANS, OVERLAPS = (0.2, 1.0, 5.0), (0.0, 0.2, 0.5, 0.8)


def loadings(D: int, L: int, overlap: float, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Each feature belongs to one component, but for a share `overlap` spread over all."""
    W = (1 - overlap) * np.eye(L)[np.arange(D) % L] + overlap * rng.dirichlet(np.ones(L), D)
    W *= rng.gamma(5, 1 / 5, (D, 1))
    return W * mean / (W.sum(1).mean() * np.exp(0.5))


def drawn(W: np.ndarray, N: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log-factors (N, L) and counts (N, D)."""
    F = rng.normal(size=(N, W.shape[1]))
    return F, rng.poisson(np.exp(F) @ W.T)


def covered(z: np.ndarray) -> list[float]:
    """Share of |z| within each central interval."""
    return [float((np.abs(z) < norm.ppf(0.5 + level / 2)).mean()) for level in LEVELS]


def known(overlap: float, mean: float, seed: int) -> list[float]:
    """Coverage of F with W known: 1,000 samples, 50 features, three components."""
    rng = np.random.default_rng([11, seed])
    W = loadings(50, 3, overlap, mean, rng)
    F, X = drawn(W, 1000, rng)
    q = transform_F(X, W, return_prior=True)
    return covered((F - log_factors_from_prior(q)) / uncertainty_from_prior(q))


def matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Numbers of the columns of b that go with those of a."""
    L = a.shape[1]
    return linear_sum_assignment(-np.nan_to_num(np.corrcoef(a.T, b.T)[:L, L:], nan=-1))[1]


def whole(overlap: float, mean: float, seed: int, scaled: bool = False) -> list[float]:
    """Coverage of F in a whole fit: 1,000 samples, 200 features, five components.

    With `scaled` the scale of each component is removed as well as its level: the slope of F on its
    means.
    """
    rng = np.random.default_rng([12, seed])
    W = loadings(200, 5, overlap, mean, rng)
    F, X = drawn(W, 1000, rng)
    stages = [WarmUp(), Settle(), SettleJointly()]
    model = pnmf_pyro.fit(X, n_components=5, stages=stages)
    mu, sd = log_factors(model), factor_uncertainty(model)
    order = matched(F, mu)
    mu, sd = mu[:, order], sd[:, order]
    if scaled:
        slope = ((mu - mu.mean(0)) * F).mean(0) / mu.var(0)
        mu, sd = slope * mu, slope * sd
    error = F - mu
    return covered((error - error.mean(0)) / sd)


scaled_whole = partial(whole, scaled=True)


def spread(overlap: float, mean: float, n_tables: int) -> dict[str, float]:
    """Standard errors of W against its spread: 300 samples, 60 features, three components.

    Over loadings that are a quarter of their feature or more: median of the ratio, and the ratio of
    root mean squares.
    """
    W = loadings(60, 3, overlap, mean, np.random.default_rng(0))
    found, errors = [], []
    for seed in range(n_tables):
        _, X = drawn(W, 300, np.random.default_rng([13, seed]))
        model = pnmf_pyro.fit(X, n_components=3)
        order = matched(W, model.components_.T)
        found.append(model.components_.T[:, order])
        errors.append(loading_uncertainty(model)[:, order])
    large = W.sum(1, keepdims=True) / 4 < W
    sd, se = np.std(found, 0, ddof=1)[large], np.sqrt(np.mean(np.square(errors), 0))[large]
    return {
        "median_ratio": float(np.median(se / sd)),
        "ratio": float(np.sqrt(np.mean(se**2) / np.mean(sd**2))),
    }


def discoveries(mean: float, log_ratio: float, seed: int) -> dict[str, float]:
    """Features called at lfsr 0.05: of 200, 20 mark each of four components, 120 none.

    Those that mark none have the same share in all components.
    """
    rng, L, n = np.random.default_rng([14, seed]), 4, 20
    base, more = rng.gamma(1.0, 1.0, n), np.exp(rng.gamma(4.0, log_ratio / 4, n))
    W = np.repeat(np.concatenate([*[base] * L, rng.gamma(1.0, 1.0, 120)])[:, None], L, 1)
    for l in range(L):
        W[l * n : (l + 1) * n, l] *= more
    W *= mean / W.sum(1).mean() / np.exp(0.5)
    _, X = drawn(W, 400, rng)
    model = pnmf_pyro.fit(X, n_components=L)
    order = matched(W, model.components_.T)
    table = pnmf_pyro.differential_features(model)
    called = ((table["lfsr"] < 0.05) & (table["mean"] > 0)).to_numpy().reshape(L, -1)[order]
    marks = np.kron(np.eye(L, L + 6), np.ones(n)) > 0
    each = pnmf_pyro.differential_features(model, against="each")
    each = each[each["lfsr"] < 0.05]
    marked, j = marks[np.argsort(order)], each["feature"].astype(int)
    alike = ~marked[each["component"], j] & ~marked[each["against"], j]
    return {
        "called": int(called.sum()),
        "false": float((called & ~marks).sum() / max(1, called.sum())),
        "power": float((called & marks).sum() / marks.sum()),
        "pairs": len(each) // 2,
        "false_pairs": float(alike.sum() / max(1, len(each))),
    }


def joint_pass(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the pass at the end of a fit, and of one of its steps."""
    X = tables.simulated(options.N, options.D, options.density, options.L)
    step = median(ours.step_seconds(X, options.L, options.steps, **ours.NATURAL))
    model = ours.quietly(lambda: pnmf_pyro.fit(X, n_components=options.L, max_iter=5))
    counts = as_counts(X)
    seconds = median([timed(lambda: find_uncertainty(model.model_, counts))[0] for _ in range(5)])
    return {"pass_seconds": seconds, "step_seconds": step, "steps": seconds / step}


def coverage(options: argparse.Namespace) -> None:
    """Coverage of intervals, errors of loadings and false discoveries; time of the pass."""
    seeds = range(options.repeats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, run in (("known", known), ("fit", whole), ("scaled", scaled_whole)):
            for mean in MEANS:
                for overlap in OVERLAPS:
                    found = np.array([run(overlap, mean, seed) for seed in seeds])
                    _report(part, found, mean=mean, overlap=overlap)
        for overlap in (0.0, 0.2, 0.5):
            report(
                benchmark="coverage", part="loadings", overlap=overlap, **spread(overlap, 1, 200)
            )
        for mean, log_ratio in ((0.2, 2.0), (1.0, 2.0), (5.0, 2.0), (5.0, 1.0)):
            each = [discoveries(mean, log_ratio, seed) for seed in seeds]
            means = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
            report(benchmark="coverage", part="markers", mean=mean, log_ratio=log_ratio, **means)
        report(benchmark="coverage", part="pass", **joint_pass(options))


def _report(part: str, found: np.ndarray, **setting: Any) -> None:
    se = found.std(0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.full(4, np.nan)
    names = [f"{level:g}" for level in LEVELS]
    values = dict(zip(names, found.mean(0).round(4).tolist(), strict=True))
    errors = dict(zip(names, se.round(4).tolist(), strict=True))
    report(benchmark="coverage", part=part, **setting, coverage=values, se=errors)
