"""What a stage of a fit is, and what it is given: the fit as far as it is planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.estimator.parameters import Settings
from pnmf_pyro.estimator.runs import Run
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.training.site_regression import start_from


@dataclass
class Draft:
    """A fit as far as it is planned.

    `trained` is the model that the stages before have trained: a warm-up in space trains another
    one than that of the fit. `warm` says whether one was a warm-up, and `kl_weight` which weight
    the divergence had.
    """

    settings: Settings
    counts: Counts
    model: PoissonFactorization
    random: np.random.RandomState
    learned: list[str]
    trained: PoissonFactorization | None = None
    warm: bool = False
    kl_weight: float = 1.0

    def take_over(self) -> Callable[[], None]:
        """Go on with the model of the fit; return what gives it the q(F) that was trained before.

        That is nothing where the stages before have trained the model itself.
        """
        source, self.trained = self.trained, self.model
        if source is None or source is self.model:
            return lambda: None
        return lambda: start_from(self.model.prior, source, self.counts)


class Stage(Protocol):
    """One stage of a fit."""

    def plan(self, draft: Draft) -> Sequence[Run]:
        """Return what the stage does in turn, given the stages before it."""
