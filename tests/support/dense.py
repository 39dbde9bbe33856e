"""Slow, dense twins of the package's formulas, and small problems to compare them on.

Written from the mathematics alone (DESIGN.md, sections 1, 2 and 4), entry by entry where that is
readable, always in float64. Nothing here imports pnmf_pyro, so an error there cannot hide here.

Shapes: counts X (N, D), log-factors F (L, N), loadings W (D, L), size factors s (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import special
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Counts, size factors, loadings, and a q(F) = N(mean, scale^2) to evaluate."""

    X: np.ndarray
    W: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    s: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, D, L)."""
        return (*self.X.shape, self.W.shape[1])

    def tiled(self, times: int) -> Problem:
        """The same samples many times over: one draw for each is many draws for one."""
        return replace(
            self,
            X=np.tile(self.X, (times, 1)),
            mean=np.tile(self.mean, (1, times)),
            scale=np.tile(self.scale, (1, times)),
            s=None if self.s is None else np.tile(self.s, times),
        )


def simulate_problem(
    seed: int = 0, N: int = 9, D: int = 7, L: int = 3, *, sized: bool = False, empty: bool = True
) -> Problem:
    """Draw a problem; with `empty`, one sample and one feature have no counts, as in real data."""
    random = np.random.default_rng(seed)
    W = random.gamma(1.0, 1.0, (D, L)) + 0.05
    s = random.uniform(0.4, 2.5, N) if sized else None
    F = random.normal(0, 1, (L, N))
    X = random.poisson(rates(F, W, s)).astype(np.float64)
    if empty:
        X[N // 2] = 0
        X[:, D // 3] = 0
    mean = F + random.normal(0, 0.3, (L, N))
    return Problem(X, W, mean, random.uniform(0.1, 0.7, (L, N)), s)


# --- the model


def rates(F: np.ndarray, W: np.ndarray, s: np.ndarray | None = None) -> np.ndarray:
    """s_i sum_l W_jl exp F_il, (N, D)."""
    (D, L), N = W.shape, F.shape[1]
    rate = np.zeros((N, D))
    for i in range(N):
        for j in range(D):
            for l in range(L):
                rate[i, j] += W[j, l] * math.exp(F[l, i])
            rate[i, j] *= 1.0 if s is None else s[i]
    return rate


def poisson_log_prob(X: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """sum_j X_ij log rate_ij - rate_ij - log Gamma(X_ij + 1), (N,)."""
    value = np.zeros(len(X))
    for i, j in np.ndindex(*X.shape):
        if X[i, j] > 0:
            value[i] += X[i, j] * math.log(rate[i, j]) - math.lgamma(X[i, j] + 1)
        value[i] -= rate[i, j]
    return value


def mean_deviance(X: np.ndarray, rate: np.ndarray) -> float:
    """2 (log p(X | X) - log p(X | rate)), averaged over the entries."""
    total = 0.0
    for x, mu in zip(X.ravel(), rate.ravel(), strict=True):
        total += 2 * ((x * math.log(x / mu) if x > 0 else 0.0) - x + mu)
    return total / X.size


def kl_independent(mean: np.ndarray, scale: np.ndarray, prior_scale: float) -> np.ndarray:
    """KL( N(mean, scale^2) || N(0, prior_scale^2) ), element by element."""
    ratio = (scale / prior_scale) ** 2
    return 0.5 * (ratio + (mean / prior_scale) ** 2 - 1 - np.log(ratio))


# --- the objective, dense and differentiable


def elbo_terms(
    X: Tensor,
    mean: Tensor,
    scale: Tensor,
    W: Tensor,
    s: Tensor | None,
    prior_scale: float,
    mode: str,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Expected log-likelihood (N,) and divergence (L, N), for the draws mean + scale * noise.

    `noise` has shape (E, L, N) and is not used in lower-bound mode.
    """
    s = torch.ones(len(X), dtype=X.dtype) if s is None else s

    def rate(exp_F: Tensor) -> Tensor:
        return s[:, None] * torch.einsum("jl,li->ij", W, exp_F)

    log_rates = [torch.xlogy(X, rate((mean + scale * e).exp())) for e in noise]
    expected_rate = rate((mean + scale**2 / 2).exp())
    if mode == "simple":
        drawn = [rate((mean + scale * e).exp()) for e in noise]
        expected_rate = sum(drawn) / len(drawn)
    if mode == "lower-bound":
        log_rates = [torch.xlogy(X, rate(mean.exp()))]
    entries = sum(log_rates) / len(log_rates) - expected_rate - torch.lgamma(X + 1)
    ratio = (scale / prior_scale) ** 2
    kl = 0.5 * (ratio + (mean / prior_scale) ** 2 - 1 - ratio.log())
    return entries.sum(1), kl


