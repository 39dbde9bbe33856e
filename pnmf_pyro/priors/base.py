"""What every prior over factors offers to the model, the guide and the transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
from pyro import poutine
from pyro.distributions import Normal
from torch import Tensor, nn

from pnmf_pyro.data import Batch


class Prior(nn.Module, ABC):
    """A prior over log-factors F of shape (L, N), with its variational family.

    Attributes
    ----------
    L, N : int
        Number of components and of samples.
    """

    L: int
    N: int

    @abstractmethod
    def model(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Make the generative statements and return F of the batch, shape (L, n).

        Parameters
        ----------
        batch : Batch
        samples : pyro.plate
            The plate over the samples of the batch.
        """

    @abstractmethod
    def guide(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Make the variational statements and return F of the batch, shape (L, n)."""

    @abstractmethod
    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""

    @abstractmethod
    def assign(self, mean: Tensor, scale: Tensor) -> None:
        """Start q(F) from the marginals with this mean and scale, of shape (L, N)."""

    @contextmanager
    def local_sites(self, batch: Batch, samples: pyro.plate) -> Iterator[None]:
        """Enter the plates, components by samples, in which F of a batch is drawn."""
        components = pyro.plate("components", self.L, dim=-2)
        with samples, components, poutine.scale(scale=batch.prior_scale):
            yield
