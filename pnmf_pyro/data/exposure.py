r"""Exposure: what scales each rate, whatever the factors and loadings are.

.. math:: \mathrm{rate}_{ij} = e_{ij} \rho_{ij}, \qquad
    e_{ij} = s_i \exp(z_i^\top \beta_j) \, o_{ij}

with size factors s, effects :math:`\beta_j` of the design :math:`z_i` of a sample (its batch, or
covariates), and o = 0 for hidden entries, 1 for all others. Steps need few products of it, which
are here. With A = exp F of shape (n, L) and loadings W of shape (d, L),

    rates      sum_j e_ij W_jl               (n, L)
    totals     sum_i e_ij A_il               (d, L)
    total      sum_jl e_ij A_il W_jl         (n,)
    weighted   sum_il v_ik e_ij A_il W_jl    (d, K)

cost (n + d) L for size factors alone, in each group of samples of one design, and L for each hidden
entry. Nothing of size n x d is stored: where all samples have designs of their own, the effects are
made for a block of samples at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pnmf_pyro.data.batches import Index, take
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.counts import Counts, SparseCounts

# Entries of a block of effects, few enough for the caches.
BLOCK = 1 << 17


class Exposure(nn.Module):
    """What scales the rates of n samples and d features; nothing does without arguments.

    Parameters
    ----------
    size_factors : Tensor of shape (n,) or (..., 1, n), optional
        s, positive.
    design : Tensor of shape (G, P), optional
        The distinct designs of samples, such as the unit vectors of G batches.
    codes : Tensor of int64, shape (n,), optional
        Number of the design of each sample.
    effects : Tensor of shape (d, P), optional
        Effects of the design on the logarithm of rates.
    hidden : SparseCounts of shape (n, d), optional
        Stored where an entry is hidden; its values do not matter. Counts are 0 there.
    n_batches : int
        Number of columns of the design, the first ones, that say in which batch a sample is.
    learned : bool
        Whether training learns the effects.
    errors : Tensor of shape (d, P), optional
        Standard errors of the effects, where they were found.
    """

    size_factors: Tensor | None
    design: Tensor | None
    codes: Tensor | None
    effects: Tensor | None
    hidden_starts: Tensor | None
    hidden_columns: Tensor | None
    errors: Tensor | None
    given_buffers: ClassVar[tuple[str, ...]] = (
        "size_factors",
        "design",
        "codes",
        "hidden_starts",
        "hidden_columns",
    )

    def __init__(
        self,
        size_factors: Tensor | None = None,
        design: Tensor | None = None,
        codes: Tensor | None = None,
        effects: Tensor | None = None,
        hidden: SparseCounts | None = None,
        n_batches: int = 0,
        learned: bool = False,
        errors: Tensor | None = None,
    ):
        super().__init__()
        self.n_batches, self.learned = n_batches, learned and effects is not None
        self.register_buffer("size_factors", size_factors)
        self.register_buffer("design", design)
        self.register_buffer("codes", codes)
        self.register_buffer("effects", effects)
        self.register_buffer("errors", errors)
        self.register_buffer("hidden_starts", None if hidden is None else hidden.row_starts)
        self.register_buffer("hidden_columns", None if hidden is None else hidden.columns_of)
        self.of_samples_alone = effects is None and hidden is None
        self.is_none = self.of_samples_alone and size_factors is None
        self._n_features = 0 if hidden is None else hidden.shape[1]
        self._hidden: SparseCounts | None = None

    @property
    def hidden(self) -> SparseCounts | None:
        """Ones at the hidden entries."""
        starts, columns, known = self.hidden_starts, self.hidden_columns, self._hidden
        if starts is None or columns is None:
            return None
        if known is None or known.row_starts is not starts:  # moved, or loaded
            ones = torch.ones(len(columns), device=starts.device)
            known = SparseCounts(starts, columns, ones, (len(starts) - 1, self._n_features))
            self._hidden = known
        return known

    def of(self, samples: Index | None, features: Index | None) -> Exposure:
        """Return the exposure of some samples and features; all of them for None."""
        if self.is_none or (samples is None and (features is None or self.of_samples_alone)):
            return self
        s = take(self.size_factors, samples)
        if self.of_samples_alone:
            return Exposure(s)
        hidden = self.hidden
        if hidden is not None:
            numbers = torch.arange(hidden.shape[0], device=hidden.device)
            hidden = hidden if samples is None else hidden.rows(take(numbers, samples))
            numbers = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden if features is None else hidden.columns(take(numbers, features))
        effects = None if self.effects is None else take(self.effects, features, dim=0)
        return Exposure(s, self.design, take(self.codes, samples), effects, hidden, self.n_batches)

    @property
    def without_size_factors(self) -> Exposure:
        """The effects and hidden entries alone."""
        if self.of_samples_alone:
            return NONE
        return Exposure(None, self.design, self.codes, self.effects, self.hidden)

    def observed_share(self) -> Tensor | float:
        """Return the share of its entries that is observed in each sample, (n,); 1 for all."""
        starts = self.hidden_starts
        return 1.0 if starts is None else 1 - starts.diff() / self._n_features

    def scaled(self, factors: Tensor) -> Tensor:
        """Return s_i times factors of shape (..., L, n)."""
        return factors if self.size_factors is None else factors * self.size_factors

    def total(self, factors: Tensor, loadings: Tensor) -> Tensor:
        """Return sum_jl e_ij A_il W_jl, (n,), float64, for factors A^T (L, n); differentiable."""
        if self.of_samples_alone:
            return loadings.sum(0, dtype=torch.float64) @ self.scaled(factors).double()
        return _Total.apply(self, factors, loadings)

    def rates(self, loadings: Tensor) -> Tensor:
        """Return sum_j e_ij W_jl, of shape (n, L), or (1, L) where it is the same for all."""
        summed = loadings.sum(0)[None]
        if self.effects is not None:
            parts = [b @ loadings for _, b in self._effect_blocks()]
            summed = torch.cat(parts)[self.codes]
        if self.size_factors is not None:
            summed = self.size_factors[:, None].to(loadings) * summed
        if (hidden := self.hidden) is None:
            return summed
        return summed - hidden.matmul(self._at_hidden(hidden, loadings), loadings)

    def totals(self, factors: Tensor) -> Tensor:
        """Return sum_i e_ij A_il for A of shape (n, L): of shape (d, L), or (1, L)."""
        scaled = factors
        if self.size_factors is not None:
            scaled = self.size_factors[:, None].to(factors) * factors
        if self.effects is None:
            found = scaled.sum(0, dtype=torch.float64)[None].to(factors)
        else:
            by_design = self._by_design(scaled)
            found = torch.zeros(len(self.effects), factors.shape[1]).to(factors)
            for rows, b in self._effect_blocks():
                found += b.mT @ by_design[rows]
        if (hidden := self.hidden) is None:
            return found
        return found - hidden.transposed_matmul(self._at_hidden(hidden, factors), factors)

    def weighted(self, factors: Tensor, loadings: Tensor, weights: Tensor) -> Tensor:
        """Return sum_i v_ik e_ij (A W^T)_ij, (d, K), float64, for weights v (G, K) of designs."""
        scaled = factors
        if self.size_factors is not None:
            scaled = self.size_factors[:, None].to(factors) * factors
        by_design, weights = self._by_design(scaled), weights.to(factors)
        found = torch.zeros(len(loadings), weights.shape[1], dtype=torch.float64)
        found = found.to(factors.device)
        for rows, b in self._effect_blocks():
            found += (by_design[rows] @ loadings.mT).mul_(b).mT @ weights[rows]
        if (hidden := self.hidden) is None:
            return found
        values = self._at_hidden(hidden, factors) * hidden.to(factors.dtype).inner(
            factors, loadings
        )
        return found - hidden.transposed_matmul(values, weights[self.codes])

    def log_at(self, counts: Counts) -> Tensor:
        """Return sum_j X_ij log e_ij, of shape (n,), float64."""
        found = torch.zeros(counts.shape[0], dtype=torch.float64, device=counts.device)
        if self.size_factors is not None:
            found = counts.row_totals * self.size_factors.double().log()
        if self.effects is not None:
            found = found + counts.row_sums(counts.values * self._log_effects_at(counts))
        return found

    def crossed(self, counts: Counts, factors: Tensor) -> Tensor:
        """Return sum_i X_ij e_ij A_il for A of shape (n, L), of shape (d, L)."""
        values = counts.values
        if self.effects is not None:
            values = values * self._log_effects_at(counts).exp()
        return counts.transposed_matmul(values, self.scaled(factors.mT).mT.contiguous())

    def block(self, rows: slice, features: Tensor | None = None) -> Tensor | None:
        """Return e of the samples in `rows`, dense, (n, d) or (n, 1); None where it is 1."""
        if self.is_none:
            return None
        found = None if self.size_factors is None else self.size_factors[rows, None]
        if self.effects is not None and self.design is not None and self.codes is not None:
            effects = take(self.effects, features, dim=0)
            b = (self.design[self.codes[rows]] @ effects.mT).exp()  # differentiable
            found = b if found is None else b * found
        if (hidden := self.hidden) is not None:
            seen = 1 - hidden.rows(rows).to_dense().clamp_max_(1)
            seen = take(seen, features)
            found = seen if found is None else seen * found
        return found

    def at(self, counts: Counts, rows: slice) -> Tensor | None:
        """Return the effects at the stored entries of the samples in `rows`; None for none."""
        if self.effects is None:
            return None
        return self._log_effects_at(counts, rows).exp()

    def squares(self, factors: Tensor, loadings: Tensor) -> Tensor:
        """Return sum_i rate_ij^2 for A of shape (n, L): of shape (d,), float64."""
        W = loadings.double()
        if self.of_samples_alone:
            A = self.scaled(factors.mT).double()
            return ((W @ (A @ A.mT)) * W).sum(1)
        found = torch.zeros(len(W), dtype=torch.float64, device=W.device)
        n, d = len(factors), len(loadings)
        size = at_once(d, BLOCK)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            e = self.block(rows)
            assert e is not None
            found += (factors[rows] @ loadings.mT).mul_(e).square_().sum(0, dtype=torch.float64)
        return found

    def _effect_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Iterate over designs, and exp(z^T beta) of them for all features, (g, d)."""
        assert self.design is not None
        assert self.effects is not None
        G, d = len(self.design), len(self.effects)
        size = at_once(d, BLOCK)
        for start in range(0, G, size):
            rows = slice(start, min(start + size, G))
            yield rows, (self.design[rows] @ self.effects.mT).exp()

    def _by_design(self, values: Tensor) -> Tensor:
        """Sum (n, L) values over the samples of each design, (G, L)."""
        assert self.design is not None
        assert self.codes is not None
        found = torch.zeros(len(self.design), values.shape[1]).to(values)
        return found.index_add_(0, self.codes, values)

    def _log_effects_at(self, counts: Counts, rows: slice = slice(None)) -> Tensor:
        """z_i^T beta_j at the stored entries of the counts of some samples."""
        assert self.design is not None
        assert self.codes is not None
        assert self.effects is not None
        design = self.design[self.codes[rows]].to(counts.dtype).contiguous()
        return counts.inner(design, self.effects.to(counts.dtype).contiguous())

    def _at_hidden(self, hidden: SparseCounts, like: Tensor) -> Tensor:
        """What e would be at the hidden entries."""
        values = hidden.values.to(like)
        if self.effects is not None:
            values = self._log_effects_at(hidden.to(like.dtype)).exp()
        if self.size_factors is not None:
            lengths = hidden.row_starts.diff()
            values = values * self.size_factors.to(like).repeat_interleave(lengths)
        return values


class _Total(torch.autograd.Function):
    """:meth:`Exposure.total`, which is linear in factors and in loadings."""

    @staticmethod
    def forward(ctx: Any, exposure: Exposure, factors: Tensor, loadings: Tensor) -> Tensor:
        rates = exposure.rates(loadings).to(factors)
        ctx.exposure = exposure
        ctx.save_for_backward(factors, loadings, rates)
        return (rates.mT * factors).sum(0, dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[None, Tensor, Tensor]:
        factors, loadings, rates = ctx.saved_tensors
        weights = weights.to(factors)
        of_loadings = ctx.exposure.totals((factors * weights).mT.contiguous().to(loadings))
        return None, rates.mT * weights, of_loadings.expand_as(loadings)


def as_exposure(given: Exposure | Tensor | None) -> Exposure:
    """Return an exposure; that of size factors where these are given, of nothing for None."""
    if isinstance(given, Exposure):
        return given
    return NONE if given is None else Exposure(given)


NONE = Exposure()
