r"""Effects of batches and covariates on the rates of features: how they move, and their errors.

With z_i the design of a sample, and all else given, the effects of a feature raise

.. math:: \beta_j^\top \sum_i X_{ij} z_i - V_j(\beta_j), \qquad
    V_j = \sum_i s_i o_{ij} \exp(z_i^\top \beta_j) \, E \rho_{ij}

under the Poisson. Under the negative binomial V is :math:`\sum_i (X + r) \log(1 + x / r)` with x
the expected rate. Both are concave in the effects, with the slope :math:`\sum_i z_i (X_{ij} -
\theta_{ij} x_{ij})` and theta = 1, or (r + X) / (r + x), see
:mod:`~pnmf_pyro.models.negative_binomial`. So effects move in two blocks, and no move lowers the
bound:

- of a batch g, :math:`\exp \beta_{jg} \leftarrow \exp \beta_{jg} \sum_{i \in g} X_{ij} / \sum_{i
  \in g} \theta_{ij} x_{ij}`, which is where the Poisson's bound is highest;
- of covariates together by Newton's steps, halved for features whose bound would fall.

A feature without counts in a batch keeps an effect as if it had half a count there, and no effect
scales a rate by more than exp(10). The mean of :math:`z_i^\top \beta_j` over samples is 0: what
is added to the effects of all batches is taken from the loadings.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.log_rate import rates
from pnmf_pyro.models.dispersion import weighted
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.models.loading_errors import RELATIVE_SPREAD
from pnmf_pyro.models.negative_binomial import NegativeBinomialFactors
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors.joint import inverses, packed_numbers, unpacked

# The count that a feature without any in a batch is taken to have there, the largest effect on the
# logarithm of a rate, the largest change of it in one step, and how often a step is halved.
LEAST_COUNT, LARGEST, STEP, HALVINGS = 0.5, 10.0, 2.0, 4

# Relative fall of a feature's part of the bound that may be rounding, of products in float32.
ROUNDING = 1e-7


class Expected(NamedTuple):
    """What the effects of features lead to.

    Attributes
    ----------
    value : Tensor of shape (d,), float64
        V of each feature.
    sums : Tensor of shape (d, K), float64
        sum_i v_ik theta_ij x_ij for weights v.
    """

    value: Tensor
    sums: Tensor


@singledispatch
def expected(
    likelihood: Distribution, counts: Counts, factors: Tensor, weights: Tensor
) -> Expected:
    """Return V and weighted sums, given A = E exp F (n, L) and weights of designs, (G, K)."""
    raise TypeError(f"effects have no steps under {type(likelihood).__name__}")


@expected.register
def _of_poisson(
    likelihood: PoissonFactors, counts: Counts, factors: Tensor, weights: Tensor
) -> Expected:
    return _by_exposure(likelihood.exposure, factors, likelihood.loadings, weights)


def _by_exposure(exposure: Exposure, A: Tensor, W: Tensor, weights: Tensor) -> Expected:
    found = exposure.weighted(A, W, torch.cat([weights.new_ones(len(weights), 1), weights], 1))
    return Expected(found[:, 0], found[:, 1:])


@expected.register
def _of_negative_binomial(
    likelihood: NegativeBinomialFactors, counts: Counts, factors: Tensor, weights: Tensor
) -> Expected:
    W, some, simple = likelihood.loadings, likelihood.dispersed, likelihood.simple
    exposure = likelihood.exposure
    if not len(some):
        return _by_exposure(exposure, factors, W, weights)
    value = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    sums = value[:, None].repeat(1, weights.shape[1])
    if len(simple):
        found = _by_exposure(exposure.of(None, simple), factors, W[simple], weights)
        value[simple], sums[simple] = found
    value[some], sums[some] = weighted(
        likelihood.columns(counts),
        factors,
        W[some],
        likelihood.inverse[some].to(W),
        exposure.of(None, some),
        weights[exposure.codes],
    )
    return Expected(value, sums)


class Block:
    """Effects that move together: of batches, or of covariates.

    Attributes
    ----------
    columns : slice
        Their columns of the design.
    weights : Tensor of shape (G, K)
        Weights of designs in the sums that :meth:`change` takes.
    exact : bool
        Whether changes never lower the bound.
    """

    exact = False

    def __init__(self, exposure: Exposure, columns: slice):
        assert exposure.design is not None
        self.columns, self.design = columns, exposure.design[:, columns]
        self.weights = self.design

    @property
    def size(self) -> int:
        """Number of the effects of a feature."""
        return self.design.shape[1]

    def change(self, effects: Tensor, counted: Tensor, sums: Tensor) -> Tensor:
        """Return changes of effects, (d, P), given sum_i X_ij z_i and expected sums of them."""
        raise NotImplementedError


class OfBatches(Block):
    """Effects of batches: the counts of a batch over its expected counts."""

    exact = True

    def change(self, effects: Tensor, counted: Tensor, sums: Tensor) -> Tensor:  # noqa: D102
        target = effects + (counted.clamp_min(LEAST_COUNT) / sums).log()
        target = torch.where(counted > 0, target, torch.minimum(effects, target))
        return torch.where(sums > 0, target, effects) - effects


class OfCovariates(Block):
    """Effects of covariates: Newton's steps."""

    def __init__(self, exposure: Exposure, columns: slice):
        super().__init__(exposure, columns)
        z, P = self.design, self.size
        self.rows, self.others = torch.triu_indices(P, P, device=z.device)
        self.weights = torch.cat([z, z[:, self.rows] * z[:, self.others]], 1)
        self.largest = z.abs().amax(0).clamp_min(1e-12).double()

    def change(self, effects: Tensor, counted: Tensor, sums: Tensor) -> Tensor:  # noqa: D102
        P = self.size
        slope, packed = counted - sums[:, :P], sums[:, P:]
        curvature = packed.new_zeros(len(packed), P, P)
        curvature[:, self.rows, self.others] = packed
        curvature[:, self.others, self.rows] = packed
        level = curvature.diagonal(dim1=1, dim2=2)
        ridge = 1e-9 * level + 1e-9 * level.amax(1, keepdim=True) + 1e-30
        curvature = curvature + ridge.diag_embed()
        step = torch.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        longest = (step.abs() * self.largest).amax(1, keepdim=True)
        step = step * (STEP / longest.clamp_min(STEP))
        most = LARGEST / self.largest
        return torch.maximum(torch.minimum(effects + step, most), -most) - effects


