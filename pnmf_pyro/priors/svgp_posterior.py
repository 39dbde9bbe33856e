"""What q(u) of an inducing-point prior is held in, and trained by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor, nn

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import take
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.cholesky import solve
from pnmf_pyro.priors.fields import NaturalNormal, NaturalSpread, marginals_of, times, weighted_gram
from pnmf_pyro.priors.svgp_sites import SiteNormal, SiteSpread

# Samples for each inducing point up to which q(u) is held in sites: the two forms train alike, at
# N^3 operations a step against 3 N M^2 + M^3.
SITES = 1.8


def family(
    L: int, M: int, N: int, cholesky_mode: str, *, diagonal_only: bool, natural: bool
) -> Family:
    """Return the family of q(u) for L components, M inducing points and N samples."""
    if diagonal_only:
        return DiagonalInducing(L, M, cholesky_mode)
    if not natural:
        return CholeskyInducing(L, M, cholesky_mode)
    return SiteInducing(L, N) if N <= SITES * M else NaturalInducing(L, M)


class Family(nn.Module, ABC):
    """What q(u) is held in. A of shape (C, M, N) makes the field at the samples, A^T u."""

    natural = False

    @property
    def spread(self) -> list[nn.Parameter]:
        """Parameters of the covariance alone, where q(u) trains by natural gradients."""
        return []

    @abstractmethod
    def distribution(self, A: Tensor) -> Any:
        """Return q(u)."""

    @abstractmethod
    def marginals(self, q: Any, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of A^T u, for an A of some samples or of other places."""

    def at_samples(self, q: Any, A: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the same at the samples `index`, whose A it is, with gradients."""
        return self.marginals(q, A)

    @abstractmethod
    def assign(self, A: Tensor, shift: Tensor, precision: Tensor) -> None:
        """Set q(u) to the posterior from sites with shift b and precision w, (L, N)."""


class SiteInducing(Family):
    """q(u) in its sites, for natural gradients with nearly as many inducing points as samples."""

    natural = True

    def __init__(self, L: int, N: int):
        super().__init__()
        self.site_shift = nn.Parameter(torch.zeros(L, N, dtype=torch.float64))
        self.site_precision = nn.Parameter(torch.zeros(L, N, dtype=torch.float64))
        self._once = Cache()

    def distribution(self, A: Tensor) -> SiteNormal:
        """Return q(u)."""
        gram = self._once("gram", (A,), lambda: A.mT @ A)
        w = self.site_precision
        spread = self._once("spread", (w, A), lambda: SiteSpread(w, A, gram))
        return SiteNormal(self.site_shift, w, spread)

    @property
    def spread(self) -> list[nn.Parameter]:
        """The precisions of the sites."""
        return [self.site_precision]

    def marginals(self, q: SiteNormal, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of A^T u."""
        return q.marginals(A)

    def at_samples(self, q: SiteNormal, A: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and variance at samples, with natural gradients."""
        mean, variance = q.at_sites()
        return take(mean, index), take(variance, index)

    @torch.no_grad()
    def assign(self, A: Tensor, shift: Tensor, precision: Tensor) -> None:
        """Set q(u) to the posterior from sites with shift b and precision w, (L, N)."""
        self.site_shift.copy_(shift)
        self.site_precision.copy_(precision)

    @torch.no_grad()
    def reweight(self, q: SiteNormal, weight: float) -> None:
        """Multiply what the samples say of the precision of q(u) by `weight`; its mean stays.

        With f = A^T m, of S^{-1} m = A b there is m = A (b - w f).
        """
        w, field = q.root.square(), q.mean_at_sites
        self.assign(q.A, q.shift - (1 - weight) * w * field, weight * w)


class DenseFamily(Family):
    """With a matrix of the size of S."""

    def assign(self, A: Tensor, shift: Tensor, precision: Tensor) -> None:
        """Set q(u) to the posterior from sites with shift b and precision w, (L, N)."""
        theta1 = times(A, shift)
        inverse = weighted_gram(A, precision)
        inverse.diagonal(dim1=-2, dim2=-1).add_(1)
        self._set(theta1, inverse)

    @abstractmethod
    def _set(self, theta1: Tensor, precision: Tensor) -> None:
        """Set S^{-1} m and S^{-1}, of shape (L, M) and (L, M, M)."""


class NaturalInducing(DenseFamily):
    """q(u) in natural parameters theta1 (L, M) and theta2 (L, M, M)."""

    natural = True

    def __init__(self, L: int, M: int):
        super().__init__()
        self.theta1 = nn.Parameter(torch.zeros(L, M, dtype=torch.float64))
        self.theta2 = nn.Parameter(-torch.eye(M, dtype=torch.float64).repeat(L, 1, 1) / 2)
        self._once = Cache()

    def distribution(self, A: Tensor) -> NaturalNormal:
        """Return q(u)."""
        spread = self._once("spread", (self.theta2,), lambda: NaturalSpread(self.theta2))
        return NaturalNormal(self.theta1, self.theta2, spread)

    @property
    def spread(self) -> list[nn.Parameter]:
        """theta2."""
        return [self.theta2]

    def marginals(self, q: NaturalNormal, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of A^T u."""
        return q.marginals(A)

    @torch.no_grad()
    def reweight(self, q: NaturalNormal, weight: float) -> None:
        """Multiply what the samples say of the precision of q(u) by `weight`; its mean stays."""
        precision = -2 * weight * q.theta2
        precision.diagonal(dim1=-2, dim2=-1).add_(1 - weight)
        self._set(times(precision, q.mean), precision)

    @torch.no_grad()
    def _set(self, theta1: Tensor, precision: Tensor) -> None:
        self.theta1.copy_(theta1)
        self.theta2.copy_(-precision / 2)


class CovarianceInducing(DenseFamily):
    """q(u) in its means and what makes its covariance, with standard deviations u_scale (L, M)."""

    def __init__(self, L: int, M: int, cholesky_mode: str):
        super().__init__()
        self.u_loc = nn.Parameter(torch.zeros(L, M, dtype=torch.float64))
        self.u_scale = PositiveParameter((L, M), cholesky_mode).double()

    def marginals(self, q: Any, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of A^T u."""
        return marginals_of(q, A)

    @torch.no_grad()
    def _set(self, theta1: Tensor, precision: Tensor) -> None:
        tril = torch.linalg.cholesky(precision)
        self.u_loc.copy_(solve(tril, theta1))
        self._spread(precision, tril)

    @abstractmethod
    def _spread(self, precision: Tensor, tril: Tensor) -> None:
        """Set the covariance from its inverse and the Cholesky factor of that, (L, M, M)."""


class CholeskyInducing(CovarianceInducing):
    """With the Cholesky factor of the covariance, (L, M, M), of which u_scale is the diagonal."""

    def __init__(self, L: int, M: int, cholesky_mode: str):
        super().__init__(L, M, cholesky_mode)
        self.u_below = nn.Parameter(torch.zeros(L, M, M, dtype=torch.float64))

    def distribution(self, A: Tensor) -> Any:
        """Return q(u)."""
        tril = self.u_below.tril(-1) + torch.diag_embed(self.u_scale.data)
        return MultivariateNormal(self.u_loc, scale_tril=tril, validate_args=False).to_event(1)

    def _spread(self, precision: Tensor, tril: Tensor) -> None:
        scale = torch.linalg.cholesky(torch.cholesky_inverse(tril))
        self.u_below.copy_(scale)
        self.u_scale.assign(scale.diagonal(dim1=-2, dim2=-1))


class DiagonalInducing(CovarianceInducing):
    """Of independent normals, each with its conditional variance."""

    def distribution(self, A: Tensor) -> Any:
        """Return q(u)."""
        return Normal(self.u_loc, self.u_scale.data, validate_args=False).to_event(2)

    def _spread(self, precision: Tensor, tril: Tensor) -> None:
        self.u_scale.assign(precision.diagonal(dim1=-2, dim2=-1).rsqrt())
