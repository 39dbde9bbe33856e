"""Steps of the effects of batches and covariates, beside those of factors and loadings."""

from __future__ import annotations

import torch
from torch import Tensor

from pnmf_pyro.data.batches import Batch, take
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.models.effects import blocks_of, counted, expected, improve, take_level
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors.natural import Step


def effect_steps(model: PoissonFactorization) -> list[Step]:
    """Return the steps of a model's effects, none where it has none to learn."""
    return [EffectSteps(model)] if model.exposure.learned else []


class EffectSteps(Step):
    r"""Steps that raise the bound in the effects, given q(F) and loadings.

    With all data in each step they are those of :func:`~pnmf_pyro.models.effects.improve`. With
    minibatches they add up what these say, and one block of effects moves at the end of each pass.
    Under a likelihood p without a closed form counts x of means m are replaced by
    :math:`m (1 + \partial \log p(x) / \partial m)` at a draw of F. Where p says what is seen of
    Poisson counts, these are the counts that are expected given what is seen, and the steps those
    of EM.

    Parameters
    ----------
    model : PoissonFactorization
        Whose exposure has effects, which are changed in place.

    Notes
    -----
    A step of size `lr` below 1 goes that fraction of the way.
    """

    carried = ("sums", "seen", "turn")

    def __init__(self, model: PoissonFactorization):
        self.model, self.batch = model, Batch()
        self.told: tuple[Counts, Tensor] | None = None
        self.sums = torch.empty(0)
        self.seen = self.turn = 0

    @property
    def effects(self) -> Tensor:
        """The effects, (D, P)."""
        effects = self.model.exposure.effects
        assert effects is not None
        return effects

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch."""
        self.batch = batch

    @torch.no_grad()
    def step(self) -> None:
        """Move the effects towards their optimum, or add up what the batch says."""
        batch, model = self.batch, self.model
        assert batch.counts is not None
        q = model.prior.marginal(batch.samples)
        F, counts = q.loc + q.variance / 2, batch.counts
        slope = None
        if not isinstance(model.likelihood(F, batch), PoissonFactors):
            F = q.sample()
            slope = self._slope(F)
        likelihood = model.in_closed_form(F, batch)
        factors = F.exp().mT.contiguous().to(model.W.dtype)
        before = self.effects.clone()
        whole = batch.samples is None and batch.features is None
        if whole and slope is None:
            if self.told is None or self.told[0] is not counts:
                self.told = counts, counted(counts, model.exposure)
            improve(likelihood, counts, factors, self.told[1])
        else:
            self._add(likelihood, factors, slope)
        self.effects.copy_(before.lerp(self.effects, self.lr))
        growth = take_level(model.exposure)
        if growth is not None and model.W.raw.requires_grad:
            model.W.assign(model.W.detach() * growth)

    def _slope(self, F: Tensor) -> Tensor | None:
        """Slope of the log-likelihood of the batch in the effects, (D, P), where it has one."""
        batch, exposure, kept = self.batch, self.model.exposure, self.effects
        leaf = kept.clone().requires_grad_()
        exposure.effects = leaf
        try:
            with torch.enable_grad():
                told = self.model.likelihood(F, batch).log_prob(batch.dense_counts).sum()
            (slope,) = torch.autograd.grad(told, leaf, allow_unused=True)
        finally:
            exposure.effects = kept
        return slope

    def _add(self, likelihood: PoissonFactors, factors: Tensor, slope: Tensor | None) -> None:
        """Add what a batch says of a block of effects; move that at the end of a pass."""
        batch, model = self.batch, self.model
        blocks, whole = blocks_of(model.exposure), model.N * model.D
        block = blocks[self.turn % len(blocks)]
        if not self.seen:
            self.sums = self.effects.new_zeros(
                model.D, block.size + block.weights.shape[1], dtype=torch.float64
            )
        counts, exposure = batch.counts, model.exposure.of(batch.samples, batch.features)
        assert counts is not None
        sums = expected(likelihood, counts, factors, block.weights).sums
        numbers = torch.arange(model.D, device=sums.device)
        if slope is None:
            told = counted(counts, exposure)[:, block.columns]
        else:  # of the counts that the likelihood makes us expect
            told = take(slope, batch.features, dim=0)[:, block.columns] + sums[:, : block.size]
        self.sums.index_add_(0, take(numbers, batch.features), torch.cat([told, sums], 1))
        self.seen += counts.numel()
        if self.seen < whole:
            return
        part = self.effects[:, block.columns]
        told, sums = self.sums[:, : block.size], self.sums[:, block.size :]
        part.add_(block.change(part.double(), told, sums))
        self.seen, self.turn = 0, self.turn + 1

    def point(self) -> tuple[Tensor, ...]:
        """Return the effects."""
        return (self.effects.clone(),)

    @torch.no_grad()
    def move(self, *changes: Tensor) -> None:
        """Add a change to the effects."""
        self.effects.add_(changes[0])
