"""Runs of the training loop: what the parameters of an estimator make of one stage of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.estimator.parameters import Settings
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.points import FIXED
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps, Step
from pnmf_pyro.training.convergence import Convergence, Judge, Settled
from pnmf_pyro.training.effects import effect_steps
from pnmf_pyro.training.loadings import ClosedFormLoadings, ClosedFormScale
from pnmf_pyro.training.loop import Steps
from pnmf_pyro.training.schedules import (
    OPTIMIZERS,
    Constant,
    Decreasing,
    GradientSteps,
    OneCycle,
    Plateau,
    Schedule,
)

# How often loadings are renewed in a pass by batches, at first, and passes after which less often.
RENEWALS, PASSES = 10.0, 5.0


@dataclass
class Training:
    """One run of the training loop: a model, what is raised by which steps, and until when.

    A `monotone` objective has no noise, so that steps that lower it are halved, and those that it
    `extrapolates` go further. `warns` says
    whether to warn where it has not settled.
    """

    model: PoissonFactorization
    objective: FactorizationELBO
    steps: Steps
    convergence: Judge
    monotone: bool
    extrapolates: bool = True
    warns: bool = True


def nothing() -> None:
    """Do nothing."""


@dataclass
class Run:
    """What a stage does: something to the model at once (`prepare`), some training, or both.

    It trains on the `counts`, which are those of the fit unless given, in `most_steps` at most.
    """

    name: str
    training: Training | None = None
    prepare: Callable[[], object] = nothing
    counts: Counts | None = None
    most_steps: int | None = None


def training_of(
    settings: Settings,
    model: PoissonFactorization,
    mode: str,
    tol: float,
    kl_weight: float = 1.0,
    *,
    warm: bool = False,
    moves_factors: bool = True,
    loadings: type[ClosedFormLoadings] | None = ClosedFormLoadings,
    least_scale: float = 0.0,
) -> Training:
    """Say how the parameters of an estimator have a model trained in one stage.

    After a warm-up (`warm`) the covariance of q may move seldom. `loadings` is the kind of steps of
    multiplicative loadings; None leaves loadings of any kind at rest. `least_scale` is how small a
    learned scale of the prior may become.
    """
    natural = settings.training_mode == "natural"
    batched = settings.batch_size is not None or settings.y_batch_size is not None
    exact = loadings in (ClosedFormLoadings, None)  # others do not maximise the bound
    noisy = mode != "lower-bound" and settings.E != FIXED
    monotone = natural and not noisy and not batched and exact
    apart = monotone and warm and moves_factors
    every = max(part.steps_apart for part in model.prior.parts) if apart else 1
    n_batches = math.ceil(model.N / (settings.batch_size or model.N))
    in_pass = n_batches * math.ceil(model.D / (settings.y_batch_size or model.D))
    for_q, for_W = _sizes(settings, noisy, n_batches, in_pass)
    steps: list[tuple[Step, Schedule]] = []
    if natural and moves_factors:
        for part in model.prior.parts:
            own = part.steps_apart if apart else 1
            steps.append((SiteSteps(part, kl_weight, own), for_q))
    if settings.loadings_mode == "multiplicative" and loadings is not None:
        steps.append((loadings(model.W, model.expected_totals, model.levels), for_W))
    named = settings.prior is None  # the scale of an object is its own
    if settings.scale_pf == "auto" and named:
        plain = [part for part in model.prior.parts if isinstance(part, GaussianPrior)]
        steps += [(ClosedFormScale(part, least_scale, model.ranks), for_W) for part in plain]
    if moves_factors:
        beside = [*model.own_steps(loadings is None), *effect_steps(model)]
        steps += [(step, for_W) for step in beside]
    by_gradient = _trained_by_gradient(settings, model, moves_factors, loadings is not None)
    if by_gradient:
        optimizer = OPTIMIZERS[settings.optimizer](by_gradient, lr=settings.learning_rate)
        steps.insert(0, (GradientSteps(optimizer), _schedule(settings)))
    in_window = max(Convergence.window, in_pass)  # whole passes, which see all samples
    judge = Settled(tol, max(5, every)) if monotone else Convergence(tol, window=in_window)
    objective = FactorizationELBO(mode, settings.E, natural, kl_weight)
    return Training(model, objective, steps, judge, monotone)


def _sizes(
    settings: Settings, noisy: bool, n_batches: int, in_pass: int
) -> tuple[Schedule, Schedule]:
    """How the sizes of steps in closed form change, of q and of W: 1 unless they are noisy.

    A pass takes `n_batches` of samples for each batch of features, in all `in_pass` steps.
    """
    steady = not noisy and settings.y_batch_size is None
    for_q = Constant() if steady else Decreasing()
    if settings.batch_size is None:
        return for_q, for_q
    # Each batch sees W anew: average over a share of a pass.
    return for_q, Decreasing(PASSES * in_pass, start=min(1.0, RENEWALS / n_batches))


def _trained_by_gradient(
    settings: Settings, model: PoissonFactorization, moves_factors: bool, moves_loadings: bool
) -> list[torch.nn.Parameter]:
    parameters: list[torch.nn.Parameter] = []
    if settings.training_mode == "standard" and moves_factors:
        parameters += model.prior.parameters()
        if isinstance(model.observation, torch.nn.Module):
            parameters += model.observation.parameters()
    if settings.loadings_mode != "multiplicative" and moves_loadings:
        parameters.append(model.W.raw)
    return parameters


def _schedule(settings: Settings) -> Schedule:
    """The schedule of the learning rate that the parameters name."""
    schedules: dict[str | None, Schedule] = {
        "one_cycle": OneCycle(
            settings.scheduler_pct_start,
            settings.scheduler_div_factor,
            settings.scheduler_final_div_factor,
        ),
        "plateau": Plateau(settings.scheduler_patience, settings.scheduler_factor, settings.min_lr),
        None: Constant(),
    }
    return schedules[settings.scheduler]
