"""What is measured of pnmf_pyro."""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning

import pnmf_pyro
from pnmf_pyro import PNMF, transforms
from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import Counts, as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.estimator.recipe import RECIPE
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.loop import evaluate_elbo, train
from pnmf_pyro.training.schedules import Constant

NATURAL = {"mode": "lower-bound", "training_mode": "natural", "loadings_mode": "multiplicative"}
SETTINGS: dict[str, dict[str, Any]] = {
    "expanded, E=3": {"mode": "expanded", "E": 3},
    "lower-bound": {"mode": "lower-bound"},
    "natural + multiplicative": NATURAL,
}


def quietly(call: Any) -> Any:
    """Call without warnings of fits that are stopped on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message=".*no counts at all")
        return call()


def iterations(X: sp.csr_matrix, L: int, n_iter: int, **settings: Any) -> None:
    """Run full-data steps of one setting."""
    model = PNMF(L, max_iter=n_iter, tol=0, random_state=0, **settings)
    quietly(lambda: model.fit(X))


def step_seconds(X: sp.csr_matrix, L: int, n_iter: int, **settings: Any) -> list[float]:
    """Return the seconds of full-data steps of one setting, without the first, which allocate.

    Where there are many they are timed ten at a time, for what a callback takes itself.
    """
    times: list[float] = []
    every = 1 if n_iter < 100 else 10
    model = PNMF(L, max_iter=every + n_iter, tol=0, random_state=0, **settings)
    note = lambda *_: times.append(time.perf_counter())  # noqa: E731 - a callback of three arguments
    quietly(lambda: model.fit(X, callback=note, callback_interval=every))
    return (np.diff(times) / every).tolist()


def fit(X: Any, L: int) -> PNMF:
    """Run `pnmf_pyro.fit` as it comes."""
    return quietly(lambda: pnmf_pyro.fit(X, n_components=L))


def expanded_elbo(model: PNMF, X: Any, draws: int = 50) -> float:
    """The ELBO of a fit in `expanded` mode, from many draws: one function for every fit."""
    objective = FactorizationELBO("expanded", draws)
    return evaluate_elbo(model.model_, Batches(as_counts(X)), objective, torch_generator(0))


def deviance(model: PNMF, counts: Counts) -> float:
    """Mean Poisson deviance of the counts from the fitted means."""
    factors = torch.as_tensor(transforms.get_factors(model)).to(counts.values)
    return pnmf_pyro.deviance(counts, (factors, model.components_.T))


def recovery(model: PNMF, log_factors: np.ndarray) -> list[float]:
    """Correlations of fitted log-factors with the true ones (N, L), matched one to one, rising."""
    return correlations(np.asarray(transforms.log_factors(model)), log_factors)


def correlations(found: np.ndarray, log_factors: np.ndarray) -> list[float]:
    """Correlations of log-factors (N, L) with the true ones, matched one to one, rising."""
    L = log_factors.shape[1]
    correlation = np.corrcoef(found.T, log_factors.T)[:L, L:]
    correlation = np.nan_to_num(correlation)  # of a component that is the same everywhere
    return np.sort(correlation[linear_sum_assignment(-correlation)]).tolist()


def log_factors_given(
    X: sp.csr_matrix, coordinates: np.ndarray, loadings: np.ndarray, lengthscales: Any, K: int
) -> np.ndarray:
    """Means of log-factors (N, L) given loadings (D, L) and Matern-3/2 kernels of height 1."""
    (N, D), L, counts = X.shape, len(lengthscales), as_counts(X)
    kernel = SpatialKernel("Matern32", n_sets=L)
    kernel.lengthscale.copy_(torch.as_tensor(lengthscales))
    places = Places(torch.from_numpy(coordinates))
    prior = LCGP(kernel, places, L, K=K, use_natural_gradients=True)
    y = torch.empty((D, N), device="meta")
    model = PoissonFactorization(prior, y, L, "multiplicative", "lower-bound")
    model.assign(torch.from_numpy(loadings), torch.ones(N, L))
    model.W.freeze()
    train(
        model,
        Batches(counts),
        FactorizationELBO("lower-bound", newton=True),
        [(SiteSteps(prior), Constant())],
        torch_generator(0),
        convergence=Convergence(1e-5, window=5, patience=1),
        monotone=True,
    )
    return prior.marginal().loc.detach().numpy().T


class Reached(Exception):
    """The fit has got where it was to get."""


class Watch:
    """A callback that stops the clock while it looks, and the fit when a target is reached."""

    def __init__(self, look: Any, reached: Any):
        self.look, self.is_reached = look, reached
        self.started = time.perf_counter()
        self.looking = 0.0
        self.best = np.nan
        self.seconds: float | None = None
        self.total_seconds = np.nan
        self.n_iter = 0

    def __call__(self, model: PNMF, iteration: int, elbo: float) -> None:
        """Look at the model after a step."""
        now = time.perf_counter()
        value = self.look(model)
        self.best = value
        if self.is_reached(value):
            self.seconds, self.n_iter = now - self.started - self.looking, iteration
            raise Reached
        self.looking += time.perf_counter() - now


def fit_until(X: Any, L: int, look: Any, reached: Any, every: int = 1, **settings: Any) -> Watch:
    """Run `pnmf_pyro.fit` until a function of the model has reached a target, or to its end."""
    parameters = {**RECIPE, "n_components": L, **settings}
    watch = Watch(look, reached)
    model = PNMF(**parameters)
    with contextlib.suppress(Reached):
        quietly(lambda: model.fit(X, callback=watch, callback_interval=every))
    watch.total_seconds = time.perf_counter() - watch.started - watch.looking
    return watch
