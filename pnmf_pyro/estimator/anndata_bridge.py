"""AnnData in, and obsm, varm and uns out."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from pnmf_pyro import __version__
from pnmf_pyro.data.checks import warn
from pnmf_pyro.data.places import lie_over_one_another
from pnmf_pyro.data.tables import counts_of, is_anndata
from pnmf_pyro.estimator.results import (
    EFFECTS,
    SPATIAL_KEY,
    STAGE_COLUMNS,
    Fit,
    import_optional,
    named,
    plain,
    results_of,
    tables_of_effects,
)
from pnmf_pyro.training.fitted import Fitted, fitted_module

if TYPE_CHECKING:
    from anndata import AnnData

MaybeArray = np.ndarray | None

# Columns of obs and var that some fits have, after their key; a later one leaves none behind.
COLUMNS = {
    "obs": ("size_factors", "importance_of_space"),
    "var": ("dispersion", "importance_of_space"),
}

# Names of columns of obs that say which section a sample is of, if places bear it out.
SECTION = re.compile(
    r"(^|[_. ])(library|sample|section|slice|slide|puck|batch|replicate|donor|patient|animal)"
    r"s?([_. ]?(id|key|name|label|no|number))?$",
    re.IGNORECASE,
)

# Where a table of SpatialData says which elements its rows are of.
ANNOTATION = "spatialdata_attrs"

logger = logging.getLogger("pnmf_pyro")


def import_anndata() -> ModuleType:
    """Import anndata, or say how to install it."""
    need = "Reading and writing .h5ad files needs anndata"
    return import_optional("anndata", need, "anndata")


def import_h5py() -> ModuleType:
    """Import h5py, which comes with anndata."""
    return import_optional("h5py", "Writing .h5ad files needs h5py", "anndata")


# Names of columns that hold places, in pairs.
PLACES = (
    *(("x", "y"), ("x_centroid", "y_centroid"), ("centroid_x", "centroid_y"), ("lon", "lat")),
    *(("longitude", "latitude"), ("array_row", "array_col"), ("imagerow", "imagecol")),
    *(("pxl_row_in_fullres", "pxl_col_in_fullres"), ("center_x", "center_y")),
)


@dataclass(frozen=True)
class AnnDataKeys:
    """What to read from an AnnData object and where to write, by the parameters of `pnmf_pyro.fit`.

    `spatial_key` is the name of the coordinates in obsm, or None for a fit without space. The
    conventional name need not be there, any other must.
    """

    layer: str | None = None
    spatial_key: str | None = SPATIAL_KEY
    batch_key: str | Sequence[str] | None = None
    key_added: str = "pnmf"
    copy: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.key_added, str) or not self.key_added:
            raise ValueError(f"key_added must be a name; got {self.key_added!r}.")
        for name in ("layer", "spatial_key"):
            if not isinstance(given := getattr(self, name), str | None):
                raise ValueError(f"{name} must be a name or None; got {given!r}.")
        if not isinstance(keys := self.batch_key, str | None):
            if not isinstance(keys, list | tuple) or [*map(type, keys)] != [str, str]:
                raise ValueError(f"batch_key must be a name, two names or None; got {keys!r}.")
            object.__setattr__(self, "batch_key", tuple(keys))

    def refuse(self) -> None:
        """Raise a ValueError where one is given for counts that are not in an AnnData object."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given:
            raise ValueError(
                f"{given[0]} is for AnnData objects, and X is none. Leave it out; pass coords= and "
                "groups= for arrays."
            )

    def read(
        self, adata: AnnData, spatial: bool | None = None
    ) -> tuple[Any, MaybeArray, MaybeArray]:
        """Return the counts (N, D), coordinates (N, p) or None, and groups (N,) or None of a fit.

        `spatial` says whether the fit is to be spatial; if None, it is where the coordinates are
        there. Keys that are not there, and groups of a fit without space, are ValueErrors. It warns
        where X is not counts and a layer is, and where no `batch_key` tells several sections apart.
        """
        return self.counts(adata), *self.places(adata, spatial)

    def take_apart(
        self, X: Any, coordinates: Any, groups: Any, spatial: bool | None = None
    ) -> tuple[Any, Any, Any]:
        """Return counts, coordinates and groups of what may be an AnnData object.

        Coordinates and groups that are passed beside it count. Anything else stays as it is.
        """
        return self.counts(X), *self.where(X, coordinates, groups, spatial)

    def where(
        self, X: Any, coordinates: Any, groups: Any, spatial: bool | None = None
    ) -> tuple[Any, Any]:
        """Return coordinates and groups, see :meth:`take_apart`."""
        if not is_anndata(X) or coordinates is not None:
            return coordinates, groups
        if groups is not None:
            return (None if spatial is False else self._coordinates(X, bool(spatial))), groups
        return self.places(X, spatial)

    def places(self, adata: AnnData, spatial: bool | None = None) -> tuple[MaybeArray, MaybeArray]:
        """Return the coordinates and groups of an AnnData object, see :meth:`read`."""
        coordinates = None if spatial is False else self._coordinates(adata, bool(spatial))
        return coordinates, self._groups(adata, coordinates)

    def counts(self, adata: Any) -> Any:
        """Return the counts of an AnnData object, see :meth:`read`; anything else as it is."""
        if not is_anndata(adata):
            return adata
        if adata.isbacked and adata.is_view and not self.copy:
            raise ValueError(
                "adata is a view of a file, to which results cannot be written. Use copy=True, or "
                "pass adata.to_memory()."
            )
        X = counts_of(adata, self.layer)
        if self.layer is None and not _is_whole(X):
            layers = [name for name, values in adata.layers.items() if _is_whole(values)]
            found = f"a layer of counts: pass layer={layers[0]!r}" if layers else ""
            if not layers and adata.raw is not None and _is_whole(adata.raw.X):
                found = "adata.raw, which does: pass adata.raw.to_adata()"
            if found:
                warn(f"adata.X does not hold whole numbers, and there is {found} to fit that.")
        return X

    def _coordinates(self, adata: AnnData, required: bool) -> np.ndarray | None:
        if self.spatial_key is None:
            return None
        if self.spatial_key in adata.obsm:
            return np.asarray(adata.obsm[self.spatial_key])
        if required or self.spatial_key != SPATIAL_KEY:
            raise ValueError(
                f"spatial_key={self.spatial_key!r} is not in adata.obsm, which has "
                f"{list(adata.obsm)}. Name the coordinates, or pass None for a fit without space."
            )
        logger.info("adata.obsm has no %r: the fit knows no space", self.spatial_key)
        if found := coordinates_elsewhere(adata):
            warn(
                f"adata.obsm has no {SPATIAL_KEY!r}, so this fit knows no space, and {found}. "
                "For a fit without space pass spatial_key=None."
            )
        return None

    def _groups(self, adata: AnnData, coordinates: np.ndarray | None) -> np.ndarray | None:
        if self.batch_key is None:
            if coordinates is not None and (sections := _sections(adata, coordinates)):
                warn(
                    f"adata holds {sections}, and no batch_key tells them apart: places of "
                    "different sections count as neighbours. If they are of one tissue, silence "
                    'this by warnings.filterwarnings("ignore", "adata holds").'
                )
            return None
        names = [self.batch_key] if isinstance(self.batch_key, str) else [*self.batch_key]
        for name in {*names} - {*adata.obs}:
            raise ValueError(
                f"batch_key={name!r} is not a column of adata.obs, which has {list(adata.obs)}."
            )
        if coordinates is None:
            raise ValueError(
                "batch_key makes groups of places, and this fit knows no space. Leave it out, or "
                "name the coordinates with spatial_key."
            )
        return adata.obs[names[0]].to_numpy() if len(names) == 1 else adata.obs[names]

    def write(self, adata: AnnData, model: Any) -> AnnData:
        """Write a fit, and return the object written to."""
        if self.copy:
            adata = adata.to_memory() if adata.isbacked else adata.copy()
        add_results(adata, model, self.key_added)
        used: dict[str, Any] = {"layer": self.layer}
        if model.spatial:
            columns = (
                self.batch_key if isinstance(self.batch_key, str | None) else [*self.batch_key]
            )
            used |= {"spatial_key": self.spatial_key, "batch_key": columns}
        adata.uns[self.key_added] |= {k: v for k, v in used.items() if v is not None}
        return adata


