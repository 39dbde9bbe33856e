"""What a fit and a prediction take, checked once at the door."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import validate_data

from pnmf_pyro.data.checks import (
    check_array,
    check_counts,
    check_device,
    check_size_factors,
    mean_total,
    some_of,
    warn,
    warn_empty,
    warn_not_whole,
)
from pnmf_pyro.data.counts import Counts, CountsLike, MaybeArray, SparseCounts, as_counts
from pnmf_pyro.data.design import NO_DESIGN, Covariates, Design, Labels, as_design, from_obs
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.masks import Mask, hide
from pnmf_pyro.data.places import (
    GroupCodes,
    Places,
    check_coordinates,
    check_extent,
    warn_lengthscale,
    warn_units,
)
from pnmf_pyro.data.sparse_structure import checked_csr
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.data.tables import check_order, is_anndata, number_stored, plain_table
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.parameters import FittedEstimator, Settings, learned
from pnmf_pyro.estimator.size import Size, check_memory
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.priors import Prior


class Scales(NamedTuple):
    """What users say of the scales of rates: the parameters of these names of `pnmf_pyro.fit`."""

    size_factors: ArrayLike | None = None
    mask: Mask = None
    batches: Labels = None
    covariates: Covariates = None

    @property
    def given(self) -> list[str]:
        """Names of those that are given."""
        return [name for name, value in self._asdict().items() if value is not None]


NO_SCALES = Scales()


@dataclass
class Data:
    """Data of a fit, checked: counts (N, D), size factors (N,), places (N,) and names of groups.

    `hidden` is stored where an entry is hidden; counts are 0 there. Where size factors are total
    counts, `mean_total` is what these were divided by. `design` says what the columns of `rows`,
    (N, P), are: batches and covariates.
    """

    counts: Counts
    size_factors: torch.Tensor | None
    hidden: SparseCounts | None = None
    places: Places | None = None
    groups: GroupCodes | None = None
    mean_total: float | None = None
    design: Design | None = None
    rows: np.ndarray | None = None

    def exposure(self) -> Exposure:
        """Return what scales the rates, with effects that are still to be learned."""
        return exposure_of(self.size_factors, self.hidden, self.design, self.rows, self.counts)


def exposure_of(
    size_factors: torch.Tensor | None,
    hidden: SparseCounts | None,
    design: Design | None,
    rows: np.ndarray | None,
    counts: Counts,
    effects: torch.Tensor | None = None,
) -> Exposure:
    """Return an exposure of samples of a design (n, P); effects are learned unless given."""
    if design is None or rows is None:
        return Exposure(size_factors, hidden=hidden)
    learned = effects is None
    if effects is None:
        effects = counts.values.new_zeros(counts.shape[1], design.P)
    distinct, codes = (part.to(counts.device) for part in as_design(rows))
    B = len(design.batches)
    return Exposure(size_factors, distinct.to(effects), codes, effects, hidden, B, learned)


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
    if codes is not None:
        warn_units(places, codes.names)
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
    kernels = (getattr(part, "kernel", None) for part in prior.fields)
    for kernel in kernels:
        if isinstance(kernel, SpatialKernel) and len(kernel.sizes_of_groups) == 2:
            return GroupCodes(list(product(*map(range, kernel.sizes_of_groups))))
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


def read_data(
    settings: Settings,
    X: CountsLike,
    coordinates: MaybeArray,
    groups: MaybeArray,
    scales: Scales = NO_SCALES,
    *,
    limited: bool = True,
) -> Data:
    """Check what a fit is given; the estimator takes note of the features.

    Of an AnnData object the counts are its X, and the coordinates of a spatial fit obsm["spatial"].
    What there is no memory for is a ValueError, if `limited`, before anything is allocated.
    """
    if isinstance(X, StoredCounts):
        return _of_store(settings, X, scales.size_factors)
    check_order(X, coordinates=coordinates, groups=groups, **scales._asdict())
    names = feature_names(X)
    size_factors, mask, batches, covariates = scales
    batches, covariates = from_obs(X, batches, covariates)
    X, coordinates, groups = AnnDataKeys().take_apart(X, coordinates, groups, settings.spatial)
    X, hidden = hide(X, mask)
    X = plain_table(X)
    _check_size(settings, X, limited)
    counts = check_table(settings, X, names, reset=True)
    if hidden is not None:
        hidden = hidden.to(counts.device)
    s = check_size_factors(size_factors, counts)
    total = None if not isinstance(size_factors, str) else mean_total(counts)
    places = check_places(settings, coordinates, groups, n := counts.shape[0])
    design, rows = Design.of(batches, covariates, n) or (None, None)
    return Data(counts, s, hidden, *places, total, design, rows)


def _of_store(settings: Any, counts: StoredCounts, size_factors: ArrayLike | None) -> Data:
    """Counts in a store, whose entries its first pass has checked, without space or effects."""
    _check_size(settings, counts, limited=False)
    warn_not_whole(counts)
    warn_empty(counts)
    settings.n_features_in_ = counts.shape[1]
    total = mean_total(counts) if isinstance(size_factors, str) else None
    if counts.ranks.size > 1 and size_factors is not None and total is None:
        size_factors = check_array("size_factors", size_factors)[counts.ranks.rows]
    return Data(counts, check_size_factors(size_factors, counts), mean_total=total)


def feature_names(X: object) -> np.ndarray | None:
    """Return the names of features of an AnnData object; those of others scikit-learn sees."""
    return np.asarray(X.var_names, dtype=object) if is_anndata(X) else None


def check_table(settings: Settings, X: CountsLike, names: np.ndarray | None, reset: bool) -> Counts:
    """Check counts of samples, and put them on the device of the fit.

    The estimator takes note of the features of a fit (`reset`); other samples must have them.
    """
    X = plain_table(X)
    columns = getattr(X, "columns", None)
    if columns is not None and 0 in X.shape:
        raise ValueError(f"X must have a sample and a feature at least; got a table of {X.shape}.")
    if not getattr(columns, "is_unique", True):
        raise ValueError("X has columns of one name. Name each feature once, or pass an array.")
    if isinstance(X, torch.Tensor):
        X = as_counts(X).numpy()
    with warnings.catch_warnings():
        if names is not None or sp.issparse(X):  # which cannot hold names, to be compared
            warnings.filterwarnings("ignore", "X does not have valid feature names")
        if sp.issparse(X):
            X = checked_csr(X)
        try:
            X = validate_data(settings, X, reset=reset, accept_sparse="csr", dtype="numeric")
        except (TypeError, ValueError) as error:
            if "contains NaN" in str(error):
                raise ValueError(
                    "X must be finite, and contains NaN. Say with mask= which entries are observed "
                    "(True) and which are hidden (False), or remove their samples or features."
                ) from error
            if not re.search("could not convert|'complex'|bytes/strings", str(error)):
                raise
            raise ValueError(f"X must hold numbers: {error}. Drop columns of text.") from error
    if names is not None:
        _note_names(settings, names, reset)
    counts = check_counts(X)
    if reset:
        warn_empty(counts, getattr(settings, "feature_names_in_", None))
    return counts.to(check_device(settings.device))


def _check_size(settings: Settings, X: Any, limited: bool) -> None:
    """Raise a ValueError for a fit that is too large for its data, or for the memory there is."""
    N, D = X.ranks.whole(X.shape) if isinstance(X, Counts) else X.shape
    if settings.n_components > max(N, D) > 0:
        raise ValueError(
            f"n_components={settings.n_components} is larger than both n_samples={N} and "
            f"n_features={D}. Use fewer components."
        )
    if limited:
        check_memory(Size.of(settings, (N, D), number_stored(X)))


def _note_names(settings: Any, names: np.ndarray, reset: bool) -> None:
    """Keep the names of the features of a fit, or compare those of other samples with them."""
    if reset:
        settings.feature_names_in_ = names
        return
    known = getattr(settings, "feature_names_in_", names)
    if list(names) != list(known):
        other = [name for name in names if name not in set(known)]
        what = f"{some_of(other)} are not among them" if other else "their order differs"
        raise ValueError(
            f"The feature names of X must be those of the fit, in the same order; {what}. Select "
            "them by name: X[:, model.feature_names_in_]."
        )


def check_new(model: FittedEstimator, X: CountsLike, scales: Scales) -> tuple[Counts, Exposure]:
    """Check new samples of a model, and what scales their rates.

    Those of an AnnData object are read as the fit read its own.
    """
    names, design = feature_names(X), model.design_
    batches, covariates = from_obs(X, scales.batches, scales.covariates, design)
    X, hidden = hide(keys_of(model).counts(X), scales.mask)
    counts = check_table(model, X, names, reset=False)
    if hidden is not None:
        hidden = hidden.to(counts.device)
    s, n = _size_factors_of(model, scales.size_factors, counts), counts.shape[0]
    rows = (design or NO_DESIGN).rows(batches, covariates, n)
    effects = model.model_.exposure.effects
    return counts, exposure_of(s, hidden, design, rows, counts, effects)


def _size_factors_of(
    model: FittedEstimator, size_factors: ArrayLike | None, counts: Counts
) -> torch.Tensor | None:
    """Check size factors of new samples: total counts, unless given, where the fit had these."""
    if size_factors is None and model.model_.size_factors is not None:
        if model.mean_total_ is None:
            raise ValueError(
                "size_factors must be given: the model was fitted with some. Pass those of these "
                "samples, on the same scale; got None."
            )
        size_factors = "total"
    return check_size_factors(size_factors, counts, model.mean_total_)


def keys_of(model: object) -> AnnDataKeys:
    """Return where the fit of a model read an AnnData object, which others are read alike."""
    return getattr(model, "keys_", None) or AnnDataKeys()


def encode_places(
    model: FittedEstimator,
    coordinates: MaybeArray,
    groups: MaybeArray,
    n_samples: int | None = None,
) -> Places:
    """Check new places against those of the fit, and give their groups the codes of it.

    A model that is not spatial, and places that do not fit it, are a ValueError. There may be any
    number of them where `n_samples` is None.
    """
    known = model.model_.prior.places
    if known is None:
        refuse_places(coordinates, groups)
        raise ValueError("coordinates are for spatial models; this model is not spatial.")
    if model.groups_ is None and groups is not None:
        raise ValueError("groups are for models with multigroup=True; leave them out.")
    coordinates = check_coordinates(coordinates, n_samples, known.coordinates.shape[1])
    if model.groups_ is None:
        return Places(coordinates)
    codes = GroupCodes(model.groups_, model.group_columns_)
    return Places(coordinates, codes.encode(groups, len(coordinates)))
