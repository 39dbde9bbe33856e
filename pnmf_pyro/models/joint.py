"""What the counts of each sample say of its log-factors together, and the posterior from it."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import Distribution

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.log_rate import second_moments
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors.joint import joint_covariance


@singledispatch
def joint_information(likelihood: Distribution, counts: Counts) -> Tensor | None:
    """Return what counts say of log-factors, H of each sample, packed: (n, L (L + 1) / 2).

    See :mod:`pnmf_pyro.priors.joint`. None for a likelihood of which the package knows no H;
    another one is registered as `joint_information.register`.
    """
    return None


@joint_information.register
def _of_poisson(likelihood: PoissonFactors, counts: Counts) -> Tensor:
    rows, columns = torch.tril_indices(*2 * [likelihood.log_factors.shape[-2]])
    factors = likelihood.log_factors.exp().T.contiguous()
    return second_moments(counts, factors, likelihood.loadings, rows, columns)


@torch.no_grad()
def find_joint_posterior(model: PoissonFactorization, counts: Counts) -> None:
    """Give the prior of a trained model the joint posterior of each sample, in one pass.

    It has none where the likelihood, or the prior, does not say what is needed, and where the
    log-factors of the likelihood are not those of the prior.
    """
    prior = model.prior
    prior.joint_covariance = None
    F = prior.marginal().loc
    likelihood = model.likelihood(F)
    own = getattr(likelihood, "log_factors", None) is F
    if not (own and bool(F.isfinite().all())):
        return
    information = joint_information(likelihood, counts.to(model.W.dtype))
    if information is not None and bool(information.isfinite().all()):
        prior.joint_covariance = joint_covariance(prior, information)
