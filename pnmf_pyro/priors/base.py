"""What every prior over factors offers to the model, the guide and the transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.distributions import Normal
from torch import Tensor, nn

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.places import Places

Draws = Callable[[Tensor | None], Tensor]

NO_SITES = (
    "restore_spread needs a spatial model that is trained by natural gradients; set spatial=True "
    "and training_mode='natural', or restore_spread=False."
)


class Field(Protocol):
    """q(F) at L components and N samples or places.

    Attributes
    ----------
    L, N : int
    """

    L: int
    N: int

    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""

    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws there, (n_draws, L, n).

        Calls for different samples belong to the same draws.
        """


class Prior(nn.Module, ABC):
    """A prior over log-factors F of shape (L, N), with its variational family: a field.

    The short way to another prior is a subclass of :class:`GaussianPrior` with a `model` of its own
    for the site "F", and a `guide` where there are more latent variables: q(F) stays as it is.

    Attributes
    ----------
    L, N : int
        Number of components and of samples.
    matrix_entries : int
        Of the matrices that a step multiplies or factorises, beside the counts.
    steps_apart : int
        How many steps there are to each one that moves the parameters that :meth:`seldom_moved`
        names.
    """

    L: int
    N: int
    matrix_entries: int = 0
    steps_apart: int = 1

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
    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws of q(F), (n_draws, L, n)."""

    @abstractmethod
    def at(self, places: Places) -> Field:
        """Return q(F) at other places.

        Raises
        ------
        ValueError
            If the prior knows nothing of places.
        """

    @abstractmethod
    def distributions(
        self, index: Tensor | None, coordinates: Any, groups: Any, placed: bool
    ) -> tuple[Any, ...]:
        """Return q(F) at samples or places, and the other distributions of the prior.

        Parameters
        ----------
        index : Tensor of int64, or None for all samples
        coordinates, groups : Tensor, optional
            Places instead of samples.
        placed : bool
            Whether the caller takes the prior for a spatial one.
        """

    @abstractmethod
    def natural_optimizer(self, lr: float = 1.0) -> torch.optim.Optimizer:
        """Return the optimiser that takes natural-gradient steps on q, of size `lr`."""

    def seldom_moved(self) -> list[nn.Parameter]:
        """Return the parameters of q whose natural steps cost more than all else of a step."""
        return []

    @abstractmethod
    def assign(self, mean: Tensor, scale: Tensor) -> None:
        """Start q(F) from what is known of each F_il: N(mean_il, scale_il^2), of shape (L, N)."""

    def refinements(self) -> list[Callable[[], None]]:
        """Return what is to be done to q once training has settled, before it settles once more."""
        return []

    def restore_spread(self, weight: float) -> None:
        r"""Undo what training with the factor `weight` on the divergence did to the spread of q.

        With w what the samples say of the precision of q, training makes it
        prior + w / weight; it becomes prior + w. The mean of q stays.

        Raises
        ------
        ValueError
            Where q is not held in what the samples say of it.
        """
        raise ValueError(NO_SITES)

    @contextmanager
    def local_sites(self, batch: Batch, samples: pyro.plate) -> Iterator[None]:
        """Enter the plates, components by samples, in which F of a batch is drawn."""
        components = pyro.plate("components", self.L, dim=-2)
        with samples, components, poutine.scale(scale=batch.prior_scale):
            yield
