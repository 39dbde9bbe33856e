r"""A Gaussian field known by what each sample tells of it: by sites.

Each of N places tells of the field there by one normal observation, its site, with precision
w >= 0 and shift b = w y. With u ~ N(0, I) the whitened field and A^T u its values at the places
(see :mod:`pnmf_pyro.priors.fields`),

.. math:: S^{-1} = I + A \, \mathrm{diag}(w) A^T, \qquad S^{-1} m = A b.

Every q(u) that natural gradients reach from the prior has this form, since the gradients of a
likelihood in the expectation parameters are A (...) and A diag(...) A^T; so N numbers w stand for
M x M ones (Opper and Archambeau 2009; Adam, Chang, Khan and Solin 2021). All that training needs
follows from

.. math:: B = I + w^{1/2} Q w^{1/2}, \qquad Q = A^T A

(Rasmussen and Williams 2006, section 3.4.3), in 2/3 N^3 operations a step.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import register_kl

from pnmf_pyro.gp.cholesky import inverse_diagonal, log_det, solve
from pnmf_pyro.priors.fields import WhitenedNormal, WhitenedPrior, times

# Least precision of a site; a smaller one tells nothing of a log-factor, and rounding would count.
FAINTEST = 1e-7


class SiteSpread:
    """What the precisions of sites alone say: made once for as many shifts as share them.

    Parameters
    ----------
    precision : Tensor of shape (L, N)
    A : Tensor of shape (L or 1, M, N)
        A^T u is the field at the sites.
    gram : Tensor of shape (L or 1, N, N)
        A^T A.
    """

    @torch.no_grad()
    def __init__(self, precision: Tensor, A: Tensor, gram: Tensor):
        self.A, self.gram = A, gram
        w = precision.clamp_min(FAINTEST)
        self.root = w.sqrt()
        B = self.root[..., :, None] * gram
        B.mul_(self.root[..., None, :]).diagonal(dim1=-2, dim2=-1).add_(1)
        self.tril = torch.linalg.cholesky(B)
        self.variance_at_sites = (1 - inverse_diagonal(self.tril)) / w

    @cached_property
    def log_det(self) -> Tensor:
        """Log-determinants of S^{-1}, of shape (L,)."""
        return log_det(self.tril)


class SiteNormal(WhitenedNormal):
    """N(m, S) over u, from the prior N(0, I) and sites.

    Parameters
    ----------
    shift, precision : Tensor of shape (L, N)
        b and w of the sites.
    spread : SiteSpread
        Of the precision.
    """

    def __init__(self, shift: Tensor, precision: Tensor, spread: SiteSpread):
        super().__init__(len(shift), spread.A.shape[-2])
        self.shift, self.precision, self.spread = shift, precision, spread
        self.A, self.gram = spread.A, spread.gram
        self.root, self.tril = spread.root, spread.tril
        with torch.no_grad():
            self.weights = self._discounted(shift)
            self.mean_at_sites = times(self.gram, self.weights)

    @cached_property
    def mean(self) -> Tensor:
        """Mean m, of shape (L, M); a value without gradient."""
        return times(self.A, self.weights)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance S, of shape (L, M, M); a value without gradient."""
        known = self._whitened(self.A.mT)
        return torch.eye(self.event_shape[1]).to(known) - known.mT @ known

    def at_sites(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the field at the sites, each of shape (L, N).

        The gradients of shift and precision are natural ones.
        """
        return _SiteMarginals.apply(self.shift, self.precision, self)

    @torch.no_grad()
    def marginals(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of A^T u, each of shape (L, n).

        Parameters
        ----------
        A : Tensor of shape (L or 1, M, n)
        """
        known = self._whitened(self.A.mT @ A)
        return times(A.mT, self.mean), A.square().sum(-2) - known.square().sum(-2)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw u, of shape sample_shape + (L, M).

        A draw of the prior, moved by what the sites say of it (Matheron's rule).
        """
        shape = torch.Size(sample_shape)
        u = torch.randn(*shape, *self.event_shape).to(self.shift)
        noise = torch.randn(*shape, *self.shift.shape).to(self.shift)
        said = self.root.square() * times(self.A.mT, u) + self.root * noise
        return u + times(self.A, self._discounted(self.shift - said))

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of u; a value without gradient."""
        away = value - self.mean
        seen = self.root * times(self.A.mT, away)
        standard = Normal(0.0, 1.0).log_prob(away).sum((-2, -1))
        return standard - seen.square().sum((-2, -1)) / 2 + self.spread.log_det.sum() / 2

    def _discounted(self, shift: Tensor) -> Tensor:
        """The x with A x = S A shift: (I + diag(w) Q)^{-1} shift."""
        return shift - self.root * solve(self.tril, self.root * times(self.gram, shift))

    def _whitened(self, cross: Tensor) -> Tensor:
        """Root of what the sites take from a covariance, given that with them, (L, N, n)."""
        right = self.root[..., None] * cross
        return torch.linalg.solve_triangular(self.tril, right, upper=False)


class _SiteMarginals(torch.autograd.Function):
    """Marginals of the field at the sites; backward hands over natural gradients.

    With dmu and dv the gradients in mean and variance, those of shift and precision are
    dmu - 2 dv mean and -2 dv. dv is kept at the sign at which it raises the precision. While the
    precision stands still, that of shift is dmu.
    """

    @staticmethod
    def forward(ctx: Any, shift: Tensor, precision: Tensor, q: SiteNormal) -> Any:
        ctx.save_for_backward(q.mean_at_sites)
        return q.mean_at_sites.clone(), q.spread.variance_at_sites.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> Any:
        (mean,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return d_mean, None, None
        d_variance = d_variance.clamp_min(0)  # of a loss
        return d_mean - 2 * d_variance * mean, -2 * d_variance, None


class _SiteDivergence(torch.autograd.Function):
    """KL(N(m, S) || N(0, I)), summed over components: with tr S = M - sum w v.

    Its natural gradients are shift and precision themselves: the prior has none. While the
    precision stands still, that of shift is the x with A x = m.
    """

    @staticmethod
    def forward(ctx: Any, shift: Tensor, precision: Tensor, q: SiteNormal) -> Tensor:
        ctx.save_for_backward(shift, precision, q.weights)
        removed = (q.root.square() * q.spread.variance_at_sites).sum()
        return (q.spread.log_det.sum() - removed + (q.weights * q.mean_at_sites).sum()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> Any:
        shift, precision, weights = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return weight * weights, None, None
        return weight * shift, weight * precision, None


@register_kl(SiteNormal, WhitenedPrior)
def _kl_sites(q: SiteNormal, p: WhitenedPrior) -> Tensor:
    return _SiteDivergence.apply(q.shift, q.precision, q)
