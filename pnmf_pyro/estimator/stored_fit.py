"""A fit of counts that stay in a store: what it reads of it, and results written into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pnmf_pyro.data.memory import available_memory
from pnmf_pyro.data.parallel import Ranks, processes
from pnmf_pyro.data.stored import StoredCounts, joined
from pnmf_pyro.data.stores import gather_metadata, needed, opened, stored_counts
from pnmf_pyro.data.tables import hash_of
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.inputs import Scales
from pnmf_pyro.estimator.shares import refuse
from pnmf_pyro.estimator.size import BYTES

if TYPE_CHECKING:
    from anndata import AnnData

# A name that an element has until it takes the place of an older one.
NEW, OLD = "~pnmf-new", "~pnmf-old"


def fit_store(
    path: str | os.PathLike,
    keys: AnnDataKeys,
    scales: Scales,
    parameters: dict[str, Any],
    train: Callable[[StoredCounts], Any],
) -> Any:
    """Fit the counts of a store without space, write what is found into it, return the model."""
    _refuse_what_needs_memory(path, keys, scales, parameters)
    if not os.access(path, os.W_OK) and os.path.exists(path):
        raise PermissionError(
            f"{path} is read-only, and the results are written into it. Make it writable, or fit "
            "a copy."
        )
    ranks, io = processes(), needed("anndata.io")
    refuse(ranks, parameters)
    with opened(path) as store:
        _refuse_places(path, store, keys, parameters)
        names = np.asarray(io.read_elem(store["var"]).index, dtype=object)
        ranks.agree(features=hash_of(list(names)), size_factors=hash_of(scales.size_factors))
        model = train(stored_counts(store, str(path), keys.layer, ranks))
    model.feature_names_in_ = names
    model.keys_ = AnnDataKeys(keys.layer, keys.spatial_key, keys.batch_key)
    ranks.by_first(lambda: write_fit(path, keys, model))
    return model


def write_fit(
    path: str | os.PathLike, keys: AnnDataKeys, model: Any, obsm: Mapping[str, Any] | None = None
) -> None:
    """Write a fit of the counts of a store into it, and of `obsm` what the store does not have."""
    with opened(path) as store:
        results = _without_counts(store)
        for name in {*(obsm or ())} - {*store.get("obsm", ())}:
            results.obsm[name] = (obsm or {})[name]
    write_elements(path, _elements(keys.write(results, model), keys.key_added))


def exceeds_memory(path: str | os.PathLike, layer: str | None = None) -> bool:
    """Say whether the counts of a store, in memory for a fit, would take more than there is."""
    with opened(path) as store:
        table = store.get("X" if layer is None else f"layers/{layer}")
        if table is None:
            return False
        sparse = not hasattr(table, "shape") and "data" in table
        n_stored = table["data"].shape[0] if sparse else np.prod(getattr(table, "shape", 0))
    return _too_many(processes(), int(n_stored))


def _too_many(ranks: Ranks, n_stored: int) -> bool:
    """Say whether so many counts, in the memory of each rank, would take more than there is."""
    return ranks.any(ranks.size * BYTES["count"] * n_stored > available_memory())


def large_table(
    adata: Any, keys: AnnDataKeys, scales: Scales, parameters: dict[str, Any]
) -> StoredCounts | None:
    """Return the counts of an AnnData object in a file that are too many for memory.

    None where they fit, and where X is not in a file.
    """
    X = adata.X if keys.layer is None else adata.layers.get(keys.layer)
    in_file = adata.isbacked or hasattr(X, "dask")
    if X is None or not in_file:
        return None
    name = str(adata.filename) if adata.isbacked else "adata"
    group = getattr(X, "group", None)
    n_stored = int(np.prod(X.shape)) if group is None else int(group["data"].shape[0])
    ranks = processes()
    if not _too_many(ranks, n_stored):
        return None
    _refuse_what_needs_memory(name, keys, scales, parameters)
    refuse(ranks, parameters)
    names = hash_of(list(adata.var_names))
    ranks.agree(features=names, size_factors=hash_of(scales.size_factors))
    if keys.spatial_key is not None and keys.spatial_key in adata.obsm:
        _say_no_space(name, keys.spatial_key)

    def read(run: slice) -> Any:
        rows = X[run]
        return rows.compute() if hasattr(rows, "compute") else rows

    return StoredCounts(joined(read), X.shape, n_stored, name, ranks)


def _refuse_what_needs_memory(
    path: str | os.PathLike, keys: AnnDataKeys, scales: Scales, parameters: dict[str, Any]
) -> None:
    unread = {
        "mask": scales.mask,
        "batches": scales.batches,
        "covariates": scales.covariates,
        "batch_key": keys.batch_key,
        "copy": keys.copy or None,
        "spatial": parameters.get("spatial") or None,
        "prior": parameters.get("prior"),
        "y_batch_size": parameters.get("y_batch_size"),
        "non_spatial_components": parameters.get("non_spatial_components"),
    }
    given = [name for name, value in unread.items() if value is not None]
    likelihood = parameters.get("likelihood")
    if likelihood not in (None, "poisson"):
        given.append("likelihood")
    if parameters.get("training_mode", "natural") != "natural":
        given.append("training_mode")
    if parameters.get("device", "cpu") != "cpu":
        given.append("device")
    if given:
        raise ValueError(
            f"{given[0]} is not for a store that is read by slices, {path}. Leave it out, or read "
            "the store into memory: pnmf_pyro.fit(anndata.read_h5ad(path), ...)."
        )


def _refuse_places(
    path: str | os.PathLike, store: Any, keys: AnnDataKeys, parameters: dict[str, Any]
) -> None:
    places = keys.spatial_key is not None and parameters.get("spatial") is not False
    if places and "obsm" in store and keys.spatial_key in store["obsm"]:
        _say_no_space(path, keys.spatial_key)


def _say_no_space(name: str | os.PathLike, key: str | None) -> NoReturn:
    raise ValueError(
        f"{name} has places, obsm[{key!r}], and a fit by slices knows no space. Pass "
        "spatial_key=None for a fit without space, or read the store into memory: "
        "pnmf_pyro.fit(anndata.read_h5ad(path))."
    )


def _without_counts(store: Any) -> AnnData:
    """The samples and features of a store, without X and without what else it holds."""
    anndata, io = needed("anndata"), needed("anndata.io")
    return anndata.AnnData(obs=io.read_elem(store["obs"]), var=io.read_elem(store["var"]))


def _elements(results: AnnData, key: str) -> dict[str, Any]:
    """What a fit found, by where it lies in a store."""
    found: dict[str, Any] = {f"obsm/{name}": values for name, values in results.obsm.items()}
    found |= {f"varm/{name}": values for name, values in results.varm.items()}
    found |= {"obs": results.obs, "var": results.var}
    return {**found, f"uns/{key}": results.uns[key]}


def write_elements(path: str | os.PathLike, elements: dict[str, Any]) -> None:
    """Write elements into a store beside what is there; where one cannot be written, none is.

    All are written under names of their own first, and then take the places of older ones.
    """
    io = needed("anndata.io")
    with opened(path, writable=True) as store:
        new = {f"{where}{NEW}": value for where, value in elements.items()}
        try:
            for group in ("obsm", "varm", "uns"):
                if group not in store:
                    io.write_elem(store, group, {})
            for where, value in new.items():
                group, _, name = where.rpartition("/")
                io.write_elem(store[group] if group else store, name, value)
        except BaseException:
            for where in new:
                if where in store:
                    del store[where]
            raise
        for where in elements:
            if Path(path).is_dir():
                _replace_folder(Path(path) / where)
                continue
            if where in store:
                del store[where]
            store.move(f"{where}{NEW}", where)
    if Path(path).is_dir():
        gather_metadata(Path(path))


def _replace_folder(folder: Path) -> None:
    """Let the new folder of an element take the place of the old one, which stays until then."""
    new, old = (folder.with_name(folder.name + ending) for ending in (NEW, OLD))
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
