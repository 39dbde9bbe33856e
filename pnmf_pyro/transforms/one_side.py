"""Inference with one side fixed: factors given loadings, and loadings given factors."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.checks import (
    check_choice,
    check_counts,
    check_device,
    check_size_factors,
    check_training,
)
from pnmf_pyro.data.counts import CountsLike
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.random_state import RandomState, torch_generator
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.priors import Prior
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.fitted import Array
from pnmf_pyro.training.given_one_side import (
    check_fixed,
    least_squares_loadings,
    loadings_given_factors,
    model_near_posterior,
)
from pnmf_pyro.training.loop import progress_bar, train
from pnmf_pyro.training.schedules import OPTIMIZERS, Constant, GradientSteps
from pnmf_pyro.transforms.results import factors_from_prior, output


@isolated
def transform_F(
    X: CountsLike,
    W: ArrayLike,
    n_components: int | None = None,
    mode: str = "expanded",
    E: int = 3,
    max_iter: int = 200,
    tol: float = 1e-4,
    learning_rate: float = 0.01,
    verbose: bool = False,
    device: str = "auto",
    return_prior: bool = False,
    *,
    size_factors: ArrayLike | None = None,
    scale_pf: float = 1.0,
    random_state: RandomState = 0,
) -> Array | Prior:
    """Infer q(F) for data, given loadings.

    A few natural-gradient steps bring q near its optimum; Adam goes on from there.

    Parameters
    ----------
    X : array-like or sparse matrix of shape (n_samples, n_features)
        Counts.
    W : array-like of shape (n_features, n_components)
        Loadings, fixed.
    n_components : int, optional
        Number of components, checked against the fixed side where given.
    mode : {'simple', 'expanded', 'lower-bound'}
        Form of the ELBO.
    E : int
        Number of draws at each step.
    max_iter : int
        Largest number of steps.
    tol : float
        Relative rise of the smoothed ELBO below which to stop.
    learning_rate : float
        Learning rate of Adam.
    verbose : bool
        Whether a progress bar is shown.
    device : {'cpu', 'cuda', 'mps', 'auto'}
        Device to compute on; `auto` takes CUDA where there is one.
    return_prior : bool
        Return the prior with the fitted q rather than the factors.
    size_factors : array-like of shape (n_samples,), optional
        Positive factors on the rates of the samples; 1 unless given.
    scale_pf : float
        Standard deviation of the prior of the log-factors, `get_prior(model).scale_pf` of a fit.
    random_state : int, RandomState, Generator or None
        Seed of the draws; None for different ones at each call.

    Returns
    -------
    ndarray of shape (n_samples, n_components), or GaussianPrior
        E exp F, or the prior.
    """
    check_training(E=E, max_iter=max_iter, tol=tol, learning_rate=learning_rate, verbose=verbose)
    counts = check_counts(X).to(check_device(device))
    loadings = check_fixed(W, counts, counts.shape[1], n_components, "W", "features")
    s = check_size_factors(size_factors, counts)
    generator = torch_generator(random_state)
    model = model_near_posterior(counts, loadings, mode, E, s, scale_pf, generator)
    optimizer = OPTIMIZERS["Adam"](model.prior.parameters(), lr=learning_rate)
    steps = [(GradientSteps(optimizer), Constant())]
    train(
        model,
        Batches(counts),
        FactorizationELBO(mode, E),
        steps,
        generator,
        max_iter=max_iter,
        convergence=Convergence(tol),
        verbose=int(verbose),
    )
    find_uncertainty(model, counts)
    return model.prior if return_prior else factors_from_prior(model.prior)


@isolated
def transform_W(
    X: CountsLike,
    F: ArrayLike,
    W_init: ArrayLike | None = None,
    n_components: int | None = None,
    max_iter: int = 100,
    tol: float = 1e-4,
    verbose: bool = False,
    device: str = "auto",
    *,
    loss: str = "poisson",
    size_factors: ArrayLike | None = None,
) -> np.ndarray:
    """Find loadings for data, given factors in exp-space, by multiplicative updates.

    Parameters
    ----------
    X, n_components, verbose, device, size_factors
        As for :func:`transform_F`.
    F : array-like of shape (n_samples, n_components)
        Factors exp F, fixed.
    W_init : array-like of shape (n_features, n_components), optional
        Loadings to start from, which decide only how long it takes: the problem is convex.
    max_iter : int
        Largest number of updates.
    tol : float
        Relative change of a feature's loadings below which they are left alone.
    loss : {'poisson', 'frobenius'}
        Loss to lower: the Poisson negative log-likelihood, or the squared error, by the rules of
        Lee and Seung (2001).

    Returns
    -------
    ndarray of shape (n_features, n_components)
    """
    check_choice("loss", loss, ("poisson", "frobenius"))
    check_training(max_iter=max_iter, tol=tol, verbose=verbose)
    counts = check_counts(X).to(check_device(device))
    factors = check_fixed(F, counts, counts.shape[0], n_components, "F", "samples")
    s = check_size_factors(size_factors, counts)
    if s is not None:
        factors = factors * s[:, None]
    start = None
    if W_init is not None:
        start = check_fixed(W_init, counts, counts.shape[1], factors.shape[1], "W_init", "features")
    solve = loadings_given_factors if loss == "poisson" else least_squares_loadings
    with progress_bar(max_iter, int(verbose), "updates") as progress:
        W = solve(counts, factors, start, max_iter=max_iter, tol=tol, progress=progress)
    return np.asarray(output(W, False))
