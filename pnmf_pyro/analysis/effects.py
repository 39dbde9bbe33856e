"""A table of the effects of batches and covariates on features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.tables import is_anndata
from pnmf_pyro.estimator.results import Fit, results_of

if TYPE_CHECKING:
    from pandas import DataFrame


def effects_table(fit: Fit, *, key: str = "pnmf") -> DataFrame | np.ndarray:
    """Return the effects of a fit with their names, a row for each feature and effect.

    Parameters
    ----------
    fit : PNMF or AnnData
        Fit with `batches=` or `covariates=`.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    DataFrame, or a structured array where pandas is not installed
        Columns `feature`; `of`, "batch" or "covariate"; `name`, of the batch, or of the covariate
        and its category; `effect`, on the logarithm of rates; `se`, its standard error; and
        `fold`, the exponential of the effect.

    Raises
    ------
    ValueError
        For a fit without batches and covariates.

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> X = np.random.default_rng(0).poisson(5, size=(60, 20))
    >>> model = pnmf_pyro.fit(X, n_components=2, batches=["a", "b"] * 30)
    >>> len(pnmf_pyro.effects_table(model))  # 20 features, 2 batches
    40
    """
    features = results_of(fit, key).feature_names
    rows: dict[str, list[Any]] = {name: [] for name in ("feature", "of", "name", "effect", "se")}
    for of in ("batch", "covariate"):
        values, errors, names = _found(fit, f"{of}_effects", key)
        for number, name in enumerate(names):
            rows["feature"] += features.tolist()
            rows["of"] += [of] * len(features)
            rows["name"] += [name] * len(features)
            rows["effect"] += values[:, number].tolist()
            rows["se"] += errors[:, number].tolist()
    if not rows["effect"]:
        raise ValueError(
            "fit has no effects: it was made without batches= and covariates=. Pass one to fit."
        )
    return as_table({**rows, "fold": np.exp(rows["effect"]).tolist()})


def _found(fit: Any, kind: str, key: str) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Effects, their standard errors and names; no names where there are none."""
    if is_anndata(fit):
        table = fit.varm.get(f"{key.upper()}_{kind}")
        errors = fit.varm.get(f"{key.upper()}_{kind}_se")
        names = [] if table is None else list(table.columns)
    else:
        table, errors = (getattr(fit, f"{kind}{end}_", None) for end in ("", "_se"))
        names = getattr(fit, {"batch_effects": "batches_"}.get(kind, "covariates_"), None) or []
    values = np.zeros((0, 0)) if table is None else np.asarray(table)
    return values, np.full_like(values, np.nan) if errors is None else np.asarray(errors), names
