"""Inference with one side of the factorisation fixed: factors given loadings, or the reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pnmf_pyro.counts import Counts
from pnmf_pyro.data import Batches
from pnmf_pyro.distributions.log_rate import log_rate_with_gradients
from pnmf_pyro.elbo import FactorizationELBO
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.optimizers import NaturalGradient
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.random_state import torch_generator
from pnmf_pyro.training import Convergence, evaluate_elbo, tqdm, train


def factors_given_loadings(
    counts: Counts,
    loadings: Tensor,
    size_factors: Tensor | None = None,
    *,
    max_iter: int = 200,
    tol: float = 1e-4,
) -> Tensor:
    """Find the maximum-likelihood factors exp F given loadings, by multiplicative updates.

    The rule of Lee and Seung (2001) for the Kullback-Leibler divergence. The problem is convex and
    separate for each sample, so that neither the start nor the other samples matter.

    Parameters
    ----------
    counts : Counts of shape (n, d)
    loadings : Tensor of shape (d, L)
    size_factors : Tensor of shape (n,), optional
    max_iter : int
    tol : float
        Relative change of a sample's factors below which they are left alone.

    Returns
    -------
    Tensor of shape (n, L)
    """
    n, L = counts.shape[0], loadings.shape[1]
    s = loadings.new_ones(n) if size_factors is None else size_factors
    totals = _positive(loadings.sum(0))
    start = counts.row_totals.to(s) / (s * totals.sum())

    def ratio(factors: Tensor) -> Tensor:
        gradient = log_rate_with_gradients(counts, factors, loadings)[1]
        return gradient / (s[:, None] * totals)

    return _multiplicative(ratio, start[:, None].repeat(1, L), max_iter, tol)


def loadings_given_factors(
    counts: Counts,
    factors: Tensor,
    start: Tensor | None = None,
    *,
    max_iter: int = 100,
    tol: float = 1e-4,
    progress: tqdm | None = None,
) -> Tensor:
    """Find the maximum-likelihood loadings given factors, by multiplicative updates.

    Parameters
    ----------
    counts : Counts of shape (n, d)
    factors : Tensor of shape (n, L)
        exp F, times size factors where there are any.
    start : Tensor of shape (d, L), optional
    max_iter : int
    tol : float
        Relative change of a feature's loadings below which they are left alone.
    progress : tqdm, optional
        Shows the Poisson negative log-likelihood, up to a constant.

    Returns
    -------
    Tensor of shape (d, L)
    """
    totals = _positive(factors.sum(0))

    def ratio(loadings: Tensor) -> Tensor:
        values, _, gradient = log_rate_with_gradients(counts, factors, loadings)
        if progress is not None:
            progress.update()
            loss = float((loadings @ totals).sum() - values.sum())
            progress.set_postfix_str(f"negative log-likelihood {loss:.6g}")
        return gradient / totals

    return _multiplicative(ratio, _start(counts, factors, start), max_iter, tol)


def least_squares_loadings(
    counts: Counts,
    factors: Tensor,
    start: Tensor | None = None,
    *,
    max_iter: int = 100,
    tol: float = 1e-4,
    progress: tqdm | None = None,
) -> Tensor:
    """Find the non-negative least-squares loadings given factors, W <- W (X^T F) / (W F^T F).

    The rule of Lee and Seung (2001) for the squared error. Parameters and returned value are those
    of :func:`loadings_given_factors`.
    """
    numerator = counts.transposed_matmul(counts.values, factors)
    gram = factors.T @ factors

    def ratio(loadings: Tensor) -> Tensor:
        if progress is not None:
            progress.update()
        return numerator / _positive(loadings @ gram)

    return _multiplicative(ratio, _start(counts, factors, start), max_iter, tol)


def _start(counts: Counts, factors: Tensor, start: Tensor | None) -> Tensor:
    """Each feature's mean, spread over the components so that the total is right."""
    if start is not None:
        return start
    ones = factors.new_ones(counts.shape[0], 1)
    totals = counts.transposed_matmul(counts.values, ones)
    return (totals / _positive(factors.sum())).repeat(1, factors.shape[1])


def _multiplicative(
    ratio: Callable[[Tensor], Tensor], start: Tensor, max_iter: int, tol: float
) -> Tensor:
    """Multiply by `ratio` until each row has settled; rows do not influence each other."""
    value = start
    settled = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    with torch.no_grad():
        for _ in range(max_iter):
            new = torch.where(settled[:, None], value, value * ratio(value))
            change = (new - value).abs().amax(1)
            settled |= change <= tol * new.amax(1)
            value = new
            if bool(settled.all()):
                break
    return value


def _positive(values: Tensor) -> Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)


def conditional_model(
    counts: Counts,
    loadings: Tensor,
    mode: str = "lower-bound",
    size_factors: Tensor | None = None,
    **prior_parameters: Any,
) -> PoissonFactorization:
    """Make a model with fixed loadings whose q(F) starts near its optimum.

    Parameters
    ----------
    counts : Counts of shape (n, d)
    loadings : Tensor of shape (d, L)
    mode : str
        Form of the ELBO.
    size_factors : Tensor of shape (n,), optional
    **prior_parameters
        For :class:`GaussianPrior`.

    Returns
    -------
    PoissonFactorization
    """
    n, d = counts.shape
    L = loadings.shape[1]
    y = torch.empty(d, n, dtype=counts.dtype, device="meta")
    prior = GaussianPrior(y, L, **prior_parameters)
    model = PoissonFactorization(prior, y, L, "projected", mode, size_factors=size_factors)
    model.to(counts.device)
    model.W.assign(loadings)
    model.W.freeze()
    factors = factors_given_loadings(counts, loadings, size_factors, max_iter=20)
    rates = factors * loadings.sum(0)
    if size_factors is not None:
        rates = rates * size_factors[:, None]
    scale = (1 / prior.scale_pf.square() + rates).rsqrt()
    prior.assign(factors.clamp_min(1e-2).log().T, scale.T)
    return model


def held_out_bound(
    counts: Counts, loadings: Tensor, size_factors: Tensor | None = None, scale_pf: Any = 1.0
) -> float:
    """Return a lower bound on log p(X | W) for data that were not fitted, in nats.

    The bound in `lower-bound` mode, raised by natural-gradient steps on q(F); a number without
    randomness.
    """
    model = conditional_model(
        counts,
        loadings,
        "lower-bound",
        size_factors,
        scale_pf=float(scale_pf),
        use_natural_gradients=True,
    )
    prior = model.prior
    assert isinstance(prior, GaussianPrior)
    objective, batches = FactorizationELBO("lower-bound"), Batches(counts)
    generator = torch_generator(0)
    train(
        model,
        batches,
        objective,
        [NaturalGradient(prior.natural_parameters())],
        generator,
        max_iter=500,
        convergence=Convergence(1e-6, window=5, patience=1),
    )
    return evaluate_elbo(model, batches, objective, generator)
