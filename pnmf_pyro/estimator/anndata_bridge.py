"""AnnData in, and obsm, varm and uns out."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import numpy as np
import scipy.sparse as sp

from pnmf_pyro.data.checks import warn
from pnmf_pyro.estimator.results import SPATIAL_KEY, ModelResults, counts_of

logger = logging.getLogger("pnmf_pyro")


def import_anndata() -> Any:
    """Import anndata, or say how to install it."""
    try:
        import anndata
    except ImportError as error:
        raise ImportError(
            "Reading and writing .h5ad files needs anndata. Install it with: "
            "pip install 'pnmf-pyro[anndata]'"
        ) from error
    return anndata


@dataclass(frozen=True)
class AnnDataKeys:
    """What to read from an AnnData object and where to write.

    Parameters
    ----------
    layer : str, optional
        Layer of the counts; X unless given.
    spatial_key : str or None
        Of the coordinates, in obsm; None for a fit without space. The conventional name need not
        be there, any other must.
    batch_key : str, optional
        Column of obs with the group of each sample.
    key_added : str
        Of the results.
    copy : bool
        Write to a copy.
    """

    layer: str | None = None
    spatial_key: str | None = SPATIAL_KEY
    batch_key: str | None = None
    key_added: str = "pnmf"
    copy: bool = False

    def refuse(self) -> None:
        """Raise a ValueError where one is given for counts that are not in an AnnData object."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given:
            raise ValueError(
                f"{given[0]} is for AnnData objects, and X is none. Leave it out; pass coords= and "
                "groups= for arrays."
            )

    def read(self, adata: Any, spatial: bool | None = None) -> tuple[Any, Any, Any]:
        """Return the counts, coordinates and groups of an AnnData object.

        Parameters
        ----------
        adata : AnnData
        spatial : bool, optional
            Whether the fit is to be spatial; if the coordinates are there, unless given.

        Returns
        -------
        X : ndarray or sparse matrix of shape (n_samples, n_features)
        coordinates : ndarray of shape (n_samples, p), or None
        groups : ndarray of shape (n_samples,), or None

        Raises
        ------
        ValueError
            For keys that are not there, groups of a fit without space, and results that could not
            be written.

        Warns
        -----
        UserWarning
            Where there is a layer of counts and X is none, and where there seem to be several
            sections that no `batch_key` tells apart.
        """
        return self._counts(adata), *self.places(adata, spatial)

    def places(self, adata: Any, spatial: bool | None = None) -> tuple[Any, Any]:
        """Return the coordinates and groups of an AnnData object, see :meth:`read`."""
        coordinates = None if spatial is False else self._coordinates(adata, bool(spatial))
        return coordinates, self._groups(adata, coordinates)

    def _counts(self, adata: Any) -> Any:
        if adata.isbacked and adata.is_view and not self.copy:
            raise ValueError(
                "adata is a view of a file, to which results cannot be written. Use copy=True, or "
                "pass adata.to_memory()."
            )
        X = counts_of(adata, self.layer)
        if self.layer is None and "counts" in adata.layers and not _is_whole(X):
            warn(
                "adata.X does not hold whole numbers, and there is a layer of counts: pass "
                "layer='counts' to fit that."
            )
        return X

    def _coordinates(self, adata: Any, required: bool) -> np.ndarray | None:
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
        return None

    def _groups(self, adata: Any, coordinates: np.ndarray | None) -> np.ndarray | None:
        if self.batch_key is None:
            if coordinates is not None:
                _warn_several_sections(adata)
            return None
        if self.batch_key not in adata.obs:
            raise ValueError(
                f"batch_key={self.batch_key!r} is not a column of adata.obs, which has "
                f"{list(adata.obs)}."
            )
        if coordinates is None:
            raise ValueError(
                "batch_key makes groups of places, and this fit knows no space. Leave it out, or "
                "name the coordinates with spatial_key."
            )
        return adata.obs[self.batch_key].to_numpy()

    def write(self, adata: Any, model: Any) -> Any:
        """Write a fit, and return the object written to."""
        if self.copy:
            adata = adata.to_memory() if adata.isbacked else adata.copy()
        add_results(adata, model, self.key_added)
        used = {"layer": self.layer}
        if model.spatial:
            used |= {"spatial_key": self.spatial_key, "batch_key": self.batch_key}
        adata.uns[self.key_added] |= {k: v for k, v in used.items() if v is not None}
        return adata