def annotated_regions(table: AnnData) -> list[str]:
    """Return the elements of SpatialData that the rows of a table are of; none if it is silent."""
    region = table.uns.get(ANNOTATION, {}).get("region")
    return [] if region is None else np.atleast_1d(region).tolist()


def _sections(adata: AnnData, coordinates: np.ndarray) -> str:
    """Say which sections there are if there are several, and what to pass; "" if there is one."""
    for name, column in adata.obs.items():
        if SECTION.search(str(name)):
            codes = column.astype("category").cat.codes.to_numpy()
            if lie_over_one_another(coordinates, codes):
                what = f"{column.nunique()} sections over one another, by obs[{name!r}]"
                return f"{what} (pass batch_key={name!r})"
    uns = adata.uns.get("spatial")
    key, found = "spatial", list(uns) if isinstance(uns, dict) else []
    if regions := annotated_regions(adata):
        key, found = ANNOTATION, regions
    several = f"{len(found)} sections, by uns[{key!r}] (pass the column of obs that names them as "
    return f"{several}batch_key=)" if len(found) > 1 else ""


def found_places(names: Sequence[str]) -> tuple[str, str] | None:
    """Return names of two columns that are called like coordinates, or None."""
    lower = {name.lower(): name for name in names}
    pairs = [(lower[a], lower[b]) for a, b in PLACES if a in lower and b in lower]
    return pairs[0] if pairs else None


