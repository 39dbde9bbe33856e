"""What users hand over as a table of counts: one rule for what it may be, and what it means.

A matrix, of numbers, is what comes out: an array, a tensor, a sparse matrix, or counts. Everything
that has no table, or more than one, or hides entries, is refused here, by name.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pnmf_pyro.data.counts import Counts, CountsLike, MatrixLike, Table

if TYPE_CHECKING:
    from anndata import AnnData
    from typing_extensions import TypeIs

WANTED = (
    "a matrix of counts, samples by features: an array, tensor, DataFrame, sparse matrix or AnnData"
)

# Objects that hold several tables, and how to name one of them.
SEVERAL = {"SpatialData": "X.tables['table']", "MuData": "X['rna']"}


def is_anndata(thing: object) -> TypeIs[AnnData]:
    """Say whether something is an AnnData object, without importing anndata."""
    anndata = sys.modules.get("anndata")
    return anndata is not None and isinstance(thing, anndata.AnnData)


def counts_of(adata: AnnData, layer: str | None = None) -> Any:
    """Return X or a layer of an AnnData object in memory, sparse where it is sparse."""
    if layer is not None and layer not in adata.layers:
        names = [name for name in adata.layers if name is not None]  # which newer ones call X
        raise ValueError(f"layer={layer!r} is not there; its layers are {names}.")
    X = adata.X if layer is None else adata.layers[layer]
    if X is None:
        raise ValueError(
            f"adata has no X; name a layer of counts, of {list(adata.layers)}, or take the object "
            "that was fitted: the command line writes results without counts."
        )
    for read in ("to_memory", "compute"):  # of a file, of dask
        if hasattr(X, read):
            return getattr(X, read)()
    return X if sp.issparse(X) else np.asarray(X)


def refuse_masked(name: str, values: object) -> None:
    """Raise a ValueError for a NumPy array with masked entries, which have values below the mask.

    An array that masks none of its entries is one like any other.
    """
    if np.ma.is_masked(values):
        raise ValueError(
            f"{name} has masked entries, and what is below a mask is not data. Leave their samples "
            f"or features out, or put numbers in their place, such as {name}.filled(0)."
        )


def check_order(X: Any, **beside: Any) -> None:
    """Raise a ValueError for a table beside X that names the same samples in another order.

    Tables are taken row by row. Those of a mask are compared in their features as well.
    """
    for name, table in beside.items():
        for axis, of_anndata in (("index", "obs_names"), ("columns", "var_names")):
            known: Any = getattr(X, of_anndata if is_anndata(X) else axis, None)
            found: Any = getattr(table, axis, None)
            if not (hasattr(known, "equals") and hasattr(found, "equals")):
                continue  # names of a table of pandas alone
            if not known.equals(found) and set(known) == set(found):
                raise ValueError(
                    f"{name} names what X has in another order: its {axis} begins with "
                    f"{found[0]!r} and that of X with {known[0]!r}. Bring both to one order by "
                    "name, such as table.reindex(X.index), or pass arrays to go by position."
                )


def plain_table(X: Any) -> Any:
    """Return a table as it is computed with: the counts of an AnnData object, lists as an array.

    DataFrames stay, since they have names. What holds no table is a ValueError.
    """
    kind = type(X).__name__
    if isinstance(X, str | bytes | os.PathLike):
        raise ValueError(
            f"X must be {WANTED}; got {X!r}. Read a file first, with pandas.read_csv or "
            "anndata.read_h5ad."
        )
    if kind in SEVERAL:
        raise ValueError(
            f"X must be {WANTED}; got {kind}. Pass one of its tables, {SEVERAL[kind]}."
        )
    refuse_masked("X", X)
    if is_anndata(X):
        X = counts_of(X)
    if isinstance(X, Tensor):
        X = _plain_tensor(X)
    if _is_sparse_frame(X) and not _has_no_fill_but_zero(X):
        X = X.sparse.to_dense()
    if isinstance(X, list | tuple | np.matrix) or not hasattr(X, "shape"):
        X = _array(X)
    if len(X.shape) != 2:
        raise ValueError(
            f"X must be {WANTED}; got {kind} of shape {tuple(X.shape)}. Reshape your data "
            "with X.reshape(1, -1) if it is a single sample."
        )
    return X


def number_stored(X: Any) -> int:
    """Return how many entries a table stores: those of a sparse one, or all."""
    if isinstance(X, Counts):
        return X.values.numel()
    if isinstance(X, Tensor):
        return X.numel() if X.layout == torch.strided else int(X._nnz())
    if _is_sparse_frame(X):
        return round(X.sparse.density * X.size) if X.size else 0
    return int(X.nnz) if sp.issparse(X) else X.shape[0] * X.shape[1]


def _plain_tensor(X: Tensor) -> Tensor:
    X = X.detach()
    if X.is_nested or X.device.type == "meta":
        kind = "nested" if X.is_nested else "meta"
        raise ValueError(f"X must hold numbers in a matrix; got a {kind} tensor.")
    if X.is_quantized:
        return X.dequantize()
    return X.to_dense() if X.layout == torch.sparse_coo and X.dense_dim() else X


def numeric_matrix(X: CountsLike) -> Counts | MatrixLike:
    """Return counts, a tensor, a sparse matrix or an array of numbers, of two dimensions."""
    X = plain_table(X)
    matrix: Counts | MatrixLike
    if isinstance(X, Counts | Tensor) or hasattr(X, "tocsr"):
        matrix = cast(Counts | MatrixLike, X)
    elif _has_no_fill_but_zero(X):
        matrix = X.sparse.to_coo()
    else:
        matrix = _array(X)
    if 0 in matrix.shape:
        raise ValueError(f"X must have samples and features; got shape {tuple(matrix.shape)}.")
    if isinstance(matrix, np.ndarray) and matrix.dtype.kind not in "biuf":
        return _as_numbers(matrix)
    return matrix


def _has_no_fill_but_zero(X: Any) -> bool:
    """Whether this is a DataFrame all of whose columns are sparse, with zeros left out."""
    return _is_sparse_frame(X) and all(kind.fill_value == 0 for kind in X.dtypes)


def _is_sparse_frame(X: Any) -> bool:
    frame = hasattr(X, "sparse") and hasattr(X, "dtypes")
    return frame and all("Sparse" in str(kind) for kind in X.dtypes)


def _array(X: Any) -> np.ndarray:
    try:
        return np.asarray(X)
    except (TypeError, ValueError) as error:
        raise ValueError(f"X must be {WANTED}, with rows of one length: {error}") from error


def _as_numbers(matrix: np.ndarray) -> np.ndarray:
    try:
        if matrix.dtype.kind in "OV":
            return matrix.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"X must hold numbers; got entries of type {matrix.dtype} such as {matrix.flat[0]!r}. "
        "Drop columns of text and convert the rest to numbers."
    )


def hash_of(*parts: Any) -> str:
    """Return a hash of arrays, with their shapes and types, and of plain values."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


def hash_of_table(X: Table) -> str:
    """Return a hash of a table, by which it is known."""
    parts = (X,) if isinstance(X, np.ndarray) else (X.data, X.indices, X.indptr)
    return hash_of(X.shape, *parts)