def _is_whole(X: Any) -> bool:
    entries = X.data if sp.issparse(X) else X
    return bool((entries == np.round(entries)).all())


def _warn_several_sections(adata: Any) -> None:
    sections = adata.uns.get("spatial")
    if isinstance(sections, dict) and len(sections) > 1:
        warn(
            f"adata holds {len(sections)} sections, by uns['spatial'], and no batch_key tells them "
            "apart: places of different sections count as neighbours. Pass batch_key=."
        )


def results(model: Any) -> dict[str, np.ndarray]:
    """Return what a fit found, as arrays.

    Parameters
    ----------
    model : PNMF
        Fitted.

    Returns
    -------
    dict
        `factors`, E exp F, and `factors_sd`, the standard deviation of exp F under q, of shape
        (n_samples, n_components); `log_factors_sd`, that of F; `loadings`, of shape
        (n_features, n_components); `elbo_history`, of shape (n_iter,).
    """
    found = ModelResults(model)
    names = ("factors", "factors_sd", "log_factors_sd", "loadings", "elbo_history")
    return {name: getattr(found, name) for name in names}


def settings(model: Any) -> dict[str, Any]:
    """Return parameters and outcome of a fit as plain values that JSON and HDF5 can hold.

    Values that are None, which HDF5 cannot hold, are left out.

    Returns
    -------
    dict
        `parameters`, `elbo`, `n_iter`, `version`; `seed`, where it is a number; of a spatial model
        `hyperparameters`, such as the lengthscale of each component.
    """
    parameters = {
        name: _plain(value)
        for name, value in model.get_params(deep=False).items()
        if value is not None
    }
    found = {
        "parameters": parameters,
        "elbo": float(model.elbo_),
        "n_iter": int(model.n_iter_),
        "version": version("pnmf-pyro"),
    }
    if isinstance(parameters.get("random_state"), int):
        found["seed"] = parameters["random_state"]
    if model.spatial:
        prior = model.model_.prior
        learned = {**prior.kernel.hyperparameters, "mean": prior.mean}
        found["kernel"] = prior.kernel.name
        found["hyperparameters"] = {name: value.tolist() for name, value in learned.items()}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return value if isinstance(value, (bool, int, float, str, list)) else str(value)


def add_results(adata: Any, model: Any, key: str = "pnmf") -> None:
    """Write a fit into an AnnData object, in place.

    Parameters
    ----------
    adata : AnnData of shape (n_samples, n_features)
        Receives obsm["X_{key}"], obsm["X_{key}_sd"], obsm["X_{key}_log_sd"],
        varm["{KEY}_loadings"], uns[key], with settings and ELBO history, and, where the fit had
        size factors, obs["{key}_size_factors"]. A view becomes an object of its own.
    model : PNMF
        Fitted to these samples and features.
    key : str
    """
    arrays = results(model)
    with warnings.catch_warnings():  # that a view becomes an object of its own
        warnings.simplefilter("ignore", import_anndata().ImplicitModificationWarning)
        adata.obsm[f"X_{key}"] = arrays["factors"]
        adata.obsm[f"X_{key}_sd"] = arrays["factors_sd"]
        adata.obsm[f"X_{key}_log_sd"] = arrays["log_factors_sd"]
        adata.varm[f"{key.upper()}_loadings"] = arrays["loadings"]
        adata.uns[key] = {**settings(model), "elbo_history": arrays["elbo_history"]}
        if model.model_.size_factors is not None:
            adata.obs[f"{key}_size_factors"] = ModelResults(model).size_factors
