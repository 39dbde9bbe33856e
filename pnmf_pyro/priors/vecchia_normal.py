r"""A normal whose precision is sparse by the Vecchia approximation, and divergences from it.

For p = N(mu, Q^-1) with Q = (I - B)^T diag(1 / v) (I - B), r(x) = (I - B) x, and q = N(m, S)::

    KL(q || p) = 1/2 [ tr(Q S) + sum_i r_i(m - mu)^2 / v_i - N + sum_i log v_i - log det S ].

For S = V V^T + diag(d) with V of shape (N, R), every term is a sum over spots, linear in N::

    tr(Q S)   = sum_i Q_ii d_i + sum_i sum_r r_i(V_.r)^2 / v_i,
    log det S = sum_i log d_i + log det(I_R + V^T diag(1 / d) V),

where the last, which has no spots, is shared out evenly. A diagonal S has no V. So the divergence
splits into one term for each spot, and a minibatch of them estimates it without bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    Normal,
    constraints,
    register_kl,
)

from pnmf_pyro.gp.neighbors import Covariance
from pnmf_pyro.gp.vecchia import VecchiaFactor, conditional_weights, on_components


class _Product(torch.autograd.Function):
    """Products of constant sparse matrices with x of shape (L, N) or (L, N, R), in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Sequence[Any]) -> Tensor:
        ctx.matrices, ctx.like = matrices, x
        return _from_numpy(on_components(lambda A, x: A @ x, matrices, _numpy(x)), x.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        product = on_components(lambda A, x: A.T @ x, ctx.matrices, _numpy(gradient))
        return _from_numpy(product, ctx.like.device).to(ctx.like.dtype), None


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _from_numpy(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)


def residuals(factor: VecchiaFactor, x: Tensor, spots: Any = None) -> Tensor:
    """Return (I - B) x at some spots, differentiable in x.

    Parameters
    ----------
    factor : VecchiaFactor
    x : Tensor of shape (L, N) or (L, N, R)
    spots : array of int, shape (n,), optional
        All unless given.

    Returns
    -------
    Tensor of shape (L, n) or (L, n, R), float64
    """
    if spots is not None:
        combined, matrices = factor.rows(spots)
        return _Product.apply(x.index_select(1, torch.from_numpy(combined).to(x.device)), matrices)
    order, position = (
        torch.from_numpy(index).to(x.device)
        for index in (factor.graph.order, factor.graph.position)
    )
    product = _Product.apply(x.index_select(1, order), factor.matrices)
    return product.index_select(1, position)


class VecchiaNormal(TorchDistribution):
    """N(loc, Q^-1) over N spots, for L components at once.

    Parameters
    ----------
    factor : VecchiaFactor
        Of L components.
    loc : Tensor or float
        Mean, broadcast to (L, N); zero unless given. Gradients flow into it.

    Notes
    -----
    The batch shape is (L,), the event shape (N,). Values are float64.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, factor: VecchiaFactor, loc: Any = 0.0):
        self.factor = factor
        shape = torch.Size((factor.L, factor.N))
        self.loc = torch.as_tensor(loc, dtype=torch.float64).expand(shape)
        super().__init__(shape[:1], shape[1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> VecchiaNormal:
        """Return independent repetitions, of batch shape (..., L).

        Raises
        ------
        ValueError
            For a batch shape that does not end with the number of components.
        """
        shape = torch.Size(batch_shape)
        if shape[-1:] != (self.factor.L,):
            raise ValueError(
                f"VecchiaNormal has batch shape ({self.factor.L},), one for each component of its "
                f"factor, and cannot take {tuple(shape)}; see VecchiaFactor.rescaled."
            )
        repeated = VecchiaNormal(self.factor, self.loc)
        repeated._batch_shape = shape
        return repeated

    @property
    def conditional_variance(self) -> Tensor:
        """v, variance of each spot given its neighbours; (L, N)."""
        return torch.from_numpy(self.factor.variances).to(self.loc.device)

    @property
    def mean(self) -> Tensor:
        """Mean, of shape batch_shape + (N,)."""
        return self.loc.expand(self._extended_shape())

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw loc + (I - B)^-1 sqrt(v) epsilon, of shape sample_shape + (L, N)."""
        shape, device = self._extended_shape(torch.Size(sample_shape)), self.loc.device
        noise = torch.randn(shape, dtype=torch.float64, device=device)
        scaled = noise.reshape(-1, *self.loc.shape) * self.conditional_variance.sqrt()
        fields = _from_numpy(self.factor.solve(_numpy(scaled.movedim(0, -1))), device)
        draws = fields.movedim(-1, 0)
        return self.loc + draws.reshape(noise.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each component, of shape (..., L) for a value (..., L, N)."""
        deviation = (value - self.loc).reshape(-1, *self.loc.shape)
        squares = residuals(self.factor, deviation.movedim(0, -1)).square()
        quadratic = (squares / self.conditional_variance[..., None]).sum(1).movedim(-1, 0)
        constant = torch.from_numpy(self.factor.log_determinant) + self.factor.N * math.log(
            2 * math.pi
        )
        return -0.5 * (quadratic + constant.to(value.device)).reshape(value.shape[:-1])


def kl_terms(
    p: VecchiaNormal,
    mean: Tensor,
    diagonal: Tensor,
    low_rank: Tensor | None = None,
    spots: Any = None,
    *,
    roughness: Tensor | None = None,
) -> Tensor:
    """Return one term of KL(N(mean, V V^T + diag(d)) || p) for each component and spot.

    Parameters
    ----------
    p : VecchiaNormal
    mean, diagonal : Tensor of shape (L, N)
        m and d, for all spots.
    low_rank : Tensor of shape (L, N, R), optional
        V.
    spots : array of int, shape (n,), optional
        Spots whose terms are wanted; all unless given. N / n times their sum has the divergence
        as its expectation, where spots are drawn uniformly.
    roughness : Tensor of shape (L, N), optional
        The sum over columns of ``r_i(V_.r)^2`` at all spots, where it is known: V may be fixed
        while m and d move.

    Returns
    -------
    Tensor of shape (L, n), float64
        The sum over all spots is the divergence; differentiable in m, d and V.
    """
    device = mean.device
    take = slice(None) if spots is None else torch.as_tensor(np.asarray(spots), device=device)
    variance = p.conditional_variance.to(device)[:, take]
    precision = torch.from_numpy(p.factor.precision_diagonal).to(device)[:, take]
    squares = residuals(p.factor, mean - p.loc.to(device), spots).square()
    if low_rank is not None:
        squares = squares + (
            residuals(p.factor, low_rank, spots).square().sum(-1)
            if roughness is None
            else roughness[:, take]
        )
    own = diagonal[:, take].double()
    terms = precision * own + squares / variance - 1 + variance.log() - own.log()
    if low_rank is not None:
        terms = terms - _capacitance_log_determinant(low_rank, diagonal)[:, None] / p.factor.N
    return terms / 2


def kl_terms_given_weights(
    weights: Tensor,
    variances: Tensor,
    neighbors: Any,
    spots: Any,
    mean: Tensor,
    diagonal: Tensor,
    low_rank: Tensor | None = None,
    loc: Any = 0.0,
) -> Tensor:
    r"""Return one term of the same divergence for each of some spots, without a factor.

    For a batch of spots whose neighbours are not kept, and for gradients in the kernel's
    hyperparameters. tr(Q diag(d)) is split by the rows of B instead of by its columns:
    sum_i (d_i + sum_k B_ik^2 d_k) / v_i. So a single term differs from that of :func:`kl_terms`;
    the sum over all spots is the same.

    Parameters
    ----------
    weights : Tensor of shape (L, n, K) or (1, n, K)
        Of the spots, from :func:`~pnmf_pyro.gp.vecchia.conditional_weights`.
    variances : Tensor of shape (L, n)
    neighbors : ndarray or Tensor of int, shape (n, K)
        -1 for none.
    spots : array of int, shape (n,)
    mean, diagonal, low_rank
        As in :func:`kl_terms`, for all N spots.
    loc : Tensor or float
        Mean of the prior, broadcast to (L, N).

    Returns
    -------
    Tensor of shape (L, n), float64
        Differentiable in everything.
    """
    near = torch.as_tensor(neighbors, dtype=torch.long, device=mean.device).clamp(min=0)
    spots = torch.as_tensor(np.asarray(spots), dtype=torch.long, device=mean.device)
    own = diagonal[:, spots].double()
    trace = own + (weights.square() * diagonal.double()[:, near]).sum(-1)
    columns = [(mean - loc).double(), *([] if low_rank is None else low_rank.double().unbind(-1))]
    residual = [x[:, spots] - (weights * x[:, near]).sum(-1) for x in columns]
    squares = torch.stack(residual).square().sum(0)
    terms = (trace + squares) / variances - 1 + variances.log() - own.log()
    if low_rank is not None:
        terms = terms - _capacitance_log_determinant(low_rank, diagonal)[:, None] / mean.shape[1]
    return terms / 2


def _capacitance_log_determinant(low_rank: Tensor, diagonal: Tensor) -> Tensor:
    """Return log det(I + V^T diag(1 / d) V), (L,)."""
    scaled = low_rank.double() / diagonal.double().sqrt()[..., None]
    capacitance = scaled.mT @ scaled + torch.eye(low_rank.shape[-1], device=scaled.device)
    factor = torch.linalg.cholesky(capacitance)
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@register_kl(LowRankMultivariateNormal, VecchiaNormal)
def _kl_low_rank(q: LowRankMultivariateNormal, p: VecchiaNormal) -> Tensor:
    return kl_terms(p, q.loc, q.cov_diag, q.cov_factor).sum(1)


@register_kl(Independent, VecchiaNormal)
def _kl_diagonal(q: Independent, p: VecchiaNormal) -> Tensor:
    if not isinstance(q.base_dist, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError("only Normal(loc, scale).to_event(1), loc of shape (L, N)")
    return kl_terms(p, q.base_dist.loc, q.base_dist.variance).sum(1)


def predict(
    kernels: Sequence[tuple[Covariance, float]],
    features: Any,
    new_features: Any,
    neighbors: Any,
    mean: Tensor,
    diagonal: Tensor,
    low_rank: Tensor | None = None,
    loc: Any = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Predict a field at new places from q(f) = N(m, V V^T + diag(d)) at the spots.

    Given its neighbours, f* ~ N(loc + sum_k b_k (f_k - loc), v*), so that its mean is
    loc + sum_k b_k (m_k - loc) and its variance v* + sum_k b_k^2 d_k + (sum_k b_k V_k)^2.

    Parameters
    ----------
    kernels : sequence of (callable, float)
        Covariance and k(x, x) of each of the L components, see :func:`conditional_weights`. Those
        that are the same are worked out once.
    features : ndarray or Tensor of shape (N, q)
    new_features : ndarray or Tensor of shape (n, q)
    neighbors : ndarray of int, shape (n, K)
        Spots near each new place, see :func:`pnmf_pyro.gp.neighbors.nearest`.
    mean, diagonal : Tensor of shape (L, N)
    low_rank : Tensor of shape (L, N, R), optional
    loc : Tensor of shape (L,) or (L, 1), or float
        Mean of the prior.

    Returns
    -------
    mean, variance : Tensor of shape (L, n), float64
    """
    sources, targets = (torch.as_tensor(x, dtype=torch.float64) for x in (features, new_features))
    near = torch.as_tensor(neighbors, dtype=torch.long)
    means = torch.as_tensor(loc, dtype=torch.float64).reshape(-1).expand(len(mean))
    known = {
        pair: conditional_weights(targets, sources, near, *pair) for pair in dict.fromkeys(kernels)
    }
    parts = []
    for l, pair in enumerate(kernels):
        weights, conditional = known[pair]
        centred = (mean[l].double() - means[l])[near]
        spread = conditional + (weights.square() * diagonal[l].double()[near]).sum(1)
        if low_rank is not None and low_rank.shape[-1]:
            spread = spread + _combined(weights, near, low_rank[l].double()).square().sum(1)
        parts.append((means[l] + (weights * centred).sum(1), spread))
    predicted, variances = zip(*parts, strict=True)
    return torch.stack(predicted), torch.stack(variances)


def _combined(weights: Tensor, near: Tensor, V: Tensor) -> Tensor:
    """sum_k b_k V_k, (n, R), one column at a time: no array of (n, K, R)."""
    return torch.stack([(weights * column[near]).sum(1) for column in V.T], 1)
