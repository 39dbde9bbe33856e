r"""Loadings, and the scale of the prior, under the joint posterior of each sample's components.

The bound of a factorised q leads to loadings that are too distinct: what components share it takes
for uncertainty. Here q(F_i) = N(m_i, S_i) has the full covariance of the components. With

.. math:: A_{il} = E \exp F_{il} = \exp(m_{il} + S_{ill} / 2), \qquad \rho = A W^T, \qquad
    \phi_{ijl} = W_{jl} A_{il} / \rho_{ij},

the expected log-likelihood of a sample is, to second order in S,

.. math:: \sum_j X_{ij} (\log \rho_{ij} - \tfrac12 \phi_{ij}^T S_i \phi_{ij}) - w_i^T A_i,

w the slope of its total rate. Its slope in W is zero where loadings are what they explain,

.. math:: W_{jl} = \frac{\sum_i X_{ij} \phi'_{ijl}}{\sum_i e_{ij} A_{il}}, \qquad
    \phi'_{ijl} = \phi_{ijl} (1 + \phi_{ij}^T S_i \phi_{ij} - (S_i \phi_{ij})_l) \approx
    E \frac{W_{jl} \exp F_{il}}{\rho_{ij}(F)}.

Of F it is zero in m_i where :math:`\sum_j X_{ij} \phi'_{ij} - w_i A_i = m_i / \sigma^2`. The
precision is that of the prior and :math:`\sum_j X_{ij} E \phi \phi^T`, to second order as well,

.. math:: E \phi \phi^T \approx \phi' \phi'^T + J S J, \qquad
    J = \mathrm{diag}(\phi') - \phi' \phi'^T.

As for :mod:`~pnmf_pyro.priors.joint`, it is scaled where the counts of a component are others than
expected. Each round is a Newton step of all m_i, then one of :math:`\log W` (expectation
maximisation), with the means of the components moved to 0, that of the prior, and the scale to its
optimum (Liu, Rubin and Wu 1998, parameter expansion). Rounds are extrapolated as in
:mod:`~pnmf_pyro.training.extrapolation`; where a round turns back they start again from rest
(O'Donoghue and Candes 2015).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.parallel import ALONE
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.priors.gaussian import GaussianPrior
from pnmf_pyro.priors.joint import PSEUDOCOUNT
from pnmf_pyro.training.extrapolation import FIRST, GROWTH, SHRINKAGE

logger = logging.getLogger("pnmf_pyro")

# The largest extrapolation, a longest Newton step, and how far parts of a rate are corrected.
MOST, LONGEST = 0.98, 1.0

# Loadings relative to the largest below which they are nothing.
NOTHING = 1e-12

# Rounds in which posteriors settle given the first loadings; and after how many the evidence is
# looked at, which must have risen by so many nats.
FIRST_ROUNDS, EVERY, WORTH = 5, 20, 1.0

# Draws for the evidence, and their spread relative to that of the posterior, which is too narrow.
DRAWS, WIDER = 20, 1.2


# N D L^2 up to which a table is small: a few seconds.
SMALL = 10_000_000


def has_joint_rounds(model: PoissonFactorization) -> bool:
    """Whether a model is one of Poisson counts without space, effects or ranks, and small."""
    plain = type(model.prior) is GaussianPrior and model.observation is None
    alone = model.ranks is ALONE and not model.exposure.learned and model.W.requires_grad
    return plain and alone and model.N * model.D * model.L**2 <= SMALL


class JointPosteriors:
    """N(m_i, S_i) for each sample, from q(F) of a model on; m of shape (N, L), S (N, L, L).

    Parameters
    ----------
    model : PoissonFactorization
        With a :class:`~pnmf_pyro.priors.gaussian.GaussianPrior`.
    X : Tensor of shape (N, D)
        Counts, 0 where they are hidden.
    """

    def __init__(self, model: PoissonFactorization, X: Tensor):
        q = model.prior.marginal()
        self.exposure, self.X = model.exposure, X
        self.m = q.loc.detach().T.contiguous()
        self.S = torch.diag_embed(q.variance.detach().T)

    @property
    def factors(self) -> Tensor:
        """E exp F, (N, L)."""
        return (self.m + self.S.diagonal(dim1=1, dim2=2) / 2).exp()

    def shares(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi' of each entry, and phi^T S phi / 2 - S phi; each (N, L, D)."""
        parts = self.factors[:, :, None] * W.T
        phi = parts / parts.sum(1, keepdim=True).clamp_min_(torch.finfo(W.dtype).tiny)
        moved = self.S @ phi
        spread = (phi * moved).sum(1, keepdim=True)
        shares = phi * (spread - moved).clamp_(-LONGEST, LONGEST).exp_()
        return shares.div_(shares.sum(1, keepdim=True).clamp_min_(NOTHING)), spread / 2 - moved

    def update(self, W: Tensor, scale: float) -> Tensor:
        """Take a step to the posteriors given loadings (D, L) and the scale of the prior.

        Return the counts that each loading had before it, (D, L).
        """
        shares, change = self.shares(W)
        weighted = shares * self.X[:, None, :]
        allocated = weighted.sum(2)
        expected = self.factors * self.exposure.rates(W)
        less = (weighted * change) @ shares.mT
        H = (weighted @ shares.mT) * (1 + self.S) + less + less.mT
        r = ((expected + PSEUDOCOUNT) / (allocated + PSEUDOCOUNT)).sqrt()
        P = H * r[:, :, None] * r[:, None, :]
        P.diagonal(dim1=1, dim2=2).add_(scale**-2)
        self.S = torch.cholesky_inverse(torch.linalg.cholesky(P))
        P.diagonal(dim1=1, dim2=2).add_((expected - allocated).clamp_min(0))
        slope = allocated - expected - self.m / scale**2
        step = torch.cholesky_solve(slope[:, :, None], torch.linalg.cholesky(P))[:, :, 0]
        self.m = self.m + step.clamp(-LONGEST, LONGEST)
        return weighted.sum(0).T

    def evidence(self, W: Tensor, scale: Tensor, seed: int) -> float:
        """Estimate the log likelihood of W and the scale of the prior, constants left out.

        By importance sampling (Burda, Grosse and Salakhutdinov 2016), with the same draws for the
        same seed. It has an expectation no higher than what it estimates.
        """
        L, generator = self.m.shape[1], torch.Generator().manual_seed(seed)
        root = WIDER * torch.linalg.cholesky(self.S)
        level = root.diagonal(dim1=1, dim2=2).log().sum(1) - L * scale.log() - math.log(DRAWS)
        values = []
        for _ in range(DRAWS):
            z = torch.randn(self.m.shape, generator=generator, dtype=torch.float64).to(self.m)
            F = self.m + (root @ z[:, :, None])[:, :, 0]
            factors = F.exp()
            of_counts = self.X * (factors @ W.T).clamp_min_(torch.finfo(W.dtype).tiny).log_()
            value = of_counts.sum(1) - (factors * self.exposure.rates(W)).sum(1)
            values.append(value - (F / scale).square().sum(1) / 2 + z.square().sum(1) / 2)
        return float((torch.stack(values).double().logsumexp(0) + level).sum())


