"""Stages of a fit: what is trained, by which objective, until when.

A fit goes through a list of stages, `PNMF(stages=[...])`. Each says in one line what it does, and
they combine freely. The iterations that `max_iter` allows are shared out among the stages that
train: each may take as many as an equal share of what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.checks import (
    MODES,
    check_choice,
    check_count,
    check_flag,
    check_positive,
    check_whole,
)
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.estimator.coarse import hand_down, levels_of, of_bins
from pnmf_pyro.estimator.drafts import Draft, Stage
from pnmf_pyro.estimator.runs import Run, training_of
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import LCGP, GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.arrangement import arrange
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.hyperparameters import CRITERIA, HyperparameterSearch
from pnmf_pyro.training.joint_loadings import SMALL, has_joint_rounds, settle_jointly
from pnmf_pyro.training.loadings import ClosedFormLoadings, ShrunkLoadings
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.site_regression import start_from

# Smallest scale that a warm-up learns, that of the log-factors to start from.
LEAST_SCALE = 1.0

# Steps of a warm-up cost little, and what they find the rest builds on.
WARM_UP_TOL = 0.4

# Steps in which samples depart from the bins they came from, given the loadings. Many would leave
# each to its own counts alone.
SAMPLE_STEPS = 3

# Steps at most in which q settles given loadings that have settled jointly.
Q_STEPS = 100


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

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_choice("mode", self.mode, MODES)
        check_positive("kl_weight", self.kl_weight)

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return the run of the training loop."""
        settings = draft.settings
        mode = settings.mode if self.mode is None else self.mode
        if not draft.model.has_closed_form and mode == "lower-bound":
            raise ValueError(
                "stages: Settle(mode='lower-bound') has no closed form of another likelihood; use "
                "WarmUp(), which trains by the Poisson, or mode='expanded'."
            )
        training = training_of(
            settings, draft.model, mode, settings.tol, self.kl_weight, warm=draft.warm
        )
        draft.kl_weight = self.kl_weight
        return [Run("settle", training, draft.take_over())]


@dataclass(frozen=True)
class WarmUp:
    """Train in `lower-bound` mode, which has no noise, until it has settled.

    A model in space, or of another likelihood, begins with Poisson factors that know no space: they
    decide which components are found. Where there are many samples in space these are factors of
    bins of places, see :mod:`~pnmf_pyro.training.levels`.

    Parameters
    ----------
    kl_weight : float
        Factor on the divergence from the prior.
    levels : int, optional
        Number of coarse levels at most, 0 for none; unless given it follows from the counts.
    """

    kl_weight: float = 1.0
    levels: int | None = None

    def __post_init__(self) -> None:
        check_positive("kl_weight", self.kl_weight)
        if self.levels is not None:
            check_whole("levels", self.levels)

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return the runs of the training loop, one for each level."""
        model = draft.model
        if model.prior.places is None and model.has_closed_form:
            draft.kl_weight = self.kl_weight
            draft.trained, draft.warm = model, True
            return [self._run(draft, "warm-up", model)]
        if draft.trained is not None:
            raise ValueError(
                "stages: WarmUp() of a model in space, or of another likelihood, trains "
                "another model to start from; put it first."
            )
        draft.trained, draft.warm = _independent(draft, model.N, model.exposure), True
        if model.has_closed_form:
            draft.trained.observation = model.observation
        runs, last = [], None
        levels = levels_of(model, draft.counts)
        most = len(levels) if self.levels is None else self.levels
        for level in levels[max(0, len(levels) - most) :]:
            exposure = of_bins(model.exposure, level, draft.counts)
            coarse = _independent(draft, len(level.centres), exposure)
            run = self._run(draft, f"{len(level.centres)} bins", coarse)
            run.counts = level.counts
            if last is not None:
                run.prepare = partial(hand_down, *last, coarse, level.centres)
            runs.append(run)
            last = coarse, level
        order = Run("order", prepare=partial(arrange, draft.trained, model.prior))
        ordered = [order] if model.prior.is_mixed else []
        if last is None:
            return [self._early(draft, draft.trained), *ordered]
        samples = self._run(draft, "samples", draft.trained, loadings=None)
        samples.prepare = partial(hand_down, *last, draft.trained, np.arange(model.N))
        samples.most_steps = SAMPLE_STEPS
        return [*runs, samples, *ordered]

    def _early(self, draft: Draft, model: PoissonFactorization) -> Run:
        """A run that ends early: settled, factors of single samples fit their noise."""
        run = self._run(draft, "warm-up", model)
        assert run.training is not None
        if run.training.monotone:
            run.training.extrapolates = False
            run.training.convergence = Convergence(draft.settings.tol, window=5, patience=1)
        return run

    def _run(
        self,
        draft: Draft,
        name: str,
        model: PoissonFactorization,
        loadings: type[ClosedFormLoadings] | None = ClosedFormLoadings,
    ) -> Run:
        training = training_of(
            draft.settings,
            model,
            "lower-bound",
            WARM_UP_TOL * draft.settings.tol,
            self.kl_weight,
            warm=True,
            loadings=loadings,
            least_scale=LEAST_SCALE,
        )
        training.warns = model is draft.model
        return Run(name, training)


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

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return the search, from what was trained before."""
        source, draft.trained = draft.trained, draft.model
        if draft.model.prior.places is None or source is None:
            raise ValueError(
                "stages: LearnHyperparameters() needs a spatial model and a stage before it that "
                "trains; set spatial=True, or leave the stage out."
            )
        model = draft.model
        searches = [
            HyperparameterSearch(
                model, draft.counts, draft.learned, self.criterion, draft.random, number
            )
            for number in range(len(model.prior.fields))
        ]

        def learn() -> None:
            if source is not model:  # searches start the fields
                start_from(model.prior, source, draft.counts, fields=False)
            for search in searches:
                search.learn_from(source)

        return [Run("hyperparameters", prepare=learn)]