def blocks_of(exposure: Exposure) -> list[Block]:
    """Return the blocks in which the effects of an exposure move."""
    assert exposure.effects is not None
    B, P = exposure.n_batches, exposure.effects.shape[1]
    found: list[Block] = [OfBatches(exposure, slice(0, B))] if B else []
    return [*found, OfCovariates(exposure, slice(B, P))] if P > B else found


def counted(counts: Counts, exposure: Exposure) -> Tensor:
    """Return sum_i X_ij z_i, (d, P), float64."""
    assert exposure.design is not None
    z = exposure.design[exposure.codes].to(counts.dtype)
    return counts.transposed_matmul(counts.values, z).double()


@torch.no_grad()
def improve(likelihood: PoissonFactors, counts: Counts, factors: Tensor, told: Tensor) -> None:
    """Move the effects of all features, in place, block after block.

    Parameters
    ----------
    likelihood : PoissonFactors
        Distribution of all counts, with the exposure that has the effects.
    counts : Counts of shape (n, d)
    factors : Tensor of shape (n, L)
        E exp F.
    told : Tensor of shape (d, P)
        What :func:`counted` returns.
    """
    exposure = likelihood.exposure
    for block in blocks_of(exposure):
        assert exposure.effects is not None
        part, of_counts = exposure.effects[:, block.columns], told[:, block.columns]
        before = part.double()
        value, sums = expected(likelihood, counts, factors, block.weights)
        step = block.change(before, of_counts, sums)
        part.copy_(before + step)
        if block.exact:
            continue
        for left in reversed(range(HALVINGS)):
            new = expected(likelihood, counts, factors, block.weights[:, :0]).value
            rise = (of_counts * step).sum(1) - (new - value)
            fell = rise < -ROUNDING * (value.abs() + 1)
            if not bool(fell.any()):
                break
            step = torch.where(fell[:, None], step / 2 if left else 0, step)
            part.copy_(before + step)


