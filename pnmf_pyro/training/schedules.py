"""Gradient optimisers by name, as steps of training, and how the sizes of steps change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.optim import Optimizer, lr_scheduler

from pnmf_pyro.priors.natural import Step

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
}


class GradientSteps(Step):
    """Steps of a torch optimiser.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Optimiser of the parameters that it trains; its learning rate is that of a whole step.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]

    @property
    def lr(self) -> float:
        """Size of the next step, relative to the learning rate that the optimiser was made with."""
        return self.optimizer.param_groups[0]["lr"] / self.learning_rates[0]

    @lr.setter
    def lr(self, value: float) -> None:
        for group, whole in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = value * whole

    def step(self) -> None:
        """Move the parameters of the optimiser."""
        self.optimizer.step()


AfterStep = Callable[[float], object]


class Schedule(Protocol):
    """How the size of a step changes over a fit."""

    def warm_up(self, max_iter: int) -> int:
        """Return the number of steps over which the learning rate still rises."""

    def attach(self, step: Step, max_iter: int) -> AfterStep:
        """Set the size of the first step.

        Parameters
        ----------
        step : Step
            What takes the steps.
        max_iter : int
            Number of steps at most.

        Returns
        -------
        callable
            Function that sets the size of the next step; to be called with the ELBO after each.
        """


def _by_number(step: Step, size: Callable[[int], float]) -> AfterStep:
    """Set the size of each step from its number, counted from 0."""
    taken = 0
    step.lr = size(taken)

    def after(elbo: float) -> None:
        nonlocal taken
        taken += 1
        step.lr = size(taken)

    return after


@dataclass(frozen=True)
class Constant:
    """All steps are of one size."""

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, step: Step, max_iter: int) -> AfterStep:
        """Return a function that does nothing."""
        return lambda elbo: None


@dataclass(frozen=True)
class Decreasing:
    """The learning rate falls from `start` as (offset + step / delay) ** -forgetting.

    For noisy closed-form steps. With `forgetting` in (0.5, 1] they satisfy the conditions of
    Robbins and Monro (1951), as in stochastic variational inference (Hoffman et al. 2013).
    """

    delay: float = 10.0
    forgetting: float = 0.7
    start: float = 1.0

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, step: Step, max_iter: int) -> AfterStep:
        """Return a function that sets the size of the next step."""
        offset = self.start ** (-1 / self.forgetting)
        return _by_number(step, lambda n: (offset + n / self.delay) ** -self.forgetting)


@dataclass(frozen=True)
class OneCycle:
    """Linear warm-up to the learning rate, then cosine annealing.

    Parameters
    ----------
    pct_start : float
        Fraction of the iterations spent in warm-up.
    div_factor : float
        The first learning rate is the optimiser's divided by this.
    final_div_factor : float
        The last one is the first divided by this.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def warm_up(self, max_iter: int) -> int:
        """Return the number of warm-up steps."""
        return int(self.pct_start * max_iter)

    def attach(self, step: Step, max_iter: int) -> AfterStep:
        """Return a function that sets the size of the next step."""
        return _by_number(step, lambda n: self.factor(n / max(max_iter - 1, 1)))

    def factor(self, progress: float) -> float:
        """Return the learning rate at a fraction of the fit, relative to the highest."""
        first = 1 / self.div_factor
        if progress < self.pct_start:
            return first + (1 - first) * progress / self.pct_start
        last = first / self.final_div_factor
        remaining = min(1.0, (progress - self.pct_start) / max(1 - self.pct_start, 1e-12))
        return last + (1 - last) * (1 + math.cos(math.pi * remaining)) / 2


@dataclass(frozen=True)
class Plateau:
    """Reduce the learning rate where the ELBO stops rising.

    Parameters
    ----------
    patience : int
        Steps without a rise, of one part in 10^4 at least, to wait for.
    factor : float
        The learning rate is multiplied by this.
    min_lr : float
        It does not fall below this.
    """

    patience: int = 200
    factor: float = 0.8
    min_lr: float = 1e-5

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, step: Step, max_iter: int) -> AfterStep:
        """Return a function that takes note of the ELBO."""
        assert isinstance(step, GradientSteps)
        scheduler = lr_scheduler.ReduceLROnPlateau(
            step.optimizer, factor=self.factor, patience=self.patience, min_lr=self.min_lr
        )
        return lambda elbo: scheduler.step(-elbo)
