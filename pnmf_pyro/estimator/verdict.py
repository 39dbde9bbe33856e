"""Whether the end of a fit can be trusted, and what to do where it cannot."""

from __future__ import annotations

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pnmf_pyro.data.checks import warn
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.log_rate import log_rate_with_gradients
from pnmf_pyro.models import PoissonFactorization

# Steps of the loadings, and the relative rise of the bound by them that a settled fit is far below.
STEPS = 10
LEFT = 0.02


def warn_of_doubts(model: PoissonFactorization, counts: Counts, elbo: float) -> None:
    """Warn of a fit in closed form that is not finite, far below its optimum, or no use."""
    if model.has_closed_form:
        with torch.no_grad():
            doubt = _doubt(model, counts, elbo)
        if doubt:
            warn(doubt, ConvergenceWarning)


def _doubt(model: PoissonFactorization, counts: Counts, elbo: float) -> str | None:
    """Say what is wrong with a fit, the worst first."""
    q, W = model.prior.marginal(), model.W.data
    factors = (q.loc + q.variance / 2).exp().mT.contiguous().to(W)
    parts = (q.loc, q.scale, factors, W, torch.tensor(elbo))
    if counts.ranks.any(not all(part.isfinite().all() for part in parts)):
        largest = max(counts.ranks.gathered(float(counts.values.max())))
        return (
            f"The fit is not usable: its factors, loadings or ELBO (elbo_ = {elbo:g}) are not "
            f"finite. The largest count is {largest:g}: is it a count? Remove such entries, or fit "
            "with pnmf_pyro.fit."
        )
    s = torch.ones_like(factors[:, :1])
    if model.size_factors is not None:
        s = model.size_factors[:, None].to(W)
    enough, left = LEFT * abs(elbo), 0.0
    if model.observation is None and model.exposure.of_samples_alone:
        typical = (s * q.loc.exp().mT.to(W)).contiguous()
        left = _rise_left(counts, typical, s * factors, W, enough)
    if left > enough:
        return (
            f"The fit ended far below its optimum: {STEPS} more steps of the loadings alone would "
            f"raise the ELBO, {elbo:.4g}, by {left:.2g}. Increase max_iter or learning_rate, or "
            "use pnmf_pyro.fit, which needs no tuning."
        )
    flat = _of_means(counts, model.exposure)
    if elbo < flat:
        return (
            f"The factors explain nothing: the ELBO, {elbo:.6g}, is below {flat:.6g}, the "
            "log-likelihood of the mean of each feature alone. Either the counts vary no more than "
            "Poisson noise does around these means, or the fit failed: check that the rows of X "
            "are samples, and try fewer n_components."
        )
    return None


def _of_means(counts: Counts, exposure: Exposure) -> float:
    """Log-likelihood of the rates e_ij m_j with m the total of each feature over that of e."""
    ones = counts.values.new_ones(counts.shape[0], 1)
    totals, size, constant = counts.ranks.totals(
        counts.transposed_matmul(counts.values, ones).double(),
        exposure.totals(ones).double(),
        (exposure.log_at(counts) - counts.log_factorials).sum(),
    )
    size = size.clamp_min(torch.finfo(torch.float64).tiny)
    fitted = torch.xlogy(totals, totals / size).sum() - totals.sum()
    return float(fitted + constant)


def _rise_left(
    counts: Counts, typical: Tensor, expected: Tensor, W: Tensor, enough: float
) -> float:
    """How far multiplicative steps of W raise the bound of `lower-bound` mode, given q(F).

    Steps rise less and less: where the first is too small for all to be `enough`, it is the last.
    """
    totals = counts.ranks.total(expected.sum(0, dtype=torch.float64))
    divisor = totals.to(W).clamp_min(torch.finfo(W.dtype).tiny)
    bounds = []
    for _ in range(STEPS + 1):
        values, _, gradient = log_rate_with_gradients(counts, typical, W)
        value, gradient = counts.ranks.totals(values.sum(), gradient)
        bounds.append(float(value - totals @ W.sum(0, dtype=torch.float64)))
        if len(bounds) == 2 and STEPS * (bounds[1] - bounds[0]) <= enough:
            break
        W = W * gradient / divisor
    return bounds[-1] - bounds[0]
