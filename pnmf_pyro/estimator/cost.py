"""What a fit will do, and what it will cost on this machine, before it does it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from pnmf_pyro.data.memory import available_memory, held_memory
from pnmf_pyro.data.parallel import ALONE, leads
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.calibration import Calibration
from pnmf_pyro.estimator.coarse import places_of_bins
from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.parameters import Settings
from pnmf_pyro.estimator.size import Size, gigabytes
from pnmf_pyro.training.levels import bin_sizes, numbers_of_bins
from pnmf_pyro.training.progress import StageCost

# A way to spend less is named where it saves such a part of the time or of the memory.
WORTH_SAYING = 0.1


@dataclass(frozen=True)
class Saving:
    """A smaller fit, and what it would cost.

    Attributes
    ----------
    change : str
        What to change.
    seconds : float
        Time of the fit.
    memory : float
        Bytes that the process holds at the peak.
    """

    change: str
    seconds: float
    memory: float

    def __str__(self) -> str:
        return f"{self.change}: {_duration(self.seconds)}, {gigabytes(self.memory)}"


@dataclass(frozen=True)
class Plan:
    """What a fit will do, and what it will cost on this machine.

    Attributes
    ----------
    n_samples, n_features, n_stored, n_components : int
        Rows and columns of X, its stored counts, and the number of components.
    prior : str
        Name of the class of the prior.
    n_inducing, n_neighbours : int
        Inducing points, and neighbours of a place; 0 for a prior that has none.
    levels : tuple of int
        Numbers of bins of places of the coarse levels that the fit begins on, the coarsest first.
    stages : tuple of StageCost
        Name, expected steps and expected seconds of each stage, in their order.
    memory : float
        Bytes that the process is expected to hold at the peak of the fit, those it holds now
        included.
    available : float
        Bytes that the process may hold; infinite where that is unknown.
    savings : tuple of Saving
        What would make the fit cheaper, the cheapest first.
    """

    n_samples: int
    n_features: int
    n_stored: int
    n_components: int
    prior: str
    n_inducing: int
    n_neighbours: int
    levels: tuple[int, ...]
    stages: tuple[StageCost, ...]
    memory: float
    available: float
    savings: tuple[Saving, ...]

    @property
    def seconds(self) -> float:
        """Expected time of the fit."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def minutes(self) -> float:
        """Expected time of the fit."""
        return self.seconds / 60

    @property
    def fits(self) -> bool:
        """Whether there is memory for the fit."""
        return self.memory <= self.available

    def __str__(self) -> str:
        taken: dict[str, float] = {}
        for stage in self.stages:
            taken[stage.name] = taken.get(stage.name, 0.0) + stage.seconds / self.seconds
        longest = sorted(taken, key=lambda name: -taken[name])[:3]
        shares = ", ".join(f"{name} {taken[name]:.0%}" for name in longest)
        room = "" if self.available == np.inf else f" of {gigabytes(self.available)}"
        refused = "" if self.fits else ": too much, fit will refuse it"
        lines = {
            "table": f"{self.n_samples:,} samples x {self.n_features:,} features, "
            f"{self.n_stored:,} stored counts",
            "model": f"{self.n_components} components, {self._prior_in_words}",
            "levels": " and ".join(f"{n:,}" for n in self.levels) + " bins of places first",
            "time": f"about {_duration(self.seconds)} ({shares})",
            "memory": f"about {gigabytes(self.memory)}{room}{refused}",
            "cheaper": "\n         ".join(map(str, self.savings)),
        }
        left_out = {"levels": not self.levels, "cheaper": not self.savings}
        return "\n".join(f"{k:<9}{v}" for k, v in lines.items() if not left_out.get(k))

    @property
    def _prior_in_words(self) -> str:
        if self.prior == "LCGP":
            return f"fields that condition each place on {self.n_neighbours} neighbours (LCGP)"
        if self.prior == "SVGP":
            return f"fields through {self.n_inducing:,} inducing points (SVGP)"
        known = self.prior == "GaussianPrior"
        return "no space (GaussianPrior)" if known else f"the prior {self.prior}"


def plan_of(settings: Settings, data: Data) -> Plan:
    """Time stages of a fit on a sample of its rows, and return what the whole will take."""
    counts, places, held = data.counts, data.places, held_memory()
    room = held + available_memory()
    if settings.prior is not None:
        places = settings.prior.places
    size = Size.of(settings, counts.shape, counts.values.numel(), places)
    calibration = Calibration(settings, data, size)
    levels: list[Size] = []
    if places is not None and calibration.warms_up:
        levels = _levels(data, places, size)
    stages = calibration.costs(size, levels)
    total = sum(stage.seconds for stage in stages)
    savings = []
    for change, smaller in size.smaller():
        seconds = sum(stage.seconds for stage in calibration.costs(smaller, levels))
        kept = max(seconds / total, smaller.memory / size.memory)
        if min(seconds / total, smaller.memory / size.memory) <= 1 - WORTH_SAYING and kept <= 1:
            savings.append(Saving(change, seconds, held + smaller.memory))
    return Plan(
        *(size.samples, size.features, size.stored, size.components),
        *(size.prior, size.inducing, size.neighbours),
        tuple(level.samples for level in levels),
        tuple(stages),
        held + size.memory,
        room,
        tuple(sorted(savings, key=lambda saving: saving.seconds)),
    )


def announced(settings: Settings, data: Data) -> Sequence[StageCost]:
    """Print the plan of a fit that is `verbose` to standard error; return the costs of stages."""
    if not settings.verbose or not leads():
        return ()
    data = replace(data, counts=copy.copy(data.counts))  # those of this rank, as if it were alone
    data.counts.ranks = ALONE
    try:
        plan = plan_of(settings, data)
    except (ArithmeticError, RuntimeError, ValueError) as error:  # of a sample, not of the fit
        tqdm.write(f"There is no plan of this fit, and no progress bar: {error}", file=sys.stderr)
        return ()
    tqdm.write(str(plan), file=sys.stderr)
    return plan.stages


def _levels(data: Data, places: Places, size: Size) -> list[Size]:
    """Sizes of the fits of the coarse levels of places.

    In a bin of n samples a feature is stored as often as if its counts were at random places.
    """
    counts = data.counts
    binned: Places | None = places
    if data.design is not None and data.rows is not None:
        of_batches = torch.from_numpy(data.rows[:, : len(data.design.batches)])
        binned = places_of_bins(places, of_batches)
    sizes = bin_sizes(counts, size.components)
    if binned is None or not sizes:
        return []
    bins = numbers_of_bins(sizes, binned.groups, size.samples)
    share = np.asarray((counts.numpy() != 0).mean(0)).ravel()
    return [
        replace(size.plain, samples=M, stored=int(M * (1 - (1 - share) ** n).sum()))
        for n, M in zip(sizes, bins, strict=True)
    ]


def _duration(seconds: float) -> str:
    """A time in a unit in which it is a small number."""
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
