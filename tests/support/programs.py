"""Factorisations of a small tissue with every prior, and their training as tutorials of Pyro do."""

from __future__ import annotations

import pyro
import torch
from pyro.infer import SVI

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import FactorizationELBO, PoissonFactorization
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior, SideBySide
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant
from tests.support.data import tissue
from tests.support.state import drawing

N, D, L = 60, 20, 2
PRIORS = ("independent", "inducing points", "neighbours", "side by side")


def small_tissue():
    """Counts (N, D) as a tensor, and the places of samples."""
    X, x, *_ = tissue(N, D, L)
    return torch.from_numpy(X).float(), Places(torch.from_numpy(x))


def make(
    data,
    prior="independent",
    natural=False,
    dtype=torch.float32,
    kind=PoissonFactorization,
    M=25,
    K=10,
    **options,
):
    """A factorisation of the data, by the name of its prior."""
    X, places = data
    y = X.T.to(dtype)
    settings = {"use_natural_gradients": natural, "dtype": dtype}
    kernel, inducing = "Matern32", places[torch.arange(min(M, len(places)))]
    priors = {
        "independent": lambda: GaussianPrior(y, L, use_natural_gradients=natural),
        "inducing points": lambda: SVGP(kernel, places, inducing, L, **settings),
        "neighbours": lambda: LCGP(kernel, places, L, K=K, **settings),
        "side by side": lambda: SideBySide(
            SVGP(kernel, places, inducing, L - 1, **settings),
            GaussianPrior(y, 1, use_natural_gradients=natural),
        ),
    }
    return kind(priors[prior](), y, L, random_state=0, **options)


def by_svi(model, guide, objective, *args, steps=400, lr=0.05):
    """Losses of training as in every tutorial of Pyro."""
    with drawing(0):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), objective)
        return [svi.step(*args) for _ in range(steps)]


def settled(model, data, correlated=0):
    """Train by natural gradients until nothing moves."""
    counts = as_counts(data[0])
    model.assign(torch.rand(D, L) + 0.5, torch.ones(N, L))
    objective = FactorizationELBO("lower-bound", newton=True)
    steps = [(SiteSteps(part), Constant()) for part in model.prior.parts]
    model.W.assign(torch.from_numpy(tissue(N, D, L)[-1]))
    train(model, Batches(counts), objective, steps, torch_generator(0), max_iter=40, warn=False)
    if correlated:
        model.prior.correlate(correlated)
    return model.eval()
