"""How long a fit takes on this machine: its stages, timed on a sample of the rows.

A stage does something once and then takes steps. Both are timed on two samples of rows, one four
times as large as the other. They are a constant, and a part in proportion to the work, which
:class:`~pnmf_pyro.estimator.size.Size` knows for all rows. Where a stage settles on the sample it
is expected to take as many steps on all rows; elsewhere as many as such stages usually take.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from logging import getLogger
from typing import cast

import numpy as np
import torch

from pnmf_pyro.data.batches import Batches, take
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.estimator.course import TRIAL_STEPS, train_run
from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.parameters import Settings, learned
from pnmf_pyro.estimator.plan import FINAL_DRAWS, LAST, make_model, make_runs, make_starts
from pnmf_pyro.estimator.runs import Run, Training
from pnmf_pyro.estimator.size import Size
from pnmf_pyro.estimator.stages import SAMPLE_STEPS
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.priors import LCGP, SVGP
from pnmf_pyro.training.hyperparameters import HyperparameterSearch
from pnmf_pyro.training.loop import final_elbo
from pnmf_pyro.training.progress import StageCost
from pnmf_pyro.training.schedules import GradientSteps

logger = getLogger("pnmf_pyro")

# Rows of the larger sample: one in so many, or as many as make so much work for a step; at least,
# and at most. The smaller sample has one in `SMALLER` of these.
ONE_IN, WORK = 20, 1e5
LEAST_ROWS, MOST_ROWS = 300, 20_000
SMALLER = 4

# Steps of a stage that are timed at least, and seconds after which they are enough.
STEPS, SECONDS = 11, 0.5

# Steps that a stage takes where the sample does not tell; measured by `python -m benchmarks plan`.
USUAL_STEPS = {"warm-up": 150, "bins": 60, "settle": 20, "loadings": 40}

# Evaluations of the criterion in a search of hyperparameters, each as long as one with values for
# each component: over the grid of each kernel, and in the descent, gradients included.
ON_GRID, IN_DESCENT = 17, 58

# Names of what comes before the stages, of the search among them, of a warm-up and of its end where
# it has levels.
START, SEARCH, WARM, FINE = "start", "hyperparameters", ("bins", "warm-up"), "samples"

clock = time.perf_counter


@dataclass(frozen=True)
class Timed:
    """What a stage took on a sample: seconds of what is done once and of each step.

    `size` is that of the model that the stage trains, `steps` how many it is expected to take; a
    stage that does not train, but searches, has evaluations in their place.
    """

    name: str
    size: Size
    once: float
    each: float = 0.0
    steps: int = 0
    trains: bool = False

    @property
    def kind(self) -> str:
        """Name of the stage without numbers."""
        return self.name.split()[-1]


class Calibration:
    """Times of the stages of a fit on two samples of its rows.

    Parameters
    ----------
    settings : Settings
        Parameters of the fit. Their `random_state` stays as it is.
    data : Data
        Data of the fit.
    size : Size
        Size of the fit.
    """

    def __init__(self, settings: Settings, data: Data, size: Size):
        self.settings = settings
        self.small: dict[str, Timed] = {}
        n = size.samples
        with _unheard():
            if settings.prior is None:  # which would be over all samples
                enough = int(WORK / replace(size, samples=1, stored=max(1, size.stored // n)).work)
                L = size.components  # of which a start must have that many rows
                n = min(n, max(L, min(MOST_ROWS, max(LEAST_ROWS, n // ONE_IN, enough))))
                fewer = _sample(data, min(n, max(L, n // SMALLER)))
                self.small = {one.kind: one for one in _time_stages(settings, fewer, 0.0)}
            self.large = list(_time_stages(settings, _sample(data, n), SECONDS))

    def costs(self, size: Size, levels: Sequence[Size]) -> list[StageCost]:
        """Return what each stage of a fit of a size is expected to take, in their order.

        `levels` are the sizes of the fits of its coarse levels.
        """
        stages = list(self._stages(size, levels))
        trains = [one.trains for _, one, _, _ in stages]
        costs, left = [], self.settings.max_iter
        for number, (name, one, of, steps) in enumerate(stages):
            extra = 0
            if one.trains:
                steps = min(steps, left // sum(trains[number:]))
                left -= steps
                if not any(trains[:number]):
                    extra = TRIAL_STEPS * (self._n_starts - 1)
            once, each = self._grown("once", one, of), self._grown("each", one, of)
            costs.append(StageCost(name, steps + extra, once, each))
        return costs

    @property
    def warms_up(self) -> bool:
        """Whether a stage of the fit is a warm-up, which goes through levels."""
        return any(one.kind in WARM for one in self.large)

    @property
    def _n_starts(self) -> int:
        init = self.settings.init
        return len(init) if isinstance(init, list | tuple) else 1

    def _stages(self, size: Size, levels: Sequence[Size]) -> Iterator[tuple[str, Timed, Size, int]]:
        """Stages of the fit, their times on the sample, their sizes, and steps.

        The sample may have levels where the fit has none, or none where it has some.
        """
        warm = [one for one in self.large if one.kind in WARM]
        for one in self.large:
            if one.kind not in (*WARM, FINE):
                yield one.name, one, size if one.size.prior == size.prior else size.plain, one.steps
            elif warm:
                last = warm.pop()
                for level in levels:
                    yield f"{level.samples} bins", last, level, last.steps
                fine = (FINE, SAMPLE_STEPS) if levels else ("warm-up", last.steps)
                yield fine[0], last, size.plain, fine[1]
                warm.clear()

    def _grown(self, part: str, one: Timed, size: Size) -> float:
        """Seconds of a part of a stage at a size: a constant, and a part in proportion to work."""
        seconds, other = getattr(one, part), self.small.get(one.kind, one)
        if (one.kind, part) == (SEARCH, "each"):
            return seconds * size.judged / one.size.judged
        work, less, more = one.size.work, other.size.work, size.work
        slope = (seconds - getattr(other, part)) / (work - less) if work > less else 0.0
        slope = min(max(slope, 0.0), seconds / work)
        return seconds + slope * (more - work)


def _sample(data: Data, n: int) -> Data:
    """The data of n samples, drawn at random."""
    N, device = data.counts.shape[0], data.counts.device
    if n == N:
        return data
    index = torch.from_numpy(np.sort(np.random.RandomState(0).permutation(N)[:n]))
    counts, s = data.counts.rows(index.to(device)), take(data.size_factors, index.to(device))
    places = None if data.places is None else data.places[index]
    hidden = None if data.hidden is None else data.hidden.rows(index.to(device))
    rows = None if data.rows is None else data.rows[index.numpy()]
    of_samples = replace(data, counts=counts, size_factors=s, hidden=hidden)
    return replace(of_samples, places=places, rows=rows)


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep what steps on a sample say from being taken for what is said of the fit."""
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _time_stages(settings: Settings, data: Data, seconds: float) -> Iterator[Timed]:
    """Take steps of each stage of a fit, for so many seconds, and time them."""
    random, counts = np.random.RandomState(0), data.counts
    size = Size.of(settings, counts.shape, counts.values.numel(), data.places)
    started = clock()
    model = make_model(settings, data, random)
    runs = make_runs(settings, data, model, random)
    starts = make_starts(settings, runs[0], counts, random)
    yield Timed(START, size, clock() - started)
    generator = torch_generator(random)
    first = cast(Training, runs[0].training).model
    first.assign(*starts[0])
    for run in runs:
        if run.name == SEARCH:
            yield _time_search(settings, model, counts, size)
        else:
            yield _time_run(settings, run, counts, size, generator, seconds)
    started = clock()
    batches = Batches(counts, settings.batch_size)
    final_elbo(model, batches, settings.mode, FINAL_DRAWS, generator)
    find_uncertainty(model, counts)
    yield Timed(LAST, size, clock() - started)


