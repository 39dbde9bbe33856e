"""Which of the named likelihoods describes a table of counts best.

A tenth of the entries is hidden, each likelihood is trained on the others, with factors that know
no space, and judged by the log density of the hidden counts at their expected rates.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import Counts, SparseCounts, as_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.estimator.inputs import Data, exposure_of
from pnmf_pyro.estimator.parameters import AUTO, Settings
from pnmf_pyro.initialization import start_values
from pnmf_pyro.models import LIKELIHOODS, PoissonFactorization
from pnmf_pyro.models.dispersion import log_density
from pnmf_pyro.models.effects import start_effects
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import Likelihood
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.effects import effect_steps
from pnmf_pyro.training.loadings import ClosedFormLoadings
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant

logger = logging.getLogger("pnmf_pyro")

# Share of the entries that is hidden, entries that are looked at, and steps of each trial.
HIDDEN, ENTRIES, STEPS = 0.1, 4_000_000, 60


def chosen_likelihood(
    settings: Settings, data: Data
) -> tuple[Likelihood | str, dict[str, float] | None]:
    """Return the likelihood of a fit, and for 'auto' the held-out log densities it was chosen by.

    Parameters
    ----------
    settings : Settings
        Parameters of the estimator.
    data : Data
        Checked data of the fit.

    Returns
    -------
    likelihood : str or callable
        As it is named or passed, or the best.
    densities : dict or None
        Mean log density of a hidden entry, in nats, for each name.
    """
    if settings.likelihood != AUTO:
        return settings.likelihood or "poisson", None
    random = np.random.RandomState(0)
    n, d = data.counts.shape
    rows = np.sort(random.permutation(n)[: max(2, min(n, ENTRIES // d))])
    index = torch.from_numpy(rows).to(data.counts.device)
    counts = data.counts.rows(index)
    s = None if data.size_factors is None else data.size_factors[index]
    unseen = None if data.hidden is None else data.hidden.rows(index)
    train_counts, hidden, held_out, all_hidden = hide_entries(counts, HIDDEN, random, unseen)
    design = None if data.rows is None else data.rows[rows]
    exposure = exposure_of(s, all_hidden, data.design, design, counts)
    densities = {}
    for name in LIKELIHOODS:
        model = _trained(settings, name, train_counts, exposure)
        densities[name] = _density(model, hidden, held_out)
    best = max(densities, key=lambda name: densities[name])
    told = ", ".join(f"{value:.4g} for {name}" for name, value in densities.items())
    logger.info("likelihood %s: mean log density of a hidden entry is %s", best, told)
    return best, densities


def hide_entries(
    counts: Counts, share: float, random: np.random.RandomState, unseen: SparseCounts | None = None
) -> tuple[Counts, SparseCounts, Tensor, SparseCounts]:
    """Hide entries at random.

    Parameters
    ----------
    counts : Counts of shape (n, d)
    share : float
        Share of the entries to hide.
    random : RandomState
    unseen : SparseCounts of shape (n, d), optional
        Stored where an entry is hidden already.

    Returns
    -------
    counts : Counts of shape (n, d)
        0 where hidden.
    hidden : SparseCounts of shape (n, d)
        Stored where hidden now.
    values : Tensor
        The counts there.
    all_hidden : SparseCounts of shape (n, d)
        Stored where hidden now or before.
    """
    n, d = counts.shape
    before = sp.csr_matrix((n, d), dtype=np.float32) if unseen is None else unseen.numpy()
    chosen = random.random_sample((n, d)) < share
    chosen &= before.toarray() == 0
    cells = np.flatnonzero(chosen)
    entries = (np.ones(len(cells), np.float32), (cells // d, cells % d))
    pattern = sp.csr_matrix(entries, shape=(n, d))
    matrix: Any = counts.numpy()
    values = np.asarray(matrix[cells // d, cells % d]).ravel()
    if sp.issparse(matrix):
        seen = (matrix - matrix.multiply(pattern)).tocsr()
    else:
        seen = matrix.copy()
        seen[cells // d, cells % d] = 0
    hidden = SparseCounts.from_scipy(pattern).to(counts.device)
    together = SparseCounts.from_scipy(sp.csr_matrix(pattern + before)).to(counts.device)
    held_out = torch.from_numpy(values).to(counts.device)
    return as_counts(seen).to(counts.device), hidden, held_out, together


def _trained(
    settings: Settings, name: str, counts: Counts, exposure: Exposure
) -> PoissonFactorization:
    """Train a factorisation without space, of a likelihood."""
    (n, d), L = counts.shape, min(settings.n_components, *counts.shape)
    y = torch.empty((d, n), dtype=counts.dtype, device="meta")
    prior = GaussianPrior(y, L, use_natural_gradients=True)
    form, part = ("multiplicative", "lower-bound"), LIKELIHOODS[name](d)
    model = PoissonFactorization(prior, y, L, *form, size_factors=exposure, likelihood=part)
    model.to(counts.device)
    start = start_effects(model.exposure, counts)
    model.assign(*start_values(start, L, None, np.random.RandomState(0), exposure.size_factors))
    loadings = ClosedFormLoadings(model.W, model.expected_totals, model.levels)
    steps = [SiteSteps(prior), loadings, *model.own_steps(), *effect_steps(model)]
    train(
        model,
        Batches(counts),
        FactorizationELBO("lower-bound", newton=True),
        [(step, Constant()) for step in steps],
        torch_generator(0),
        max_iter=STEPS,
        convergence=Convergence(settings.tol, window=5, patience=1),
        warn=False,
        monotone=True,
    )
    return model


@torch.no_grad()
def _density(model: PoissonFactorization, hidden: SparseCounts, values: Tensor) -> float:
    """Mean log density of the hidden counts at their expected rates."""
    q = model.prior.marginal()
    scaled = model.exposure.scaled((q.loc + q.variance / 2).exp()).mT.contiguous()
    seen = hidden.to(scaled.dtype)
    rates, e = seen.inner(scaled, model.W.data), model.exposure.at(seen, slice(None))
    rates = (rates if e is None else rates * e).double()
    r = getattr(model.observation, "dispersion", torch.full((model.D,), torch.inf))
    return float(log_density(values.double(), rates, hidden.spread(r).double()).mean())
