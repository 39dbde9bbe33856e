"""The course of a fit through its runs, and where it stands: what a checkpoint holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.checks import noting, warn
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.resumable import Resumable, State
from pnmf_pyro.estimator.checkpoints import Unkept
from pnmf_pyro.estimator.parameters import Settings
from pnmf_pyro.estimator.runs import Run, Training, nothing
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.training.convergence import Convergence, Judge
from pnmf_pyro.training.course import Course, Keeper
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.progress import Progress

logger = logging.getLogger("pnmf_pyro")

# Steps after which starts are compared: the ELBO of ten still misleads.
TRIAL_STEPS = 20

# Categories of warnings, by their names.
CATEGORIES = {kind.__name__: kind for kind in (UserWarning, ConvergenceWarning)}

Starts = list[tuple[Tensor, Tensor]]


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


class FitCourse(Keeper, Resumable):
    """Where a fit stands: before one of its runs, after the last, or at a whole step of one.

    Parameters
    ----------
    runs : list of Run
        What the fit does in turn. Those that are over are emptied.
    model : PoissonFactorization
        The model of the fit.
    checkpoint : Unkept
        Where the course is kept. The fit goes on from what it has found.

    Attributes
    ----------
    number : int
        Number of the present run.
    taken : int
        Steps of the runs before.
    history : History
        ELBO at each step.
    told : History
        The same of the present run, where that is on coarse levels; `history` otherwise.
    first, budget : int
        Number of the first step of the present run in `told`, and steps that it may still take.
    said : list of (str, str)
        Warnings of the fit, with their categories.
    generator : torch.Generator
        Source of all draws.
    """

    carried = ("number", "taken", "first", "budget", "said")

    def __init__(self, runs: list[Run], model: PoissonFactorization, checkpoint: Unkept):
        self.runs, self.model, self.checkpoint = runs, model, checkpoint
        self.number = self.taken = self.first = self.budget = 0
        self.history = self.told = History()
        self.said: list[tuple[str, str]] = []
        self.generator = torch.Generator()
        self.begun: Mapping[str, Any] | None = None
        if checkpoint.found is not None:
            self.resume(checkpoint.found)
            logger.info("goes on from a checkpoint, after %d steps", len(self.history))

    @property
    def is_new(self) -> bool:
        """Whether nothing is done yet."""
        return self.number == 0 and self.begun is None

    def state(self) -> State:
        """Return the state; parameters and buffers are those of the models still needed."""
        return {
            **super().state(),
            "history": [list(self.history), self.history.stages],
            "told": list(self.told) if self.told is not self.history else None,
            "generator": self.generator.get_state(),
            "models": [_held(model) for model in self._models()],
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and warn of what the fit has warned of before."""
        super().resume({name: state[name] for name in self.carried})
        self.history = self.told = History(*state["history"])
        if state["told"] is not None:
            self.told = History(state["told"])
        self.generator.set_state(state["generator"])
        for model, held in zip(self._models(), state["models"], strict=True):
            model.load_state_dict(held["values"])
            for part, own in zip(_resumable(model), held["parts"], strict=True):
                part.resume(own)
        self.begun = state["course"]
        for message, category in self.said:
            warn(message, CATEGORIES.get(category, UserWarning))

    def left(self, progress: Progress) -> Iterator[Run]:
        """Go through the runs that are left; each may begin in its midst."""
        for number, run in enumerate(self.runs):
            progress.begin(run.name)
            if number < self.number:
                continue
            self.number = number
            self._let_go()
            if self.begun is None:
                self.told = self.history if run.counts is None else History()
                self.checkpoint.keep(partial(self._kept, None))
                run.prepare()
            run.prepare = nothing
            yield run
            self.begun = None
        self.number, self.told = len(self.runs), self.history
        self.checkpoint.keep(partial(self._kept, None))

    def _let_go(self) -> None:
        """Forget what runs that are over hold, but for the last one that trained."""
        over = range(self.number)
        trained = [number for number in over if self.runs[number].training is not None]
        for number in set(over) - set(trained[-1:]):
            self.runs[number] = Run(self.runs[number].name)

    def whole(self) -> AbstractContextManager[object]:
        """Return a block that no signal interrupts."""
        return self.checkpoint.whole()

    def passed(self, course: Course) -> None:
        """Keep the state if it is time to."""
        self.checkpoint.passed(partial(self._kept, course))

    def _kept(self, course: Course | None) -> State | None:
        if course is None and self.number == 0:
            return None  # a fit that begins anew
        return {**self.state(), "course": None if course is None else course.state()}

    def _models(self) -> list[PoissonFactorization]:
        """Models that are still needed: the last one that was trained, and those to come."""
        trained = [(n, run.training.model) for n, run in enumerate(self.runs) if run.training]
        before = [model for n, model in trained if n < self.number][-1:]
        after = [model for n, model in trained if n >= self.number]
        return list({id(model): model for model in (*before, *after, self.model)}.values())


def _resumable(model: PoissonFactorization) -> list[Resumable]:
    return [part for part in model.modules() if isinstance(part, Resumable)]


def _held(model: PoissonFactorization) -> State:
    """What a model holds: parameters and buffers, and what else its parts hand on."""
    parts = [part.state() for part in _resumable(model)]
    return {"values": dict(model.state_dict()), "parts": parts}


def train_runs(
    course: FitCourse,
    starts: Starts,
    settings: Settings,
    counts: Counts,
    on_step: OnStep,
    progress: Progress,
) -> History:
    """Train through all runs, from the best of several starts W (D, L) and exp F (N, L).

    Each run may take an equal share of the iterations that are left of `max_iter`. Steps on coarse
    levels count, but they have no place in the history, which is that of all samples.
    """
    with course.checkpoint.under_way(), noting(course.said):
        for run in course.left(progress):
            if run.training is None:
                continue
            seen = counts if run.counts is None else run.counts
            told, quiet = course.told, run.counts is not None
            if course.begun is None:
                course.first = len(told)
                share = _share(course, settings.max_iter)
                if course.number == 0:
                    given = settings, seen, course.generator, share, progress
                    told += _best_start(run.training, starts, *given)
                    starts.clear()
                most = course.first + share - len(told)
                course.budget = min(most, run.most_steps or share)
            report = partial(_report, told, on_step, run.training.model)
            train_run(
                run.training,
                settings,
                seen,
                course.generator,
                course.budget,
                on_step=progress.telling(told.append if quiet else report),
                warn=run.training.warns,
                keeper=course,
            )
            course.taken += len(told) - course.first
            told.stages.append((run.name, course.first, len(told)))
            if quiet and told:
                logger.info("%s: %d steps, ELBO %.6g", run.name, len(told), told[-1])
    return course.history


def _share(course: FitCourse, max_iter: int) -> int:
    """Steps that the present run may take: an equal share of those that are left."""
    left = sum(run.training is not None for run in course.runs[course.number :])
    return (max_iter - course.taken) // left


def _report(history: History, on_step: OnStep, model: PoissonFactorization, elbo: float) -> None:
    history.append(elbo)
    on_step(model, len(history), elbo)


def _best_start(
    training: Training,
    starts: Starts,
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