class _Enough(Exception):
    """A stage has been timed for long enough."""


def _time_run(
    settings: Settings,
    run: Run,
    counts: Counts,
    size: Size,
    generator: torch.Generator,
    seconds: float,
) -> Timed:
    started = clock()
    run.prepare()
    ticks = [clock()]
    training = run.training
    if training is None:
        return Timed(run.name, size, ticks[0] - started)
    seen = counts if run.counts is None else run.counts
    if training.model.prior.places is None:
        size = replace(size.plain, samples=seen.shape[0], stored=seen.values.numel())

    def tick(elbo: float) -> None:
        ticks.append(clock())
        if len(ticks) > STEPS and ticks[-1] - ticks[0] > seconds:
            raise _Enough

    settled, most = False, run.most_steps or settings.max_iter
    with suppress(_Enough):
        train_run(training, settings, seen, generator, most, on_step=tick, warn=False)
        settled = True
    taken = len(ticks) - 1
    each = (ticks[-1] - ticks[1]) / (taken - 1) if taken > 1 else 0.0
    once = ticks[0] - started + max(0.0, ticks[1] - ticks[0] - each)
    if not settled:
        by_gradient = any(isinstance(step, GradientSteps) for step, _ in training.steps)
        usual = USUAL_STEPS.get(run.name.split()[-1], USUAL_STEPS["settle"])
        taken = settings.max_iter if by_gradient else max(taken, usual)
    return Timed(run.name, size, once, each, taken, trains=True)


def _time_search(
    settings: Settings, model: PoissonFactorization, counts: Counts, size: Size
) -> Timed:
    """Time evaluations of the criterion, and what sets q(F) to the posterior from its sites."""
    prior, kernels = cast(SVGP | LCGP, model.prior.fields[0]), settings.kernel
    random = np.random.RandomState(0)
    search = HyperparameterSearch(model, counts, learned(settings), "leave-one-out", random)
    lengthscale = float(prior.kernel.lengthscale.max())
    search.profile(model, np.array([lengthscale]))  # which makes what all evaluations share
    ticks = [clock()]
    search.profile(model, lengthscale * np.array([1.0, 1.1, 1.2, 1.3]))
    ticks.append(clock())
    if "lengthscale" in search.names:  # components differ after it, and have weights of their own
        own = prior.kernel.lengthscale
        own.data.mul_(torch.linspace(1.0, 1.1, len(own)).to(own))
    q = prior.marginal()
    prior.assign(q.loc.detach(), torch.ones_like(q.loc))
    once, each = clock() - ticks[1], (ticks[1] - ticks[0]) / 4
    evaluations = ON_GRID * (len(kernels) if isinstance(kernels, list | tuple) else 1) + IN_DESCENT
    return Timed(SEARCH, size, once, each, evaluations)
