"""Gradient optimisers by name, as steps of training, and how the sizes of steps change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer, lr_scheduler

from pnmf_pyro.data.resumable import Resumable, State
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

    def state(self) -> State:
        """Return the state of the optimiser."""
        return {"optimizer": self.optimizer.state_dict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.optimizer.load_state_dict(state["optimizer"])


class AfterStep(Resumable):
    """What is called with the ELBO after each step, and sets the size of the next one: nothing."""

    def __call__(self, elbo: float) -> None:
        """Set the size of the next step."""


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
        AfterStep
            Function that sets the size of the next step; to be called with the ELBO after each.
        """


class _ByNumber(AfterStep):
    """Sets the size of each step from its number, counted from 0."""

    carried = ("taken",)

    def __init__(self, step: Step, size: Callable[[int], float]):
        self.step_of, self.size, self.taken = step, size, 0
        step.lr = size(0)

    def __call__(self, elbo: float) -> None:
        self.taken += 1
        self.step_of.lr = self.size(self.taken)

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self.step_of.lr = self.size(self.taken)


class _OnPlateau(AfterStep):
    """Lets a scheduler of torch set the learning rate of an optimiser."""

    def __init__(self, scheduler: lr_scheduler.ReduceLROnPlateau):
        self.scheduler = scheduler

    def __call__(self, elbo: float) -> None:
        self.scheduler.step(-elbo)

    def state(self) -> State:
        return self.scheduler.state_dict()

    def resume(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(dict(state))


@dataclass(frozen=True)
class Constant:
    """All steps are of one size."""

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, step: Step, max_iter: int) -> AfterStep:
        """Return a function that does nothing."""
        return AfterStep()


@dataclass(frozen=True)
class Decreasing:
    """The learning rate falls as start * (1 + step / delay) ** -forgetting.

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
        return _ByNumber(step, lambda n: self.start * (1 + n / self.delay) ** -self.forgetting)


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
        return _ByNumber(step, lambda n: self.factor(n / max(max_iter - 1, 1)))

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
        return _OnPlateau(
            lr_scheduler.ReduceLROnPlateau(
                step.optimizer, factor=self.factor, patience=self.patience, min_lr=self.min_lr
            )
        )
