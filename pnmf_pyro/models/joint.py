"""What counts say of log-factors and loadings, and how uncertain that leaves them."""

from __future__ import annotations

import logging
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.log_rate import log_rate_with_gradients, second_moments
from pnmf_pyro.data.parallel import Ranks
from pnmf_pyro.models.effects import effect_errors
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.models.joint_fields import field_draws, taken_by_field
from pnmf_pyro.models.loading_errors import (
    LoadingErrors,
    covariance_from_loadings,
    loading_errors,
)
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors.joint import diagonal_numbers, joint_covariance, packed_numbers, scaled

logger = logging.getLogger("pnmf_pyro")

# What a model must have from this package for the package to know its posterior.
PROGRAMS = ("model", "guide", "likelihood")


class Information(NamedTuple):
    """What counts say of the log-factors of samples, see :mod:`pnmf_pyro.priors.joint`.

    Attributes
    ----------
    counts : Counts of shape (n, d)
        What of each count tells of its rate.
    shared : Tensor of shape (n, L (L + 1) / 2)
        H, packed: sum_j X_ij phi_ij phi_ij^T for Poisson counts.
    expected : Tensor of shape (L, n)
        h, the expected counts of each component under q.
    """

    counts: Counts
    shared: Tensor
    expected: Tensor


@singledispatch
def information(likelihood: Distribution, counts: Counts, factors: Tensor) -> Information | None:
    """Return what counts (n, d) say of log-factors, given E exp F, `factors` of shape (L, n).

    None for a likelihood of which the package does not know it; `information.register` adds one.
    """
    return None


@information.register
def _of_poisson(likelihood: PoissonFactors, counts: Counts, factors: Tensor) -> Information:
    L = likelihood.log_factors.shape[-2]
    rows, columns = packed_numbers(L, factors.device)
    A, W = likelihood.log_factors.exp().T.contiguous(), likelihood.loadings
    informative = likelihood.informative(counts)
    expected = factors.T * likelihood.rates(counts, factors)
    if informative is not counts:  # as many of those expected as of those that were seen
        told, seen = (A * log_rate_with_gradients(c, A, W)[1] for c in (informative, counts))
        expected = expected * (told / seen.clamp_min(torch.finfo(seen.dtype).tiny))
    shared = second_moments(informative, A, W, rows, columns)
    return Information(informative, shared, expected.T)


@torch.no_grad()
def find_uncertainty(model: PoissonFactorization, counts: Counts) -> None:
    """Give a trained model the joint posterior of each sample, and errors of loadings and effects.

    Where loadings are learned, the posterior counts their errors as well.

    It has none where the likelihood, or the prior, does not say what is needed, where a subclass
    has another program or likelihood, and where numbers are too extreme to work it out, which the
    log then says.
    """
    prior = model.prior
    prior.joint_covariance = prior.joint_draws = None
    model.loading_blocks = model.loading_coupling = model.exposure.errors = None
    if any(getattr(type(model), n) is not getattr(PoissonFactorization, n) for n in PROGRAMS):
        return
    found = _information(model, counts.to(model.W.dtype))
    if found is None:
        return
    try:
        uncertainty = _uncertainty(model, found)
        if model.exposure.learned:
            model.exposure.errors = effect_errors(model, found.counts, found.shared)
    except torch.linalg.LinAlgError:
        logger.warning("no joint posterior: the numbers of this fit are too extreme for it")
        return
    if uncertainty is not None:
        prior.joint_covariance, (model.loading_blocks, model.loading_coupling) = uncertainty[:2]
        prior.joint_draws = uncertainty[2]


def _information(model: PoissonFactorization, counts: Counts) -> Information | None:
    q = model.prior.marginal()
    with model.apart():
        likelihood = model.likelihood(q.loc, Batch())
    return information(likelihood, counts, (q.loc + q.variance / 2).exp())


def _uncertainty(
    model: PoissonFactorization, found: Information
) -> tuple[Tensor, LoadingErrors, Tensor | None] | None:
    """Joint covariances of samples, errors of loadings, and draws that a field keeps.

    Where they are no finite numbers, that is a LinAlgError.
    """
    ranks = model.ranks
    _check_finite(ranks, found.shared, found.expected)
    covariance = ranks.all_or_none(
        lambda: joint_covariance(model.prior, found.shared, found.expected),
        torch.linalg.LinAlgError,
    )
    taken = taken_by_field(model, found.shared)
    errors = loading_errors(model, found.counts, found.shared, taken)
    if covariance is None or errors is None:
        return None
    drawn = field_draws(model, *found, errors)
    if drawn is not None:
        held, variance = drawn
        wider = variance / covariance[:, diagonal_numbers(model.L)].mean(0)
        covariance = scaled(covariance, wider.clamp_min(1).sqrt().to(covariance)[None])
        _check_finite(ranks, covariance, *errors, held)
        return covariance, errors, held
    if model.W.requires_grad:  # otherwise they are known
        more = covariance_from_loadings(model, found.counts, found.shared, covariance, errors)
        # Errors never take from a variance, as numbers of a fit far from its optimum may say.
        adds = (more[:, diagonal_numbers(model.L)] >= 0).all(1, keepdim=True)
        covariance += torch.where(adds, more, 0)
    _check_finite(ranks, covariance, *errors)
    return covariance, errors, None


def _check_finite(ranks: Ranks, *tensors: Tensor) -> None:
    odd = sum((~one.isfinite()).sum() for one in tensors)
    if ranks.total(torch.as_tensor(odd)) > 0:
        raise torch.linalg.LinAlgError("numbers that are not finite")
