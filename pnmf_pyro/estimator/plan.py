"""What an estimator's parameters and the data make: a model, the runs that train it, their course.

Below this there are objects and no words: everything that a parameter chooses by name is made here,
or by the stages of :mod:`pnmf_pyro.estimator.stages`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.random_state import check_random_state, torch_generator
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.estimator.checkpoints import Unkept
from pnmf_pyro.estimator.course import FitCourse, History, OnStep, Starts, train_runs
from pnmf_pyro.estimator.drafts import Draft, Stage
from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.parameters import Settings, closed_form, learned
from pnmf_pyro.estimator.prior import make_prior
from pnmf_pyro.estimator.runs import Run, Training
from pnmf_pyro.estimator.stages import (
    Correlate,
    LearnHyperparameters,
    Settle,
    WarmUp,
)
from pnmf_pyro.estimator.verdict import warn_of_doubts
from pnmf_pyro.initialization import start_values
from pnmf_pyro.models import LIKELIHOODS, PoissonFactorization
from pnmf_pyro.models.effects import start_effects
from pnmf_pyro.models.factorization import Likelihood
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.priors import LCGP, Prior
from pnmf_pyro.training.loop import final_elbo
from pnmf_pyro.training.progress import Progress, StageCost

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
    model.ranks = data.counts.ranks
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


def fit_by_plan(
    settings: Settings,
    data: Data,
    on_step: OnStep,
    costs: Sequence[StageCost] = (),
    checkpoint: Unkept | None = None,
) -> tuple[PoissonFactorization, History, tuple[float, float]]:
    """Make a model of the data, train it through all stages; return its ELBO and the error as well.

    `on_step` is called with the model, the number of the step and the ELBO after it. A progress bar
    shows how far it is, where the `costs` of the stages are given. The fit goes on from what the
    `checkpoint` has found, and is kept there.
    """
    random, counts = check_random_state(settings.random_state), data.counts
    model = make_model(settings, data, random)
    runs = make_runs(settings, data, model, random)
    course = FitCourse(runs, model, checkpoint or Unkept())
    starts: Starts = []
    if course.is_new:
        starts = make_starts(settings, runs[0], counts, random)
        course.generator = torch_generator(random)
    with Progress(costs) as progress:
        history = train_runs(course, starts, settings, counts, on_step, progress)
        progress.begin(LAST)
        batches = Batches(counts, settings.batch_size)
        elbo = final_elbo(model, batches, settings.mode, FINAL_DRAWS, course.generator)
        if not isinstance(counts, StoredCounts):  # it takes more memory than all the rest
            find_uncertainty(model, counts)
    warn_of_doubts(model, counts, elbo[0])
    return model.eval(), history, elbo


def make_starts(
    settings: Settings, first: Run, counts: Counts, random: np.random.RandomState
) -> Starts:
    """Return the values W (D, L) and exp F (N, L) from which the first run may start."""
    inits = settings.init if isinstance(settings.init, list | tuple) else [settings.init]
    counts = counts if first.counts is None else first.counts
    model = cast(Training, first.training).model
    s, counts = model.size_factors, start_effects(model.exposure, counts)
    return [start_values(counts, settings.n_components, init, random, s) for init in inits]
