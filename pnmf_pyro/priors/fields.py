r"""Distributions of a Gaussian field: its values at inducing points, and at samples given them.

Everything is whitened: the field at inducing points is L_z u with L_z the Cholesky factor of their
covariance and u ~ N(0, I) under the prior. At a sample it is A^T u plus an independent rest, with
A = L_z^{-1} K_{zx}.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from pnmf_pyro.gp.cholesky import BLOCK

Field = TypeVar("Field", bound="Repeated")


class Repeated:
    """A distribution of a whole field, of which plates in front make independent repetitions.

    `rsample` draws for each of the leading dimensions of the batch shape anew.
    """

    _batch_shape: torch.Size

    def expand(self: Field, batch_shape: Sequence[int], _instance: object = None) -> Field:
        """Return independent repetitions, with more dimensions in front of the batch shape."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new


class FieldMarginals(Repeated, Normal):
    """Marginals of a field whose draws are joint.

    The mean and standard deviation of shape (L, n) are all that a likelihood needs; `draw` returns
    a number of joint draws, (n_draws, L, n).
    """

    def __init__(self, loc: Tensor, scale: Tensor, draw: Callable[[int], Tensor]):
        self.draw = draw
        super().__init__(loc, scale, validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw jointly; differentiable in loc and scale as a draw from each marginal."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            joint = self.draw(shape[:-2].numel()).reshape(shape)
            standard = (joint.to(self.loc.dtype) - self.loc) / self.scale
        return self.loc + self.scale * standard

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw jointly."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class FieldGivenInducing(TorchDistribution):
    """F at samples given the whitened values u at inducing points: normal and independent.

    Parameters
    ----------
    loc : callable
        Function that returns the mean, of shape (..., L, n), made where a value or a density is
        asked for: where F is integrated out nobody does.
    scale : Tensor of shape (L, n)
        Standard deviation of what u leaves.
    leading : sequence of int
        Dimensions in front of (L, n), of u.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Callable[[], Tensor], scale: Tensor, leading: Sequence[int] = ()):
        self._loc, self.scale = loc, scale
        super().__init__(torch.Size((*leading, *scale.shape)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FieldGivenInducing:
        """Return the same distribution with more dimensions in front."""
        return FieldGivenInducing(self._loc, self.scale, torch.Size(batch_shape)[:-2])

    @property
    def normal(self) -> Normal:
        """The same as a `Normal`."""
        return Normal(self._loc(), self.scale, validate_args=False).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Mean given u, of shape (..., L, n)."""
        return self.normal.mean

    @property
    def variance(self) -> Tensor:
        """Variance given u, of shape (..., L, n)."""
        return self.normal.variance

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw F given u, of shape sample_shape + (..., L, n)."""
        return self.normal.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each F_il given u."""
        return self.normal.log_prob(value)


@register_kl(FieldGivenInducing, FieldGivenInducing)
def _kl_given_inducing(q: FieldGivenInducing, p: FieldGivenInducing) -> Tensor:
    """Zero: guide and model agree on F given u. The divergence is counted at u."""
    return q.scale.new_zeros(q.batch_shape)


class WhitenedPrior(Independent):
    """N(0, I) over u, of event shape (L, M)."""

    def __init__(
        self,
        L: int,
        M: int,
        device: torch.device | None = None,
        batch_shape: Sequence[int] = (),
    ):
        zero = torch.zeros(*batch_shape, L, M, dtype=torch.float64, device=device)
        super().__init__(Normal(zero, 1.0, validate_args=False), 2, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> WhitenedPrior:
        """Return independent repetitions of u, of this batch shape."""
        L, M = self.event_shape
        return WhitenedPrior(L, M, self.mean.device, batch_shape)


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the products (..., L, M) of matrices (L or 1, M, n) with vectors (..., L, n).

    One by one: batches of them are slow.
    """
    pairs = zip(each(matrices, vectors.shape[-2]), vectors.unbind(-2), strict=True)
    return torch.stack([(vector @ matrix.mT) for matrix, vector in pairs], -2)


def weighted_gram(A: Tensor, weights: Tensor) -> Tensor:
    """Return A diag(w) A^T, of shape (L, M, M), by blocks below the diagonal: M^2 n operations."""
    M = A.shape[-2]
    product = A.new_empty(len(weights), M, M)
    for a, weight, out in zip(each(A, len(weights)), weights, product, strict=True):
        for first in range(0, M, BLOCK):
            rows = slice(first, first + BLOCK)
            out[rows, : rows.stop] = (a[rows] * weight) @ a[: rows.stop].T
    return product.tril() + product.tril(-1).mT


def each(A: Tensor, L: int) -> Tensor:
    """Return the A of each of L components, where they may share one, of shape (L, M, n)."""
    return A if len(A) == L else A.expand(L, *A.shape[1:])