@dataclass(frozen=True)
class RestoreSpread:
    """Give q the covariance that a weight of 1 on the divergence says, around the same means."""

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return the restoration of the spread that the stages before made narrow or wide."""
        prior, take_over = draft.model.prior, draft.take_over()
        if not prior.natural:
            raise ValueError(
                "stages: RestoreSpread() needs a q(F) that is held in sites; set "
                "training_mode='natural' and diagonal_only=False, or leave the stage out."
            )
        weight, draft.kl_weight = draft.kl_weight, 1.0

        def restore() -> None:
            take_over()
            prior.restore_spread(weight)

        return [Run("spread", prepare=restore)]


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

    def __post_init__(self) -> None:
        if self.rank != 0:
            check_count("rank", self.rank)

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return the drawing of the correlated part."""
        parts, take_over = draft.model.prior.parts, draft.take_over()
        local = [part for part in parts if isinstance(part, LCGP)]
        if not local:
            raise ValueError(
                "stages: Correlate() is for a prior with neighbours; set local=True, or leave the "
                "stage out."
            )

        def correlate() -> None:
            take_over()
            for part in local:
                part.correlate(self.rank)

        return [Run("correlation", prepare=correlate)]


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

    def __post_init__(self) -> None:
        check_flag("shrink", self.shrink)

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return the run of the training loop."""
        settings, model = draft.settings, draft.model
        if self.shrink and settings.loadings_mode != "multiplicative":
            raise ValueError(
                "stages: SettleLoadings(shrink=True) needs loadings in closed form; set "
                f"loadings_mode='multiplicative'. loadings_mode is {settings.loadings_mode!r}."
            )
        loadings = ShrunkLoadings if self.shrink else ClosedFormLoadings
        training = training_of(
            settings, model, settings.mode, settings.tol, moves_factors=False, loadings=loadings
        )
        return [Run("loadings", training, draft.take_over())]


@dataclass(frozen=True)
class SettleJointly:
    """Settle loadings under the joint posterior of the components of a sample, then q given them.

    The bound of a factorised q leads to loadings that are too distinct where components share
    features, see :mod:`~pnmf_pyro.training.joint_loadings`. It is for Poisson counts without space
    and effects, for steps in closed form without noise, and for N D L^2 up to 10,000,000.

    Parameters
    ----------
    rounds : int
        At most; they go on while the evidence rises.
    """

    rounds: int = 300

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return what moves loadings and the scale of the prior, and then q."""
        settings, model, counts = draft.settings, draft.model, draft.counts
        training = training_of(settings, model, settings.mode, settings.tol, loadings=None)
        closed = training.monotone and settings.loadings_mode == "multiplicative"
        if not (closed and has_joint_rounds(model)):
            raise ValueError(
                "stages: SettleJointly() is for Poisson counts in memory, without space, batches, "
                "covariates and other processes, for steps in closed form without noise, and for "
                f"N D L^2 up to {SMALL:,}, here {model.N * model.D * model.L**2:,}. Leave it out."
            )
        for_q = [one for one in training.steps if isinstance(one[0], SiteSteps)]
        learns_scale, take_over = len(for_q) < len(training.steps), draft.take_over()
        judge = training.convergence

        def settle() -> None:
            take_over()
            seed = draft.random.randint(2**31)
            if settle_jointly(model, counts, self.rounds, learns_scale, seed):
                given = model, Batches(counts), training.objective, for_q, torch.Generator()
                train(*given, max_iter=Q_STEPS, convergence=judge, monotone=True, warn=False)

        return [Run("joint", prepare=settle)]


STAGES = (
    Settle,
    SettleJointly,
    WarmUp,
    LearnHyperparameters,
    RestoreSpread,
    Correlate,
    SettleLoadings,
)


def plain_stage(stage: Any) -> dict[str, Any]:
    """Return a stage as its name and values; a TypeError for one of the user's own."""
    if type(stage) not in STAGES:
        raise TypeError(f"{stage!r} is no stage of pnmf_pyro.estimator.stages")
    return {"stage": type(stage).__name__, **asdict(stage)}


def stage_of(plain: Mapping[str, Any]) -> Stage:
    """Return the stage of which :func:`plain_stage` made name and values."""
    kinds = {stage.__name__: stage for stage in STAGES}
    values = {name: value for name, value in plain.items() if name != "stage"}
    return kinds[plain["stage"]](**values)


def _independent(
    draft: Draft, N: int, exposure: Exposure | torch.Tensor | None
) -> PoissonFactorization:
    """A Poisson factorisation of N samples, of the same loadings, whose factors know no space."""
    model, settings = draft.model, draft.settings
    y = torch.empty((model.D, N), dtype=model.W.dtype, device="meta")
    scale = 1.0 if isinstance(settings.scale_pf, str) else settings.scale_pf
    prior = GaussianPrior(y, model.L, scale, settings.training_mode == "natural")
    independent = PoissonFactorization(
        prior, y, model.L, model.loadings_mode, model.mode, size_factors=exposure
    )
    independent.W = model.W
    independent.to(model.W.device).exposure.effects = model.exposure.effects
    return independent
