"""Closed-form steps of the loadings and of the scale of a prior."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import Batch, take
from pnmf_pyro.data.parallel import ALONE, Ranks
from pnmf_pyro.priors.gaussian import GaussianPrior
from pnmf_pyro.priors.natural import Step


class ClosedFormLoadings(Step):
    r"""The multiplicative update of W, from the gradient that the ELBO has already taken.

    With R_jl the expected counts of feature j that come from component l,

    .. math:: R_{jl} = W_{jl} \left(\frac{\partial ELBO}{\partial W_{jl}}
        + \sum_i e_{ij} E \exp F_{il}\right), \qquad
        W_{jl} \leftarrow \frac{R_{jl}}{\sum_i e_{ij} E \exp F_{il}},

    with the exposure e, the second sum taken after q has moved: that before, times the growth of
    sum_i s_i E exp F_il, to which it is equal where only size factors scale the rates. Both q and W
    then move up the same lower bound (expectation conditional maximisation), for the price of one
    pass over the counts.

    Parameters
    ----------
    W : PositiveParameter of shape (D, L)
    totals : callable
        Function from a batch to its estimates of sum_i e_ij E exp F_il, of shape (d, L) or (1, L),
        and of sum_i s_i E exp F_il, of shape (L,).
    levels : callable
        Function from a batch to the second of these.

    Notes
    -----
    A step of size `lr` below 1 goes that fraction of the way, which averages over noisy steps.
    """

    def __init__(
        self,
        W: PositiveParameter,
        totals: Callable[[Batch], tuple[Tensor, Tensor]],
        levels: Callable[[Batch], Tensor],
    ):
        self.W, self.totals, self.levels, self.batch = W, totals, levels, Batch()

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Take the expected counts from the gradients of the batch."""
        self.batch = batch
        W, gradient = self.W, self.W.raw.grad
        assert gradient is not None
        slope = -take(gradient / W.unit, batch.features, dim=0) / batch.likelihood_scale
        tiny = torch.finfo(slope.dtype).tiny
        totals, levels = self.totals(batch)
        self.expected_counts = take(W.data, batch.features, dim=0) * (slope + totals)
        self.relative_totals = totals / levels.clamp_min(tiny)

    @torch.no_grad()
    def step(self) -> None:
        """Move W towards the expected counts over the totals."""
        totals = self.relative_totals * self.levels(self.batch)
        target = self.expected_counts / totals.clamp_min(torch.finfo(totals.dtype).tiny)
        features = slice(None) if self.batch.features is None else self.batch.features
        value = self.W.detach()
        target = torch.where(target > self._nothing, target, 0)
        value[features] = value[features].lerp(target, self.lr)
        self.W.assign(value)

    @property
    def _nothing(self) -> float:
        """Loadings up to which a rate has nothing of them; products of smaller ones are slow."""
        return torch.finfo(self.W.raw.dtype).tiny ** 0.5

    def point(self) -> tuple[Tensor, ...]:
        """Return log W."""
        return (self.W.detach().clamp_min_(self._nothing).log_(),)

    def move(self, *changes: Tensor) -> None:
        """Add a change to log W."""
        (change,) = changes
        self.W.assign(self.W.detach().mul_(change.exp()))


class ShrunkLoadings(ClosedFormLoadings):
    r"""The multiplicative update of W under a gamma prior around what the margins say.

    Given R_jl counts of feature j from component l, and e_l = sum_i s_i E exp F_il,

    .. math:: R_{jl} \sim \mathrm{Poisson}(W_{jl} e_l), \qquad
        W_{jl} \sim \mathrm{Gamma}(a, a e_l / \bar R_{jl}), \qquad
        \bar R_{jl} = R_{j\cdot} R_{\cdot l} / R_{\cdot\cdot},

    so that a priori all components have the features in the same proportions. W becomes its
    posterior mean, times what keeps the total of each feature,

    .. math:: W_{jl} \leftarrow \frac{R'_{jl}}{e_l} \frac{R_{j\cdot}}{R'_{j\cdot}}, \qquad
        R'_{jl} = \bar R_{jl} \frac{a + R_{jl}}{a + \bar R_{jl}}.

    Empirical Bayes (Clayton and Kaldor 1987): the shape a is that of the loadings before they are
    shrunk, by the moment of :math:`\chi^2 = \sum_{jl} (R_{jl} - \bar R_{jl})^2 / \bar R_{jl}`, of
    which the expectation is the number of entries and :math:`R_{\cdot\cdot} / a`. Where there are
    many counts it is the update without a prior.

    Parameters
    ----------
    W, totals, levels
        As for :class:`ClosedFormLoadings`.

    Attributes
    ----------
    shape : float or None
        a, from the first batch.
    """

    LARGEST_SHAPE = 1e3

    carried = ("shape",)
    shape: float | None = None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Take the expected counts from the gradients of the batch, and shrink them."""
        super().prepare(batch)
        R = self.expected_counts.clamp_min(0)
        tiny = torch.finfo(R.dtype).tiny
        of_features = R.sum(1, keepdim=True)
        by_margins = of_features * (R.sum(0) / R.sum().clamp_min(tiny))
        if self.shape is None:
            self.shape = self._shape_by_moments(R, by_margins)
        shrunk = by_margins * (self.shape + R) / (self.shape + by_margins)
        self.expected_counts = shrunk * (of_features / shrunk.sum(1, keepdim=True).clamp_min(tiny))

    def _shape_by_moments(self, R: Tensor, by_margins: Tensor) -> float:
        there = by_margins > torch.finfo(R.dtype).eps * R.sum()  # absent but for rounding
        R, by_margins = R[there].double(), by_margins[there].double()
        excess = ((R - by_margins).square() / by_margins - 1).sum()
        return float(R.sum() / excess.clamp_min(R.sum() / self.LARGEST_SHAPE))


class ClosedFormScale(Step):
    """The scale of a normal prior that maximises the ELBO: scale^2 = mean of mu^2 + sigma^2.

    Empirical Bayes, in closed form (an M step). The prior's mean stays 0: the loadings hold the
    level of a component.

    Parameters
    ----------
    prior : GaussianPrior
    least : float
        Smallest scale. The `lower-bound` mode makes little of counts that vary less than a Poisson,
        such as presences, and would lead from there to factors that are all alike.
    ranks : Ranks
        Processes among which the samples are shared out.

    Notes
    -----
    A step of size `lr` below 1 goes that fraction of the way, in scale^2.
    """

    def __init__(self, prior: GaussianPrior, least: float = 0.0, ranks: Ranks = ALONE):
        self.prior, self.least, self.batch, self.ranks = prior, least, Batch(), ranks

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch."""
        self.batch = batch

    @torch.no_grad()
    def step(self) -> None:
        """Move the scale towards its optimum given q."""
        q = self.prior.marginal(self.batch.samples)
        squares = q.loc.square() + q.variance
        n = squares.shape[1]
        n_of_all, _ = self.ranks.whole((n, 0))
        optimum = self.ranks.total(squares.mean() * (n / n_of_all)).clamp_min(self.least**2)
        scale = self.prior.scale_pf
        scale.copy_(scale.square().lerp(optimum, self.lr).sqrt())
