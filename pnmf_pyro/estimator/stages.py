"""Stages of a fit: what is trained, by which objective, until when.

A fit goes through a list of stages, `PNMF(stages=[...])`. Each says in one line what it does, and
they combine freely. The iterations that `max_iter` allows are shared out among the stages that
train: each may take as many as an equal share of what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.estimator.parameters import Settings
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP, GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps, Step
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.hyperparameters import HyperparameterSearch
from pnmf_pyro.training.loadings import ClosedFormLoadings, ClosedFormScale, ShrunkLoadings
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

# A warm-up of the same factors only has to bring a fit near; it settles at this multiple of the
# tolerance.
WARM_UP_TOL = 10

# Size of the first step of q and W where batches see parts of a field: from a cold start, a whole
# step that the samples of one batch ask for carries the others too far.
PARTIAL = 0.3


@dataclass
class Training:
    """One run of the training loop.

    Attributes
    ----------
    model : PoissonFactorization
        What is trained.
    objective : FactorizationELBO
        What is raised.
    steps : sequence of (Step, Schedule)
        The steps that raise it.
    convergence : Convergence
        When it has settled.
    monotone : bool
        Whether the objective has no noise, so that steps that lower it are halved.
    warns : bool
        Whether to warn where it has not settled.
    """

    model: PoissonFactorization
    objective: FactorizationELBO
    steps: Steps
    convergence: Convergence
    monotone: bool
    warns: bool = True


@dataclass
class Run:
    """What a stage does: something to the model at once, some training, or both.

    Attributes
    ----------
    name : str
        Name of the stage.
    training : Training or None
    prepare : callable
        Function that is called first.
    """

    name: str
    training: Training | None = None
    prepare: Callable[[], object] = lambda: None


@dataclass
class Draft:
    """A fit as far as it is planned.

    Attributes
    ----------
    settings : Settings
        Estimator with the parameters of the fit.
    counts : Counts of shape (N, D)
    model : PoissonFactorization
        The model of the fit.
    random : RandomState
        Source of what a search draws.
    learned : list of str
        Hyperparameters of the kernel to learn.
    trained : PoissonFactorization
        The model that the stages before have trained: a warm-up in space trains another one.
    warm : bool
        Whether a stage before was a warm-up.
    kl_weight : float
        Weight of the divergence in the stages before.
    """

    settings: Settings
    counts: Counts
    model: PoissonFactorization
    random: np.random.RandomState
    learned: list[str]
    trained: PoissonFactorization | None = None
    warm: bool = False
    kl_weight: float = 1.0


class Stage(Protocol):
    """One stage of a fit."""

    def plan(self, draft: Draft) -> Run:
        """Return what the stage does, given those before it."""


@dataclass(frozen=True)
class Settle:
    """Train factors and loadings until the objective has settled.

    Parameters
    ----------
    mode : {'simple', 'expanded', 'lower-bound'}, optional
        Form of the ELBO; that of the estimator unless given.
    kl_weight : float
        Factor on the divergence from the prior. Below 1 factors follow the counts of their own
        sample more closely, and their uncertainty is too small until it is restored.
    """

    mode: str | None = None
    kl_weight: float = 1.0

    def plan(self, draft: Draft) -> Run:
        """Return the run of the training loop."""
        mode = draft.settings.mode if self.mode is None else self.mode
        training = _training(draft, draft.model, mode, draft.settings.tol, self.kl_weight)
        draft.trained, draft.kl_weight = draft.model, self.kl_weight
        return Run("settle", training)


@dataclass(frozen=True)
class WarmUp:
    """Train in `lower-bound` mode, which has no noise, until it has nearly settled.

    A spatial model begins with factors that know no space and settle to the tolerance of the fit:
    they decide which components are found.

    Parameters
    ----------
    kl_weight : float
        Factor on the divergence from the prior.
    """

    kl_weight: float = 1.0

    def plan(self, draft: Draft) -> Run:
        """Return the run of the training loop."""
        settings, model = draft.settings, draft.model
        tol = WARM_UP_TOL * settings.tol
        if model.prior.places is not None or model.observation is not None:
            model, tol = _independent(draft), settings.tol
        draft.trained, draft.warm = model, True
        training = _training(draft, model, "lower-bound", tol, self.kl_weight)
        training.warns = False
        return Run("warm-up", training)


@dataclass(frozen=True)
class LearnHyperparameters:
    """Learn the hyperparameters that `learn` names, and which of several kernels is the best.

    The judge is how well samples are predicted from the others; see
    :class:`~pnmf_pyro.training.hyperparameters.HyperparameterSearch`.

    Parameters
    ----------
    criterion : {'leave-one-out', 'elbo'}
        The deviance of counts predicted without their own sample, or the ELBO.
    """

    criterion: str = "leave-one-out"

    def plan(self, draft: Draft) -> Run:
        """Return the search, from what was trained before."""
        source = draft.trained
        if draft.model.prior.places is None or source is None:
            raise ValueError(
                "stages: LearnHyperparameters() needs a spatial model and a stage before it that "
                "trains; set spatial=True, or leave the stage out."
            )
        search = HyperparameterSearch(
            draft.model, draft.counts, draft.learned, self.criterion, draft.random
        )
        return Run("hyperparameters", prepare=lambda: search.learn_from(source))


@dataclass(frozen=True)
class RestoreSpread:
    """Give q the covariance that a weight of 1 on the divergence says, around the same means."""

    def plan(self, draft: Draft) -> Run:
        """Return the restoration of the spread that the stages before made narrow or wide."""
        prior, weight = draft.model.prior, draft.kl_weight
        prior.check_sites()
        return Run("spread", prepare=lambda: prior.restore_spread(weight))


@dataclass(frozen=True)
class Correlate:
    """Give q the part that is correlated over places, for a prior with neighbours (`local=True`).

    It makes uncertainties and draws those of the posterior. A stage that settles should follow.

    Parameters
    ----------
    rank : int
        Number of columns of that part; 0 leaves marginals independent, and standard deviations too
        small.
    """

    rank: int = 30

    def plan(self, draft: Draft) -> Run:
        """Return the drawing of the correlated part."""
        prior = draft.model.prior
        if not isinstance(prior, LCGP):
            raise ValueError("stages: Correlate() is for local=True; leave it out.")
        return Run("correlation", prepare=lambda: prior.correlate(self.rank))


@dataclass(frozen=True)
class SettleLoadings:
    """Train the loadings, with q(F) at rest.

    Parameters
    ----------
    shrink : bool
        Give multiplicative loadings a gamma prior that is learned from them, see
        :class:`~pnmf_pyro.training.loadings.ShrunkLoadings`. New samples are predicted better
        where features have few counts, at the cost of a little of the bound.
    """

    shrink: bool = False

    def plan(self, draft: Draft) -> Run:
        """Return the run of the training loop."""
        settings, model = draft.settings, draft.model
        if self.shrink and settings.loadings_mode != "multiplicative":
            raise ValueError(
                "stages: SettleLoadings(shrink=True) needs loadings in closed form; set "
                f"loadings_mode='multiplicative'. loadings_mode is {settings.loadings_mode!r}."
            )
        loadings = ShrunkLoadings if self.shrink else ClosedFormLoadings
        training = _training(
            draft, model, settings.mode, settings.tol, moves_factors=False, loadings=loadings
        )
        return Run("loadings", training)


STAGES = (Settle, WarmUp, LearnHyperparameters, RestoreSpread, Correlate, SettleLoadings)


def _independent(draft: Draft) -> PoissonFactorization:
    """The same Poisson factorisation, of the same loadings, with factors that know no space."""
    model, settings = draft.model, draft.settings
    y = torch.empty((model.D, model.N), dtype=model.W.dtype, device="meta")
    prior = GaussianPrior(y, model.L, use_natural_gradients=settings.training_mode == "natural")
    independent = PoissonFactorization(
        prior, y, model.L, model.loadings_mode, model.mode, size_factors=model.size_factors
    )
    independent.W = model.W
    return independent.to(model.W.device)


def _training(
    draft: Draft,
    model: PoissonFactorization,
    mode: str,
    tol: float,
    kl_weight: float = 1.0,
    *,
    moves_factors: bool = True,
    loadings: type[ClosedFormLoadings] = ClosedFormLoadings,
) -> Training:
    """Say how a model is trained in one stage."""
    settings = draft.settings
    natural = settings.training_mode == "natural"
    batched = settings.batch_size is not None or settings.y_batch_size is not None
    exact = loadings is ClosedFormLoadings  # others do not maximise the bound
    monotone = natural and mode == "lower-bound" and not batched and exact
    every = model.prior.steps_apart if monotone and draft.warm and moves_factors else 1
    for_q, for_W = _sizes(settings, model, mode)
    steps: list[tuple[Step, Schedule]] = []
    if natural and moves_factors:
        steps.append((SiteSteps(model.prior, kl_weight, every), for_q))
    if settings.loadings_mode == "multiplicative":
        steps.append((loadings(model.W, model.expected_totals), for_W))
    if settings.scale_pf == "auto" and isinstance(model.prior, GaussianPrior):
        steps.append((ClosedFormScale(model.prior), for_W))
    by_gradient = _trained_by_gradient(settings, model, moves_factors)
    if by_gradient:
        optimizer = OPTIMIZERS[settings.optimizer](by_gradient, lr=settings.learning_rate)
        steps.insert(0, (GradientSteps(optimizer), _schedule(settings)))
    # An ELBO without noise can be judged sooner.
    settled = {"window": max(5, every), "patience": 1} if monotone else {}
    objective = FactorizationELBO(mode, settings.E, natural, kl_weight)
    return Training(model, objective, steps, Convergence(tol, **settled), monotone)


def _sizes(settings: Settings, model: PoissonFactorization, mode: str) -> tuple[Schedule, Schedule]:
    """How the sizes of steps in closed form change, of q and of W: 1 unless they are noisy."""
    noisy = mode != "lower-bound" or settings.y_batch_size is not None
    batched = settings.batch_size is not None
    parts_of_fields = batched and model.prior.places is not None
    start = PARTIAL if parts_of_fields else 1.0
    for_q = Decreasing(start=start) if noisy or parts_of_fields else Constant()
    # Each batch sees W anew: average over many of them.
    return for_q, Decreasing(delay=100.0, start=start) if batched else for_q


def _trained_by_gradient(
    settings: Settings, model: PoissonFactorization, moves_factors: bool
) -> list[torch.nn.Parameter]:
    parameters: list[torch.nn.Parameter] = []
    if settings.training_mode == "standard" and moves_factors:
        parameters += model.prior.parameters()
        if isinstance(model.observation, torch.nn.Module):
            parameters += model.observation.parameters()
    if settings.loadings_mode != "multiplicative":
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
