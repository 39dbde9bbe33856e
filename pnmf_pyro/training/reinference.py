"""q(F) of other counts than those of a fit, with its loadings and hyperparameters."""

from __future__ import annotations

import copy

import torch

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.models.points import FIXED
from pnmf_pyro.priors import LCGP, GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.convergence import Settled
from pnmf_pyro.training.given_one_side import factors_given_loadings
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant, Decreasing, GradientSteps, OneCycle

# Relative rise of the bound that is left where factors have settled, and steps until then at most.
TOL = 1e-6
MOST_STEPS = 300

# Draws of a noisy objective, its steps, and those of gradients with their learning rate.
DRAWS = 10
NOISY_STEPS = 30
GRADIENT_STEPS = 600
LEARNING_RATE = 0.1


def infer_again(
    model: PoissonFactorization, counts: Counts, generator: torch.Generator
) -> PoissonFactorization:
    """Return a copy of a model with the q(F) and the joint posterior of other counts.

    Loadings, hyperparameters and what the likelihood has learned stay, and are taken for known.

    Parameters
    ----------
    model : PoissonFactorization
    counts : Counts of shape (N, D)
        Counts at the places, and of the exposure, of the samples of the model.
    generator : torch.Generator
        Source of draws, where the objective or the guide needs them.
    """
    found = copy.deepcopy(model)
    found.W.freeze()
    ranks = {
        part: part.low_rank.shape[-1]
        for part in found.prior.parts
        if isinstance(part, LCGP) and part.low_rank.shape[-1]
    }
    if type(found.prior) is GaussianPrior and not found.prior.natural:
        found.prior = _in_sites(found.prior, found)
    counts = counts.to(found.W.device).to(found.W.dtype)
    if found.has_closed_form:
        _start(found, counts)
    else:
        zero = torch.zeros(found.L, found.N, device=found.W.device)
        found.prior.assign(zero, torch.full_like(zero, 0.1))
    _settle(found, counts, generator)
    for part, rank in ranks.items():
        part.correlate(rank)
    if ranks:
        _settle(found, counts, generator)
    find_uncertainty(found, counts)
    return found


def _in_sites(prior: GaussianPrior, model: PoissonFactorization) -> GaussianPrior:
    """The same independent prior with q(F) in natural parameters, whose optimum is the same."""
    y = torch.empty(model.D, model.N, dtype=model.W.dtype, device="meta")
    scale = float(prior.scale_pf)
    return GaussianPrior(y, model.L, scale, use_natural_gradients=True).to(model.W.device)


def _start(model: PoissonFactorization, counts: Counts) -> None:
    """Start at factors of maximum likelihood, with the precision that counts and a prior have."""
    given = counts, model.W.data.detach(), model.exposure, model.observation
    factors = factors_given_loadings(*given, max_iter=20)
    likelihood = model.in_closed_form(factors.mT.log())
    rates = factors * likelihood.rates(counts, factors.mT)
    model.prior.assign(factors.clamp_min(1e-2).log().T, (1 + rates).rsqrt().T)


def _settle(model: PoissonFactorization, counts: Counts, generator: torch.Generator) -> None:
    """Move q(F) to where the bound of the model's mode is highest."""
    if not (model.prior.natural and model.has_closed_form):
        objective = FactorizationELBO(model.mode, DRAWS)
        adam = torch.optim.Adam(model.prior.parameters(), lr=LEARNING_RATE)
        steps = [(GradientSteps(adam), OneCycle())]
        train(model, Batches(counts), objective, steps, generator, max_iter=GRADIENT_STEPS)
        return
    for mode in ("expanded", "simple") if model.mode == "simple" else (model.mode,):
        noisy = mode == "simple"
        draws = DRAWS if noisy else FIXED if mode == "expanded" else 1
        size = Decreasing() if noisy else Constant()
        train(
            model,
            Batches(counts),
            FactorizationELBO(mode, draws, newton=True),
            [(SiteSteps(part), size) for part in model.prior.parts],
            generator,
            max_iter=NOISY_STEPS if noisy else MOST_STEPS,
            convergence=None if noisy else Settled(TOL),
            monotone=not noisy,
            warn=False,
        )
