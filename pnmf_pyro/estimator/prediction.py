"""What a fit says of new samples: their factors, their expected counts, their likelihood."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.checks import check_array
from pnmf_pyro.data.counts import Counts, CountsLike, MaybeArray
from pnmf_pyro.data.design import NO_DESIGN, Covariates, Labels
from pnmf_pyro.data.tables import check_order
from pnmf_pyro.estimator.inputs import (
    Scales,
    check_new,
    encode_places,
    keys_of,
    refuse_places,
)
from pnmf_pyro.estimator.parameters import FittedEstimator
from pnmf_pyro.models import PoissonFactors
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.training.given_one_side import factors_given_loadings, held_out_bound
from pnmf_pyro.transforms import get_factors


def new_factors(
    model: FittedEstimator,
    X: CountsLike | None,
    coordinates: MaybeArray,
    groups: MaybeArray,
    scales: Scales,
) -> np.ndarray:
    """Find factors exp F of new samples, see :meth:`PNMF.transform`."""
    spatial = model.model_.prior.places is not None
    check_order(X, coordinates=coordinates, groups=groups, **scales._asdict())
    coordinates, groups = keys_of(model).where(X, coordinates, groups, spatial)
    if not spatial:
        refuse_places(coordinates, groups)
        counts, exposure = check_new(model, X, scales)
        W, max_iter = _loadings(model, counts), max(model.max_iter, 200)
        likelihood = model.model_.observation if model.model_.has_closed_form else None
        found = factors_given_loadings(counts, W, exposure, likelihood, max_iter=max_iter)
        return typed_like(X, found.cpu().numpy())
    if scales.given:
        raise ValueError(
            f"{' and '.join(scales.given)} do not change what a spatial model predicts at new "
            "places, the factors. Leave them out; they are for score and inverse_transform."
        )
    if coordinates is None:
        raise ValueError(
            "coordinates must be given: a spatial model predicts the factors of samples from "
            "their places alone. Those of the fit's own samples are "
            "pnmf_pyro.transforms.get_factors(model)."
        )
    factors = np.asarray(get_factors(model, coordinates=coordinates, groups=groups))
    if X is not None and len(factors) != (n := np.shape(X)[0]):
        raise ValueError(
            f"coordinates must have one row for each of the {n} samples of X; got {len(factors)}."
        )
    return factors


def _loadings(model: FittedEstimator, counts: Counts) -> torch.Tensor:
    """The loadings (D, L) of the fit, with the type and device of counts."""
    return torch.from_numpy(model.components_.T.copy()).to(counts.values)


def typed_like(X: object, factors: np.ndarray) -> np.ndarray:
    """Return factors in float32 where that is the type of the counts, large as they may be."""
    single = str(getattr(X, "dtype", "")).endswith("float32")
    return factors.astype(np.float32) if single else factors


def expected_counts(
    model: FittedEstimator,
    transformed: ArrayLike,
    totals: MaybeArray,
    batches: Labels,
    covariates: Covariates,
) -> np.ndarray:
    """Return expected counts for factors, see :meth:`PNMF.inverse_transform`."""
    factors = check_array("transformed", transformed)
    if factors.ndim != 2 or factors.shape[1] != model.n_components_:
        raise ValueError(
            f"transformed must have shape (n_samples, {model.n_components_}); got {factors.shape}."
        )
    rates = factors @ model.components_
    if batches is not None or covariates is not None:
        rows = (model.design_ or NO_DESIGN).rows(batches, covariates, len(factors))
        assert model.model_.exposure.effects is not None
        rates = rates * np.exp(rows @ model.model_.exposure.effects.cpu().numpy().T)
    if totals is None:
        return rates
    n = check_array("totals", totals)
    if n.shape != (len(factors),) or not (np.isfinite(n) & (n >= 0)).all():
        raise ValueError(
            f"totals must be the total count of each of the {len(factors)} samples, finite "
            f"and not negative; got shape {n.shape} and values from {n.min(initial=0):g} to "
            f"{n.max(initial=0):g}."
        )
    seen = rates.sum(1)
    return rates * np.divide(n, seen, out=np.zeros_like(seen), where=seen > 0)[:, None]


def mean_log_likelihood(
    model: FittedEstimator,
    X: CountsLike,
    coordinates: MaybeArray,
    groups: MaybeArray,
    scales: Scales,
) -> float:
    """Return a lower bound on the log-likelihood per sample, see :meth:`PNMF.score`."""
    if not model.model_.has_closed_form:
        raise ValueError(
            "score is a bound in closed form, and the likelihood of this model has none; compare "
            "elbo_ or predictive checks instead."
        )
    prior, likelihood = model.model_.prior, model.model_.observation
    spatial = prior.places is not None
    check_order(X, coordinates=coordinates, groups=groups, **scales._asdict())
    coordinates, groups = keys_of(model).where(X, coordinates, groups, spatial)
    counts, exposure = check_new(model, X, scales)
    loadings = _loadings(model, counts)
    if not spatial:
        refuse_places(coordinates, groups)
        scale = prior.scale_pf if isinstance(prior, GaussianPrior) else 1.0
        return held_out_bound(counts, loadings, exposure, scale, likelihood) / counts.shape[0]
    with torch.no_grad():
        q = prior.at(encode_places(model, coordinates, groups, counts.shape[0])).marginal()
        predicted = PoissonFactors(q.loc, loadings, exposure, validate_args=False)
        if likelihood is not None:
            predicted = likelihood(predicted, Batch(counts))
        return float(predicted.expected_log_prob(counts, q, "lower-bound").mean())
