"""Factors, their uncertainty and loadings of a fitted model."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pnmf_pyro.data.checks import (
    check_choice,
    check_count,
)
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.places import Places, check_coordinates
from pnmf_pyro.data.random_state import RandomState, drawing_from, torch_generator
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.loading_errors import LoadingErrors
from pnmf_pyro.priors import Prior
from pnmf_pyro.priors.base import Field
from pnmf_pyro.priors.joint import posterior_at, posterior_of
from pnmf_pyro.training.fitted import Array, Fitted, by_samples, fitted_module, marginals


@isolated
def log_factors(
    model: Fitted,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    return_tensor: bool = False,
    *,
    posterior: str = "joint",
) -> Array:
    """Return the log-factors: the mean of the posterior of F.

    Parameters
    ----------
    model : PNMF, ModelFit or PoissonFactorization
        Fitted estimator, result of :func:`~pnmf_pyro.fit_model`, or a model trained in any way.
    coordinates, groups : array-like, optional
        Other places than those of the fit, for spatial models.
    return_tensor : bool
        Return a tensor rather than an array.
    posterior : {'joint', 'factorised'}
        `joint` takes the components of a sample together, so that what one gains others lose, see
        :mod:`pnmf_pyro.priors.joint`; `factorised` is q(F) = N(mu, sigma^2), which is too narrow
        where components share features. E exp F is the same in both. A fit of Poisson counts has
        the joint one at its samples; at other places, and where there is none, it is q(F).

    Returns
    -------
    ndarray or Tensor of shape (n_samples, n_components)

    Examples
    --------
    >>> import numpy as np
    >>> from pnmf_pyro import PNMF
    >>> from pnmf_pyro.transforms import log_factors
    >>> X = np.random.default_rng(0).poisson(5, size=(30, 20))
    >>> model = PNMF(n_components=5, tol=0.1, random_state=0).fit(X)
    >>> log_factors(model).shape
    (30, 5)
    """
    return _means(_field(model, coordinates, groups, posterior), return_tensor)


@isolated
def factor_uncertainty(
    model: Fitted,
    return_variance: bool = False,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    return_tensor: bool = False,
    *,
    posterior: str = "joint",
) -> Array:
    """Return the uncertainty of the log-factors: standard deviations of F, or variances.

    A central interval is :func:`log_factors` plus and minus a normal quantile of these.

    Parameters
    ----------
    return_variance : bool
        Return variances rather than standard deviations.
    model, coordinates, groups, return_tensor, posterior
        As for :func:`log_factors`, whose shape the result has.
    """
    field = _field(model, coordinates, groups, posterior)
    return _spreads(field, return_variance, return_tensor)


@isolated
def get_factors(
    model: Fitted,
    use_mgf: bool = True,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    return_tensor: bool = False,
    *,
    posterior: str = "joint",
) -> Array:
    """Return the factors E exp F = exp(mu + sigma^2 / 2), or exp(mu).

    Parameters
    ----------
    use_mgf : bool
        Return the expectation; if false, exp(mu).
    model, coordinates, groups, return_tensor, posterior
        As for :func:`log_factors`, whose shape the result has.
    """
    field = _field(model, coordinates, groups, posterior)
    return _factors(field, use_mgf, return_tensor)


@isolated
def factor_samples(
    model: Fitted,
    n_samples: int = 100,
    return_exp: bool = False,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    return_tensor: bool = False,
    *,
    posterior: str = "joint",
    random_state: RandomState = None,
) -> Array:
    """Draw log-factors from their posterior.

    Parameters
    ----------
    n_samples : int
        Number of draws.
    return_exp : bool
        Return exp F rather than F.
    random_state : int, RandomState, Generator or None
        Seed of the draws; None for different ones at each call.
    model, coordinates, groups, return_tensor, posterior
        As for :func:`log_factors`.

    Returns
    -------
    ndarray or Tensor of shape (n_samples, n_data_samples, n_components)
    """
    check_count("n_samples", n_samples)
    module, field = fitted_module(model), _field(model, coordinates, groups, posterior)
    with torch.no_grad(), drawing_from(torch_generator(random_state), module.W.device):
        draws = field.draws(n_samples)
        drawn = (lambda index: draws(index).exp()) if return_exp else draws
        return by_samples(field, drawn, return_tensor, (n_samples,))


def get_loadings(model: Fitted, return_tensor: bool = False) -> Array:
    """Return the loadings W, non-negative, of shape (n_features, n_components).

    Parameters
    ----------
    model, return_tensor
        As for :func:`log_factors`; a PoissonFactorization need not be trained.
    """
    return output(fitted_module(model).W.data, return_tensor)


def loading_uncertainty(
    model: Fitted, return_log: bool = False, return_tensor: bool = False
) -> Array:
    """Return standard errors of the loadings W, or of log W, (n_features, n_components).

    They count what the factors are not sure of, see :mod:`pnmf_pyro.models.loading_errors`. The
    level of a component, which its loadings and its factors share, is part of them.

    Parameters
    ----------
    model : PNMF, ModelFit or PoissonFactorization
        Fit of Poisson counts.
    return_log : bool
        Return the standard errors of log W, those of W divided by W.
    return_tensor : bool
        Return a tensor rather than an array.

    Raises
    ------
    ValueError
        For a model that holds no standard errors: of another likelihood, trained by other means
        than `fit` and `fit_model`, or saved by an earlier version.
    """
    module = fitted_module(model)
    covariance = errors_of_loadings(module).covariances(module.W.data)
    error = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    error = error / module.W.data if return_log else error
    return output(error.to(module.W.dtype), return_tensor)


def errors_of_loadings(module: PoissonFactorization) -> LoadingErrors:
    """Return what a trained model knows of the errors of its loadings; a ValueError if nothing."""
    if module.loading_blocks is None or module.loading_coupling is None:
        raise ValueError(
            "model must hold standard errors of its loadings, which a fit of Poisson counts by "
            "pnmf_pyro.fit, PNMF or fit_model leaves behind; this one holds none. Fit it again."
        )
    return LoadingErrors(module.loading_blocks, module.loading_coupling)


def get_prior(model: Fitted) -> Prior:
    """Return the prior, which holds the variational distribution.

    It is a :class:`GaussianPrior` for non-spatial models; calling it gives q(F) and p(F). The model
    is as for :func:`log_factors`.
    """
    return fitted_module(model).prior


@isolated
def log_factors_from_prior(prior: Prior, return_tensor: bool = False) -> Array:
    """Return the mean of the posterior of F that a prior holds, see :func:`log_factors`."""
    return _means(posterior_of(check_prior(prior)), return_tensor)


@isolated
def factors_from_prior(prior: Prior, use_mgf: bool = True, return_tensor: bool = False) -> Array:
    """Return the factors of the posterior that a prior holds, see :func:`get_factors`."""
    return _factors(posterior_of(check_prior(prior)), use_mgf, return_tensor)


@isolated
def uncertainty_from_prior(
    prior: Prior, return_variance: bool = False, return_tensor: bool = False
) -> Array:
    """Return the uncertainty of the F that a prior holds, see :func:`factor_uncertainty`."""
    return _spreads(posterior_of(check_prior(prior)), return_variance, return_tensor)


def _field(
    model: Fitted, coordinates: ArrayLike | None, groups: ArrayLike | None, posterior: str
) -> Field:
    """The posterior of F of a fitted model, at its samples or at the places that are given."""
    check_choice("posterior", posterior, ("joint", "factorised"))
    prior = fitted_module(model).prior
    if coordinates is None and groups is None:
        return posterior_of(prior) if posterior == "joint" else prior
    if coordinates is None:
        raise ValueError("coordinates must be given beside groups; got None.")
    encode = getattr(model, "encode_places", None)  # of an estimator, which names its groups
    if encode is not None:
        places = encode(coordinates, groups)
    else:
        codes = None if groups is None else torch.as_tensor(groups, dtype=torch.int64)
        places = Places(check_coordinates(coordinates, None), codes)
    return posterior_at(prior, places) if posterior == "joint" else prior.at(places)


def check_prior(prior: object) -> Prior:
    """Return `prior` if it is one; raise a ValueError otherwise."""
    if not isinstance(prior, Prior):
        raise ValueError(
            f"prior must be a Prior such as a GaussianPrior; got {type(prior).__name__}. "
            "For that of a fitted model use get_prior(model)."
        )
    return prior


def _means(field: Field, return_tensor: bool) -> Array:
    return marginals(field, lambda q: q.loc, return_tensor)


def _factors(field: Field, use_mgf: bool, return_tensor: bool) -> Array:
    half = 0.5 if use_mgf else 0.0
    return marginals(field, lambda q: (q.loc + half * q.variance).exp(), return_tensor)


def _spreads(field: Field, variance: bool, return_tensor: bool) -> Array:
    return marginals(field, lambda q: q.variance if variance else q.scale, return_tensor)


def output(values: Tensor, return_tensor: bool) -> Array:
    """Return a copy of values, as an array unless a tensor is asked for."""
    # A copy: training moves the parameters in place, and a caller may write into what it got.
    values = values.detach().clone(memory_format=torch.contiguous_format)
    return values if return_tensor else values.cpu().numpy()