def take_level(exposure: Exposure) -> Tensor | None:
    """Make the mean of the effects over samples 0; return by what loadings grow instead, (d, 1).

    None where there are no batches: covariates are centred.
    """
    B = exposure.n_batches
    if not B or exposure.effects is None:
        return None
    assert exposure.design is not None
    of_batches = exposure.effects[:, :B]
    level = of_batches.double() @ shares(exposure)[:, None]
    of_batches.sub_(level)
    return level.exp()


def shares(exposure: Exposure) -> Tensor:
    """Return the share of the samples that is in each batch, (B,), float64."""
    assert exposure.design is not None
    assert exposure.codes is not None
    members = torch.bincount(exposure.codes, minlength=len(exposure.design)).double()
    return members @ exposure.design[:, : exposure.n_batches].double() / members.sum()


@torch.no_grad()
def start_effects(exposure: Exposure, counts: Counts, rounds: int = 5) -> Counts:
    """Start effects where each feature has one rate for all samples; return counts without them.

    Stored counts are divided by the effects that scale their rates.
    """
    if not exposure.learned:
        return counts
    assert exposure.effects is not None
    ones = counts.values.new_ones(counts.shape[0], 1)
    totals, told = counts.transposed_matmul(counts.values, ones), counted(counts, exposure)
    for _ in range(rounds):
        mean = totals / exposure.totals(ones).clamp_min(torch.finfo(ones.dtype).tiny)
        flat = PoissonFactors(torch.zeros_like(ones.mT), mean, exposure, validate_args=False)
        improve(flat, counts, ones, told)
        take_level(exposure)
    e = exposure.at(counts, slice(None))
    assert e is not None
    return counts.with_values(counts.values / e)


def effect_errors(model: PoissonFactorization, counts: Counts, shared: Tensor) -> Tensor:
    r"""Return standard errors of the effects of a trained model, (D, P).

    Gauss-Newton, as for loadings (:mod:`~pnmf_pyro.models.loading_errors`): counts say of errors of
    the effects and loadings of a feature

    .. math:: \sum_i w_{ij} v_{ij} v_{ij}^\top, \qquad v_{ij} = (z_i, \exp F_i / \rho_{ij}), \qquad
        w_{ij} = X_{ij} (1 - X_{ij} \phi_{ij}^\top P_i^{-1} \phi_{ij}),

    with a weak normal prior of both. Loadings are taken out by a Schur complement, and effects of
    batches move in the directions in which their mean over samples stays 0. To this comes that
    levels of factors may differ between batches, which the prior of a sample tells from effects.

    Parameters
    ----------
    model : PoissonFactorization
    counts : Counts of shape (N, D)
        What of each count tells of its rate.
    shared : Tensor of shape (N, L (L + 1) / 2)
        H of each sample, see :mod:`pnmf_pyro.priors.joint`.
    """
    W, A = model.W.data.detach(), model.prior.marginal().loc.exp().T.contiguous()
    apart = model.prior.apart_from_own(torch.zeros(A.T.shape, dtype=torch.float64))
    inverse = None if apart is None else inverses(shared, apart)
    spread = torch.maximum(RELATIVE_SPREAD * W, 1 / model.levels()).double()
    told, crossed, given = _information(model.exposure, counts, A, W, inverse)
    told.diagonal(dim1=1, dim2=2).add_(LARGEST**-2)
    given.diagonal(dim1=1, dim2=2).add_(spread.square().reciprocal())
    told = told - crossed @ torch.linalg.solve(given, crossed.mT)
    free = _free_directions(model.exposure)
    covariance = free @ torch.linalg.pinv(free.mT @ told @ free, hermitian=True) @ free.mT
    variance = covariance.diagonal(dim1=1, dim2=2).clamp_min(0)
    if apart is not None:
        variance = variance + _from_levels(model.exposure, given, W.double(), apart)
    return variance.sqrt().to(W)


