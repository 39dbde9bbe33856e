r"""Prior and posterior of a field by its neighbours, in the shape that plates take.

Both have batch shape (L, n), components by places, so that a plate scales each place of a batch.

For p = N(c, Q^-1) with Q = (I - B)^T diag(1 / v) (I - B), r(x) = (I - B) x, and q = N(m, S)::

    KL(q || p) = 1/2 [ tr(Q S) + sum_i r_i(m - c)^2 / v_i - N + sum_i log v_i - log det S ].

For S = V V^T + diag(d) with V of shape (N, R), every term is a sum over places, linear in N::

    tr(Q S)   = sum_i Q_ii d_i + sum_i sum_r r_i(V_.r)^2 / v_i,
    log det S = sum_i log d_i + log det(I_R + V^T diag(1 / d) V),

where the last, which has no places, is shared out evenly. So the divergence splits into one term
for each place, and a minibatch of them estimates it without bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from pnmf_pyro.data.batches import take
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.gp.cholesky import log_det
from pnmf_pyro.gp.vecchia import VecchiaFactor
from pnmf_pyro.priors.fields import Repeated


class VecchiaNormal(TorchDistribution):
    r"""N(mean_l, Q_l^-1) over N places, for L components: a Gaussian process by its neighbours.

    Parameters
    ----------
    factor : VecchiaFactor
        Factor of the precisions Q_l of all components.
    mean : Tensor of shape (L,) or float
        Mean of each component.
    index : Tensor of int64, shape (n,), optional
        Numbers of the places of a batch; all N unless given.
    dtype : torch.dtype
        Type of draws; everything inside is float64.

    Notes
    -----
    The batch shape is (L, n) and the event shape is empty, for plates over components and places.
    The entries of a draw depend on one another nevertheless. `log_prob` gives the density of each
    place given its neighbours; their sum over places is the log density of a component.

    Examples
    --------
    >>> import pyro, torch
    >>> from pnmf_pyro.data.places import Places
    >>> from pnmf_pyro.gp.kernels import SpatialKernel
    >>> from pnmf_pyro.gp.neighborhoods import Neighborhoods
    >>> from pnmf_pyro.priors.lcgp_distributions import VecchiaNormal
    >>> places = Places(torch.rand(500, 2, dtype=torch.float64))
    >>> neighborhoods = Neighborhoods(SpatialKernel("Matern32", lengthscale=0.2), places, L=3, K=15)
    >>> def model():
    ...     with pyro.plate("components", 3, dim=-2), pyro.plate("places", 500, dim=-1):
    ...         return pyro.sample("field", VecchiaNormal(neighborhoods.factor, mean=1.0))
    >>> model().shape
    torch.Size([3, 500])
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        factor: VecchiaFactor,
        mean: Tensor | float = 0.0,
        index: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.factor, self.index, self.dtype = factor, index, dtype
        self.loc = torch.as_tensor(mean, dtype=torch.float64).expand(factor.L)
        n = factor.N if index is None else len(index)
        super().__init__(torch.Size((factor.L, n)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> VecchiaNormal:
        """Return independent repetitions of the field, of batch shape (..., L, n).

        Raises
        ------
        ValueError
            For a batch shape that does not end with components and places.
        """
        shape = torch.Size(batch_shape)
        if shape[-2:] != self.batch_shape[-2:]:
            raise ValueError(
                f"VecchiaNormal has batch shape {tuple(self.batch_shape[-2:])}, components by "
                f"places, and can be repeated to (..., {self.factor.L}, {self.batch_shape[-1]}); "
                f"got {tuple(shape)}. Let plates over components and places be its last two."
            )
        new = self._get_checked_instance(VecchiaNormal, _instance)
        new.factor, new.index, new.dtype, new.loc = self.factor, self.index, self.dtype, self.loc
        super(VecchiaNormal, new).__init__(shape, validate_args=False)
        return new

    @property
    def mean(self) -> Tensor:
        """Mean, of the batch shape."""
        return self.loc[:, None].expand(self.batch_shape).to(self.dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw mean + (I - B)^-1 sqrt(v) epsilon, of shape sample_shape + batch shape."""
        shape = (*self._extended_shape(torch.Size(sample_shape))[:-1], self.factor.N)
        noise = torch.randn(shape, dtype=torch.float64, device=self.loc.device)
        scaled = noise.reshape(-1, *shape[-2:]) * self.factor.variances.sqrt()
        draws = self.factor.solve(scaled.movedim(0, -1)).movedim(-1, 0).reshape(shape)
        return take(self.loc[:, None] + draws, self.index).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each place given its neighbours, of the shape of the value.

        Raises
        ------
        ValueError
            For a batch of places: those that they are conditioned on are not there.
        """
        if self.index is not None:
            raise ValueError(
                "the density of some places of a field is not known without the others. Use all "
                "samples (batch_size=None) with a model that needs it."
            )
        deviation = value - self.loc[:, None]
        columns = deviation.reshape(-1, *deviation.shape[-2:]).movedim(0, -1)
        squares = residuals(self.factor, columns).square().movedim(-1, 0).reshape(deviation.shape)
        variances = self.factor.variances
        return -0.5 * (squares / variances + (2 * torch.pi * variances).log())


class LocalPosterior(Repeated, Normal):
    r"""N(m, V V^T + diag(d)) at some places: a `Normal` of its marginals with a joint density.

    With S the covariance at the n places, `log_prob` gives

    .. math:: -\tfrac12 \left(\log 2 \pi d_i + r_i (S^{-1} r)_i
        + \tfrac1n \log\det(I + V^T \mathrm{diag}(1 / d) V)\right), \qquad r = F - m,

    at each place, whose sum is the log density of a component. Draws are joint as well.

    Parameters
    ----------
    mean, diagonal : Tensor of shape (L, N)
        m and d at all places.
    low_rank : Tensor of shape (L, N, R)
        V; taken as fixed.
    index : Tensor of int64, shape (n,), optional
        Numbers of the places of a batch; all N unless given.
    dtype : torch.dtype
        Type of the marginals and draws.
    """

    def __init__(
        self,
        mean: Tensor,
        diagonal: Tensor,
        low_rank: Tensor,
        index: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.moments, self.low_rank, self.index = (mean, diagonal), low_rank, index
        m, d, V = take(mean, index), take(diagonal, index), take(low_rank, index, dim=1)
        variance = d + torch.einsum("lnr,lnr->ln", V, V)
        self._present = m, d, V
        super().__init__(m.to(dtype), variance.sqrt().to(dtype), validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw jointly, of shape sample_shape + batch shape; differentiable in loc and scale."""
        _, d, V = self._present
        variance, shape = self.scale.square(), torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(*shape[:-1], V.shape[-1]).to(V)
        own = d.detach() + variance - variance.detach()  # d, as a function of the scale
        return draw_given(noise, self.loc, own, V).to(self.loc.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw jointly, of shape sample_shape + batch shape."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each component, shared out over places, (..., L, n)."""
        m, d, V = (part.double() for part in self._present)
        r, scaled = value - m, V / d[..., None]
        tril = torch.linalg.cholesky(_capacitance(V, d))
        known = torch.cholesky_solve(scaled.mT @ r[..., None], tril)
        squares = r * (r / d - (scaled @ known)[..., 0])  # Woodbury
        return -((2 * torch.pi * d).log() + squares + log_det(tril)[:, None] / d.shape[-1]) / 2


def draw_given(noise: Tensor, mean: Tensor, diagonal: Tensor, low_rank: Tensor) -> Tensor:
    """Draw from N(m, V V^T + diag(d)), given the standard normals that go with V.

    Parameters
    ----------
    noise : Tensor of shape (..., L, R)
    mean, diagonal : Tensor of shape (L, n)
    low_rank : Tensor of shape (L, n, R)

    Returns
    -------
    Tensor of shape (..., L, n)
    """
    smooth = torch.einsum("lnr,...lr->...ln", low_rank, noise)
    return mean + smooth + diagonal.sqrt() * torch.randn(smooth.shape).to(mean)


@register_kl(LocalPosterior, VecchiaNormal)
def kl_terms(q: LocalPosterior, p: VecchiaNormal) -> Tensor:
    """Return one term of KL(q || p) for each component and place, see the head of this module.

    Returns
    -------
    Tensor of shape (L, n), float64, or of q's batch shape
        Terms of the places of q, which p must have as well. The sum over all N places is the
        divergence, and N / n times the sum over a uniform batch has it as its expectation.
        Differentiable in m, d and the mean of p.
    """
    (mean, diagonal), index, V = q.moments, q.index, q.low_rank
    precision, variance, rough = (
        take(x, index)
        for x in (p.factor.precision_diagonal, p.factor.variances, p.factor.roughness(V))
    )
    d = take(diagonal, index).double()
    squares = residuals(p.factor, mean - p.loc[:, None].to(mean.device), index).square() + rough
    evenly = log_det(torch.linalg.cholesky(_capacitance(V, diagonal)))[:, None] / p.factor.N
    terms = precision * d + squares / variance - 1 + variance.log() - d.log() - evenly
    return (terms / 2).expand(q.batch_shape)


def _capacitance(low_rank: Tensor, diagonal: Tensor) -> Tensor:
    """Return I + V^T diag(1 / d) V, (L, R, R); no eigenvalue is below 1, so without jitter."""
    R = low_rank.shape[-1]
    total = torch.eye(R, dtype=torch.float64, device=low_rank.device)
    size = at_once(R * len(low_rank))
    for V, d in zip(low_rank.split(size, 1), diagonal.split(size, 1), strict=True):
        scaled = V.double() / d.double().sqrt()[..., None]  # so much of V is copied at once
        total = total + scaled.mT @ scaled
    return total


def residuals(factor: VecchiaFactor, x: Tensor, index: Tensor | None = None) -> Tensor:
    """Return (I - B) x at some places, differentiable in x.

    Parameters
    ----------
    factor : VecchiaFactor
    x : Tensor of shape (L, N) or (L, N, R)
    index : Tensor of int64, shape (n,), optional
        Numbers of the places; all unless given.

    Returns
    -------
    Tensor of shape (L, n) or (L, n, R), float64
    """
    if index is None:
        return _Residuals.apply(x, factor)
    near, weights = factor.neighbors(index)
    known = x.index_select(1, near.flatten()).unflatten(1, near.shape).double()
    weights = weights.double() if x.ndim == 2 else weights.double()[..., None]
    return x.index_select(1, index).double() - (weights * known).sum(2)


class _Residuals(torch.autograd.Function):
    """(I - B) x for x of shape (L, N) or (L, N, R), in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: VecchiaFactor) -> Tensor:
        ctx.factor, ctx.dtype = factor, x.dtype
        return factor.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor.multiply_transposed(gradients[0]).to(ctx.dtype), None