# --- expectations by quadrature


def moments(
    function: Callable[[np.ndarray], np.ndarray], mean: np.ndarray, scale: np.ndarray, n: int = 40
) -> tuple[float, float]:
    """Mean and variance of function(F), F ~ N(mean, diag(scale^2)) of a few dimensions.

    Gauss-Hermite in each dimension; `function` maps points (P, L) to values (P,).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    weights = weights / weights.sum()
    L = len(mean)
    points = np.stack(np.meshgrid(*[nodes] * L, indexing="ij"), -1).reshape(-1, L)
    weight = np.prod(np.stack(np.meshgrid(*[weights] * L, indexing="ij"), -1), -1).ravel()
    values = function(mean + scale * points)
    first = float(weight @ values)
    return first, float(weight @ (values - first) ** 2)


def expected_log_likelihood(
    problem: Problem, log_density: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """E_q log p(X_i | F, W) and its variance over F ~ q, each (N,), by quadrature.

    `log_density(counts, rates)` of shape (D,) and (P, D) to (P, D); Poisson unless given.
    """

    def poisson(x: np.ndarray, rate: np.ndarray) -> np.ndarray:
        return special.xlogy(x, rate) - rate - special.gammaln(x + 1)

    density = log_density or poisson
    results = []
    for i, x in enumerate(problem.X):
        size = 1.0 if problem.s is None else problem.s[i]

        def value(F: np.ndarray, x: np.ndarray = x, size: float = size) -> np.ndarray:
            return density(x, size * np.exp(F) @ problem.W.T).sum(1)

        results.append(moments(value, problem.mean[:, i], problem.scale[:, i]))
    mean, variance = np.array(results).T
    return mean, variance


def expected_log_rate_variance(problem: Problem) -> np.ndarray:
    """Variance over F ~ q of term (a), sum_j X_ij log rho_ij, (N,)."""
    return expected_log_likelihood(problem, lambda x, rate: x * np.log(rate))[1]


def log_evidence(problem: Problem, prior_scale: float, step: float = 0.01) -> np.ndarray:
    """log p(X_i | W) of one component, (N,), summed on a grid of F from -12 to 12.

    For a smooth integrand that vanishes at both ends the error of equal weights falls like
    exp(-2 pi^2 (width / step)^2): none here, for posteriors wider than 0.03.
    """
    F = np.arange(-12, 12, step)
    log_prior = -0.5 * (F / prior_scale) ** 2 - np.log(prior_scale * np.sqrt(2 * np.pi) / step)
    evidence = []
    for i, x in enumerate(problem.X):
        size = 1.0 if problem.s is None else problem.s[i]
        rate = size * np.exp(F)[:, None] * problem.W[:, 0]
        density = x * np.log(rate) - rate - special.gammaln(x + 1)
        evidence.append(special.logsumexp(log_prior + density.sum(1)))
    return np.array(evidence)


# --- curvature and closed-form steps


def allocation_moments(X: np.ndarray, F: np.ndarray, W: np.ndarray) -> list[np.ndarray]:
    """sum_j X_ij phi_ijl and sum_j X_ij phi_ijl^2, with phi the share of l in rho_ij; (N, L)."""
    (N, D), L = X.shape, len(F)
    first, second = np.zeros((N, L)), np.zeros((N, L))
    for i in range(N):
        for j in range(D):
            phi = W[j] * np.exp(F[:, i])
            phi = phi / phi.sum()
            first[i] += X[i, j] * phi
            second[i] += X[i, j] * phi**2
    return [first, second]


def log_rate_curvature(X: np.ndarray, F: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Second derivative of sum_j X_ij log rho_ij in each F_il, (N, L), by automatic derivatives."""
    W_tensor, rows = torch.as_tensor(W), []
    for x, f in zip(torch.as_tensor(X), torch.as_tensor(F.T), strict=True):

        def value(f: Tensor, x: Tensor = x) -> Tensor:
            return (x * (W_tensor @ f.exp()).log()).sum()

        rows.append(torch.autograd.functional.hessian(value, f).diagonal())
    return torch.stack(rows).numpy()