def _from_levels(exposure: Exposure, given: Tensor, W: Tensor, apart: Tensor) -> Tensor:
    """Variances (d, P) that come from levels of factors that differ along columns of the design.

    The prior alone tells them from effects, by the precision sum_i z_ip^2 c_il. A feature has its
    share of the counts in each component; sum_l W_jl psi_ijl = 1 gives it from the information on
    loadings.
    """
    assert exposure.design is not None
    z = exposure.design[exposure.codes].double()
    precision = z.square().mT @ apart.mT.double()
    of_loadings = (given @ W[:, :, None])[:, :, 0] * W
    share = of_loadings / of_loadings.sum(1, keepdim=True).clamp_min(1e-300)
    moved = share.square() @ (1 / precision.clamp_min(1e-300)).mT
    B = exposure.n_batches
    centred = torch.eye(z.shape[1], dtype=torch.float64, device=z.device)
    centred[:B, :B] -= shares(exposure)
    return moved @ centred.square().mT


def _information(
    exposure: Exposure, counts: Counts, A: Tensor, W: Tensor, inverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Information on effects (d, P, P), on effects and loadings (d, P, L), on loadings (d, L, L).

    `inverse` is P_i^{-1} of each sample, packed; where it is None, factors are taken for known.
    """
    assert exposure.design is not None
    assert exposure.codes is not None
    (d, L), P, B = W.shape, exposure.design.shape[1], exposure.n_batches
    rows, columns = packed_numbers(L, W.device)
    twice, products = 2.0 - (rows == columns).to(W), W[:, rows] * W[:, columns]
    first, second = (torch.tensor(p, device=W.device) for p in zip(*_pairs(P, B), strict=True))
    of_effects, crossed, of_loadings = (
        torch.zeros(d, size, dtype=torch.float64, device=W.device)
        for size in (len(first), P * L, len(rows))
    )
    for index, block in counts.blocks():
        a, z = A[index], exposure.design[exposure.codes[index]].to(A)
        rho, pairs, w = rates(block, a, W), a[:, rows] * a[:, columns], block.values
        if inverse is not None:
            known = block.inner(pairs * twice * inverse[index].to(W), products)
            w = w * (1 - w * known / rho.square()).clamp_min(0)
        of_effects += block.transposed_matmul(w, z[:, first] * z[:, second])
        crossed += block.transposed_matmul(w / rho, (z[:, :, None] * a[:, None, :]).flatten(1))
        of_loadings += block.transposed_matmul(w / rho.square(), pairs)
    told = of_effects.new_zeros(d, P, P)
    told[:, first, second] = told[:, second, first] = of_effects
    return told, crossed.reshape(d, P, L), unpacked(of_loadings)


def _pairs(P: int, B: int) -> Iterator[tuple[int, int]]:
    """Pairs of columns of a design whose products are not all 0: no sample is in two batches."""
    return ((p, q) for p in range(P) for q in range(p, P) if p == q or q >= B)


def _free_directions(exposure: Exposure) -> Tensor:
    """Orthonormal directions (P, .) in which effects are free: of batches those of mean 0."""
    assert exposure.design is not None
    P, B = exposure.design.shape[1], exposure.n_batches
    free = torch.eye(P, dtype=torch.float64, device=exposure.design.device)
    if not B:
        return free
    # An orthonormal basis of which the first vector is the mean, and the rest has none.
    basis = torch.linalg.qr(torch.cat([shares(exposure)[:, None], free[:B, :B]], 1)).Q[:, 1:]
    found = free.new_zeros(P, P - 1)
    found[:B, : B - 1], found[B:, B - 1 :] = basis, free[B:, B:]
    return found