def unnamed_places(adata: AnnData) -> tuple[str | None, tuple[str, str] | None]:
    """Return the key of obsm, or else the columns of obs, that look like coordinates, if any do."""
    keys = (key for key in adata.obsm if re.search("spatial|coord|^xy", key.lower()))
    key = next(keys, None)
    return key, None if key else found_places(list(adata.obs))


def coordinates_elsewhere(adata: AnnData) -> str:
    """Say which parts of an AnnData object look like coordinates, and what to do; "" if none."""
    key, pair = unnamed_places(adata)
    if key:
        return f"obsm[{key!r}] looks like coordinates: pass spatial_key={key!r}"
    if pair:
        return (
            f"the columns {' and '.join(pair)} of obs look like coordinates: set "
            f"adata.obsm[{SPATIAL_KEY!r}] = adata.obs[{list(pair)}].to_numpy()"
        )
    return ""


def _is_whole(X: Any) -> bool:
    entries = X.data if sp.issparse(X) else X
    if not isinstance(entries, np.ndarray):
        return False
    return entries.dtype.kind != "f" or bool((entries == np.round(entries)).all())


def results(fit: Fit) -> dict[str, np.ndarray]:
    """Return what a fit found, as arrays.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        What :func:`~pnmf_pyro.estimator.results.results_of` takes.

    Returns
    -------
    dict
        `factors`, E exp F, and `factors_sd`, the standard deviation of exp F under q, of shape
        (n_samples, n_components); `log_factors_sd`, that of F; `loadings`, of shape
        (n_features, n_components); `elbo_history`, of shape (n_iter,), where it is known; and
        `batch_effects`, `covariate_effects`, the same with `_se`, and `dispersion`, where there
        are any.
    """
    found = results_of(fit)
    names = ("factors", "factors_sd", "log_factors_sd", "loadings", "elbo_history")
    arrays = {name: getattr(found, name) for name in names}
    arrays |= {name: getattr(fit, f"{name}_", None) for name in (*EFFECTS, "dispersion")}
    return {name: array for name, array in arrays.items() if array is not None}


