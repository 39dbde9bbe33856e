r"""Dispersions of a negative binomial: passes over the counts of features, and how r is learned.

Given the expected rates x of a feature, its dispersion r maximises

.. math:: Q(r) = \sum_i \log \frac{\Gamma(X_i + r)}{\Gamma(r) r^{X_i}}
    - (X_i + r) \log\Bigl(1 + \frac{x_i}{r}\Bigr)

by Newton's steps in log r. A feature begins as Poisson, :math:`Q(\infty) = -\sum_i x_i`. It is
tried where the score :math:`\sum_i (X_i - x_i)^2 - X_i`, which needs its stored entries alone,
stands out of its noise, and becomes over-dispersed where Q gains more than half the logarithm of
the number of samples, the price of a parameter (Schwarz 1978).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pnmf_pyro.data.batches import Batch, take
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.exposure import BLOCK, Exposure
from pnmf_pyro.data.resumable import Resumable
from pnmf_pyro.priors.natural import Step

if TYPE_CHECKING:
    from pnmf_pyro.models.factorization import PoissonFactorization

# 1 / r up to which a negative binomial is a Poisson for all that counts can tell, and the largest.
LEAST, MOST = 1e-4, 1e3

# Passes over the data before the first step of the dispersions, while what factors will explain
# still looks like dispersion; and from one to the next. Steps after which a feature that has not
# gained is Poisson.
FIRST, EVERY = 10, 5
TRIALS = 4


class Moments(NamedTuple):
    """What a pass over the entries of over-dispersed features gives.

    Attributes
    ----------
    value : Tensor of shape (n,), float64
        sum_j (X_ij + r_j) log(1 + x_ij / r_j).
    of_factors, of_loadings : Tensor of shape (n, L), (d, L)
        Slopes of the sum of `value` in E exp F and in the loadings.
    """

    value: Tensor
    of_factors: Tensor
    of_loadings: Tensor


@torch.no_grad()
def moments(
    counts: Counts,
    factors: Tensor,
    loadings: Tensor,
    inverse: Tensor,
    exposure: Exposure,
    weights: Tensor | None = None,
) -> Moments:
    """Go over all entries of counts (n, d) in blocks, given A (n, L), W (d, L) and 1 / r (d,).

    Each sample has its weight, (n,), in the slopes of the loadings; 1 unless given. The slope in a
    rate, (r + X) / (r + x), has a part for all entries and one for the stored ones.
    """
    n, r = len(factors), 1 / inverse
    scaled, relative = exposure.scaled(factors.mT).mT.contiguous(), loadings * inverse[:, None]
    weighted = scaled if weights is None else scaled * weights[:, None]
    rest, values, of_factors = exposure.without_size_factors, [], torch.empty_like(factors)
    right = relative.mT.contiguous()
    by_components = torch.zeros_like(right)
    for rows, x, theta in _blocks(n, right):
        torch.mm(scaled[rows], right, out=x)
        e = rest.block(rows)
        if e is not None:
            x.mul_(e)
        torch.add(x, 1, out=theta).reciprocal_()
        values.append(torch.mv(x.log1p_(), r).double())
        if e is not None:
            theta.mul_(e)
        torch.mm(theta, loadings, out=of_factors[rows])
        by_components.addmm_(weighted[rows].mT, theta)
    of_loadings = by_components.mT.contiguous()
    value = torch.cat(values)
    for rows, block in counts.blocks():
        x = block.inner(scaled[rows], relative)
        share, e = block.values, rest.at(block, rows)
        if e is not None:
            x, share = x * e, share * e
        share = share / (x + 1)
        value[rows] += block.row_sums(x.log1p_().mul_(block.values))
        of_factors[rows] += block.matmul(share, relative)
        of_loadings += inverse[:, None] * block.transposed_matmul(share, weighted[rows])
    return Moments(value, exposure.scaled(of_factors.mT).mT, of_loadings)


@torch.no_grad()
def weighted(
    counts: Counts,
    factors: Tensor,
    loadings: Tensor,
    inverse: Tensor,
    exposure: Exposure,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return sums of each feature over samples, given A (n, L), W (d, L) and 1 / r (d,).

    They are the value, sum_i (X_ij + r_j) log(1 + x_ij / r_j), (d,), and, for weights v (n, K) of
    samples, sum_i v_ik theta_ij x_ij with theta = (r + X) / (r + x), (d, K); both float64.
    """
    n, d, r = len(factors), len(loadings), (1 / inverse).double()
    scaled, relative = exposure.scaled(factors.mT).mT.contiguous(), loadings * inverse[:, None]
    right, rest = relative.mT.contiguous(), exposure.without_size_factors
    columns = torch.cat([weights.new_ones(n, 1), weights], 1).to(factors)
    found = torch.zeros(d, columns.shape[1], dtype=torch.float64, device=factors.device)
    for rows, x, other in _blocks(n, right):
        torch.mm(scaled[rows], right, out=x)
        e = rest.block(rows)
        if e is not None:
            x.mul_(e)
        found[:, :1] += r[:, None] * (torch.log1p(x, out=other).mT @ columns[rows, :1])
        x.div_(torch.add(x, 1, out=other))
        found[:, 1:] += r[:, None] * (x.mT @ columns[rows, 1:])
    for rows, block in counts.blocks():
        x, e = block.inner(scaled[rows], relative), rest.at(block, rows)
        x = x if e is None else x * e
        found[:, :1] += block.transposed_matmul(block.values * x.log1p(), columns[rows, :1])
        found[:, 1:] += block.transposed_matmul(block.values * x / (x + 1), columns[rows, 1:])
    return found[:, 0], found[:, 1:]


