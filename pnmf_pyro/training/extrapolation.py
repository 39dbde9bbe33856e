r"""Steps without noise, extrapolated: the bound never falls and settles in far fewer of them.

Steps in closed form lead from a point y to x = T(y), where the bound is no lower. Where they settle
slowly they go on in the same direction for long, so that the next one is taken from

.. math:: y_k = x_k + \beta \, (x_k - x_{k-1})

(Ang and Gillis 2019). The bound at y is worked out anyway, with the gradients of the next step.
Where it is lower than at the last y, that next step is taken from x instead and beta shrinks; else
beta grows. So the bound rises at every point that is accepted, whatever beta.

Each kind of steps says what of it is extrapolated, :meth:`~pnmf_pyro.priors.natural.Step.point`:
log W, and the mean m of q(F) with the pull r = b - h m of its sites. The posterior given sites
solves Q (m - c) + h m = b, with Q the prior's precision and c its mean, so that r = Q (m - c) is
linear in m: sites of precision h and shift r + h m have exactly the extrapolated mean, for every
prior, and no system is solved for it. Their covariance is that of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pnmf_pyro.data.resumable import Resumable
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.priors.natural import Step

# Relative rise of the loss that may be rounding, of log rates in float32.
ROUNDING = 1e-7

# Fraction of a step that must raise the bound, or nothing does but rounding.
SMALLEST = 2.0**-10

# beta at first and at most, by what it grows with each step, and by what it shrinks where the
# bound fell.
FIRST, MOST, GROWTH, SHRINKAGE = 0.5, 0.9, 1.05, 1.5


# What is extrapolated of each kind of steps.
Points = list[tuple[Tensor, ...]]


class Accepted(Resumable):
    """A copy of what steps can change, at the last point that was accepted.

    Parameters
    ----------
    model : PoissonFactorization
        The model that is trained.

    Attributes
    ----------
    values : list of float
        ELBO at the points that were accepted.
    moved : bool
        Whether the last point was.
    at_rest : bool
        Whether no step leads higher, however short.
    """

    carried: ClassVar[tuple[str, ...]] = ("saved", "values", "moved")
    at_rest = False

    def __init__(self, model: PoissonFactorization):
        self.tensors = model.state_of_training()
        self.saved: list[Tensor] | None = None
        self.values: list[float] = []
        self.moved = True

    @torch.no_grad()
    def accept(self, loss: float) -> bool:
        """Save the present point, of this loss; or go back and say False."""
        self.values.append(-loss)
        if self.saved is None:
            self.saved = [torch.empty_like(tensor) for tensor in self.tensors]
        _copy(self.saved, self.tensors)
        return True

    def go_on(self) -> None:
        """Take note that steps were taken from the point that was accepted."""

    def finish(self) -> None:
        """Take note that no more steps are taken."""

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the copy."""
        if self.saved is not None:
            _copy(self.tensors, self.saved)


class Extrapolation(Accepted):
    """Points at which the loss never rises, of steps that are extrapolated.

    A step that raises the loss without being extrapolated was too long: it is halved, and so are
    the next ones until they have succeeded.

    Parameters
    ----------
    model : PoissonFactorization
        The model that is trained.
    steps : sequence of Step
        The steps that move it.
    most : float
        Largest beta; 0 for steps that are not extrapolated.
    """

    carried = (*Accepted.carried, "at_rest", "beta", "fraction", "last", "further")

    def __init__(self, model: PoissonFactorization, steps: Sequence[Step], most: float = MOST):
        super().__init__(model)
        self.steps, self.most = steps, most
        self.beta = min(FIRST, most)
        self.fraction = 1.0
        self.last: Points | None = None
        self.further = False

    @torch.no_grad()
    def accept(self, loss: float) -> bool:
        """Save the present point, of this loss; or go back and say False."""
        last = -self.values[-1] if self.values else math.inf
        self.moved = loss <= last + ROUNDING * abs(loss)
        if self.moved:
            self.fraction = min(1.0, self.fraction * 1.5)
            if self.further:
                self.beta = min(self.most, self.beta * GROWTH)
            return super().accept(loss)
        if self.further:
            assert self.last is not None
            self.beta /= SHRINKAGE
            self._move(1.0, self.last, [step.point() for step in self.steps])
            self.further = False
        else:
            self.fraction /= 2
            self.at_rest = self.fraction < SMALLEST
            self._shorten(0.5)
            self.last = None
        return False

    @torch.no_grad()
    def go_on(self) -> None:
        """Extrapolate the steps just taken; shorten them, where they were too long before."""
        self.further = False
        if self.fraction < 1:
            self._shorten(self.fraction)
            self.last = None
            return
        if not self.most:
            return
        before, self.last = self.last, [step.point() for step in self.steps]
        self.further = before is not None
        if before is not None:
            self._move(self.beta, self.last, before)

    def finish(self) -> None:
        """Go back to the last point that was accepted, from one that nobody has judged."""
        self.restore()

    def _move(self, size: float, to: Points, since: Points) -> None:
        """Add the change between two points, times a size; the earlier one is lost."""
        for step, x, last in zip(self.steps, to, since, strict=True):
            if x:
                changes = (b.neg_().add_(a).mul_(size) for a, b in zip(x, last, strict=True))
                step.move(*changes)

    def _shorten(self, fraction: float) -> None:
        assert self.saved is not None
        for now, before in zip(self.tensors, self.saved, strict=True):
            moved = now.is_floating_point() and not torch.equal(now, before)
            if moved:  # a copy would count as a change to what depends on it
                now.copy_(before.lerp(now, fraction))


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if not torch.equal(target, source):  # or what is made of it would be made again
            target.copy_(source)
