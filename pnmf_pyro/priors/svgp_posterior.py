"""What the q(u) of an SVGP is held in: sites, or its mean and what makes its covariance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Independent, MultivariateNormal, Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import register_kl

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import put, take
from pnmf_pyro.data.parallel import by_components
from pnmf_pyro.data.resumable import Resumable, State
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.cholesky import solve
from pnmf_pyro.priors.fields import WhitenedPrior, each, times, weighted_gram
from pnmf_pyro.priors.svgp_sites import (
    Moments,
    NormalOverInducing,
    NormalOverSamples,
    SiteNormal,
    SpreadOverInducing,
    SpreadOverSamples,
)

# Samples for each inducing point up to which the N x N form is the faster one: it takes 2/3 N^3
# operations a step and component, the other 3 N M^2 + M^3.
SITES = 1.8


class InducingPosterior(nn.Module):
    """What q(u) is held in. A of shape (L or 1, M, N) makes the field at the samples, A^T u."""

    natural = False

    def distribution(self, A: Tensor) -> TorchDistribution:
        """Return q(u)."""
        raise NotImplementedError

    def assign(self, A: Tensor, precision: Tensor, shift: Tensor) -> None:
        """Set q(u) to the posterior from sites with precision w and shift b, each (L, N)."""
        raise NotImplementedError


class SiteInducing(Resumable, InducingPosterior):
    """q(u) in sites, for natural-gradient steps.

    Parameters
    ----------
    L, M, N : int
        Number of components, inducing points and samples.
    """

    natural = True
    site_shift: nn.Parameter
    site_precision: nn.Parameter

    def __init__(self, L: int, M: int, N: int):
        super().__init__()
        self.over_samples = N <= SITES * M
        for name in ("site_shift", "site_precision"):
            zeros = torch.zeros(L, N, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        self._once = Cache()
        self._moved: Tensor | None = None  # S^{-1} since batches move it
        self._resumed_at = -1

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_moved": None}

    def state(self) -> State:
        """Return S^{-1} where batches have moved it: made anew it is rounded in another way."""
        return {"moved": self._moved}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the sites that belong to it."""
        self._moved, self._resumed_at = state["moved"], self.site_precision._version

    @torch.no_grad()
    def distribution(self, A: Tensor) -> SiteNormal:
        """Return q(u)."""
        w, b = self.site_precision, self.site_shift
        if self.over_samples:
            gram = self._once("gram", (A,), lambda: A.mT @ A)
            known = self._once("spread", (w, A), lambda: SpreadOverSamples(w, A, gram))
            return NormalOverSamples(b.detach(), known)
        spread = self._once("spread", (w, A), lambda: SpreadOverInducing(self._precision(A), A))
        return NormalOverInducing(times(A, b.detach()), spread)

    @torch.no_grad()
    def move(
        self, A: Tensor, precision: Tensor | None, shift: Tensor, index: Tensor | None
    ) -> None:
        """Set the sites of some samples, each of shape (L, n); a precision of None stays.

        The cost of a batch is in proportion to its size: S^{-1} is moved by what its samples say.
        """
        if precision is not None:
            if not self.over_samples and index is not None:
                moved = self._precision(A)
                moved += weighted_gram(take(A, index), precision - take(self.site_precision, index))
                put(self.site_precision, precision, index)
                self._once.renew("precision", (self.site_precision, A), moved)
                self._moved = moved
            else:
                put(self.site_precision, precision, index)
                self._moved = None
        put(self.site_shift, shift, index)

    def assign(self, A: Tensor, precision: Tensor, shift: Tensor) -> None:
        """Set q(u) to the posterior from sites with precision w and shift b, each (L, N)."""
        self.move(A, precision, shift, None)

    def _precision(self, A: Tensor) -> Tensor:
        """S^{-1} = I + A diag(w) A^T, of shape (L, M, M)."""

        def make() -> Tensor:
            if self._moved is not None and self._resumed_at == self.site_precision._version:
                return self._moved
            w = self.site_precision
            precision = by_components(
                lambda own: weighted_gram(each(A, len(w))[own], w[own]), len(w)
            )
            precision.diagonal(dim1=-2, dim2=-1).add_(1)
            return precision

        return self._once("precision", (self.site_precision, A), make)


