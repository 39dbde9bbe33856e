"""Training of a model of one's own: any subclass of the Poisson factorisation, with any prior."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pyro import poutine

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.checks import check_counts, check_training
from pnmf_pyro.data.counts import Counts, CountsLike
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.random_state import (
    RandomState,
    check_random_state,
    drawing_from,
    torch_generator,
)
from pnmf_pyro.initialization import start_values
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.training.effects import effect_steps
from pnmf_pyro.training.loop import TrainingResult, final_elbo, train
from pnmf_pyro.training.schedules import Constant, GradientSteps, OneCycle

# Draws for the value of the ELBO at the end, whose noise then hardly matters.
FINAL_DRAWS = 50


@dataclass
class ModelFit(TrainingResult):
    """What the training of a model did.

    Attributes
    ----------
    elbo, elbo_se : float
        ELBO of the trained model in nats, constants included, and its standard error over 50 draws.
    model : PoissonFactorization
        The trained model.
    """

    elbo: float = field(kw_only=True)
    elbo_se: float = field(kw_only=True)
    model: PoissonFactorization = field(kw_only=True, repr=False)


@isolated
def fit_model(
    model: PoissonFactorization,
    X: CountsLike,
    *,
    max_iter: int = 1000,
    learning_rate: float = 0.2,
    n_draws: int = 3,
    batch_size: int | None = None,
    init: str | None = None,
    random_state: RandomState = 0,
    verbose: bool = False,
) -> ModelFit:
    """Train a model, its guide and its prior by Adam.

    The steps of :func:`pnmf_pyro.fit` are those of one model, the Poisson factorisation. These need
    nothing but a `model` and a `guide`, so they are for what has been changed: another likelihood,
    a covariate, another prior. Every parameter of the module is learned, and every parameter of a
    `pyro.param` statement in its programs; buffers, such as the hyperparameters of kernels, stay.
    The ELBO is taken in closed form where it has one, see
    :class:`~pnmf_pyro.models.elbo.FactorizationELBO`.

    Parameters
    ----------
    model : PoissonFactorization
        Trained in place; where its loadings and factors stood before plays no part. A change that
        explains what a decomposition of X would put into the factors starts better at random.
    X : array-like, Tensor, DataFrame, sparse matrix or AnnData of shape (n_samples, n_features)
        Counts; of an AnnData object its X.
    max_iter : int
        Number of steps. The learning rate rises in the first three tenths and falls to nothing at
        the end (one cycle).
    learning_rate : float
        The highest.
    n_draws : int
        Monte Carlo draws at each step.
    batch_size : int, optional
        Samples in a minibatch; all unless given.
    init : str, optional
        Where to start, see :func:`~pnmf_pyro.initialization.initialize_factors`.
    random_state : int, RandomState or None
    verbose : bool
        Show a progress bar with the ELBO.

    Returns
    -------
    ModelFit

    Raises
    ------
    ValueError
        If X is not of the size that the model was made for, or its loadings or q(F) have no
        gradient steps.

    Warns
    -----
    ConvergenceWarning
        If the ELBO still rose at the end, or ceased to be finite.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from pnmf_pyro import fit_model
    >>> from pnmf_pyro.models import PoissonFactorization
    >>> from pnmf_pyro.priors import GaussianPrior
    >>> X = np.random.default_rng(0).poisson(5, size=(30, 20)).astype("float32")
    >>> y = torch.from_numpy(X.T)
    >>> model = PoissonFactorization(GaussianPrior(y, L=2), y, L=2)
    >>> result = fit_model(model, X, max_iter=200)
    >>> result.elbo > result.history[0]
    True
    """
    check_training(max_iter=max_iter, tol=0.0, learning_rate=learning_rate)
    objective = FactorizationELBO(model.mode, n_draws)
    counts = _check_fits(check_counts(X), model).to(model.W.dtype).to(model.W.device)
    random = check_random_state(random_state)
    model.assign(*start_values(counts, model.L, init, random, model.size_factors))
    _run_once(model, next(Batches(counts, batch_size).one_pass()))
    generator = torch_generator(random)
    adam = torch.optim.Adam(model.trained_parameters(), lr=learning_rate)
    trained = train(
        model,
        Batches(counts, batch_size, shuffle=batch_size is not None, generator=generator),
        objective,
        [(GradientSteps(adam), OneCycle()), *((one, Constant()) for one in effect_steps(model))],
        generator,
        max_iter=max_iter,
        verbose=int(verbose),
    )
    batches = Batches(counts, batch_size)
    elbo, error = final_elbo(model, batches, model.mode, FINAL_DRAWS, generator)
    find_uncertainty(model, counts)
    done = trained.history, trained.converged, trained.failure
    return ModelFit(*done, elbo=elbo, elbo_se=error, model=model)


def _run_once(model: PoissonFactorization, batch: Batch) -> None:
    """Run guide and model, so that their `pyro.param` statements have made their parameters."""
    with model.apart(), torch.no_grad(), drawing_from(torch_generator(0), model.W.device):
        trace = poutine.trace(model.guide).get_trace(batch)
        poutine.replay(model.model, trace=trace)(batch)


def _check_fits(counts: Counts, model: PoissonFactorization) -> Counts:
    if model.loadings_mode == "multiplicative":
        raise ValueError(
            "loadings_mode='multiplicative' has closed-form steps of the Poisson factorisation "
            "alone; make the model with 'softplus', 'exp' or 'projected'."
        )
    if model.prior.natural:
        raise ValueError(
            "the prior holds q(F) for natural-gradient steps, and fit_model trains by gradients; "
            "make it with use_natural_gradients=False."
        )
    if counts.shape != (model.N, model.D):
        raise ValueError(
            f"X must have the shape that the model was made for, ({model.N}, {model.D}) samples by "
            f"features; got {counts.shape}. The model takes y = X^T."
        )
    return counts
