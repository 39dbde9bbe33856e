r"""Distributions of a Gaussian field: its values at inducing points, and its marginals elsewhere.

Everything is whitened: the field at inducing points is L_z u with L_z the Cholesky factor of their
covariance and u ~ N(0, I) under the prior. At other places it is A^T u plus an independent rest,
with A = L_z^{-1} K_{zx}.

For training by natural gradients q(u) = N(m, S) is held in theta1 = S^{-1} m and
theta2 = -S^{-1} / 2. The natural gradient in theta is the gradient in the expectation parameters
m and S + m m^T, so that is what backward passes here hand to theta1 and theta2 (Hensman, Fusi and
Lawrence 2013, section 3.2; Salimbeni, Eleftheriadis and Hensman 2018). Where theta2 stands still,
and asks for no gradient, the family is that of N(m, S) with S given, in which the natural gradient
in theta1 = S^{-1} m is the gradient in m: a step is one of Newton's, with S for the curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import Independent, MultivariateNormal, Normal, TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints, register_kl

from pnmf_pyro.gp.cholesky import BLOCK, inverse_diagonal, log_det, solve


class OneShape:
    """A distribution that cannot be expanded to another batch shape."""

    batch_shape: torch.Size

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return self, for its own batch shape."""
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"a field of shape {tuple(self.batch_shape)} cannot be expanded.")
        return self


