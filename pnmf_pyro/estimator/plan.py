"""What an estimator's parameters and the data make: a model, the runs that train it, their course.

Below this there are objects and no words: everything that a parameter chooses by name is made here,
or by the stages of :mod:`pnmf_pyro.estimator.stages`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.random_state import check_random_state, torch_generator
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.parameters import Settings, closed_form, learned
from pnmf_pyro.estimator.prior import make_prior
from pnmf_pyro.estimator.runs import Run, Training
from pnmf_pyro.estimator.stages import (
    Correlate,
    Draft,
    LearnHyperparameters,
    Settle,
    Stage,
    WarmUp,
)
from pnmf_pyro.estimator.verdict import warn_of_doubts
from pnmf_pyro.initialization import start_values
from pnmf_pyro.models import LIKELIHOODS, PoissonFactorization
from pnmf_pyro.models.effects import start_effects
from pnmf_pyro.models.factorization import Likelihood
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.priors import LCGP, Prior
from pnmf_pyro.training.convergence import Convergence, Judge
from pnmf_pyro.training.loop import final_elbo, train
from pnmf_pyro.training.progress import Progress, StageCost

logger = logging.getLogger("pnmf_pyro")

# Steps after which starts are compared: the ELBO of ten still misleads.
TRIAL_STEPS = 20

# Draws for the ELBO of a finished fit, which is quoted and compared.
FINAL_DRAWS = 20

# Name of what comes after the stages, in a progress bar.
LAST = "ELBO"


def make_model(
    settings: Settings, data: Data, random: np.random.RandomState
) -> PoissonFactorization:
    """Make the model that the parameters name for the data, on the device of the counts."""
    shape, dtype = data.counts.shape[::-1], data.counts.dtype
    y = torch.empty(shape, dtype=dtype, device="meta")
    prior = make_prior(settings, data, random)
    model = PoissonFactorization(
        prior,
        y,
        settings.n_components,
        settings.loadings_mode,
        settings.mode,
        size_factors=data.exposure(),
        likelihood=likelihood_part(settings, data.counts.shape[1]),
    )
    return model.to(data.counts.device)


def likelihood_part(settings: Settings, n_features: int) -> Likelihood | None:
    """Make the likelihood that a name stands for, or copy that which was passed as an object."""
    given = getattr(settings, "likelihood_", settings.likelihood)
    if given is None or isinstance(given, str):
        return LIKELIHOODS[given or "poisson"](n_features)
    return copy.deepcopy(given)


def make_runs(
    settings: Settings, data: Data, model: PoissonFactorization, random: np.random.RandomState
) -> list[Run]:
    """Return what the stages of a fit do, one after another."""
    draft = Draft(settings, data.counts, model, random, learned(settings))
    given = cast(Sequence[Stage] | None, settings.stages)
    stages = default_stages(settings, model.prior) if given is None else given
    runs = [run for stage in stages for run in stage.plan(draft)]
    if not runs or runs[0].training is None:
        raise ValueError(
            "stages must begin with a stage that trains, such as Settle() or WarmUp(); got "
            f"{list(stages)!r}."
        )
    return runs


def default_stages(settings: Settings, prior: Prior) -> Sequence[Stage]:
    """Return the stages of a fit for which none are named.

    Hyperparameters of a field, and which of several kernels it has, are learned where the field
    has settled. So is the part of q(F) that is correlated over places that have neighbours. Where
    only some components are of fields, a warm-up says which.
    """
    stages: list[Stage] = [WarmUp(), Settle()] if prior.is_mixed else [Settle()]
    if learned(settings) or (settings.spatial and isinstance(settings.kernel, list | tuple)):
        no_bound = not closed_form(settings)
        first = WarmUp() if no_bound or prior.is_mixed else Settle(mode="lower-bound")
        stages = [first, LearnHyperparameters(), Settle()]
    if any(isinstance(part, LCGP) for part in prior.parts):
        stages += [Correlate(), Settle()]
    return stages


class History(list):
    """ELBO at each step of a fit, in nats.

    Attributes
    ----------
    stages : list of (str, int, int)
        Name of each stage that trained, the number of its first step, and that after its last. The
        ELBO of a stage is that of what it trains: a warm-up's is of its own model, and a weighted
        divergence counts with its weight.
    """

    def __init__(self, values: Iterable[float] = (), stages: Iterable[Sequence] = ()):
        super().__init__(values)
        self.stages = [(str(name), int(first), int(last)) for name, first, last in stages]


OnStep = Callable[[PoissonFactorization, int, float], None]


def fit_by_plan(
    settings: Settings, data: Data, on_step: OnStep, costs: Sequence[StageCost] = ()
) -> tuple[PoissonFactorization, History, tuple[float, float]]:
    """Make a model of the data, train it through all stages; return its ELBO and the error as well.

    `on_step` is called with the model, the number of the step and the ELBO after it. A progress bar
    shows how far it is, where the `costs` of the stages are given.
    """
    random, counts = check_random_state(settings.random_state), data.counts
    model = make_model(settings, data, random)
    runs = make_runs(settings, data, model, random)
    starts = make_starts(settings, runs[0], counts, random)
    generator = torch_generator(random)
    with Progress(costs) as progress:
        history = train_runs(runs, starts, settings, counts, generator, on_step, progress)
        progress.begin(LAST)
        batches = Batches(counts, settings.batch_size)
        elbo = final_elbo(model, batches, settings.mode, FINAL_DRAWS, generator)
        if not isinstance(counts, StoredCounts):  # it takes more memory than all the rest
            find_uncertainty(model, counts)
    warn_of_doubts(model, counts, elbo[0])
    return model.eval(), history, elbo


def make_starts(
    settings: Settings, first: Run, counts: Counts, random: np.random.RandomState
) -> list[tuple[Tensor, Tensor]]:
    """Return the values W (D, L) and exp F (N, L) from which the first run may start."""
    inits = settings.init if isinstance(settings.init, list | tuple) else [settings.init]
    counts = counts if first.counts is None else first.counts
    model = cast(Training, first.training).model
    s, counts = model.size_factors, start_effects(model.exposure, counts)
    return [start_values(counts, settings.n_components, init, random, s) for init in inits]


def train_runs(
    runs: Sequence[Run],
    starts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    settings: Settings,
    counts: Counts,
    generator: torch.Generator,
    on_step: OnStep,
    progress: Progress,
) -> History:
    """Train through all runs, from the best of several starts W (D, L) and exp F (N, L).

    Each run may take an equal share of the iterations that are left of `max_iter`. Steps on coarse
    levels count, but they have no place in the history, which is that of all samples.
    """
    history, taken = History(), 0
    left = sum(run.training is not None for run in runs)
    for run in runs:
        progress.begin(run.name)
        run.prepare()
        training = run.training
        if training is None:
            continue
        share = (settings.max_iter - taken) // left
        left -= 1
        seen = counts if run.counts is None else run.counts
        told = history if run.counts is None else History()
        first = len(told)
        if run is runs[0]:
            told += _best_start(training, starts, settings, seen, generator, share, progress)
        budget = min(first + share - len(told), run.most_steps or share)
        quiet = told is not history
        report = told.append if quiet else partial(_report, history, on_step, training.model)
        each = progress.telling(report)
        train_run(training, settings, seen, generator, budget, on_step=each, warn=training.warns)
        taken += len(told) - first
        told.stages.append((run.name, first, len(told)))
        if quiet and told:
            logger.info("%s: %d steps, ELBO %.6g", run.name, len(told), told[-1])
    return history


def _report(history: History, on_step: OnStep, model: PoissonFactorization, elbo: float) -> None:
    history.append(elbo)
    on_step(model, len(history), elbo)


def _best_start(
    training: Training,
    starts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    settings: Settings,
    counts: Counts,
    generator: torch.Generator,
    max_iter: int,
    progress: Progress,
) -> list[float]:
    """Set the model to the best of several starts; return the ELBO of the steps it took."""
    model, steps, tried = training.model, min(TRIAL_STEPS, max_iter), []
    for start in starts:
        model.assign(*start)
        if len(starts) == 1 or steps < 1:
            return []
        each = progress.telling(lambda elbo: None)
        given = (training, settings, counts, generator, steps)
        history = train_run(*given, on_step=each, warn=False, settles=False)
        tried.append((history, {k: v.clone() for k, v in model.state_dict().items()}))
    history, state = max(tried, key=lambda one: one[0][-1])
    model.load_state_dict(state)
    return history


def train_run(
    training: Training,
    settings: Settings,
    counts: Counts,
    generator: torch.Generator,
    max_iter: int,
    *,
    settles: bool = True,
    **keywords: Any,
) -> list[float]:
    """Train by one run for `max_iter` steps, or until it `settles`; return the ELBO of each."""
    if max_iter < 1:
        return []
    judge: Judge | None = training.convergence if settles else None
    if isinstance(judge, Convergence):
        judge = replace(judge, start=max(one.warm_up(max_iter) for _, one in training.steps))
    return train(
        training.model,
        make_batches(settings, counts, generator),
        training.objective,
        training.steps,
        generator,
        max_iter=max_iter,
        monotone=training.monotone,
        extrapolates=training.extrapolates,
        convergence=judge,
        **keywords,
    ).history


def make_batches(settings: Settings, counts: Counts, generator: torch.Generator) -> Batches:
    """Return the stream of batches that training goes through."""
    return Batches(
        counts,
        settings.batch_size,
        settings.y_batch_size,
        settings.shuffle,
        settings.scale_ll_D,
        settings.scale_kl_NM,
        generator,
    )
