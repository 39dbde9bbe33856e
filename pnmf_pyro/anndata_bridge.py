"""AnnData in, and obsm, varm and uns out."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from pnmf_pyro.transforms import factor_uncertainty, get_factors, get_loadings


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
    factors, sigma = get_factors(model), factor_uncertainty(model)
    return {
        "factors": np.asarray(factors),
        # standard deviation of a log-normal: mean * sqrt(exp(sigma^2) - 1)
        "factors_sd": np.asarray(factors * np.sqrt(np.expm1(np.square(sigma)))),
        "log_factors_sd": np.asarray(sigma),
        "loadings": np.asarray(get_loadings(model)),
        "elbo_history": np.asarray(model.history_),
    }


def settings(model: Any) -> dict[str, Any]:
    """Return parameters and outcome of a fit as plain values that JSON and HDF5 can hold.

    Parameters that are None, which HDF5 cannot hold, are left out.
    """
    parameters = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in model.get_params(deep=False).items()
        if value is not None
    }
    return {
        "parameters": parameters,
        "elbo": float(model.elbo_),
        "n_iter": int(model.n_iter_),
        "version": version("pnmf-pyro"),
    }


def add_results(adata: Any, model: Any, key: str = "pnmf") -> None:
    """Write a fit into an AnnData object, in place.

    Parameters
    ----------
    adata : AnnData of shape (n_samples, n_features)
        Receives obsm["X_{key}"], obsm["X_{key}_sd"], obsm["X_{key}_log_sd"],
        varm["{KEY}_loadings"] and uns[key], with settings and ELBO history.
    model : PNMF
        Fitted to these samples and features.
    key : str
    """
    arrays = results(model)
    adata.obsm[f"X_{key}"] = arrays["factors"]
    adata.obsm[f"X_{key}_sd"] = arrays["factors_sd"]
    adata.obsm[f"X_{key}_log_sd"] = arrays["log_factors_sd"]
    adata.varm[f"{key.upper()}_loadings"] = arrays["loadings"]
    adata.uns[key] = {**settings(model), "elbo_history": arrays["elbo_history"]}