def _blocks(n: int, right: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Cut n samples of the features of `right`, (L, d), into blocks small enough for the caches.

    Each comes with room for two tables of its entries, the same for all: new memory at every block
    would take as long as the arithmetic.
    """
    d = right.shape[1]
    size = min(n, at_once(d, BLOCK))
    first, second = right.new_empty(size, d), right.new_empty(size, d)
    for start in range(0, n, max(1, size)):
        rows = slice(start, min(start + size, n))
        m = rows.stop - start
        yield rows, first[:m], second[:m]


@torch.no_grad()
def constants(counts: Counts, inverse: Tensor) -> Tensor:
    """Return sum_j log Gamma(X + r) - log Gamma(r) - X log r, (n,), float64, given 1 / r (d,)."""
    r = 1 / inverse.double()
    at_zero, log_r = torch.lgamma(r), r.log()
    parts = []
    for _, block in counts.blocks():
        X = block.values.double()
        values = torch.lgamma(X + block.spread(r))
        parts.append(
            block.row_sums(values.sub_(block.spread(at_zero)).sub_(X * block.spread(log_r)))
        )
    return torch.cat(parts)


def log_density(X: Tensor, rates: Tensor, r: Tensor) -> Tensor:
    """Return log densities of counts X given their rates and dispersions, infinite for Poisson."""
    rates = rates.clamp_min(torch.finfo(rates.dtype).tiny)
    poisson = torch.distributions.Poisson(rates, validate_args=False).log_prob(X)
    size = torch.where(r.isfinite(), r, 1.0)
    other = torch.xlogy(X, rates / size) - (X + size) * (rates / size).log1p()
    other = other + torch.lgamma(X + size) - torch.lgamma(size) - torch.lgamma(X + 1)
    return torch.where(r.isfinite(), other, poisson)


class Slopes(NamedTuple):
    """Derivatives of Q in r, and Q less that of the Poisson, each (d,), float64."""

    first: Tensor
    second: Tensor
    gain: Tensor


@torch.no_grad()
def slopes(
    counts: Counts, factors: Tensor, loadings: Tensor, inverse: Tensor, exposure: Exposure
) -> Slopes:
    """Return the derivatives of Q for counts (n, d), given A (n, L), W (d, L) and 1 / r (d,)."""
    (n, d), r = counts.shape, 1 / inverse.double()
    scaled, relative = exposure.scaled(factors.mT).mT.contiguous(), loadings * inverse[:, None]
    right, rest = relative.mT.contiguous(), exposure.without_size_factors
    found = torch.zeros(3, d, dtype=torch.float64, device=factors.device)
    for rows, x, other in _blocks(n, right):
        torch.mm(scaled[rows], right, out=x)
        e = rest.block(rows)
        if e is not None:
            x.mul_(e)
        ones, log = x.new_ones(len(x)), x.log1p()
        away = torch.div(x, torch.add(x, 1, out=other), out=other)
        found[2] += torch.mv((x.sub_(log)).mT, ones) * r
        found[0] += torch.mv(log.neg_().add_(away).mT, ones)
        found[1] += torch.mv(away.square_().mT, ones) / r
    for rows, block in counts.blocks():
        x, e = block.inner(scaled[rows], relative), rest.at(block, rows)
        x = (x if e is None else x * e).double()
        X, above = block.values.double(), (x + 1) * block.spread(r)
        _add_stored(found, block, (-X / above, X / above.square(), -X * x.log1p()))
    return Slopes(*found.add_(_of_stored(counts, r)))


def _add_stored(found: Tensor, block: Counts, terms: tuple[Tensor, ...]) -> None:
    """Add the sums over samples of terms at stored entries to those of each feature, (k, d)."""
    ones = found.new_ones(block.shape[0], 1)
    for k, term in enumerate(terms):
        found[k] += block.transposed_matmul(term, ones)[:, 0]


def _of_stored(counts: Counts, r: Tensor) -> Tensor:
    """Terms of Q and its derivatives at stored entries, that the others do not have, (3, d)."""
    found = torch.zeros(3, len(r), dtype=torch.float64, device=r.device)
    at_zero = [part(r) for part in (torch.digamma, _trigamma, torch.lgamma)]
    for _, block in counts.blocks():
        X = block.values.double()
        above, (psi, slope, gamma) = X + block.spread(r), (block.spread(one) for one in at_zero)
        first, second = torch.digamma(above).sub_(psi), _trigamma(above).sub_(slope)
        third = torch.lgamma(above).sub_(gamma).sub_(X * block.spread(r.log()))
        _add_stored(found, block, (first, second, third))
    return found


def _trigamma(values: Tensor) -> Tensor:
    return torch.polygamma(1, values)


@dataclass
class Clock(Resumable):
    """How many passes over the data there were, and entries seen in the present one."""

    carried = ("passes", "seen")
    passes: int = 0
    seen: int = 0


class DispersionSteps(Step):
    """Newton steps of the dispersions that need one, every few passes over the data.

    Parameters
    ----------
    inverse : Tensor of shape (D,)
        1 / r, 0 for a Poisson. It is changed in place.
    clock : Clock
        Passes over the data that the likelihood has seen, in all stages of a fit.
    model : PoissonFactorization
        Whose likelihood has these dispersions.
    """

    carried = ("tried", "trials", "sums")

    def __init__(self, inverse: Tensor, clock: Clock, model: PoissonFactorization):
        self.inverse, self.clock, self.model, self.batch = inverse, clock, model, Batch()
        # What is tried for each feature, and how often it was without a gain.
        self.tried, self.trials = inverse.double(), torch.zeros_like(inverse)
        self._clear()

    def _clear(self) -> None:
        self.sums = self.tried.new_zeros(5, len(self.tried))

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch."""
        self.batch = batch

    @torch.no_grad()
    def step(self) -> None:
        """Add up what the batch says; move the dispersions at the end of a pass that counts."""
        assert self.batch.counts is not None
        part, whole = self.batch.counts.numel(), self.model.N * self.model.D
        number = int(self.clock.passes)
        self.clock.seen += part
        if self.clock.seen >= whole:
            self.clock.passes, self.clock.seen = number + 1, 0
        if number < FIRST or number % EVERY:
            return
        self._add()
        if self.clock.seen:
            return
        if self._move() and part == whole:  # new ones are judged at once
            self._add()
            self._move()

    def _add(self) -> None:
        """Add what the batch says of features that are Poisson, and of those with a dispersion."""
        batch, model = self.batch, self.model
        q = model.prior.marginal(batch.samples)
        A = (q.loc + q.variance / 2).exp().mT.contiguous()
        counts, exposure = batch.counts, model.exposure.of(batch.samples, batch.features)
        assert counts is not None
        W = take(model.W.data, batch.features, dim=0).to(A)
        number = torch.arange(model.D, device=A.device)
        features = take(number, batch.features)
        tried = take(self.tried, batch.features)
        simple, others = torch.nonzero(tried == 0)[:, 0], torch.nonzero(tried)[:, 0]
        if len(simple):
            self.sums[:2].index_add_(
                1, features[simple], _excess(counts, A, W, exposure)[:, simple]
            )
        if len(others):
            some = counts if len(others) == len(tried) else counts.columns(others)
            e = exposure if exposure.of_samples_alone else exposure.of(None, others)
            found = slopes(some, A, W[others], tried[others].to(A), e)
            self.sums[2:].index_add_(1, features[others], torch.stack(found))

    def _move(self) -> bool:
        """Move all dispersions by what was added; return whether there are new ones to try."""
        excess, square, first, second, gain = self.sums
        self._clear()
        price = math.log(max(self.model.N, 3)) / 2
        others = self.tried > 0
        r = 1 / self.tried.clamp_min(LEAST / 10)
        slope, bend = r * first, r * first + r.square() * second
        step = torch.where(bend < 0, -slope / bend, slope.sign()).clamp(-1.5, 1.5)
        moved = (self.tried * (-step).exp()).clamp(LEAST / 10, MOST)
        gains = others & (gain > price)
        self.trials += (others & ~gains).to(self.trials)
        given_up = self.trials >= TRIALS
        new = ~others & ~given_up & (excess > 0) & (excess.square() > 4 * price * square)
        self.tried = torch.where(others & ~given_up, moved, torch.zeros_like(moved))
        self.tried[new] = (excess / square)[new].clamp(10 * LEAST, MOST / 10)
        published = torch.where(gains & (moved > LEAST), moved, 0)
        self.inverse.copy_(published)
        return bool(new.any())


def _excess(counts: Counts, A: Tensor, W: Tensor, exposure: Exposure) -> Tensor:
    """Return sum_i (X - x)^2 - X and sum_i x^2 of each feature, (2, d), float64."""
    square = exposure.squares(A, W)
    ones = A.new_ones(len(A), 1)
    stored = counts.transposed_matmul(counts.values * (counts.values - 1), ones)[:, 0]
    crossed = (exposure.crossed(counts, A) * W).sum(1)
    return torch.stack([stored.double() - 2 * crossed.double() + square, square])
