"""Inference with one side of the factorisation fixed: factors given loadings, or the reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.checks import check_array, check_count
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.log_rate import log_rate_with_gradients
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import PoissonFactorization, PoissonFactors
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import Likelihood
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.loop import evaluate_elbo, tqdm, train
from pnmf_pyro.training.schedules import Constant, Decreasing

# Natural-gradient steps to a place from which a fit in another way goes on; ten or so come near.
START_STEPS = 30


def check_fixed(
    values: ArrayLike, counts: Counts, n_rows: int, n_components: int | None, name: str, rows: str
) -> Tensor:
    """Check the side of the factorisation that is given, and return it like the counts.

    Parameters
    ----------
    values : array-like or Tensor of shape (n_rows, L)
        In exp-space.
    counts : Counts
        Whose device and floating-point type to take.
    n_rows : int
    n_components : int, optional
        L, where it is to be checked.
    name, rows : str
        What to call the values and their rows in an error.

    Raises
    ------
    ValueError
        For another shape, and for entries that are negative or not finite.
    """
    matrix = check_array(name, values)
    if matrix.ndim != 2 or len(matrix) != n_rows or matrix.shape[1] == 0:
        raise ValueError(
            f"{name} must have one row for each of the {n_rows} {rows} of X and one column for "
            f"each component; got shape {matrix.shape}."
        )
    if n_components is not None and matrix.shape[1] != check_count("n_components", n_components):
        raise ValueError(
            f"{name} must have n_components={n_components} columns; it has {matrix.shape[1]}."
        )
    if not (np.isfinite(matrix).all() and (matrix >= 0).all()):
        raise ValueError(f"{name} must be finite and not negative; pass it in exp-space.")
    if not matrix.any():
        raise ValueError(f"{name} must have entries above 0, or there is nothing to fit; got none.")
    return torch.from_numpy(matrix).to(counts.device, counts.dtype)


def factors_given_loadings(
    counts: Counts,
    loadings: Tensor,
    size_factors: Tensor | Exposure | None = None,
    likelihood: Likelihood | None = None,
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
    size_factors : Tensor of shape (n,) or Exposure, optional
    likelihood : callable, optional
        One that has a closed form; Poisson unless given.
    max_iter : int
    tol : float
        Relative change of a sample's factors below which they are left alone.

    Returns
    -------
    Tensor of shape (n, L)
    """
    n, L = counts.shape[0], loadings.shape[1]
    observed = _observed(loadings.new_zeros(L, n), loadings, counts, size_factors, likelihood)
    rates = _positive(observed.exposure.rates(loadings).sum(1))
    start = (counts.row_totals.to(loadings) / rates).expand(n)

    def ratio(factors: Tensor) -> Tensor:
        gradient = log_rate_with_gradients(counts, factors, loadings)[1]
        return gradient / _positive(observed.rates(counts, factors.mT))

    return _multiplicative(ratio, start[:, None].repeat(1, L), max_iter, tol)


