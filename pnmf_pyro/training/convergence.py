"""When a fit has settled: where the ELBO is not worth more steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from pnmf_pyro.data.resumable import Resumable

# Relative rise of the smoothed ELBO over ten steps that is not worth a warning, however small tol.
LEAST_TREND = 1e-5


class Judge(Resumable):
    """What decides from the values of the ELBO so far whether a fit has settled."""

    tol: float

    def reached(self, history: Sequence[float]) -> bool:
        """Say whether to stop, given all values so far; to be asked after each step."""
        raise NotImplementedError

    def still_rising(self, history: Sequence[float]) -> bool:
        """Say whether the ELBO still rose at the end."""
        raise NotImplementedError


@dataclass
class Convergence(Judge):
    """Decide from smoothed values of the ELBO whether a fit has converged.

    The ELBO is averaged over windows of `window` steps. A window that rises by less than `tol`
    times the size of the ELBO over the one before is quiet; `patience` quiet windows in a row are
    convergence. One noisy step can therefore neither stop a fit nor keep it going.

    Parameters
    ----------
    tol : float
        0 never stops.
    start : int
        Steps to leave out at first, such as the warm-up of a learning rate.
    window, patience : int
    """

    carried = ("_quiet",)
    tol: float = 1e-4
    start: int = 0
    window: int = 10
    patience: int = 3
    _quiet: int = field(default=0, init=False)

    def reached(self, history: Sequence[float]) -> bool:
        """Say whether to stop, given all values so far; to be asked after each step."""
        judged = len(history) - self.start
        if self.tol <= 0 or judged < 2 * self.window or judged % self.window:
            return False
        rise, _ = self._rise(history, self.window)
        self._quiet = self._quiet + 1 if rise < self.tol else 0
        return self._quiet >= self.patience

    def still_rising(self, history: Sequence[float]) -> bool:
        """Say whether the ELBO rose at the end by more than `tol` and more than its own noise."""
        window = min(self.window, len(history) // 2)
        if window < 1:
            return True
        rise, noise = self._rise(history, window)
        return rise > max(self.tol, LEAST_TREND, 2 * noise)

    @staticmethod
    def _rise(history: Sequence[float], window: int) -> tuple[float, float]:
        """Rise over the last two windows and its standard error, relative to the ELBO's size."""
        recent = np.asarray(history[-2 * window :])
        before, now = recent[:window].mean(), recent[window:].mean()
        size = max(abs(now), np.finfo(float).tiny)
        noise = np.sqrt(np.mean(np.diff(recent) ** 2) / window)
        return float((now - before) / size), float(noise / size)


@dataclass
class Settled(Judge):
    r"""Decide from values of an ELBO without noise how much of its rise is left.

    Of all steps so far the last third raised the ELBO by r, and the third before it by r / q. Where
    thirds go on to shrink by the same ratio, what is left is

    .. math:: r (q + q^2 + \cdots) = r \frac{q}{1 - q}

    (Aitken 1926). A fit has settled where that is below `tol` times the size of the ELBO. A rise
    that hardly shrinks is taken to shrink by `SLOWEST`, and one that shrinks fast, as at first, by
    `FASTEST` from now on.

    Parameters
    ----------
    tol : float
        0 never stops.
    least : int
        Number of steps in a third at least.
    """

    tol: float = 1e-4
    least: int = 5

    FASTEST: ClassVar[float] = 0.5
    SLOWEST: ClassVar[float] = 0.9

    def reached(self, history: Sequence[float]) -> bool:
        """Say whether to stop, given all values so far; to be asked after each step."""
        return self.tol > 0 and len(history) > 3 * self.least and self.left(history) < self.tol

    def still_rising(self, history: Sequence[float]) -> bool:
        """Say whether more than `tol` is left at the end."""
        return self.left(history) > max(self.tol, LEAST_TREND)

    def left(self, history: Sequence[float]) -> float:
        """Return the rise that is left, relative to the size of the ELBO."""
        third = (len(history) - 1) // 3
        if third < 1:
            return math.inf
        first, middle, last = (history[-1 - k * third] for k in (2, 1, 0))
        before, now = max(middle - first, 0.0), max(last - middle, 0.0)
        ratio = now / before if before else math.inf
        ratio = min(max(ratio, self.FASTEST), self.SLOWEST)
        return now * ratio / (1 - ratio) / max(abs(last), np.finfo(float).tiny)