@torch.no_grad()
def settle_jointly(
    model: PoissonFactorization, counts: Counts, rounds: int, learns_scale: bool, seed: int
) -> bool:
    """Move the loadings, and the scale of the prior, to their optimum under joint posteriors.

    The rounds go on while they raise the evidence. What it is highest for is kept; the means of
    q(F) then belong to it, and its variances are those of the joint posterior.

    Parameters
    ----------
    model : PoissonFactorization
        A Poisson model of which the prior is a GaussianPrior.
    counts : Counts of shape (N, D)
    rounds : int
        Number of rounds at most.
    learns_scale : bool
    seed : int
        Of the draws that estimate the evidence.

    Returns
    -------
    bool
        Whether the evidence rose; otherwise the model is as it was.
    """
    prior = model.prior
    assert isinstance(prior, GaussianPrior)
    posteriors = JointPosteriors(model, counts.to(model.W.dtype).to_dense())
    nothing = float((NOTHING * model.W.data.max()).log())
    best, found = -math.inf, None
    points = _points(model, posteriors, nothing, learns_scale)
    try:
        for number, (log_W, log_scale) in zip(range(rounds + 1), points, strict=False):
            if number % EVERY:
                continue
            value = posteriors.evidence(log_W.exp(), log_scale.exp(), seed)
            logger.debug("joint: %d rounds, evidence %.6g", number, value)
            if not value > best + WORTH:
                break
            best = value
            found = (log_W, log_scale, posteriors.m, posteriors.S) if number else None
    except torch.linalg.LinAlgError:  # numbers too extreme for it
        logger.info("joint: a covariance could not be factorised")
    if found is None:
        return False
    log_W, log_scale, m, S = found
    model.W.assign(torch.where(log_W > nothing, log_W, -torch.inf).exp())
    prior.scale_pf.copy_(log_scale.exp())
    prior.assign(m.T, S.diagonal(dim1=1, dim2=2).T.sqrt())
    return True


def _points(
    model: PoissonFactorization, posteriors: JointPosteriors, nothing: float, learns_scale: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through the rounds: log W and the log scale before each of them, extrapolated."""
    log_W = model.W.data.detach().log().clamp_min(nothing)
    log_scale = cast(Tensor, model.prior.scale_pf).log().to(log_W)
    for _ in range(FIRST_ROUNDS):
        posteriors.update(log_W.exp(), float(log_scale.exp()))
    beta, last = FIRST, None
    while True:
        yield log_W, log_scale
        start = log_W
        R = posteriors.update(log_W.exp(), float(log_scale.exp()))
        totals = model.exposure.totals(posteriors.factors)
        level = posteriors.m.mean(0)
        posteriors.m = posteriors.m - level
        log_W = ((R / totals).log() + level).clamp_min(nothing)
        if learns_scale:
            squares = posteriors.m.square() + posteriors.S.diagonal(dim1=1, dim2=2)
            log_scale = squares.mean().log() / 2
        before, last = last, (log_W, log_scale, posteriors.m)
        if before is None:
            continue
        if (R * (log_W - start) * (log_W - before[0])).sum() > 0:
            beta = min(MOST, beta * GROWTH)
            log_W, log_scale, posteriors.m = (
                now + beta * (now - then) for now, then in zip(last, before, strict=True)
            )
        else:
            beta /= SHRINKAGE
