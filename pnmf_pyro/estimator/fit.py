"""The recommended fit in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pnmf_pyro.data.counts import CountsLike, MaybeArray
from pnmf_pyro.data.design import Covariates, Labels, from_obs
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.masks import Mask, unmasked
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.data.stores import is_store
from pnmf_pyro.data.tables import is_anndata, plain_table
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.checkpoints import EVERY, checkpoint_of
from pnmf_pyro.estimator.cost import Plan, plan_of
from pnmf_pyro.estimator.inputs import Scales, read_data
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.recipe import recommended
from pnmf_pyro.estimator.results import SPATIAL_KEY
from pnmf_pyro.estimator.spatialdata_bridge import is_spatialdata, table_of
from pnmf_pyro.estimator.stored_fit import fit_store, large_table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

logger = logging.getLogger("pnmf_pyro")


@isolated
def fit(
    X: CountsLike | AnnData | SpatialData | str | os.PathLike,
    coords: MaybeArray = None,
    groups: MaybeArray = None,
    *,
    n_components: int = 10,
    size_factors: MaybeArray = None,
    mask: Mask = None,
    batches: Labels = None,
    covariates: Covariates = None,
    table: str | None = None,
    layer: str | None = None,
    spatial_key: str | None = SPATIAL_KEY,
    batch_key: str | Sequence[str] | None = None,
    key_added: str = "pnmf",
    copy: bool = False,
    checkpoint: str | os.PathLike | None = None,
    every: float = EVERY,
    **parameters: Any,
) -> Any:
    """Fit a factorisation with settings that need no tuning.

    Parameters
    ----------
    X : array-like, Tensor, DataFrame or sparse matrix of shape (n_samples, n_features), or AnnData
        Counts. What the fit finds is written into an AnnData object, see Notes. The path of an
        .h5ad or .zarr file of AnnData is read by slices, without space, and written into. Of
        SpatialData a table is fitted; where it has no coordinates it receives the centroids of the
        elements that its rows are of.
    coords : array-like of shape (n_samples, p), optional
        Where the samples are, in any unit: the factors are then smooth in space. Up to 1,500
        samples are all inducing points; more, or those with another likelihood, are conditioned
        on their neighbours (`local=True`), in time in proportion to their number. The log says
        which.
    groups : array-like of shape (n_samples,), or DataFrame or array (n_samples, 2), optional
        Slices or types of cells, which share less than their places say: what they share is
        learned. Of two columns, such as slices and types, what each of them shares is.
    n_components : int
    size_factors : array-like of shape (n_samples,) or 'total', optional
        Positive factor on all rates of a sample; `total` for its total count over their mean.
    mask : array-like or sparse matrix of shape (n_samples, n_features), optional
        True where an entry is observed; what is hidden plays no part. A masked array of NumPy
        brings its own.
    batches : array-like of shape (n_samples,), or str, optional
        Labels of what scales each feature by a factor of its own, such as the run, chemistry or
        donor of a sample; the factors are learned. Of an AnnData object the name of a column of
        obs. Unlike `groups` they say nothing of how factors vary.
    covariates : array-like of shape (n_samples, P), DataFrame, or str or list of str, optional
        Numbers whose effect on the logarithm of each feature's rate is learned, centred. A data
        frame may hold words: a column for each of their categories but the first. Of an AnnData
        object names of columns of obs. The mean over samples of all effects of a feature is 0.
    table : str, optional
        Name of the table of a SpatialData object; it may be left out where there is only one.
    layer : str, optional
        Layer that holds the counts, X unless given. This and what follows up to `copy` is for
        AnnData.
    spatial_key : str or None
        Name of the coordinates in obsm. Where they are there the fit is spatial, unless this is
        None or `spatial` false.
    batch_key : str or two of them, optional
        Column of obs that takes the place of `groups`, such as the section of each sample, or two.
        Without it all samples are of one section.
    key_added : str
        Name under which the results are written.
    copy : bool
        Write to a copy of the AnnData object, which is returned as well.
    checkpoint, every : str or os.PathLike, float, optional
        File in which the fit is kept every so many seconds. Where it is there, the fit goes on from
        it, to the same bits as if never stopped; one of another fit is a ValueError.
    **parameters
        Any parameter of :class:`PNMF`, in place of the recommended value.

    Returns
    -------
    PNMF, or (PNMF, AnnData) with `copy`
        Fitted; and the copy with the results.

    Raises
    ------
    ValueError
        For input or parameters that cannot be used; the message says what to change.

    Notes
    -----
    With key_added="pnmf", an AnnData object receives obsm["X_pnmf"], the factors E exp F;
    obsm["X_pnmf_sd"], their standard deviation; obsm["X_pnmf_log_sd"], that of F;
    varm["PNMF_loadings"]; uns["pnmf"], with parameters, seed, version, ELBO and its history and the
    keys that were read; obs["pnmf_size_factors"] where there are any; and, in obs and var,
    "pnmf_importance_of_space" with `non_spatial_components`. A view becomes an object
    of its own, as whenever something is written to it. An object backed by a file keeps the results
    in memory until its `write` is called.

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> X = np.random.default_rng(0).poisson(5, size=(60, 20))
    >>> model = pnmf_pyro.fit(X, n_components=2)
    >>> model.components_.shape
    (2, 20)
    """
    checkpoint_of(checkpoint, every)  # before X is read
    X = _of_table(X, table, spatial_key, parameters)
    keys = AnnDataKeys(layer, spatial_key, batch_key, key_added, copy)
    scales = Scales(size_factors, mask, *from_obs(X, batches, covariates))
    kept = {"checkpoint": checkpoint, "every": every}
    if is_anndata(X):
        _refuse_places(coords, groups)
        return _fit_anndata(X, keys, n_components, scales, parameters, kept)
    if is_store(X):
        _refuse_places(coords, groups)
        path = cast(str | os.PathLike, X)
        train = partial(
            _fit_stored,
            n_components=n_components,
            size_factors=size_factors,
            parameters=parameters,
            kept=kept,
        )
        return fit_store(path, keys, scales, parameters | kept, train)
    keys.refuse()
    return _fit_arrays(X, coords, groups, n_components, scales, parameters, kept)


@isolated
def plan(
    X: CountsLike | AnnData | SpatialData,
    coords: MaybeArray = None,
    groups: MaybeArray = None,
    *,
    n_components: int = 10,
    size_factors: MaybeArray = None,
    mask: Mask = None,
    batches: Labels = None,
    covariates: Covariates = None,
    table: str | None = None,
    layer: str | None = None,
    spatial_key: str | None = SPATIAL_KEY,
    batch_key: str | Sequence[str] | None = None,
    **parameters: Any,
) -> Plan:
    """Say what :func:`fit` would do, how long it would take on this machine, and in which memory.

    Stages of the fit are timed on a sample of the rows, for a few seconds where X is not large.

    Parameters
    ----------
    X, coords, groups, n_components, size_factors, mask, batches, covariates
        What `fit` would be given.
    table, layer, spatial_key, batch_key, **parameters
        What `fit` would be given.

    Returns
    -------
    Plan
        Its `str` is a summary to read.

    Raises
    ------
    ValueError
        For input or parameters that cannot be used.

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> X = np.random.default_rng(0).poisson(5, size=(60, 20))
    >>> plan = pnmf_pyro.plan(X, n_components=2)
    >>> plan.prior, plan.n_stored, [stage.name for stage in plan.stages]
    ('GaussianPrior', 1200, ['start', 'warm-up', 'settle', 'ELBO'])
    """
    X = _of_table(X, table, spatial_key, parameters)
    effects = from_obs(X, batches, covariates)
    if is_anndata(X):
        _refuse_places(coords, groups)
        keys = AnnDataKeys(layer, spatial_key, batch_key)
        X, coords, groups = keys.read(X, parameters.get("spatial"))
    else:
        AnnDataKeys(layer, spatial_key, batch_key).refuse()
    X, mask = unmasked(X, mask)
    X = plain_table(X)
    model = recommended(np.shape(X), coords, groups, n_components, parameters)
    scales = Scales(size_factors, mask, *effects)
    return plan_of(model, read_data(model, X, coords, groups, scales, limited=False))


def _of_table(
    X: Any, table: str | None, spatial_key: str | None, parameters: dict[str, Any]
) -> Any:
    """Return the table of a SpatialData object, with its places; anything else as it is."""
    if is_spatialdata(X):
        wanted = spatial_key == SPATIAL_KEY and parameters.get("spatial") is not False
        return table_of(X, table, places=wanted)
    if table is not None:
        raise ValueError("table is for SpatialData objects, and X is none. Leave it out.")
    return X


def _fit_anndata(
    adata: AnnData,
    keys: AnnDataKeys,
    n_components: int,
    scales: Scales,
    parameters: dict[str, Any],
    kept: dict[str, Any],
) -> PNMF | tuple[PNMF, AnnData]:
    """Fit the counts of an AnnData object, and write what is found to it or to a copy."""
    large = large_table(adata, keys, scales, parameters | kept)
    if large is None:
        X, coords, groups = keys.read(adata, parameters.get("spatial"))
        model = _fit_arrays(X, coords, groups, n_components, scales, parameters, kept)
    else:
        model = _fit_stored(large, n_components, scales.size_factors, parameters, kept)
    model.feature_names_in_ = np.asarray(adata.var_names, dtype=object)
    model.keys_ = AnnDataKeys(keys.layer, keys.spatial_key, keys.batch_key)
    written = keys.write(adata, model)
    return (model, written) if keys.copy else model


def _refuse_places(coords: MaybeArray, groups: MaybeArray) -> None:
    """Raise a ValueError where places are given beside an AnnData object."""
    if coords is not None or groups is not None:
        raise ValueError(
            "coords and groups of an AnnData object are named by spatial_key and batch_key; "
            "leave coords and groups out."
        )


def _fit_arrays(
    X: CountsLike,
    coords: MaybeArray,
    groups: MaybeArray,
    n_components: int,
    scales: Scales,
    parameters: dict[str, Any],
    kept: dict[str, Any],
) -> PNMF:
    X, mask = unmasked(X, scales.mask)
    X = plain_table(X)
    model = recommended(np.shape(X), coords, groups, n_components, parameters)
    given = scales._replace(mask=mask)._asdict() | kept
    model.fit(X, coordinates=coords, groups=groups, **given)
    if model.spatial:
        logger.info("kernel %s", model.kernel_)
    return model


def _fit_stored(
    counts: StoredCounts,
    n_components: int,
    size_factors: MaybeArray,
    parameters: dict[str, Any],
    kept: dict[str, Any],
) -> PNMF:
    """Fit counts that stay in a store."""
    shape = counts.ranks.whole(counts.shape)
    model = recommended(shape, None, None, n_components, parameters)
    model.fit(counts, size_factors=size_factors, **kept)
    return model
