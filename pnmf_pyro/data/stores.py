"""Stores of AnnData, .h5ad and .zarr: where counts lie in them, opened for reading by slices."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.sparse as sp

from pnmf_pyro.data.counts import Table
from pnmf_pyro.data.parallel import ALONE, Ranks
from pnmf_pyro.data.stored import Read, StoredCounts, joined

ENDINGS = (".h5ad", ".zarr")


def is_zarr(path: str | os.PathLike) -> bool:
    """Say whether a path is a folder of zarr, whatever its name."""
    return any((Path(path) / name).exists() for name in (".zgroup", ".zattrs", "zarr.json"))


def is_store(thing: object) -> bool:
    """Say whether something is a path that may be a store."""
    if not isinstance(thing, str | os.PathLike):
        return False
    return Path(thing).suffix in ENDINGS or is_zarr(thing)


def needed(name: str) -> ModuleType:
    """Import a package that stores need, or say how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"Stores need {package}: pip install {package}") from error


@contextmanager
def opened(path: str | os.PathLike, writable: bool = False) -> Iterator[Any]:
    """Open a store and close it; one that is not there or no store is an error that says so."""
    path = Path(path)
    needed("anndata")
    if not path.exists():
        raise ValueError(f"There is no {path}.")
    mode = "r+" if writable else "r"
    if path.is_dir():
        yield _zarr_group(path, mode)
        return
    try:
        file = needed("h5py").File(path, mode)
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error}. It is cut off, or no .h5ad file."
        ) from error
    with file:
        yield file


def _zarr_group(path: Path, mode: str) -> Any:
    zarr = needed("zarr")
    # What metadata gathered in one place say may be older than the store, and cannot be added to.
    direct = {} if zarr.__version__.startswith("2.") else {"use_consolidated": False}
    try:
        return zarr.open_group(str(path), mode=mode, **direct)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path} is no .zarr store that can be read: {error}") from error


def gather_metadata(path: Path) -> None:
    """Gather the metadata of a .zarr store, and of those around it, anew where they had them."""
    for folder in (path, *path.parents):
        plain, gathered = folder / "zarr.json", folder / ".zmetadata"
        if gathered.exists() or (plain.exists() and "consolidated_metadata" in plain.read_text()):
            with warnings.catch_warnings():  # that version 3 of zarr does not specify it
                warnings.simplefilter("ignore")
                needed("zarr").consolidate_metadata(str(folder))


def stored_counts(
    store: Any, name: str, layer: str | None = None, ranks: Ranks = ALONE
) -> StoredCounts:
    """Return the counts of a store that is open, X or a layer; its first pass is made at once."""
    where = "X" if layer is None else f"layers/{layer}"
    if where not in store:
        layers = list(store["layers"]) if "layers" in store else []
        raise ValueError(f"{name} has no {where}; its layers are {layers}.")
    table = store[where]
    if hasattr(table, "shape"):
        return StoredCounts(joined(table.__getitem__), table.shape, table.size, name, ranks)
    sparse_dataset = getattr(needed("anndata.io"), "sparse_dataset", None)
    if sparse_dataset is None:
        raise ImportError("Stores need anndata of version 0.11 or later: pip install -U anndata")
    try:
        dataset, starts = sparse_dataset(table), table["indptr"][:]
        shape, kind, n_stored = dataset.shape, dataset.format, int(table["data"].shape[0])
    except Exception as error:  # whatever the store's library raises
        raise ValueError(f"{name} has no table of counts at {where}: {error}") from error
    if kind != "csr":
        raise ValueError(
            f"{where} of {name} is stored by columns ({kind}), and a fit reads rows. Write it as "
            "CSR: adata.X = adata.X.tocsr(), then adata.write."
        )

    def read(run: slice) -> Table:
        # By itself: to select rows of the dataset, anndata looks up versions of packages each time.
        within = starts[run.start : run.stop + 1]
        first, last = int(within[0]), int(within[-1])
        parts = (table[name][first:last] for name in ("data", "indices"))
        return sp.csr_matrix((*parts, within - first), (len(within) - 1, shape[1]))

    several = by_annbatch(dataset) if Path(name).is_dir() else None
    return StoredCounts(joined(read, several), shape, n_stored, name, ranks)


def by_annbatch(dataset: Any) -> Read | None:
    """Return what reads runs of rows of sparse counts in .zarr at once; None without annbatch."""
    try:
        annbatch, abc = import_module("annbatch"), import_module("annbatch.abc")
    except ImportError:
        return None

    class Runs(abc.Sampler):  # type: ignore[name-defined]
        """One batch of the runs that are asked for."""

        batch_size, shuffle = None, False

        def validate(self, n_obs: int) -> None: ...

        def n_batches(self, n_obs: int) -> int:
            return 1

        def _sample(self, n_obs: int) -> Iterator[dict[str, Any]]:
            yield {"requests": self.rows, "splits": [np.arange(len(self.rows))]}

    sampler = Runs()
    loader = annbatch.Loader(batch_sampler=sampler, preload_to_gpu=False).add_dataset(dataset)

    def read(runs: Sequence[slice]) -> Table:
        sampler.rows = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        (batch,) = loader
        return batch["X"]

    return read
