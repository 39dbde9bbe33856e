"""The observation of the model: counts whose rates are a product of factors and loadings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pnmf_pyro.data.checks import MODES, check_choice
from pnmf_pyro.data.counts import Counts, as_counts
from pnmf_pyro.data.log_rate import log_rate, log_rate_and_moments

# Mean rate below which events are drawn one by one and not a Poisson number for each entry.
SPARSE_RATE = 0.2


class PoissonFactors(TorchDistribution):
    r"""X_ij ~ Poisson(s_i sum_l W_jl exp F_il), independent over i and j.

    A batch is the samples and an event is one sample's row of counts, so that a plate over samples
    scales and subsamples it.

    Parameters
    ----------
    log_factors : Tensor of shape (..., L, n)
        F.
    loadings : Tensor of shape (d, L)
        W, non-negative.
    size_factors : Tensor of shape (n,), optional
        s, positive; 1 unless given.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(self, log_factors: Tensor, loadings: Tensor, size_factors: Tensor | None = None):
        self.log_factors = self._unexpanded = log_factors
        self.loadings = loadings
        self.size_factors = size_factors
        *leading, _, n = log_factors.shape
        # F stands at plate dimensions (..., components, samples): keep the place of components.
        batch = (*leading, 1, n) if leading else (n,)
        super().__init__(torch.Size(batch), loadings.shape[:1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PoissonFactors:
        """Return the same distribution with other leading batch dimensions."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        F = self._unexpanded
        placed = F if F.ndim == 2 else F.unsqueeze(-3)
        placed = placed.expand(*batch_shape[:-1], *F.shape[-2:])
        expanded = PoissonFactors(placed, self.loadings, self.size_factors)
        expanded._batch_shape = torch.Size(batch_shape)
        expanded._unexpanded = F
        return expanded

    @property
    def rate(self) -> Tensor:
        """Mean counts, dense, of shape batch_shape + (d,)."""
        rate = self._scaled(self.log_factors.exp()).mT @ self.loadings.T
        return rate.reshape(*self.batch_shape, *self.event_shape)

    @property
    def mean(self) -> Tensor:
        """Mean counts, dense, of shape batch_shape + (d,)."""
        return self.rate

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, equal to their mean."""
        return self.rate

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw counts of shape sample_shape + batch_shape + (d,).

        Where most of them are zero, it is the single events that are drawn, at a cost that does
        not grow with the number of zeros.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            factors = self._scaled(self.log_factors.exp())
            entries = factors.shape[:-2].numel() * factors.shape[-1] * len(self.loadings)
            expected = factors.sum(-1, dtype=torch.float64) @ self.loadings.sum(0).double()
            if not expected.sum() < SPARSE_RATE * entries:
                return torch.poisson(self.rate.expand(shape))
            repeated = factors.expand(*sample_shape, *factors.shape)
            rows = repeated.movedim(-2, 0).reshape(factors.shape[-2], -1)
            return _count_events(rows, self.loadings).reshape(shape)

    def log_prob(self, value: Any) -> Tensor:
        """Return the log density of each sample's row.

        Parameters
        ----------
        value : Counts, Tensor or scipy sparse matrix of shape (n, d)
            Only stored entries are visited where it is sparse.

        Returns
        -------
        Tensor of batch shape, float64
        """
        fields = self.log_factors.reshape(-1, *self.log_factors.shape[-2:]).exp()
        rows = [self._expectation(value, [field], field) for field in fields]
        return torch.stack(rows).reshape(self.batch_shape)

    def expected_log_prob(
        self,
        value: Any,
        q: Distribution,
        mode: str = "expanded",
        n_draws: int = 3,
        *,
        newton: bool = False,
    ) -> Tensor:
        r"""Return E_q[log p(X_i | F, W)] for each sample i, or a bound on it.

        Parameters
        ----------
        value : Counts, Tensor or scipy sparse matrix of shape (n, d)
        q : Distribution
            Distribution of F whose `mean` and `stddev`, of shape (L, n), are those of a normal
            marginal of each F_il. The rate of a sample needs no more than these marginals.
        mode : {'simple', 'expanded', 'lower-bound'}
            `simple` averages the density over draws; `expanded` draws for the expected log rate
            and takes E exp F = exp(mu + sigma^2 / 2) in the expected rate; `lower-bound` replaces
            the first by log sum_l W_jl exp(mu_il), which is no larger: log-sum-exp is convex
            (Jensen).
        n_draws : int
            Draws from q, not used by `lower-bound`.
        newton : bool
            Take the gradient in the variance of q, which is half the expected curvature (Price's
            theorem), from the curvature at the draws, bounded so that a natural-gradient step
            cannot make a precision negative. `lower-bound` needs no such care.

        Returns
        -------
        Tensor of shape (n,), float64, constants included
        """
        check_choice("mode", mode, MODES)
        mean, scale = q.mean, q.stddev
        expected = (mean + scale.square() / 2).exp()
        if mode == "lower-bound":
            return self._expectation(value, [mean.exp()], expected)
        newton = newton and torch.is_grad_enabled()
        spread = scale.detach() if newton else scale
        draws = [(mean + spread * torch.randn_like(mean)).exp() for _ in range(n_draws)]
        if mode == "simple":
            expected = torch.stack(draws).mean(0)
        if not newton:
            return self._expectation(value, draws, expected)
        counts = self._counts(value)
        fields = [draw.T.contiguous() for draw in draws]
        per_draw = [log_rate_and_moments(counts, field, self.loadings) for field in fields]
        log_rate, *moments = (torch.stack(part).mean(0) for part in zip(*per_draw, strict=True))
        target = self._variance_gradient(expected.detach(), *moments)
        if mode == "expanded":  # -h / 2 comes from the expected rate already
            target = target + self._component_rates(expected.detach()) / 2
        rise = q.variance - q.variance.detach()
        correction = (target * rise.T).sum(1)
        return log_rate - self._total_rate(expected) + self._constant(counts) + correction

    def _variance_gradient(self, expected: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Half the expected second derivative in F_il, at most -1/4 sum_j X phi^2; (n, L).

        With h the expected rate of a component and phi its share in a rate, the derivative is
        sum_j X phi (1 - phi) - h, which can be positive far from the optimum and is
        -sum_j X phi^2 where the expected counts sum_j X phi equal h.
        """
        curvature = self._component_rates(expected) - first + second
        return -torch.maximum(curvature, second / 2) / 2

    def _component_rates(self, expected: Tensor) -> Tensor:
        """Expected total rate of each sample from each component, h_il, of shape (n, L)."""
        return self._scaled(expected).T * self.loadings.detach().sum(0)

    def _expectation(self, value: Any, fields: Sequence[Tensor], expected: Tensor) -> Tensor:
        log_rate, total_rate, constant = self.expected_terms(value, fields, expected)
        return log_rate - total_rate + constant

    def expected_terms(
        self, value: Any, fields: Sequence[Tensor], expected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three terms of the expected log-likelihood of each sample.

        Parameters
        ----------
        value : Counts, Tensor or scipy sparse matrix of shape (n, d)
        fields : sequence of Tensor of shape (L, n)
            exp F over which the log rate is averaged; one after another, so that memory does not
            grow with their number times the stored counts.
        expected : Tensor of shape (L, n)
            Expectation of exp F.

        Returns
        -------
        log_rate : Tensor of shape (n,), float64
            Mean over fields of sum_j X_ij log sum_l W_jl exp F_il.
        total_rate : Tensor of shape (n,), float64
            s_i sum_l (sum_j W_jl) E exp F_il.
        constant : Tensor of shape (n,), float64
            sum_j X_ij log s_i - log X_ij!.
        """
        counts = self._counts(value)
        log_rates = [log_rate(counts, field.T.contiguous(), self.loadings) for field in fields]
        return torch.stack(log_rates).mean(0), self._total_rate(expected), self._constant(counts)

    def _total_rate(self, expected: Tensor) -> Tensor:
        component_totals = self.loadings.sum(0, dtype=torch.float64)
        return component_totals @ self._scaled(expected).double()

    def _constant(self, counts: Counts) -> Tensor:
        if self.size_factors is None:
            return -counts.log_factorials
        return counts.row_totals * self.size_factors.double().log() - counts.log_factorials

    def _counts(self, value: Any) -> Counts:
        counts = as_counts(value)
        expected = (self.log_factors.shape[-1], *self.event_shape)
        if counts.shape != expected:
            raise ValueError(f"counts must have shape {expected}; got {counts.shape}.")
        return counts if counts.dtype == self.loadings.dtype else counts.to(self.loadings.dtype)

    def _scaled(self, factors: Tensor) -> Tensor:
        return factors if self.size_factors is None else factors * self.size_factors


def _count_events(factors: Tensor, loadings: Tensor) -> Tensor:
    """Draw X_ij ~ Poisson(sum_l factors_li W_jl) from its events, a dense (n, d) tensor.

    Sample i has Poisson(factors_li sum_j W_jl) events of component l, and each falls on feature j
    with probability W_jl / sum_j W_jl: their counts are independent Poisson with the rates of X.
    """
    (_, n), d = factors.shape, len(loadings)
    numbers = torch.poisson(factors * loadings.sum(0)[:, None]).long()
    ladders = loadings.T.double().cumsum(1)
    features = [
        torch.searchsorted(
            ladder, ladder[-1] * torch.rand(m, dtype=ladder.dtype, device=ladder.device), right=True
        )
        for ladder, m in zip(ladders, numbers.sum(1).tolist(), strict=True)
    ]
    samples = torch.arange(n, device=factors.device).expand_as(numbers)
    rows = torch.repeat_interleave(samples.reshape(-1), numbers.reshape(-1))
    events = rows * d + torch.cat(features).clamp_max(d - 1)
    table = factors.new_zeros(n * d)
    return table.scatter_add_(0, events, table.new_ones(len(events))).reshape(n, d)


def mean_deviance(value: Any, factors: Tensor, loadings: Tensor) -> float:
    r"""Return the Poisson deviance of counts from rates, averaged over all n d entries.

    .. math:: \frac{2}{n d} \sum_{ij} \left(X_{ij} \log \frac{X_{ij}}{\mu_{ij}} - X_{ij}
        + \mu_{ij}\right), \qquad \mu = \mathrm{factors} \; \mathrm{loadings}^T

    Only stored entries are visited where the counts are sparse.

    Parameters
    ----------
    value : Counts, Tensor or scipy sparse matrix of shape (n, d)
    factors : Tensor of shape (n, L)
        Times size factors where there are any.
    loadings : Tensor of shape (d, L)
    """
    counts = as_counts(value).to(loadings.dtype)
    n, d = counts.shape
    saturated = [
        block.row_sums(torch.xlogy(b := block.values, b) - b) for _, block in counts.blocks()
    ]
    total_rate = factors.sum(0, dtype=torch.float64) @ loadings.sum(0, dtype=torch.float64)
    fitted = log_rate(counts, factors, loadings).sum()
    return float(2 * (torch.cat(saturated).sum() - fitted + total_rate) / (n * d))
