r"""Counts that vary more than a Poisson: a negative binomial with a dispersion for each feature.

A factor of each entry, :math:`\theta_{ij} \sim \mathrm{Gamma}(r_j, r_j)`, on the rate of a Poisson
makes the variance :math:`\mu + \mu^2 / r_j`. Integrated out it is a negative binomial, of which

.. math:: E_q \log p(X_{ij}) \geq X_{ij} E \log x_{ij}
    - (X_{ij} + r_j) \log\Bigl(1 + \frac{E x_{ij}}{r_j}\Bigr)
    + \log \frac{\Gamma(X_{ij} + r_j)}{\Gamma(r_j) r_j^{X_{ij}}} - \log X_{ij}!

with x the rate (Jensen: the logarithm is concave). In place of the expected rate of the Poisson
there is a function of it whose slope is the mean of theta given the counts,
:math:`(r_j + X_{ij}) / (r_j + E x_{ij})`. So theta acts as an exposure, and every step is that of
the Poisson with it. It takes a pass over all entries, in blocks that are never stored; features
whose counts vary no more than a Poisson's stay with their stored entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pnmf_pyro.data.batches import Batch, take
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.log_rate import log_rate
from pnmf_pyro.data.resumable import Resumable, State
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.models.dispersion import (
    FIRST,
    LEAST,
    Clock,
    DispersionSteps,
    Moments,
    constants,
    moments,
)
from pnmf_pyro.models.poisson import PoissonFactors

if TYPE_CHECKING:
    from pnmf_pyro.models.factorization import PoissonFactorization
    from pnmf_pyro.priors.natural import Step


class NegativeBinomial(Resumable, nn.Module):
    """The likelihood of over-dispersed counts, as a part of the factorisation.

    Parameters
    ----------
    n_features : int
        D.
    dispersion : float or Tensor of shape (D,), optional
        r, infinite for a Poisson. Where it is not given all features begin as Poisson, and r is
        learned for those whose counts show that they need one.

    Attributes
    ----------
    inverse : Tensor of shape (D,)
        1 / r, 0 for a Poisson.
    """

    closed_form = True

    def __init__(self, n_features: int, dispersion: float | Tensor | None = None):
        super().__init__()
        self.learned = dispersion is None
        inverse = torch.zeros(n_features)
        if dispersion is not None:
            r = torch.as_tensor(dispersion, dtype=inverse.dtype)
            if not bool((r > 0).all()) or r.shape not in ((), inverse.shape):
                raise ValueError(
                    f"dispersion must be positive, one number or one for each of the {n_features} "
                    f"features; got shape {tuple(r.shape)} and a lowest of {float(r.min()):g}."
                )
            inverse = inverse + 1 / r
        self.register_buffer("inverse", inverse)
        self.kept, self.clock = Kept(), Clock()

    inverse: Tensor

    @property
    def dispersion(self) -> Tensor:
        """The dispersion r of each feature, infinite for a Poisson, (D,)."""
        return torch.where(self.inverse > LEAST, 1 / self.inverse, torch.inf)

    def forward(self, poisson: PoissonFactors, batch: Batch) -> NegativeBinomialFactors:
        """Return the distribution of the counts of a batch."""
        return NegativeBinomialFactors(poisson, take(self.inverse, batch.features), self.kept)

    def state(self) -> State:
        """Return how long it has been trained."""
        return self.clock.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.clock.resume(state)

    def steps(self, model: PoissonFactorization, at_once: bool = False) -> list[Step]:
        """Return the steps that learn the dispersions, from the first on or when all is settled."""
        if at_once:
            self.clock.passes = max(self.clock.passes, FIRST)
        return [DispersionSteps(self.inverse, self.clock, model)] if self.learned else []


class Kept:
    """Results that steps ask for again: the last pass, the columns and constants of the counts."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.given: tuple[Any, ...] = ()
        self.moments: Moments | None = None

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept()

    def __getstate__(self) -> dict[str, object]:
        return Kept().__dict__

    def pass_over(
        self,
        counts: Counts,
        A: Tensor,
        W: Tensor,
        inverse: Tensor,
        exposure: Exposure,
        some: Tensor,
    ) -> Moments:
        """Return the moments of factors, loadings and dispersions, from the last pass if equal.

        The exposure is that of all features, of which `some` are looked at; steps move its effects.
        """
        tensors = [A, W, inverse, some]
        tensors += [] if exposure.effects is None else [exposure.effects]
        known = len(self.given) and self.given[0] is counts and self.given[1] is exposure
        if known and all(map(torch.equal, self.given[2:], tensors)) and self.moments is not None:
            return self.moments
        e = exposure if exposure.of_samples_alone else exposure.of(None, some)
        self.moments = moments(counts, A, W, inverse, e)
        self.given = (counts, exposure, *(tensor.clone() for tensor in tensors))
        return self.moments