def _observed(
    log_factors: Tensor,
    loadings: Tensor,
    counts: Counts,
    size_factors: Tensor | Exposure | None,
    likelihood: Likelihood | None,
) -> PoissonFactors:
    """The distribution of counts given log-factors (L, n)."""
    poisson = PoissonFactors(log_factors, loadings, size_factors, validate_args=False)
    found = poisson if likelihood is None else likelihood(poisson, Batch(counts))
    return cast(PoissonFactors, found)


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
    mode: str,
    size_factors: Tensor | Exposure | None = None,
    likelihood: Likelihood | None = None,
    **prior_parameters: Any,
) -> PoissonFactorization:
    """Make a model with fixed loadings, whose q(F) is still to be set.

    Parameters
    ----------
    counts : Counts of shape (n, d)
    loadings : Tensor of shape (d, L)
    mode : str
        Form of the ELBO.
    size_factors : Tensor of shape (n,) or Exposure, optional
    likelihood : callable, optional
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
    model = PoissonFactorization(
        prior, y, L, "projected", mode, size_factors=size_factors, likelihood=likelihood
    )
    model.to(counts.device)
    model.W.assign(loadings)
    model.W.freeze()
    return model


def posterior_given_loadings(
    counts: Counts,
    loadings: Tensor,
    size_factors: Tensor | Exposure | None = None,
    scale_pf: float | Tensor = 1.0,
    likelihood: Likelihood | None = None,
    *,
    max_iter: int = 500,
    tol: float = 1e-6,
    warn: bool = True,
) -> PoissonFactorization:
    """Find the q(F) that maximises the bound of `lower-bound` mode, by natural-gradient steps.

    Parameters
    ----------
    counts : Counts of shape (n, d)
    loadings : Tensor of shape (d, L)
    size_factors : Tensor of shape (n,), optional
    scale_pf : float
        Standard deviation of the prior.
    likelihood : callable, optional
        One that has a closed form; Poisson unless given.
    max_iter : int
    tol : float
        Relative rise of the bound over five steps below which to stop.
    warn : bool
        Warn if the bound still rises at the end.

    Returns
    -------
    PoissonFactorization
        Its prior holds q(F) in natural parameters.

    Notes
    -----
    Nothing is random. The start is near: at the maximum-likelihood factors, with the precisions
    1 / scale_pf^2 + rates that belong to them.
    """
    model = conditional_model(
        counts,
        loadings,
        "lower-bound",
        size_factors,
        likelihood,
        scale_pf=float(scale_pf),
        use_natural_gradients=True,
    )
    prior = model.prior
    assert isinstance(prior, GaussianPrior)
    factors = factors_given_loadings(counts, loadings, size_factors, likelihood, max_iter=20)
    observed = _observed(factors.mT, loadings, counts, size_factors, likelihood)
    rates = factors * observed.rates(counts, factors.mT)
    scale = (1 / prior.scale_pf.square() + rates).rsqrt()
    prior.assign(factors.clamp_min(1e-2).log().T, scale.T)
    objective = FactorizationELBO("lower-bound", newton=True)
    settled = Convergence(tol, window=5, patience=1)
    natural_steps(model, counts, objective, torch_generator(0), max_iter, settled, warn=warn)
    return model


def model_near_posterior(
    counts: Counts,
    loadings: Tensor,
    mode: str,
    n_draws: int,
    size_factors: Tensor | None,
    scale_pf: float,
    generator: torch.Generator,
) -> PoissonFactorization:
    """Make a model with fixed loadings whose q(F) is near its optimum in `mode`.

    The natural-gradient steps of `lower-bound` mode give means and, where components share counts,
    standard deviations that are too small; those of `mode` mend the latter.
    """
    model = conditional_model(counts, loadings, mode, size_factors, scale_pf=scale_pf)
    start = posterior_given_loadings(
        counts, loadings, size_factors, scale_pf, max_iter=START_STEPS, warn=False
    )
    if mode != "lower-bound":
        objective = FactorizationELBO(mode, n_draws, newton=True)
        natural_steps(start, counts, objective, generator, START_STEPS)
    with torch.no_grad():
        q = start.prior.marginal()
    model.prior.assign(q.loc, q.scale)
    return model


def natural_steps(
    model: PoissonFactorization,
    counts: Counts,
    objective: FactorizationELBO,
    generator: torch.Generator,
    max_iter: int,
    convergence: Convergence | None = None,
    *,
    warn: bool = False,
) -> None:
    """Move q(F) by natural-gradient steps, of a size that falls where the objective is noisy.

    Parameters
    ----------
    model : PoissonFactorization
        With a :class:`GaussianPrior` in natural parameters.
    counts : Counts of shape (n, d)
    objective, generator, max_iter, convergence, warn
        As for :func:`~pnmf_pyro.training.loop.train`.
    """
    schedule = Constant() if objective.mode == "lower-bound" else Decreasing()
    train(
        model,
        Batches(counts),
        objective,
        [(SiteSteps(model.prior), schedule)],
        generator,
        max_iter=max_iter,
        convergence=convergence,
        warn=warn,
    )


def held_out_bound(
    counts: Counts,
    loadings: Tensor,
    size_factors: Tensor | Exposure | None = None,
    scale_pf: float | Tensor = 1.0,
    likelihood: Likelihood | None = None,
) -> float:
    """Return a lower bound on log p(X | W) for data that were not fitted, in nats.

    The bound in `lower-bound` mode at its optimum in q(F); a number without randomness.
    """
    model = posterior_given_loadings(counts, loadings, size_factors, scale_pf, likelihood)
    objective = FactorizationELBO("lower-bound")
    return evaluate_elbo(model, Batches(counts), objective, torch_generator(0))
