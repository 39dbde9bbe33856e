"""Components as modules of gene expression, in the layout that FlowSig reads.

FlowSig (Almet and others 2024) learns which modules of expression lie between the signals that
cells receive and those that they send. It calls component l GEM-(l + 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pnmf_pyro.analysis.interpretation import contributions
from pnmf_pyro.data.tables import is_anndata
from pnmf_pyro.estimator.results import results_of

if TYPE_CHECKING:
    from anndata import AnnData


def to_flowsig(adata: AnnData, *, key: str = "pnmf") -> None:
    """Write a fit as FlowSig reads non-negative spatial factors, in place.

    Parameters
    ----------
    adata : AnnData of shape (n_samples, n_features)
        Object that a fit has written to. Receives obsm["X_gem"], the factors, each of which sums
        to 1 over samples; varm["H_gem"], the share of each component in a feature's expected
        counts; and uns["nsf_info"] with `n_gems`, `vars` (the names of features), both arrays as
        `factors` and `loadings`, and `totals`, the expected counts of each feature.
    key : str
        `key_added` of the fit.
    """
    if not is_anndata(adata):
        raise ValueError(
            "adata must be an AnnData object that pnmf_pyro.fit has written to; got "
            f"{type(adata).__name__}."
        )
    found = results_of(adata, key)
    expected = contributions(found, "feature")
    totals = expected.sum(1)
    of_factors = found.factors.sum(0, dtype=np.float64)
    factors = np.divide(
        found.factors, of_factors, out=np.zeros(found.factors.shape), where=of_factors > 0
    )
    shares = np.divide(
        expected, totals[:, None], out=np.zeros_like(expected), where=totals[:, None] > 0
    )
    adata.obsm["X_gem"], adata.varm["H_gem"] = factors, shares
    adata.uns["nsf_info"] = {
        "n_gems": found.n_components,
        "vars": found.feature_names.tolist(),
        "factors": factors,
        "loadings": shares,
        "totals": totals,
    }
