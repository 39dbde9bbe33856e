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
from collections.abc import Callable

import torch
from torch import Tensor

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.priors.gaussian import GaussianPrior
from pnmf_pyro.priors.joint import PSEUDOCOUNT
from pnmf_pyro.training.convergence import Judge
from pnmf_pyro.training.extrapolation import FIRST, GROWTH, SHRINKAGE
from pnmf_pyro.training.loop import Steps, evaluate_elbo, train

logger = logging.getLogger("pnmf_pyro")

# The largest extrapolation, a longest Newton step, and how far parts of a rate are corrected.
MOST, LONGEST = 0.98, 1.0

# Loadings relative to the largest below which they are nothing.
NOTHING = 1e-12

# Change of log W in one round, root mean square over counts, that ends them.
TOL = 1e-4

# Steps in which q settles given new loadings, at most.
Q_STEPS = 100


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


@torch.no_grad()
def settle_jointly(
    model: PoissonFactorization, counts: Counts, rounds: int, learns_scale: bool
) -> None:
    """Move the loadings, and the scale of the prior, to their optimum under joint posteriors.

    Parameters
    ----------
    model : PoissonFactorization
        A Poisson model of which the prior is a GaussianPrior. Its q(F) moves along with the means.
    counts : Counts of shape (N, D)
    rounds : int
        Number of rounds at most.
    learns_scale : bool
    """
    prior = model.prior
    assert isinstance(prior, GaussianPrior)
    posteriors = JointPosteriors(model, counts.to(model.W.dtype).to_dense())
    nothing = float((NOTHING * model.W.data.max()).log())
    log_W = model.W.data.detach().log().clamp_min(nothing)
    log_scale = prior.scale_pf.log()
    beta, last = FIRST, None
    for _ in range(rounds):
        W = log_W.exp()
        R = posteriors.update(W, float(log_scale.exp()))
        totals = model.exposure.totals(posteriors.factors)
        level = posteriors.m.mean(0)
        posteriors.m = posteriors.m - level
        now = ((R / totals).log() + level).clamp_min(nothing)
        of_scale = log_scale
        if learns_scale:
            squares = posteriors.m.square() + posteriors.S.diagonal(dim1=1, dim2=2)
            of_scale = squares.mean().double().log() / 2
        step = now - log_W
        if (R * step.square()).sum() < TOL**2 * R.sum():
            break
        log_W, log_scale, before = now, of_scale, last
        last = now, of_scale, posteriors.m
        if before is None:
            continue
        ahead = now - before[0]
        if (R * step * ahead).sum() > 0:
            beta = min(MOST, beta * GROWTH)
            log_W = now + beta * ahead
            log_scale = of_scale + beta * (of_scale - before[1])
            posteriors.m = last[2] + beta * (last[2] - before[2])
        else:
            beta /= SHRINKAGE
    if bool(now.isfinite().all()):
        model.W.assign(torch.where(now > nothing, now, -torch.inf).exp())
        prior.scale_pf.copy_(of_scale.exp())
        prior.assign(posteriors.m.T, posteriors.S.diagonal(dim1=1, dim2=2).T.sqrt())


def keep_higher(
    model: PoissonFactorization,
    counts: Counts,
    objective: FactorizationELBO,
    steps: Steps,
    judge: Judge,
    change: Callable[[], None],
) -> None:
    """Change a model and let q settle by `steps`; go back where that leaves the ELBO lower."""
    batches, generator = Batches(counts), torch.Generator()
    before = evaluate_elbo(model, batches, objective, generator)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    change()
    given = model, batches, objective, steps, generator
    train(*given, max_iter=Q_STEPS, convergence=judge, monotone=True, warn=False)
    after = evaluate_elbo(model, batches, objective, generator)
    better = after >= before
    logger.info("joint: ELBO %.6g, before %.6g%s", after, before, "" if better else ", kept")
    if not better:
        model.load_state_dict(kept)
