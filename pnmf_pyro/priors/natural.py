"""priors.natural."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pnmf_pyro.data.batches import Batch, take


class ClosedForm(Optimizer):
    """Base class of optimisers whose step solves for the optimum instead of following a slope.

    They need more than the gradient: :meth:`prepare` is called with the batch when the gradients
    of its loss are there and before any parameter moves.
    """

    batch: Batch = Batch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters, without importing torch's compiler first, which takes seconds."""
        unwrap(Optimizer.add_param_group)(self, param_group)

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch that the gradients are of."""
        self.batch = batch

    def close(self) -> None:
        """Leave the parameters as others can train them, at the end of training."""


class Descent(ClosedForm):
    """Gradient descent, for parameters whose gradients are natural ones.

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1.0):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move all parameters that have gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


class EveryNth(ClosedForm):
    """Steps of an optimiser that move some of its parameters once in `n` times, at the first.

    For parameters whose steps cost more than those of the others, which move in the meantime:
    gradients of them are not taken when they are not to move, and optimisers leave parameters
    without gradients as they are.

    Parameters
    ----------
    optimizer : Optimizer
    n : int
    parameters : sequence of Parameter
        Those that move once in `n` times.
    """

    def __init__(self, optimizer: Optimizer, n: int, parameters: Sequence[nn.Parameter]):
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups  # shared: schedules change them
        self.optimizer, self.n, self.parameters, self.turn = optimizer, n, parameters, 0

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch that the gradients are of."""
        if isinstance(self.optimizer, ClosedForm):
            self.optimizer.prepare(batch)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step with all parameters that have gradients."""
        self.optimizer.step()
        self.turn += 1
        _take_gradients(self.parameters, self.turn % self.n == 0)

    def close(self) -> None:
        """Let gradients be taken again."""
        _take_gradients(self.parameters, True)


class Still(ClosedForm):
    """Leaves parameters where they are, and takes no gradients of them after the first.

    Parameters
    ----------
    parameters : iterable of Parameter
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Drop the gradients."""
        _take_gradients(self.param_groups[0]["params"], False)

    def close(self) -> None:
        """Let gradients be taken again."""
        _take_gradients(self.param_groups[0]["params"], True)


def _take_gradients(parameters: Iterable[nn.Parameter], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)
        if not wanted:
            parameter.grad = None


class NaturalGradient(ClosedForm):
    r"""Natural-gradient steps on normal distributions held in their natural parameters.

    For q = N(mu, sigma^2) with theta1 = mu / sigma^2 and theta2 = -1 / (2 sigma^2), the natural
    gradient in theta is the plain gradient in the expectation parameters m1 = mu and
    m2 = mu^2 + sigma^2:

        dL/dm1 = dL/dmu - 2 mu dL/dsigma^2,    dL/dm2 = dL/dsigma^2.

    A step of size 1 is a Newton step on mu with the new precision for curvature. Rates are
    exponential in mu and sigma^2, so a long step upwards overshoots. Therefore where Newton would
    raise mu by delta > 0, it is raised by log(1 + delta), which with sigma fixed never passes the
    optimum; and sigma^2 rises by at most `LARGEST_RISE` in one step.

    The gradients of a batch are those of the whole data set as the batch estimates it; each
    sample's own q is stepped by its own gradient, with the scale of the estimate taken out.

    Parameters
    ----------
    params : sequence of two Parameters
        theta1 and theta2, of shape (L, N).
    lr : float in (0, 1]
        Step size.

    References
    ----------
    Khan and Lin (2017), Conjugate-computation variational inference, section 3.
    """

    LARGEST_RISE = 1.0

    def __init__(self, params: Sequence[nn.Parameter], lr: float = 1.0):
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move theta by one step against the gradients of the loss."""
        index = self.batch.samples
        for group in self.param_groups:
            theta1, theta2 = group["params"]
            if theta1.grad is None or theta2.grad is None:
                continue
            now = take(theta1, index), take(theta2, index)
            share = now[0].shape[1] / theta1.shape[1]
            gradients = take(theta1.grad, index) * share, take(theta2.grad, index) * share
            new = self._moved(now, gradients, group["lr"])
            for theta, value in zip((theta1, theta2), new, strict=True):
                if index is None:
                    theta.copy_(value)
                else:
                    theta.index_copy_(1, index, value)

    def _moved(
        self, theta: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], lr: float
    ) -> tuple[Tensor, Tensor]:
        (theta1, theta2), (grad1, grad2) = theta, gradients
        variance = -0.5 / theta2
        mean = theta1 * variance
        d_mean = grad1 / variance
        d_variance = (grad2 - 2 * variance * mean * d_mean) / (2 * variance.square())
        least_precision = (variance + self.LARGEST_RISE).reciprocal()
        precision = torch.maximum(1 / variance + 2 * lr * d_variance, least_precision)
        change = -lr * d_mean / precision
        mean = mean + torch.where(change > 0, change.log1p(), change)
        return precision * mean, -0.5 * precision
