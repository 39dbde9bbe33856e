"""What each sample tells of its factors, its site, and prediction of a sample from other sites."""

from __future__ import annotations

import torch
from torch import Tensor

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.log_rate import log_rate_and_moments
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import Prior

# Largest distance, in units of F, of a site from the mean of q.
HIGHEST_SITE = 5.0


def sites(
    model: PoissonFactorization, counts: Counts, overlap: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what each sample tells of its log-factors: observations y and their noise variance.

    Parameters
    ----------
    model : PoissonFactorization
    counts : Counts of shape (N, D)
    overlap : bool
        Count for less what may be of another component: the curvature is that of the
        log-likelihood, in place of that of `lower-bound` mode, which knows whose each count is.

    Returns
    -------
    y, noise : Tensor of shape (L, N), float64
    """
    with torch.no_grad():
        q, W = model.prior.marginal(), model.W.data.detach()
        A, expected = q.loc.exp().mT.contiguous().to(W), (q.loc + q.variance / 2).exp().to(W)
        likelihood = model.in_closed_form(q.loc)
        _, first, second = log_rate_and_moments(counts, A, W)
        if overlap and (informative := likelihood.informative(counts)) is not counts:
            _, _, second = log_rate_and_moments(informative, A, W)
        first, second = first.mT.double(), second.mT.double()
        h = (expected.mT * likelihood.rates(counts, expected)).mT.double()
        slope = first - h
        if overlap:  # far from the optimum the first can be below 0
            h = torch.maximum(h - first + second, second / 2)
        h = h.clamp_min(1e-6)
        return q.loc.double() + (slope / h).clamp(-HIGHEST_SITE, HIGHEST_SITE), 1 / h


def start_from(
    prior: Prior, source: PoissonFactorization, counts: Counts, fields: bool = True
) -> None:
    """Start q(F) of a prior from that of a model of the same samples and loadings.

    Fields, unless they are left out, start at their posterior given the sites of the model, other
    parts at its q(F).
    """
    with torch.no_grad():
        q = source.prior.marginal()
    if fields and prior.fields:
        observed, noise = sites(source, counts)
    for part, mine in prior.of_parts():
        if part.places is None:
            part.assign(q.loc[mine], q.scale[mine])
        elif fields:
            part.assign(observed[mine], noise[mine].sqrt())


def predict_without(
    covariance: Tensor, mean: Tensor, judged: Tensor, neighbours: Tensor, y: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of F at samples, given the sites of their neighbours.

    Parameters
    ----------
    covariance : Tensor of shape (L or 1, n, K + 1, K + 1)
        Of F at the neighbours of each judged sample, and in the last place at the sample.
    mean : Tensor of shape (L,)
    judged : Tensor of shape (n,)
    neighbours : Tensor of shape (n, K)
        Entries equal to the judged sample itself are left out.
    y, noise : Tensor of shape (L, N)
        Sites.

    Returns
    -------
    mean, variance : Tensor of shape (L, n)
    """
    among, prior = covariance[..., :-1, :-1], covariance[..., -1, -1]
    absent = neighbours == judged[:, None]
    towards = covariance[..., :-1, -1:].masked_fill(absent[..., None], 0.0)
    spread = noise[:, neighbours].masked_fill(absent, 1e12)
    diagonal = among.diagonal(dim1=-2, dim2=-1) + spread
    among = among.expand(*diagonal.shape, -1)
    # The noise of the sites keeps this well conditioned: no jitter.
    tril = torch.linalg.cholesky(among.diagonal_scatter(diagonal, dim1=-2, dim2=-1))
    towards = towards.expand(*diagonal.shape, 1)
    right = torch.cat([(y[:, neighbours] - mean[:, None, None])[..., None], towards], -1)
    left, solved = torch.linalg.solve_triangular(tril, right, upper=False).unbind(-1)
    variance = prior - solved.square().sum(-1)
    return mean[:, None] + (left * solved).sum(-1), variance.clamp_min(1e-10)
