r"""The variational family of an SVGP: q(u) = N(m, S) over whitened values u at inducing points.

For training by gradients q(u) is held in its mean and what makes its covariance. For
natural-gradient steps it is held in sites of the samples (see :mod:`pnmf_pyro.priors.natural`),
with precision w and shift b. With A^T u the field at the samples,

.. math:: S^{-1} = I + A \, \mathrm{diag}(w) A^T, \qquad S^{-1} m = A b.

Every q(u) that natural gradients reach from the prior has this form, since the gradients of a
likelihood in the expectation parameters are A (...) and A diag(...) A^T; so N numbers w stand for
M x M ones (Opper and Archambeau 2009; Adam, Chang, Khan and Solin 2021). With nearly as many
inducing points as samples all that training needs follows from the N x N matrix

.. math:: B = I + w^{1/2} Q w^{1/2}, \qquad Q = A^T A

(Rasmussen and Williams 2006, section 3.4.3), and with fewer from the M x M matrix S^{-1}.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from pyro.distributions import Independent, MultivariateNormal, Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints, register_kl

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import put, take
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.cholesky import inverse_diagonal, log_det, solve
from pnmf_pyro.priors.fields import Repeated, WhitenedPrior, each, times, weighted_gram

# Samples for each inducing point up to which the N x N form is the faster one: it takes 2/3 N^3
# operations a step and component, the other 3 N M^2 + M^3.
SITES = 1.8

# Least precision of a site; a smaller one tells nothing of a log-factor, and rounding would count.
FAINTEST = 1e-7

Moments = tuple[Tensor, Tensor]


class SiteNormal(Repeated, TorchDistribution, ABC):
    """N(m, S) over u, of event shape (L, M), from the prior N(0, I) and sites.

    Everything is a value without gradient.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, L: int, M: int):
        super().__init__(torch.Size(), torch.Size([L, M]), validate_args=False)

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean m, of shape (L, M)."""

    @property
    @abstractmethod
    def covariance_matrix(self) -> Tensor:
        """Covariance S, of shape (L, M, M)."""

    @abstractmethod
    def at_samples(self) -> Moments:
        """Return mean and variance of A^T u at the samples, each of shape (L, N)."""

    @abstractmethod
    def marginals(self, A: Tensor) -> Moments:
        """Return mean and variance of A^T u, each of shape (L, n), for the A of other places.

        Parameters
        ----------
        A : Tensor of shape (L or 1, M, n)
        """

    @abstractmethod
    def divergence(self) -> Tensor:
        """Return KL(N(m, S) || N(0, I)), summed over components."""


@register_kl(SiteNormal, WhitenedPrior)
def _kl_sites(q: SiteNormal, p: WhitenedPrior) -> Tensor:
    return q.divergence().expand(q.batch_shape)


class SpreadOverSamples:
    """What the precisions of sites alone say, in N x N matrices.

    Parameters
    ----------
    precision : Tensor of shape (L, N)
        w.
    A : Tensor of shape (L or 1, M, N)
    gram : Tensor of shape (L or 1, N, N)
        A^T A.
    """

    def __init__(self, precision: Tensor, A: Tensor, gram: Tensor):
        self.A, self.gram = A, gram
        w = precision.clamp_min(FAINTEST)
        self.root = w.sqrt()
        B = self.root[..., :, None] * gram
        B.mul_(self.root[..., None, :]).diagonal(dim1=-2, dim2=-1).add_(1)
        self.tril = torch.linalg.cholesky(B)
        self.variance_at_samples = (1 - inverse_diagonal(self.tril)) / w

    @cached_property
    def log_det(self) -> Tensor:
        """Log-determinants of S^{-1}, of shape (L,)."""
        return log_det(self.tril)


class NormalOverSamples(SiteNormal):
    """N(m, S) from sites by N x N matrices.

    Parameters
    ----------
    shift : Tensor of shape (L, N)
        b.
    spread : SpreadOverSamples
        What the precisions say.
    """

    def __init__(self, shift: Tensor, spread: SpreadOverSamples):
        super().__init__(len(shift), spread.A.shape[-2])
        self.shift, self.spread = shift, spread
        self.A, self.gram, self.root, self.tril = spread.A, spread.gram, spread.root, spread.tril
        self.weights = self._discounted(shift)
        self.mean_at_samples = times(self.gram, self.weights)

    @cached_property
    def mean(self) -> Tensor:
        """Mean m, of shape (L, M)."""
        return times(self.A, self.weights)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance S, of shape (L, M, M)."""
        known = self._known(self.A.mT)
        return torch.eye(self.event_shape[1]).to(known) - known.mT @ known

    def at_samples(self) -> Moments:
        """Return mean and variance of A^T u at the samples, each of shape (L, N)."""
        return self.mean_at_samples, self.spread.variance_at_samples

    @torch.no_grad()
    def marginals(self, A: Tensor) -> Moments:
        """Return mean and variance of A^T u, each of shape (L, n), for the A of other places."""
        known = self._known(self.A.mT @ A)
        return times(A.mT, self.mean), A.square().sum(-2) - known.square().sum(-2)

    def divergence(self) -> Tensor:
        """Return KL(N(m, S) || N(0, I)), with tr S = M - sum w v, summed over components."""
        removed = (self.root.square() * self.spread.variance_at_samples).sum()
        squares = (self.weights * self.mean_at_samples).sum()
        return (self.spread.log_det.sum() - removed + squares) / 2

    @torch.no_grad()
    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw u, of shape sample_shape + batch shape + (L, M).

        A draw of the prior, moved by what the sites say of it (Matheron's rule).
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        u = torch.randn(*shape, *self.event_shape).to(self.shift)
        noise = torch.randn(*shape, *self.shift.shape).to(self.shift)
        said = self.root.square() * times(self.A.mT, u) + self.root * noise
        return u + times(self.A, self._discounted(self.shift - said))

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of u."""
        away = value - self.mean
        seen = self.root * times(self.A.mT, away)
        standard = Normal(0.0, 1.0).log_prob(away).sum((-2, -1))
        return standard - seen.square().sum((-2, -1)) / 2 + self.spread.log_det.sum() / 2

    def _known(self, cross: Tensor) -> Tensor:
        """Root of what the sites take from a covariance, given that with them, (L, N, n)."""
        right = self.root[..., None] * cross
        return torch.linalg.solve_triangular(self.tril, right, upper=False)

    def _discounted(self, shift: Tensor) -> Tensor:
        """The x with A x = S A shift: (I + diag(w) Q)^{-1} shift."""
        return shift - self.root * solve(self.tril, self.root * times(self.gram, shift))


class SpreadOverInducing:
    """What the precision S^{-1} alone says, in M x M matrices.

    Parameters
    ----------
    precision : Tensor of shape (L, M, M)
        S^{-1}, positive definite.
    A : Tensor of shape (L or 1, M, N)
        A of the samples.
    """

    def __init__(self, precision: Tensor, A: Tensor):
        self.A, self.tril = A, torch.linalg.cholesky(precision)

    @cached_property
    def trace(self) -> Tensor:
        """Traces of S, of shape (L,)."""
        return inverse_diagonal(self.tril).sum(-1)

    @cached_property
    def log_det(self) -> Tensor:
        """Log-determinants of S^{-1}, of shape (L,)."""
        return log_det(self.tril)

    @cached_property
    def variance_at_samples(self) -> Tensor:
        """Variances of A^T u at the samples, of shape (L, N)."""
        return self.variance(self.A)

    def variance(self, A: Tensor) -> Tensor:
        """Return variances of A^T u, of shape (L, n)."""
        pairs = zip(self.tril, each(A, len(self.tril)), strict=True)
        roots = (torch.linalg.solve_triangular(tril, a, upper=False) for tril, a in pairs)
        return torch.stack([root.square_().sum(0) for root in roots])


class NormalOverInducing(SiteNormal):
    """N(m, S) from sites by M x M matrices.

    Parameters
    ----------
    shift : Tensor of shape (L, M)
        S^{-1} m.
    spread : SpreadOverInducing
        What the precision says.
    """

    def __init__(self, shift: Tensor, spread: SpreadOverInducing):
        super().__init__(*shift.shape)
        self.spread = spread
        self._mean = solve(spread.tril, shift)

    @property
    def mean(self) -> Tensor:
        """Mean m, of shape (L, M)."""
        return self._mean

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance S, of shape (L, M, M)."""
        return torch.cholesky_inverse(self.spread.tril)

    @cached_property
    def mean_at_samples(self) -> Tensor:
        """Mean of A^T u at the samples, of shape (L, N)."""
        return times(self.spread.A.mT, self._mean)

    def at_samples(self) -> Moments:
        """Return mean and variance of A^T u at the samples, each of shape (L, N)."""
        return self.mean_at_samples, self.spread.variance_at_samples

    @torch.no_grad()
    def marginals(self, A: Tensor) -> Moments:
        """Return mean and variance of A^T u, each of shape (L, n), for the A of other places."""
        return times(A.mT, self._mean), self.spread.variance(A)

    def divergence(self) -> Tensor:
        """Return KL(N(m, S) || N(0, I)), summed over components."""
        squares = self.spread.trace + self._mean.square().sum(-1)
        return (squares - self._mean.shape[-1] + self.spread.log_det).sum() / 2

    @torch.no_grad()
    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw u, of shape sample_shape + batch shape + (L, M)."""
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape))).to(self._mean)
        upper = self.spread.tril.mT
        return (
            self._mean + torch.linalg.solve_triangular(upper, noise[..., None], upper=True)[..., 0]
        )

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of u."""
        away = times(self.spread.tril.mT, value - self._mean)
        standard = Normal(0.0, 1.0).log_prob(away).sum((-2, -1))
        return standard + self.spread.log_det.sum() / 2


class InducingPosterior(nn.Module):
    """What q(u) is held in. A of shape (L or 1, M, N) makes the field at the samples, A^T u."""

    natural = False

    def distribution(self, A: Tensor) -> TorchDistribution:
        """Return q(u)."""
        raise NotImplementedError

    def assign(self, A: Tensor, precision: Tensor, shift: Tensor) -> None:
        """Set q(u) to the posterior from sites with precision w and shift b, each (L, N)."""
        raise NotImplementedError


class SiteInducing(InducingPosterior):
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
            else:
                put(self.site_precision, precision, index)
        put(self.site_shift, shift, index)

    def assign(self, A: Tensor, precision: Tensor, shift: Tensor) -> None:
        """Set q(u) to the posterior from sites with precision w and shift b, each (L, N)."""
        self.move(A, precision, shift, None)

    def _precision(self, A: Tensor) -> Tensor:
        """S^{-1} = I + A diag(w) A^T, of shape (L, M, M)."""

        def make() -> Tensor:
            precision = weighted_gram(A, self.site_precision)
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