class FieldMarginals(OneShape, Normal):
    """Marginals of a field whose draws are joint.

    Parameters
    ----------
    loc, scale : Tensor of shape (L, n)
        Of the marginals, which are all that a likelihood needs.
    draw : callable
        Returns one joint draw of shape (L, n), or `n_draws` of them, (n_draws, L, n).
    """

    def __init__(self, loc: Tensor, scale: Tensor, draw: Callable[[int], Tensor]):
        self.draw = draw
        super().__init__(loc, scale, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw jointly; differentiable in loc and scale as a draw from each marginal."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            joint = self.draw(shape.numel()).reshape(*shape, *self.batch_shape)
            standard = (joint.to(self.loc.dtype) - self.loc) / self.scale
        return self.loc + self.scale * standard

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw jointly."""
        with torch.no_grad():
            return self.rsample(sample_shape)


@register_kl(FieldMarginals, Normal)
def _kl_of_a_field(q: FieldMarginals, p: Normal) -> Tensor:
    """Zero: given u, field and prior agree, and the divergence of u is counted at u."""
    return q.loc.new_zeros(q.batch_shape)


class WhitenedNormal(OneShape, TorchDistribution):
    """N(m, S) over u of event shape (L, M): the base of those that train by natural gradients."""

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.independent(constraints.real, 2)
    has_rsample = False

    def __init__(self, L: int, M: int):
        super().__init__(torch.Size(), torch.Size([L, M]), validate_args=False)


class NaturalSpread:
    """What theta2 alone says of N(m, S): made once for as many theta1 as share it.

    Parameters
    ----------
    theta2 : Tensor of shape (L, M, M)
        Negative definite.
    """

    def __init__(self, theta2: Tensor):
        self.precision_tril = torch.linalg.cholesky(-2 * theta2.detach())
        self._variance: tuple[Tensor, Tensor] | None = None

    @cached_property
    def trace(self) -> Tensor:
        """Traces of S, of shape (L,)."""
        return inverse_diagonal(self.precision_tril).sum(-1)

    @cached_property
    def log_det(self) -> Tensor:
        """Log-determinants of S^{-1}, of shape (L,)."""
        return log_det(self.precision_tril)

    def variance(self, A: Tensor) -> Tensor:
        """Variances of A^T u, of shape (L, n); kept for the same A."""
        if self._variance is None or self._variance[0] is not A:
            roots = (
                torch.linalg.solve_triangular(tril, a, upper=False)
                for tril, a in zip(
                    self.precision_tril, _each(A, len(self.precision_tril)), strict=True
                )
            )
            self._variance = A, torch.stack([root.square_().sum(0) for root in roots])
        return self._variance[1]


class NaturalNormal(WhitenedNormal):
    """N(m, S) in natural parameters theta1 = S^{-1} m and theta2 = -S^{-1} / 2.

    Parameters
    ----------
    theta1 : Tensor of shape (L, M)
    theta2 : Tensor of shape (L, M, M)
        Negative definite.
    spread : NaturalSpread, optional
        Of theta2.
    """

    def __init__(self, theta1: Tensor, theta2: Tensor, spread: NaturalSpread | None = None):
        self.theta1, self.theta2 = theta1, theta2
        self.spread = spread or NaturalSpread(theta2)
        self._mean = solve(self.precision_tril, theta1.detach())
        self._field_mean: tuple[Tensor, Tensor] | None = None
        super().__init__(*theta1.shape)

    @property
    def precision_tril(self) -> Tensor:
        """Cholesky factor of S^{-1}, of shape (L, M, M); a value without gradient."""
        return self.spread.precision_tril

    @property
    def mean(self) -> Tensor:
        """Mean m, of shape (L, M); a value without gradient."""
        return self._mean

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance S, of shape (L, M, M); a value without gradient."""
        return torch.cholesky_inverse(self.precision_tril)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw u, of shape sample_shape + (L, M)."""
        noise = torch.randn(*torch.Size(sample_shape), *self.theta1.shape).to(self.theta1)
        return self._mean + _solve_upper(self.precision_tril, noise[..., None])[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of u; a value without gradient."""
        precision = -2 * self.theta2.detach()
        normal = MultivariateNormal(self._mean, precision_matrix=precision, validate_args=False)
        return normal.log_prob(value).sum(-1)

    def marginals(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of A^T u, each of shape (L, n).

        Parameters
        ----------
        A : Tensor of shape (L or 1, M, n)
        """
        return _NaturalMarginals.apply(self.theta1, self.theta2, A, self)

    def field_mean(self, A: Tensor) -> Tensor:
        """Return the mean of A^T u, of shape (L, n), as a value; kept for the same A."""
        if self._field_mean is None or self._field_mean[0] is not A:
            self._field_mean = A, times(A.mT, self._mean)
        return self._field_mean[1]


class WhitenedPrior(Independent):
    """N(0, I) over u, of event shape (L, M)."""

    def __init__(self, L: int, M: int):
        zero = torch.zeros(L, M, dtype=torch.float64)
        super().__init__(Normal(zero, 1.0, validate_args=False), 2, validate_args=False)


@register_kl(NaturalNormal, WhitenedPrior)
def _kl_natural(q: NaturalNormal, p: WhitenedPrior) -> Tensor:
    return _NaturalDivergence.apply(q.theta1, q.theta2, q)


@register_kl(Independent, WhitenedPrior)
def _kl_whitened(q: Independent, p: WhitenedPrior) -> Tensor:
    """KL(N(m, S) || N(0, I)) = (tr S + |m|^2 - M - log |S|) / 2, summed over components."""
    base = q.base_dist
    scale = (
        base.scale_tril.diagonal(dim1=-2, dim2=-1) if hasattr(base, "scale_tril") else base.scale
    )
    return ((q.variance + q.mean.square() - 1) / 2 - scale.log()).sum()


def marginals_of(q: Independent, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of A^T u for u in covariance form, each (L, n).

    Parameters
    ----------
    q : Independent of MultivariateNormal or Normal, of event shape (L, M)
    A : Tensor of shape (L or 1, M, n)
    """
    mean = times(A.mT, q.mean)
    if hasattr(q.base_dist, "scale_tril"):
        return mean, (q.base_dist.scale_tril.mT @ A).square().sum(-2)
    return mean, (q.variance[..., None] * A.square()).sum(-2)


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the product of each matrix with its vector; one by one, batches of them are slow.

    Parameters
    ----------
    matrices : Tensor of shape (L or 1, M, n)
    vectors : Tensor of shape (..., L, n)

    Returns
    -------
    Tensor of shape (..., L, M)
    """
    pairs = zip(_each(matrices, vectors.shape[-2]), vectors.unbind(-2), strict=True)
    return torch.stack([(vector @ matrix.mT) for matrix, vector in pairs], -2)


def weighted_gram(A: Tensor, weights: Tensor) -> Tensor:
    """Return A diag(w) A^T, of shape (L, M, M), by blocks below the diagonal: M^2 n operations.

    Parameters
    ----------
    A : Tensor of shape (L or 1, M, n)
    weights : Tensor of shape (L, n)
    """
    M = A.shape[-2]
    product = A.new_empty(len(weights), M, M)
    for a, weight, out in zip(_each(A, len(weights)), weights, product, strict=True):
        for first in range(0, M, BLOCK):
            rows = slice(first, first + BLOCK)
            out[rows, : rows.stop] = (a[rows] * weight) @ a[: rows.stop].T
    return product.tril() + product.tril(-1).mT


class _NaturalMarginals(torch.autograd.Function):
    """Marginals of A^T u; backward hands over natural gradients.

    With dmu and dv the gradients in mean and variance of A^T u, those in the expectation
    parameters are A (dmu - 2 dv A^T m) and A diag(dv) A^T. dv is kept at the sign at which it
    raises the precision, so that a step cannot make it negative.
    """

    @staticmethod
    def forward(ctx: Any, theta1: Tensor, theta2: Tensor, A: Tensor, q: NaturalNormal) -> Any:
        mean = q.field_mean(A)
        ctx.save_for_backward(A, mean)
        return mean.clone(), q.spread.variance(A).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> Any:
        A, mean = ctx.saved_tensors
        second = None
        if ctx.needs_input_grad[1]:
            d_variance = d_variance.clamp_min(0)  # of a loss
            d_mean = d_mean - 2 * d_variance * mean
            second = weighted_gram(A, d_variance)
        return times(A, d_mean), second, None, None


class _NaturalDivergence(torch.autograd.Function):
    """KL(N(m, S) || N(0, I)), summed over components.

    Its natural gradient is theta minus that of the prior.
    """

    @staticmethod
    def forward(ctx: Any, theta1: Tensor, theta2: Tensor, q: NaturalNormal) -> Tensor:
        ctx.save_for_backward(theta1, theta2, q.mean)
        squares = q.spread.trace + q.mean.square().sum(-1)
        return (squares - theta1.shape[-1] + q.spread.log_det).sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> Any:
        theta1, theta2, mean = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return weight * mean, None, None
        second = theta2.clone()
        second.diagonal(dim1=-2, dim2=-1).add_(0.5)
        return weight * theta1, weight * second, None


def _solve_upper(tril: Tensor, right: Tensor) -> Tensor:
    """Solve tril^T x = right."""
    return torch.linalg.solve_triangular(tril.mT, right, upper=True)


def _each(A: Tensor, L: int) -> Any:
    """The A of each of L components, where they may share one."""
    return A if len(A) == L else A.expand(L, *A.shape[1:])