class CovarianceInducing(InducingPosterior):
    """q(u) in its means u_loc (L, M) and what makes its covariance, with u_scale (L, M).

    Parameters
    ----------
    L, M : int
        Number of components and inducing points.
    cholesky_mode : {'exp', 'softplus'}
        How u_scale stays positive.
    """

    def __init__(self, L: int, M: int, cholesky_mode: str):
        super().__init__()
        self.u_loc = nn.Parameter(torch.zeros(L, M, dtype=torch.float64))
        self.u_scale = PositiveParameter((L, M), cholesky_mode).double()

    @torch.no_grad()
    def assign(self, A: Tensor, precision: Tensor, shift: Tensor) -> None:
        """Set q(u) to the posterior from sites with precision w and shift b, each (L, N)."""
        inverse = weighted_gram(A, precision)
        inverse.diagonal(dim1=-2, dim2=-1).add_(1)
        tril = torch.linalg.cholesky(inverse)
        self.u_loc.copy_(solve(tril, times(A, shift)))
        self._spread(inverse, tril)

    def _spread(self, precision: Tensor, tril: Tensor) -> None:
        """Set the covariance from its inverse and the Cholesky factor of that, (L, M, M)."""
        raise NotImplementedError


class CholeskyInducing(CovarianceInducing):
    """With the Cholesky factor of the covariance, (L, M, M), of which u_scale is the diagonal."""

    def __init__(self, L: int, M: int, cholesky_mode: str):
        super().__init__(L, M, cholesky_mode)
        self.u_below = nn.Parameter(torch.zeros(L, M, M, dtype=torch.float64))

    def distribution(self, A: Tensor) -> Independent:
        """Return q(u)."""
        tril = self.u_below.tril(-1) + torch.diag_embed(self.u_scale.data)
        return MultivariateNormal(self.u_loc, scale_tril=tril, validate_args=False).to_event(1)

    def _spread(self, precision: Tensor, tril: Tensor) -> None:
        scale = torch.linalg.cholesky(torch.cholesky_inverse(tril))
        self.u_below.copy_(scale)
        self.u_scale.assign(scale.diagonal(dim1=-2, dim2=-1))


class DiagonalInducing(CovarianceInducing):
    """Of independent normals, each with its conditional variance."""

    def distribution(self, A: Tensor) -> Independent:
        """Return q(u)."""
        return Normal(self.u_loc, self.u_scale.data, validate_args=False).to_event(2)

    def _spread(self, precision: Tensor, tril: Tensor) -> None:
        self.u_scale.assign(precision.diagonal(dim1=-2, dim2=-1).rsqrt())


@register_kl(Independent, WhitenedPrior)
def _kl_whitened(q: Independent, p: WhitenedPrior) -> Tensor:
    """KL(N(m, S) || N(0, I)) = (tr S + |m|^2 - M - log |S|) / 2, summed over components."""
    base = q.base_dist
    scale = (
        base.scale_tril.diagonal(dim1=-2, dim2=-1) if hasattr(base, "scale_tril") else base.scale
    )
    return ((q.variance + q.mean.square() - 1) / 2 - scale.log()).sum((-2, -1))


def spread_of(A: Tensor, precision: Tensor) -> SpreadOverSamples | SpreadOverInducing:
    """Return what sites of these precisions (L, N) alone say of u, for the A of samples."""
    if A.shape[-1] <= SITES * A.shape[-2]:
        return SpreadOverSamples(precision, A, A.mT @ A)
    inverse = weighted_gram(A, precision)
    inverse.diagonal(dim1=-2, dim2=-1).add_(1)
    return SpreadOverInducing(inverse, A)


def marginals_of(q: TorchDistribution, A: Tensor) -> Moments:
    """Return mean and variance of A^T u under q(u), each (L, n).

    Parameters
    ----------
    q : SiteNormal, or Independent of MultivariateNormal or Normal, of event shape (L, M)
    A : Tensor of shape (L or 1, M, n)
    """
    if isinstance(q, SiteNormal):
        return q.marginals(A)
    mean = times(A.mT, q.mean)
    if hasattr(q.base_dist, "scale_tril"):
        return mean, (q.base_dist.scale_tril.mT @ A).square().sum(-2)
    return mean, (q.variance[..., None] * A.square()).sum(-2)