class NegativeBinomialFactors(PoissonFactors):
    """X_ij ~ NegativeBinomial of mean s_i sum_l W_jl exp F_il and dispersion r_j.

    Parameters
    ----------
    poisson : PoissonFactors
        The distribution that has the same means.
    inverse : Tensor of shape (d,)
        1 / r; features with at most `LEAST` are Poisson.
    kept : Kept, optional
        Where to look for what was worked out before.
    """

    def __init__(self, poisson: PoissonFactors, inverse: Tensor, kept: Kept | None = None):
        super().__init__(
            poisson.log_factors, poisson.loadings, poisson.exposure, poisson._validate_args
        )
        self.inverse = inverse
        self.kept = Kept() if kept is None else kept
        self.dispersed = torch.nonzero(inverse > LEAST)[:, 0]
        self.simple = torch.nonzero(inverse <= LEAST)[:, 0]

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, dense."""
        inverse = torch.where(self.inverse > LEAST, self.inverse, 0)
        return self.mean + self.mean.square() * inverse

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw counts of shape sample_shape + batch_shape + (d,)."""
        if not len(self.dispersed):
            return super().sample(sample_shape)
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            mean = self.mean.expand(shape)
            r = 1 / self.inverse[self.dispersed].to(mean)
            rates = mean[..., self.dispersed]
            rates = rates * torch._standard_gamma(r.expand(rates.shape).contiguous()) / r
            return torch.poisson(mean.clone().index_copy_(-1, self.dispersed, rates))

    def total_rate(self, counts: Counts, expected: Tensor) -> Tensor:
        """Return what stands in the place of the Poisson's expected total, (n,), float64."""
        return self._total_rate(counts, expected.mT, self.loadings, self.exposure)

    def rates(self, counts: Counts, expected: Tensor) -> Tensor:  # noqa: D102 - as the Poisson's
        W = self.loadings.detach()
        found = self._of(self.simple).rates(W[self.simple])
        if not len(self.dispersed):
            return found
        return found + self._moments(counts, expected.mT, W, self.exposure).of_factors

    def totals(self, counts: Counts, expected: Tensor) -> Tensor:  # noqa: D102
        found = self._of(self.simple).totals(expected.mT)
        if not len(self.dispersed):
            return found
        W = self.loadings.detach()
        found = found.expand(len(self.simple), -1)
        whole = found.new_empty(W.shape).index_copy_(0, self.simple, found)
        dispersed = self._moments(counts, expected.mT, W, self.exposure).of_loadings
        return whole.index_copy_(0, self.dispersed, dispersed)

    def informative(self, counts: Counts) -> Counts:
        """Return X r / (r + x), since r x / (r + x) is what a count of mean x tells of log x."""
        A, W = self.log_factors.detach().exp(), self.loadings.detach()
        scaled = self.exposure.scaled(A).mT.contiguous().to(W)
        rates = counts.inner(scaled, W)
        effects = self.exposure.at(counts, slice(None))
        rates = rates if effects is None else rates * effects
        inverse = torch.where(self.inverse > LEAST, self.inverse, 0)
        return counts.with_values(counts.values / (1 + rates * counts.spread(inverse.to(W))))

    def constant(self, counts: Counts) -> Tensor:  # noqa: D102
        return super().constant(counts) + self._of_dispersion(counts)

    def _row_log_prob(self, counts: Counts, factors: Tensor, loadings: Tensor) -> Tensor:
        e = self.exposure.without_size_factors
        fitted = log_rate(counts, factors, loadings) + e.log_at(counts)
        constant = self._of_dispersion(counts) - counts.log_factorials
        return fitted + constant - self._total_rate(counts, factors, loadings, e)

    def _of(self, features: Tensor) -> Exposure:
        """The exposure of some features."""
        return self.exposure.of(None, features)

    def _total_rate(self, counts: Counts, A: Tensor, W: Tensor, exposure: Exposure) -> Tensor:
        if not len(self.dispersed):
            return exposure.total(A.mT, W)
        found = _TotalRate.apply(self, counts, A, W[self.dispersed], exposure)
        if len(self.simple):
            simple = exposure.of(None, self.simple)
            found = found + simple.total(A.mT, W[self.simple])
        return found

    def _moments(self, counts: Counts, A: Tensor, W: Tensor, exposure: Exposure) -> Moments:
        return self._pass(counts, A, W[self.dispersed], exposure)

    def _pass(self, counts: Counts, A: Tensor, W: Tensor, exposure: Exposure) -> Moments:
        """Go over the entries of the dispersed features, whose loadings are W."""
        inverse = self.inverse[self.dispersed].to(A)
        seen = self.columns(counts)
        A, W = A.detach().contiguous(), W.detach().contiguous()
        return self.kept.pass_over(seen, A, W, inverse, exposure, self.dispersed)

    def columns(self, counts: Counts) -> Counts:
        """Return the counts of the dispersed features."""
        if len(self.dispersed) == counts.shape[1]:
            return counts
        made_of = counts.values, self.inverse
        return self.kept.cache("columns", made_of, lambda: counts.columns(self.dispersed))

    def _of_dispersion(self, counts: Counts) -> Tensor:
        """Sum over features of log Gamma(X + r) - log Gamma(r) - X log r, (n,), float64."""
        if not len(self.dispersed):
            return torch.zeros(counts.shape[0], dtype=torch.float64, device=counts.device)
        made_of = counts.values, self.inverse

        return self.kept.cache(
            "constant",
            made_of,
            lambda: constants(self.columns(counts), self.inverse[self.dispersed]),
        )


class _TotalRate(torch.autograd.Function):
    """The value of a pass, with its slopes."""

    @staticmethod
    def forward(
        ctx: Any,
        likelihood: NegativeBinomialFactors,
        counts: Counts,
        factors: Tensor,
        loadings: Tensor,
        exposure: Exposure,
    ) -> Tensor:
        found = likelihood._pass(counts, factors, loadings, exposure)
        ctx.given = likelihood, counts, exposure
        ctx.save_for_backward(factors, loadings, found.of_factors, found.of_loadings)
        return found.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        factors, loadings, of_factors, of_loadings = ctx.saved_tensors
        w = weights.to(factors)
        if bool((w == w[0]).all()):
            return None, None, of_factors * w[0], of_loadings * w[0], None
        likelihood, counts, exposure = ctx.given
        inverse = likelihood.inverse[likelihood.dispersed].to(factors)
        exposure = (
            exposure if exposure.of_samples_alone else exposure.of(None, likelihood.dispersed)
        )
        seen = likelihood.columns(counts)
        _, of_factors, of_loadings = moments(seen, factors, loadings, inverse, exposure, w)
        return None, None, of_factors * w[:, None], of_loadings, None
