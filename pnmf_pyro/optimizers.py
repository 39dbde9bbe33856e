"""Optimisers and learning-rate schedules by name, and natural-gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
}


class NaturalGradient(Optimizer):
    r"""Natural-gradient steps on normal distributions held in their natural parameters.

    For q = N(mu, sigma^2) with theta1 = mu / sigma^2 and theta2 = -1 / (2 sigma^2), the natural
    gradient in theta is the plain gradient in the expectation parameters m1 = mu and
    m2 = mu^2 + sigma^2:

        dL/dm1 = dL/dmu - 2 mu dL/dsigma^2,    dL/dm2 = dL/dsigma^2.

    A step of size 1 is a Newton step on mu with the new precision for curvature. Where it would
    raise mu by delta > 0, mu is raised by log(1 + delta) instead: the rate is exponential in mu, so
    a full step overshoots, and this one provably does not.

    Parameters
    ----------
    params : sequence of two Parameters
        theta1 and theta2, of one shape.
    lr : float in (0, 1]
        Step size.

    References
    ----------
    Khan and Lin (2017), Conjugate-computation variational inference, section 3.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float = 1.0):
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move theta by one step against the gradients of the loss."""
        if closure is not None:
            raise ValueError(
                "NaturalGradient takes no closure; compute the gradients before step()."
            )
        for group in self.param_groups:
            theta1, theta2 = group["params"]
            if theta1.grad is not None and theta2.grad is not None:
                _natural_step(theta1, theta2, (theta1.grad, theta2.grad), group["lr"])


def _natural_step(
    theta1: Tensor, theta2: Tensor, gradients: tuple[Tensor, Tensor], lr: float
) -> None:
    variance = -0.5 / theta2
    mean = theta1 * variance
    d_mean = gradients[0] / variance
    d_variance = (gradients[1] - 2 * variance * mean * d_mean) / (2 * variance.square())
    new_theta2 = theta2 - lr * d_variance
    change = lr * d_mean / (2 * new_theta2)
    mean = mean + torch.where(change > 0, change.log1p(), change)
    theta2.copy_(new_theta2)
    theta1.copy_(-2 * new_theta2 * mean)


class JointOptimizer(PyroOptim):
    """Torch optimisers over all parameters at once, in the form that `pyro.infer.SVI` takes.

    Pyro makes an optimiser for each parameter. Here one optimiser may hold several, as a natural
    gradient has to, and works through fewer calls.

    Parameters
    ----------
    optimizers : iterable of torch.optim.Optimizer
    before_step : callable, optional
        Called when gradients are there and before any parameter moves.
    """

    def __init__(
        self, optimizers: Iterable[Optimizer], before_step: Callable[[], None] = lambda: None
    ):
        super().__init__(torch.optim.SGD, {})
        self.optimizers = list(optimizers)
        self.before_step = before_step

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Take one step with every optimiser."""
        self.before_step()
        for optimizer in self.optimizers:
            optimizer.step()


class Schedule(Protocol):
    """How the learning rate changes over a fit."""

    def warm_up(self, max_iter: int) -> int:
        """Return the number of steps over which the learning rate still rises."""

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that is called with the ELBO after each step."""


@dataclass(frozen=True)
class Constant:
    """The learning rate stays as it is."""

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that does nothing."""
        return lambda elbo: None


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

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that sets the learning rate of the next step."""
        scheduler = lr_scheduler.LambdaLR(
            optimizer, lambda step: self.factor(step / max(max_iter - 1, 1))
        )
        return lambda elbo: scheduler.step()

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
        Steps without a rise to wait for.
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

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that takes note of the ELBO."""
        scheduler = lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="min", factor=self.factor, patience=self.patience, min_lr=self.min_lr
        )
        return lambda elbo: scheduler.step(-elbo)
