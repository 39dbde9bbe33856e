r"""q(u) = N(m, S) over whitened values u at inducing points, from sites of the samples.

Sites have precision w and shift b (see :mod:`pnmf_pyro.priors.natural`). With A^T u the field at
the samples,

.. math:: S^{-1} = I + A \, \mathrm{diag}(w) A^T, \qquad S^{-1} m = A b.

Every q(u) that natural gradients reach from the prior has this form, since the gradients of a
likelihood in the expectation parameters are A (...) and A diag(...) A^T; so N numbers w stand for
M x M ones (Opper and Archambeau 2009; Adam, Chang, Khan and Solin 2021). With nearly as many
inducing points as samples all that training needs follows from the N x N matrix

.. math:: B = I + w^{1/2} Q w^{1/2}, \qquad Q = A^T A

(Rasmussen and Williams 2006, section 3.4.3), and with fewer from the M x M matrix S^{-1}. Neither
has an eigenvalue below 1, so their Cholesky factors need no jitter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from pnmf_pyro.data.parallel import by_components
from pnmf_pyro.gp.cholesky import inverse_diagonal, log_det, solve
from pnmf_pyro.priors.fields import Repeated, WhitenedPrior, each, times

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

    def at_samples(self) -> Moments:
        """Return mean and variance of A^T u at the samples, each of shape (L, N)."""
        return self.mean_at_samples, self.spread.variance_at_samples

    @abstractmethod
    def marginals(self, A: Tensor) -> Moments:
        """Return mean and variance of A^T u, each (L, n), for the A (L or 1, M, n) of places."""

    @abstractmethod
    def divergence(self) -> Tensor:
        """Return KL(N(m, S) || N(0, I)), summed over components."""


@register_kl(SiteNormal, WhitenedPrior)
def _kl_sites(q: SiteNormal, p: WhitenedPrior) -> Tensor:
    return q.divergence().expand(q.batch_shape)


class SpreadOverSamples:
    """What the precisions w (L, N) of sites alone say, in N x N matrices; `gram` is A^T A."""

    def __init__(self, precision: Tensor, A: Tensor, gram: Tensor):
        self.A, self.gram = A, gram
        w, L = precision.clamp_min(FAINTEST), len(precision)
        self.root = w.sqrt()
        self.tril = by_components(self._cholesky, L)
        self.variance_at_samples = by_components(
            lambda own: (1 - inverse_diagonal(self.tril[own])) / w[own], L
        )

    def _cholesky(self, own: slice) -> Tensor:
        """Cholesky factors of B, of some components."""
        root, gram = self.root[own], each(self.gram, len(self.root))[own]
        B = root[..., :, None] * gram
        B.mul_(root[..., None, :]).diagonal(dim1=-2, dim2=-1).add_(1)
        return torch.linalg.cholesky(B)

    @cached_property
    def log_det(self) -> Tensor:
        """Log-determinants of S^{-1}, of shape (L,)."""
        return log_det(self.tril)


class NormalOverSamples(SiteNormal):
    """N(m, S) from the shifts b (L, N) of sites, and what their precisions say, in N x N."""

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
    """What the precision S^{-1} (L, M, M) alone says; A (L or 1, M, N) is of the samples."""

    def __init__(self, precision: Tensor, A: Tensor):
        self.A = A
        self.tril = by_components(lambda own: torch.linalg.cholesky(precision[own]), len(precision))

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
        return by_components(lambda own: self._variance(self.A, own), len(self.tril))

    def variance(self, A: Tensor) -> Tensor:
        """Return variances of A^T u, of shape (L, n)."""
        return self._variance(A, slice(None))

    def _variance(self, A: Tensor, own: slice) -> Tensor:
        pairs = zip(self.tril[own], each(A, len(self.tril))[own], strict=True)
        roots = (torch.linalg.solve_triangular(tril, a, upper=False) for tril, a in pairs)
        return torch.stack([root.square_().sum(0) for root in roots])


class NormalOverInducing(SiteNormal):
    """N(m, S) from S^{-1} m (L, M), and what S^{-1} says, in M x M."""

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
