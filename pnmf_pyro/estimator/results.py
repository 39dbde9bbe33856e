"""What a fit found, in one form whether a fitted model or an AnnData object holds it.

Tables, scores and plots read a fit through this interface and never ask where it came from.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.utils.validation import check_is_fitted

from pnmf_pyro.data.checks import check_array
from pnmf_pyro.transforms import factor_uncertainty, get_factors, get_loadings

# Where AnnData objects have their coordinates by convention.
SPATIAL_KEY = "spatial"


class Results(ABC):
    """Factors, loadings and places of a fit.

    Attributes
    ----------
    factors, factors_sd : ndarray of shape (n_samples, n_components)
        E exp F, and the standard deviation of exp F under q.
    log_factors_sd : ndarray of shape (n_samples, n_components)
        Standard deviation of F under q: the relative uncertainty of a factor, where it is small.
    loadings : ndarray of shape (n_features, n_components)
        W.
    elbo_history : ndarray of shape (n_iter,)
        In nats.
    feature_names : ndarray of str, shape (n_features,)
        "0", "1", ... where the data had no names.
    size_factors : ndarray of shape (n_samples,)
        1 where the fit had none.
    coordinates : ndarray of shape (n_samples, p), or None
        Of a spatial fit; of any fit in an AnnData object that has them in obsm["spatial"].
    groups : ndarray of shape (n_samples,), or None
        Of a multi-group fit.
    """

    factors: np.ndarray
    log_factors_sd: np.ndarray
    loadings: np.ndarray
    elbo_history: np.ndarray
    feature_names: np.ndarray
    size_factors: np.ndarray
    coordinates: np.ndarray | None
    groups: np.ndarray | None

    @property
    def n_components(self) -> int:
        """Number of components."""
        return self.loadings.shape[1]

    @property
    def factors_sd(self) -> np.ndarray:
        """Standard deviation of a log-normal: mean * sqrt(exp(sigma^2) - 1)."""
        return self.factors * np.sqrt(np.expm1(np.square(self.log_factors_sd)))

    def summary(self) -> dict[str, Any]:
        """Return what there is to say in numbers, by name."""
        return {
            "samples": len(self.factors),
            "features": len(self.loadings),
            "components": self.n_components,
            "steps": len(self.elbo_history),
            "ELBO at the last step (nats)": f"{self.elbo_history[-1]:.6g}",
        }

    @abstractmethod
    def counts(self, X: Any = None) -> Any:
        """Return the counts of the fit: X itself, unless the source keeps them.

        Raises
        ------
        ValueError
            Where X is needed.
        """


class ModelResults(Results):
    """Results of a fitted model.

    Parameters
    ----------
    model : PNMF
    """

    def __init__(self, model: Any):
        check_is_fitted(model)
        self.model = model
        self.elbo_history = np.asarray(model.history_, dtype=np.float64)
        self.loadings = np.asarray(get_loadings(model))
        names = getattr(model, "feature_names_in_", range(len(self.loadings)))
        self.feature_names = np.asarray([str(name) for name in names])

    @cached_property
    def factors(self) -> np.ndarray:  # type: ignore[override]  # noqa: D102
        return np.asarray(get_factors(self.model))

    @cached_property
    def log_factors_sd(self) -> np.ndarray:  # type: ignore[override]  # noqa: D102
        return np.asarray(factor_uncertainty(self.model))

    @property
    def size_factors(self) -> np.ndarray:  # type: ignore[override]  # noqa: D102
        s = self.model.model_.size_factors
        return np.ones(self.model.model_.N) if s is None else s.cpu().numpy().astype(np.float64)

    @property
    def coordinates(self) -> np.ndarray | None:  # type: ignore[override]  # noqa: D102
        if not self.model.spatial:
            return None
        return self.model.model_.prior.places.coordinates.cpu().numpy()

    @property
    def groups(self) -> np.ndarray | None:  # type: ignore[override]  # noqa: D102
        if self.model.groups_ is None:
            return None
        return np.asarray(self.model.groups_)[self.model.model_.prior.places.groups.cpu().numpy()]

    def counts(self, X: Any = None) -> Any:  # noqa: D102 - the interface says it
        if X is None:
            raise ValueError("X must be given with a model, which does not keep it; got None.")
        return X


class AnnDataResults(Results):
    """Results that a fit wrote into an AnnData object.

    Parameters
    ----------
    adata : AnnData
    key : str
        `key_added` of the fit.
    """

    def __init__(self, adata: Any, key: str):
        if key not in adata.uns or f"X_{key}" not in adata.obsm:
            fits = [name for name in adata.uns if f"X_{name}" in adata.obsm]
            raise ValueError(
                f"key={key!r} is not a fit in this AnnData object; the fits in it are {fits}. Run "
                f"pnmf_pyro.fit(adata, key_added={key!r}) first."
            )
        self.adata, self.settings = adata, adata.uns[key]
        self.factors = np.asarray(adata.obsm[f"X_{key}"])
        self.log_factors_sd = np.asarray(adata.obsm[f"X_{key}_log_sd"])
        self.loadings = np.asarray(adata.varm[f"{key.upper()}_loadings"])
        self.elbo_history = np.asarray(self.settings["elbo_history"])
        self.feature_names = np.asarray(adata.var_names, dtype=str)
        stored = adata.obs.get(f"{key}_size_factors")
        self.size_factors = np.ones(adata.n_obs) if stored is None else stored.to_numpy()
        self.coordinates = _column(adata.obsm, self.settings.get("spatial_key", SPATIAL_KEY))
        self.groups = _column(adata.obs, self.settings.get("batch_key"))

    def counts(self, X: Any = None) -> Any:  # noqa: D102 - the interface says it
        return counts_of(self.adata, self.settings.get("layer")) if X is None else X


def _column(table: Any, name: str | None) -> np.ndarray | None:
    return np.asarray(table[name]) if name is not None and name in table else None


def is_anndata(X: Any) -> bool:
    """Say whether X is an AnnData object, without importing anndata."""
    anndata = sys.modules.get("anndata")
    return anndata is not None and isinstance(X, anndata.AnnData)


def results_of(fit: Any, key: str = "pnmf") -> Results:
    """Read a fit.

    Parameters
    ----------
    fit : PNMF, AnnData or Results
        Fitted, or written to by :func:`pnmf_pyro.fit`.
    key : str
        `key_added` of the fit, for AnnData.

    Raises
    ------
    ValueError
        For an AnnData object without such a fit.
    TypeError
        For anything else.
    """
    if isinstance(fit, Results):
        return fit
    if is_anndata(fit):
        return AnnDataResults(fit, key)
    if hasattr(fit, "get_params") and hasattr(fit, "n_components"):
        return ModelResults(fit)
    raise TypeError(
        "fit must be a fitted PNMF or an AnnData object that pnmf_pyro.fit has written to; got "
        f"{type(fit).__name__}."
    )


def counts_of(adata: Any, layer: str | None = None) -> Any:
    """Return X or a layer of an AnnData object in memory, sparse where it is sparse.

    Raises
    ------
    ValueError
        For a layer that is not there.
    """
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"layer={layer!r} is not there; its layers are {list(adata.layers)}.")
    X = adata.X if layer is None else adata.layers[layer]
    if X is None:
        raise ValueError(f"adata has no X; name a layer of counts, of {list(adata.layers)}.")
    for read in ("to_memory", "compute"):  # of a file, of dask
        if hasattr(X, read):
            return getattr(X, read)()
    return X if sp.issparse(X) else np.asarray(X)


def chosen_components(components: Sequence[int] | int | None, n_components: int) -> list[int]:
    """Return numbers of components, counted from 0; all of them if None.

    Raises
    ------
    ValueError
        For numbers of components that are not there.
    """
    if components is None:
        return list(range(n_components))
    chosen = check_array("components", np.atleast_1d(components))
    whole = chosen.astype(np.int64)
    fits = chosen.ndim == 1 and len(chosen) and (whole == chosen).all()
    if not fits or (whole < 0).any() or (whole >= n_components).any():
        raise ValueError(
            f"components must be whole numbers from 0 to {n_components - 1}; got {components!r}."
        )
    return whole.tolist()