def multiplicative_update(
    X: np.ndarray,
    W: np.ndarray,
    fields: list[np.ndarray],
    expected: np.ndarray,
    s: np.ndarray | None = None,
) -> np.ndarray:
    """W_jl mean_e(sum_i X_ij / rho_ij^e exp F_il^e) / sum_i s_i E exp F_il, (D, L).

    `fields` are draws of exp F and `expected` is E exp F, all of shape (L, N).
    """
    N, D = X.shape
    new = np.zeros_like(W)
    for j in range(D):
        for l in range(W.shape[1]):
            numerator = denominator = 0.0
            for i in range(N):
                denominator += (1.0 if s is None else s[i]) * expected[l, i]
                for field in fields:
                    rho = float(W[j] @ field[:, i])
                    numerator += X[i, j] / rho * field[l, i] / len(fields)
            new[j, l] = W[j, l] * numerator / denominator
    return new


def expected_counts(X: np.ndarray, W: np.ndarray, fields: list[np.ndarray]) -> np.ndarray:
    """R_jl, the counts of feature j that come from component l: sum_i X_ij phi_ijl, (D, L)."""
    R = np.zeros_like(W)
    for i, j in np.ndindex(X.shape):
        for field in fields:
            phi = W[j] * field[:, i]
            R[j] += X[i, j] * phi / phi.sum() / len(fields)
    return R


def by_margins(R: np.ndarray) -> np.ndarray:
    """R_j. R_.l / R.., (D, L)."""
    return R.sum(1)[:, None] * R.sum(0) / R.sum()


def shape_by_moments(R: np.ndarray) -> float:
    """a of E (R - m)^2 / m = 1 + m / a, summed over entries, with m what the margins say."""
    excess = total = 0.0
    for seen, mean in zip(R.ravel(), by_margins(R).ravel(), strict=True):
        if mean > 0:
            excess += (seen - mean) ** 2 / mean - 1
            total += mean
    return total / excess


def posterior_mean_loadings(R: np.ndarray, exposure: np.ndarray, shape: float) -> np.ndarray:
    """E[W_jl | R_jl] by quadrature, scaled to sum_l W_jl e_l = R_j., (D, L).

    R_jl ~ Poisson(W_jl e_l), W_jl ~ Gamma(shape) around what the margins say.
    """
    W = np.zeros_like(R)
    for j, l in zip(*np.nonzero(by_margins(R)), strict=True):
        mean = by_margins(R)[j, l] / exposure[l]
        end = 20 * (mean * (1 + 1 / shape) + (R[j, l] + 1) / exposure[l])
        w = (np.arange(1_000_000) + 0.5) * end / 1_000_000
        log_density = (shape - 1 + R[j, l]) * np.log(w) - w * (shape / mean + exposure[l])
        density = np.exp(log_density - log_density.max())
        W[j, l] = (w * density).sum() / density.sum()
    totals = W @ exposure
    return W * np.divide(R.sum(1), totals, out=np.zeros_like(totals), where=totals > 0)[:, None]


def loadings_objective(
    X: np.ndarray,
    W: np.ndarray,
    fields: list[np.ndarray],
    expected: np.ndarray,
    s: np.ndarray | None = None,
) -> float:
    """Part of the ELBO that depends on W: mean_e sum X log rho^e - sum_ij s_i W_jl E exp F_il."""
    s = np.ones(len(X)) if s is None else s
    value = -float((s * expected).sum(1) @ W.sum(0))
    for field in fields:
        value += float(special.xlogy(X, (W @ field).T).sum()) / len(fields)
    return value


def natural_step(
    loss: Callable[[Tensor, Tensor], Tensor], mean: Tensor, variance: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """One textbook step theta <- theta - lr dL/dm for N(mean, variance); new mean and variance.

    The gradient is taken by autograd in the expectation parameters m = (mu, mu^2 + sigma^2).
    """
    m1 = mean.clone().requires_grad_()
    m2 = (mean**2 + variance).clone().requires_grad_()
    loss(m1, m2 - m1**2).backward()
    theta1 = mean / variance - lr * m1.grad
    theta2 = -1 / (2 * variance) - lr * m2.grad
    return -theta1 / (2 * theta2), -1 / (2 * theta2)