def settings(fit: Fitted) -> dict[str, Any]:
    """Return parameters and outcome of a fit as plain values that JSON and HDF5 can hold.

    Values that are None, which HDF5 cannot hold, are left out.

    Parameters
    ----------
    fit : PNMF, ModelFit or PoissonFactorization
        Fitted estimator, result of :func:`~pnmf_pyro.fit_model`, or a model trained in any way.

    Returns
    -------
    dict
        `version`; `parameters` of an estimator, and `seed`, where it is a number; `elbo`, its
        standard error `elbo_se` and `n_iter`, where they are known; the names of `batches` and
        `covariates`, where there are any; of a spatial model `kernel` and
        `hyperparameters`.
    """
    found: dict[str, Any] = {"version": __version__}
    get_params = getattr(fit, "get_params", None)
    if get_params is not None:
        stored = {name: named(value) for name, value in get_params(deep=False).items()}
        found["parameters"] = {name: value for name, value in stored.items() if value is not None}
        if isinstance(stored["random_state"], int):
            found["seed"] = stored["random_state"]
    for name in ("batches", "covariates"):
        if (names := getattr(fit, f"{name}_", None)) is not None:
            found[name] = list(map(str, names))
    history = results_of(fit).elbo_history
    elbo = getattr(fit, "elbo_", getattr(fit, "elbo", None))
    if history is not None and elbo is not None:
        error = getattr(fit, "elbo_se_", getattr(fit, "elbo_se", float("nan")))
        found |= {"elbo": float(elbo), "elbo_se": float(error), "n_iter": len(history)}
    in_space = results_of(fit).in_space
    if in_space.any() and not in_space.all():
        found["in_space"] = in_space.tolist()
    fields: Any = [one for one in fitted_module(fit).prior.fields if hasattr(one, "kernel")]
    each = [{**one.kernel.hyperparameters, "mean": one.mean} for one in fields]
    learned = [{name: plain(value) for name, value in one.items()} for one in each]
    if len(fields) == 1:
        found |= {"kernel": fields[0].kernel.name, "hyperparameters": learned[0]}
    for number, one in enumerate(fields if len(fields) > 1 else ()):
        found[f"field_{number}"] = {"kernel": one.kernel.name, "hyperparameters": learned[number]}
    return found


def add_results(adata: AnnData, fit: Fitted, key: str = "pnmf") -> None:
    """Write a fit into an AnnData object, in place.

    Parameters
    ----------
    adata : AnnData of shape (n_samples, n_features)
        Receives obsm["X_{key}"], obsm["X_{key}_sd"], obsm["X_{key}_log_sd"],
        varm["{KEY}_loadings"], uns[key], with settings, ELBO history and stages, and, where the
        fit had size factors, obs["{key}_size_factors"], and var["{key}_dispersion"] of a negative
        binomial, and of effects tables varm["{KEY}_batch_effects"] and "..._se", for covariates
        "..._covariate_effects" alike. Where some components know no space, obs and
        var["{key}_importance_of_space"]. A view becomes an object of its own.
    fit : PNMF, ModelFit or PoissonFactorization
        Fit of these samples and features.
    key : str
        Name of the results.
    """
    found = results_of(fit)
    with warnings.catch_warnings():  # that a view becomes an object of its own
        warnings.simplefilter("ignore", import_anndata().ImplicitModificationWarning)
        adata.obsm[f"X_{key}"] = found.factors
        adata.obsm[f"X_{key}_sd"] = found.factors_sd
        adata.obsm[f"X_{key}_log_sd"] = found.log_factors_sd
        adata.varm[f"{key.upper()}_loadings"] = found.loadings
        adata.uns[key] = settings(fit)
        if found.elbo_history is not None:
            adata.uns[key]["elbo_history"] = found.elbo_history
        if stages := found.stages:
            columns = zip(STAGE_COLUMNS, zip(*stages, strict=True), strict=True)
            adata.uns[key]["stages"] = {name: np.asarray(column) for name, column in columns}
        for frame, names in COLUMNS.items():
            for column in {f"{key}_{name}" for name in names} & set(getattr(adata, frame)):
                del getattr(adata, frame)[column]
        if "in_space" in adata.uns[key]:
            adata.obs[f"{key}_importance_of_space"] = found.importance_of_space("sample")
            adata.var[f"{key}_importance_of_space"] = found.importance_of_space("feature")
        if (r := getattr(fitted_module(fit).observation, "dispersion", None)) is not None:
            adata.var[f"{key}_dispersion"] = r.cpu().numpy()
        tables = tables_of_effects(fit, adata.var_names)
        for name in EFFECTS:
            adata.varm.pop(f"{key.upper()}_{name}", None)
            if name in tables:
                adata.varm[f"{key.upper()}_{name}"] = tables[name]
        if fitted_module(fit).size_factors is not None:
            adata.obs[f"{key}_size_factors"] = found.size_factors
