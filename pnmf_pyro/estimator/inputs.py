"""What a fit and a prediction take, checked once at the door."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import scipy.sparse as sp
import torch
from sklearn.utils.validation import validate_data

from pnmf_pyro.data.checks import (
    check_counts,
    check_device,
    check_size_factors,
    warn,
    warn_empty,
)
from pnmf_pyro.data.counts import Counts, CountsLike, MaybeArray, as_counts
from pnmf_pyro.data.places import (
    GroupCodes,
    Places,
    check_coordinates,
    check_extent,
    warn_lengthscale,
)
from pnmf_pyro.data.sparse_structure import checked_csr
from pnmf_pyro.estimator.parameters import HYPERPARAMETERS, FittedEstimator, Settings
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.priors import Prior


@dataclass
class Data:
    """Data of a fit, checked: counts (N, D), size factors (N,), places (N,) and names of groups."""

    counts: Counts
    size_factors: torch.Tensor | None
    places: Places | None = None
    groups: GroupCodes | None = None


def check_places(
    settings: Settings, coordinates: MaybeArray, groups: MaybeArray, n_samples: int
) -> tuple[Places | None, GroupCodes | None]:
    """Check where the samples of a fit are; places that cannot be used are a ValueError."""
    if not settings.spatial:
        refuse_places(coordinates, groups)
        return None, _codes_of(settings.prior)
    if groups is not None and not settings.multigroup:
        raise ValueError(
            "groups are used by models with multigroup=True, and multigroup=False. Set it, or "
            "leave groups out to treat all samples as one group."
        )
    codes = GroupCodes.of(groups, n_samples) if settings.multigroup else None
    places = Places(
        check_coordinates(coordinates, n_samples),
        None if codes is None else codes.encode(groups, n_samples),
    )
    check_extent(places)
    if "lengthscale" not in learned(settings):
        for lengthscale in _lengthscales(settings):
            warn_lengthscale(lengthscale, places)
    if settings.local and n_samples - 1 < settings.K:
        warn(
            f"K={settings.K} neighbours were asked for, and a sample has only {n_samples - 1} "
            f"others; K={n_samples - 1} is used. All of them make an exact Gaussian process."
        )
    return places, codes


def _codes_of(prior: Prior | None) -> GroupCodes | None:
    """Groups of a prior that was passed as an object: its codes are their names."""
    if prior is None or prior.places is None or prior.places.groups is None:
        return None
    return GroupCodes(range(int(prior.places.groups.max()) + 1))


def _lengthscales(settings: Settings) -> list[float]:
    """The lengthscales that fields begin with: those of the kernel, if that is an object."""
    if isinstance(settings.kernel, SpatialKernel):
        return settings.kernel.lengthscale.unique().tolist()
    return [settings.lengthscale]


def refuse_places(coordinates: MaybeArray, groups: MaybeArray) -> None:
    """Raise a ValueError where places are given to a model that is not spatial."""
    if coordinates is not None or groups is not None:
        raise ValueError(
            "coordinates and groups are used by spatial models only, and spatial=False. "
            "Leave them out, or set spatial=True."
        )


def learned(settings: Settings) -> list[str]:
    """Return the names of the kernel's hyperparameters that are to be learned."""
    kernel = getattr(settings.prior, "kernel", None)
    named = {*settings.learn, *(["lengthscale"] if settings.train_lengthscale else [])}
    there = list(HYPERPARAMETERS) if settings.spatial else []
    if isinstance(kernel, SpatialKernel):
        there = list(kernel.hyperparameters)
    elif not settings.multigroup:
        named -= {"group_diff_param"}
    return [name for name in there if name in named]


def check_table(settings: Settings, X: CountsLike, reset: bool) -> Counts:
    """Check counts of samples, and put them on the device of the fit.

    The estimator takes note of the features of a fit (`reset`); other samples must have them.
    """
    if isinstance(X, torch.Tensor):
        X = as_counts(X.detach()).numpy()
    with warnings.catch_warnings():
        if sp.issparse(X):  # which cannot hold names, to be compared with those of the fit
            warnings.filterwarnings("ignore", "X does not have valid feature names")
            X = checked_csr(X)
        X = validate_data(settings, X, reset=reset, accept_sparse="csr", dtype="numeric")
    counts = check_counts(X)
    if reset:
        warn_empty(counts, getattr(settings, "feature_names_in_", None))
    if reset and settings.n_components > max(counts.shape):
        raise ValueError(
            f"n_components={settings.n_components} is larger than both n_samples="
            f"{counts.shape[0]} and n_features={counts.shape[1]}. Use fewer components."
        )
    return counts.to(check_device(settings.device))


def check_new(
    model: FittedEstimator, X: CountsLike, size_factors: MaybeArray
) -> tuple[Counts, torch.Tensor, torch.Tensor | None]:
    """Check new samples; return counts, the loadings (D, L) of the fit, and size factors."""
    counts = check_table(model, X, reset=False)
    loadings = torch.from_numpy(model.components_.T.copy()).to(counts.values)
    return counts, loadings, check_size_factors(size_factors, counts.shape[0], counts)


def encode_places(
    model: FittedEstimator, coordinates: MaybeArray, groups: MaybeArray, n_samples: int
) -> Places:
    """Check new places against those of the fit, and give their groups the codes of it.

    A model that is not spatial, and places that do not fit it, are a ValueError.
    """
    known = model.model_.prior.places
    if known is None:
        refuse_places(coordinates, groups)
        raise ValueError("coordinates are for spatial models; this model is not spatial.")
    if model.groups_ is None and groups is not None:
        raise ValueError("groups are for models with multigroup=True; leave them out.")
    coordinates = check_coordinates(coordinates, n_samples, known.coordinates.shape[1])
    codes = None if model.groups_ is None else GroupCodes(model.groups_).encode(groups, n_samples)
    return Places(coordinates, codes)
