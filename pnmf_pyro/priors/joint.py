r"""The joint posterior of the log-factors of a sample: normal, with a full L x L covariance.

q(F) takes components as independent, and so is too narrow where they share features: what one
component gains the others lose. The counts of a sample say of an error dF of its log-factors, to
second order (Gauss-Newton), :math:`\frac12 dF^T H_i dF`, with

.. math:: H_i = \sum_j X_{ij} \phi_{ij} \phi_{ij}^T, \qquad
    \phi_{ijl} = W_{jl} \exp F_{il} / \rho_{ij}.

Its rows add up to the counts a_i of each component. What q expects of these is h_i, and where the
two differ, as in a sample with few counts, h_i is right: H_i is taken times :math:`r_i r_i^T` with
:math:`r_i^2 = h_i / a_i`. The precision is :math:`P_i = \mathrm{diag}(c_i) + H_i`; without overlap
it is that of q. Here c_i is what is known of F_i apart from its own counts. For independent samples
that is the precision of the prior. In a field it is the precision given the sites of all other
samples, where a site has for its precision what H_i says of one component while the others are
uncertain, :math:`1 / (P_i^{-1})_{ll} - c_{il}`. Sites and c_i follow from each other; from the c_i
of q, a round or two settle both (expectation propagation for a normal model, Minka 2001).

A posterior of counts is skewed, and its variance larger than 1 / (c + h), by the factor
:math:`1 + h^2 / (2 (c + h)^3)` to the next order. Variances are multiplied by it.

E exp F stays what q says, since the counts determine it. So the mean is
:math:`\log E_q \exp F_{il} - (P_i^{-1})_{ll} / 2`.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import Normal
from torch import Tensor

from pnmf_pyro.data.batches import take
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.places import Places
from pnmf_pyro.priors.base import Draws, Field, Prior

# Part of a count by which those of a component are raised before they are divided by.
PSEUDOCOUNT = 0.1

# Part of the precision under q that is known apart from the counts of a sample, at least.
LEAST_APART = 0.01

# Rounds in which sites and what is known apart from them settle, at most; and the change of sites,
# relative to precisions and root mean square over samples, of which they make an end. It is twice
# what it can move standard deviations by.
ROUNDS = 5
SETTLED = 0.02


class JointPosterior:
    """The joint posterior of each sample of a prior, a field beside q(F)."""

    def __init__(self, prior: Prior, covariance: Tensor):
        self.prior, self.packed = prior, covariance
        self.L, self.N = prior.L, prior.N

    def covariance(self, index: Tensor | None = None) -> Tensor:
        """Return the covariances of the samples `index` (all if None), (n, L, L), in float64."""
        return unpacked(take(self.packed, index, dim=0))

    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return the marginals of F_il for the samples `index`, with loc and scale (L, n)."""
        q = self.prior.marginal(index)
        diagonal = diagonal_numbers(self.L)
        variance = take(self.packed, index, dim=0)[:, diagonal].T.to(q.loc)
        return Normal(q.loc + (q.variance - variance) / 2, variance.sqrt(), validate_args=False)

    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws there, (n_draws, L, n).

        Those of a field are of all components over all places together.
        """
        kept = self.prior.joint_draws
        if kept is None:
            of_q = self.prior.draws(n_draws)
            return lambda index: self.from_draws_of_q(of_q(index), index)
        deviations = _deviations(self.prior, kept, None)[0]
        deviations = deviations / deviations.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30)
        mixed = torch.randn(n_draws, kept.shape[-1]).to(deviations)

        def draw(index: Tensor | None) -> Tensor:
            q = self.marginal(index)
            own = take(deviations, index, dim=1)
            return q.loc + q.scale * torch.einsum("lnr,er->eln", own, mixed).to(q.loc)

        return draw

    def from_draws_of_q(self, draws: Tensor, index: Tensor | None = None) -> Tensor:
        """Give draws of q(F), (..., L, n), the covariance of each sample.

        How they go together over samples stays: what is mixed at a sample are the standard normals
        behind the draws, by the symmetric root of the correlation of components, so that no
        component comes before another.
        """
        if self.prior.joint_draws is not None:  # they have their own
            shape = draws.shape
            return self.draws(shape[:-2].numel())(index).reshape(shape)
        q, joint = self.prior.marginal(index), self.marginal(index)
        covariance = self.covariance(index)
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        correlation = covariance / (scale[:, :, None] * scale[:, None, :])
        values, vectors = torch.linalg.eigh(correlation)
        root = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
        standard = (draws - q.loc) / q.scale
        mixed = torch.einsum("nlk,...kn->...ln", root.to(standard), standard)
        return joint.loc + joint.scale * self._skewed(mixed, joint.variance)

    def _skewed(self, standard: Tensor, variance: Tensor) -> Tensor:
        """Give standard normals the skewness of a posterior of counts, (..., L, n).

        That is -h / (c + h)^(3/2), by the first term of Cornish and Fisher (1938); mean and
        variance stay. What several places say together is hardly skewed, so fields stay normal.
        """
        apart = None if self.prior.places is not None else self.prior.apart_from_own(variance)
        if apart is None:
            return standard
        of_counts = (1 - apart * variance).clamp(0, 1)
        skewness = (-of_counts * variance.sqrt()).to(standard)
        moved = standard + skewness / 6 * (standard.square() - 1)
        return moved / (1 + skewness.square() / 18).sqrt()


class JointFieldAt:
    """The joint posterior of a field at other places than those of its samples."""

    def __init__(self, prior: Prior, places: Places, draws: Tensor):
        self.prior, self.places, self.kept = prior, places, draws
        self.L, self.N = prior.L, len(places)

    @torch.no_grad()
    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return the marginals at the places `index` (all if None), with loc and scale (L, n).

        No place is less sure than the prior.
        """
        places = self.places.take(index)
        q = self.prior.at(places).marginal()
        deviations, rest = _deviations(self.prior, self.kept, places)
        most = self.prior.kernel.variance(places.to(rest.device))
        variance = torch.minimum(rest + deviations.square().mean(-1), most).to(q.loc)
        return Normal(q.loc + (q.variance - variance) / 2, variance.sqrt(), validate_args=False)

    @torch.no_grad()
    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of places to draws there, (n_draws, L, n).

        Calls for different places belong to the same draws. What the samples leave open goes
        together over places as in draws of q(F).
        """
        of_q = self.prior.at(self.places).draws(n_draws)
        mixed = torch.randn(n_draws, self.kept.shape[-1]) / self.kept.shape[-1] ** 0.5

        def draw(index: Tensor | None) -> Tensor:
            places, joint = self.places.take(index), self.marginal(index)
            q = self.prior.at(places).marginal()
            deviations, rest = _deviations(self.prior, self.kept, places)
            found = torch.einsum("lnr,er->eln", deviations, mixed.to(deviations))
            found += rest.sqrt() * ((of_q(index) - q.loc) / q.scale)
            spread = (rest + deviations.square().mean(-1)).sqrt()
            return joint.loc + joint.scale * (found / spread).to(joint.loc)

        return draw


def _deviations(prior: Prior, kept: Tensor, places: Places | None) -> tuple[Tensor, Tensor]:
    """Draws about the mean at places, or at the samples, and the variance left there."""
    kept = kept.double()
    carried, rest = prior.carry(places, kept[:, :-1])
    return carried - kept[:, -1:].to(carried), rest


def posterior_at(prior: Prior, places: Places) -> Field:
    """Return the joint posterior at other places where a field has it, q(F) otherwise."""
    kept = prior.joint_draws
    return prior.at(places) if kept is None else JointFieldAt(prior, places, kept)


def posterior_of(prior: Prior) -> Field:
    """Return the joint posterior of each sample where a prior has it, q(F) otherwise."""
    packed = prior.joint_covariance
    return prior if packed is None else JointPosterior(prior, packed)


@torch.no_grad()
def joint_covariance(prior: Prior, shared: Tensor, expected: Tensor) -> Tensor | None:
    """Return the packed covariances of samples, (N, L (L + 1) / 2), in float32.

    None for a prior that does not say what it knows apart from the counts of a sample.

    Parameters
    ----------
    prior : Prior
        Prior, with its method :meth:`~pnmf_pyro.priors.base.Prior.apart_from_own`.
    shared : Tensor of shape (N, L (L + 1) / 2)
        H of each sample, packed.
    expected : Tensor of shape (L, N)
        h, the expected counts of components.
    """
    diagonal = diagonal_numbers(prior.L)

    def given(apart: Tensor) -> tuple[Tensor, Tensor]:
        """The packed covariances, and the sites of single components that make variances these."""
        packed = inverses(as_expected(shared, expected), apart)
        return packed, (1 / packed[:, diagonal].T.double() - apart).clamp_min(0)

    precision = 1 / prior.marginal().variance.double()
    sites = given(torch.maximum(precision - expected.double(), LEAST_APART * precision))[1]
    del precision
    for _ in range(ROUNDS):
        apart = packed = last = None  # draws take their memory
        apart = prior.apart_from_own(sites)
        if apart is None:
            return None
        (packed, sites), last = given(apart), sites
        if bool(((sites - last) / (apart + sites)).square_().mean() < SETTLED**2):
            break
    assert apart is not None
    assert packed is not None
    skew = expected.square() / (apart + expected) ** 3 / 2
    return scaled(packed, skew.add_(1).sqrt_().T.float())


def expected_ratio(shared: Tensor, expected: Tensor) -> Tensor:
    """Return the expected counts of each component relative to those allocated, (N, L)."""
    L = len(expected)
    rows, columns = packed_numbers(L, shared.device)
    off = rows != columns
    allocated = shared.new_zeros(len(shared), L).index_add_(1, rows, shared)
    allocated.index_add_(1, columns[off], shared[:, off])
    return (expected.T + PSEUDOCOUNT) / (allocated + PSEUDOCOUNT)


def as_expected(shared: Tensor, expected: Tensor) -> Tensor:
    """Return H, packed, with the counts of components as q expects and not as allocated."""
    ratio = expected_ratio(shared, expected)
    information = scaled(shared, ratio.sqrt().to(shared))
    more = PSEUDOCOUNT * (ratio - 1).clamp_min(0)
    information[:, diagonal_numbers(len(expected))] += more.to(shared)
    return information


def scaled(packed: Tensor, r: Tensor) -> Tensor:
    """Return packed matrices (n, ...) times r r^T, r of shape (n, L)."""
    rows, columns = packed_numbers(r.shape[1], r.device)
    return packed * r[:, rows] * r[:, columns]


def inverses(information: Tensor, apart: Tensor) -> Tensor:
    """Return the packed inverses of diag(apart) + H, in float32, a block of samples at a time.

    Parameters
    ----------
    information : Tensor of shape (N, L (L + 1) / 2)
        H, packed.
    apart : Tensor of shape (L, N)
    """
    L, N = apart.shape
    rows, columns = packed_numbers(L, information.device)
    found = torch.empty_like(information, dtype=torch.float32)
    for block in torch.arange(N, device=information.device).split(at_once(L**2)):
        precision = unpacked(information[block])
        precision.diagonal(dim1=-2, dim2=-1).add_(apart[:, block].T)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        found[block] = inverse[:, rows, columns].float()
    return found


def unpacked(packed: Tensor) -> Tensor:
    """Return symmetric matrices (n, L, L) in float64 from their lower triangles, row by row."""
    L = math.isqrt(2 * packed.shape[1])
    rows, columns = packed_numbers(L, packed.device)
    full = packed.new_empty(len(packed), L, L, dtype=torch.float64)
    full[:, rows, columns] = full[:, columns, rows] = packed.double()
    return full


def packed_numbers(L: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the entries of a packed matrix, the lower triangle row by row."""
    rows, columns = torch.tril_indices(L, L, device=device)
    return rows, columns


def diagonal_numbers(L: int) -> list[int]:
    """Return where the diagonal stands in a packed matrix."""
    return [l * (l + 3) // 2 for l in range(L)]
