"""How well samples are predicted without themselves, against the lengthscale of a fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.data.checks import check_array
from pnmf_pyro.data.counts import CountsLike
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.places import extent, spacing
from pnmf_pyro.data.random_state import check_random_state
from pnmf_pyro.estimator.inputs import keys_of
from pnmf_pyro.estimator.results import counts_of_fit
from pnmf_pyro.training.fitted import Fitted, fitted_module
from pnmf_pyro.training.hyperparameters import CRITERIA, HyperparameterSearch

# Lengthscales that are tried without being asked for.
PROFILED = 25


@dataclass(frozen=True)
class LengthscaleProfile:
    """A criterion at several lengthscales, those of all components moved by one factor.

    Attributes
    ----------
    lengthscales : ndarray of shape (n,)
        Geometric means of the components' lengthscales that were tried, in the unit of the
        coordinates.
    loss : ndarray of shape (n,)
        Criterion of the fit there, in nats per sample; low is good.
    learned : ndarray of shape (n_components,) or (1,)
        Lengthscales of the fit, one that all components share or one for each.
    """

    lengthscales: np.ndarray
    loss: np.ndarray
    learned: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        """Unpack into lengthscales and loss."""
        return iter((self.lengthscales, self.loss))


@isolated
def lengthscale_profile(
    fit: Fitted, X: CountsLike, lengthscales: ArrayLike | None = None
) -> LengthscaleProfile:
    """Predict samples without themselves, with all lengthscales longer or shorter by one factor.

    All else is as in the fit: this is the function that the search of a fit goes down.

    Parameters
    ----------
    fit : PNMF, ModelFit or PoissonFactorization
        Spatial fit. Its `criterion` judges predictions, leave-one-out unless it has one.
    X : array-like or sparse matrix of shape (n_samples, n_features)
        Counts of the fit.
    lengthscales : array-like of shape (n,), optional
        Geometric means of the components' lengthscales to try, in the unit of the coordinates;
        from half their spacing to their extent or the longest learned unless given.

    Returns
    -------
    LengthscaleProfile
        It unpacks into lengthscales and loss.

    Raises
    ------
    ValueError
        For a model that is not spatial, and for X or lengthscales that do not fit.
    """
    module = fitted_module(fit, "fit")
    prior = next(iter(module.prior.fields), None)
    if prior is None or prior.places is None:
        raise ValueError("fit must be spatial to have lengthscales; this one knows no space.")
    counts = counts_of_fit(keys_of(fit).counts(X), (module.N, module.D))
    learned = prior.kernel.lengthscale.detach().cpu().numpy()
    if lengthscales is None:
        longest = max(extent(prior.places), learned.max())
        tried = np.geomspace(spacing(prior.places) / 2, longest, PROFILED)
    else:
        tried = _checked(lengthscales)
    search = HyperparameterSearch(
        module,
        counts.to(module.W.device).to(module.W.dtype),
        (),
        getattr(fit, "criterion", CRITERIA[0]),
        check_random_state(getattr(fit, "random_state", 0)),
    )
    return LengthscaleProfile(tried, search.profile(module, tried), learned)


def _checked(lengthscales: ArrayLike) -> np.ndarray:
    tried = np.atleast_1d(check_array("lengthscales", lengthscales).astype(np.float64))
    if tried.ndim != 1 or not (np.isfinite(tried) & (tried > 0)).all():
        raise ValueError(f"lengthscales must be positive finite numbers; got {lengthscales!r}.")
    return tried
