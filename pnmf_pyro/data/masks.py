"""Entries of a table that are hidden: nothing is known of them, and no fit sees their values."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pnmf_pyro.data.checks import some_of, warn
from pnmf_pyro.data.counts import Counts, SparseCounts
from pnmf_pyro.data.tables import plain_table

# True where an entry is observed.
Mask: TypeAlias = ArrayLike | sp.spmatrix | sp.sparray | None


def unmasked(X: Any, mask: Mask) -> tuple[Any, Mask]:
    """Return a table and its mask; a masked array of NumPy brings one, and becomes a plain one."""
    if not np.ma.is_masked(X):
        return X, mask
    seen = ~np.ma.getmaskarray(X)
    return X.filled(0), seen if mask is None else seen & _dense(mask, X.shape)


def hide(X: Any, mask: Mask, told: bool = True) -> tuple[Any, SparseCounts | None]:
    """Put zeros where a table is hidden.

    Parameters
    ----------
    X : array, masked array, Tensor, DataFrame or sparse matrix of shape (n, d)
        Counts; anything may stand where they are hidden, such as NaN.
    mask : array or sparse matrix of shape (n, d), optional
        True where an entry is observed.
    told : bool
        Whether to warn of samples and features of which nothing is observed.

    Returns
    -------
    X : of the kind of X
    hidden : SparseCounts of shape (n, d), or None
        Stored where an entry is hidden.

    Raises
    ------
    ValueError
        For a mask of another shape, or of anything but true and false.
    """
    X, mask = unmasked(X, mask)
    if mask is None:
        return X, None
    X = plain_table(X)
    seen = _dense(mask, tuple(X.shape))
    for axis, what in ((1, "samples"), (0, "features")):
        if told and len(empty := np.flatnonzero(~seen.any(axis))):
            warn(
                f"mask hides all entries of {len(empty)} {what}: {some_of(empty.tolist())}. The "
                "prior alone says what they are; consider removing them."
            )
    pattern = sp.csr_matrix(~seen, dtype=np.float32)
    hidden = SparseCounts.from_scipy(pattern)
    return without(X, hidden), hidden if pattern.nnz else None


def without(X: Any, hidden: SparseCounts | None) -> Any:
    """Return a table with zeros at the hidden entries."""
    if hidden is None:
        return X
    X, pattern = plain_table(X), hidden.numpy()
    if isinstance(X, Counts):
        X = X.numpy()
    if sp.issparse(X):
        table = sp.coo_array(X)
        keep = np.asarray(pattern[table.row, table.col]).ravel() == 0
        entries = (table.data[keep], (table.row[keep], table.col[keep]))
        return sp.csr_matrix(entries, shape=X.shape)
    dense = pattern.toarray() != 0
    if isinstance(X, Tensor):
        X = X.to_dense() if X.layout != torch.strided else X
        return torch.where(torch.from_numpy(dense).to(X.device), torch.zeros_like(X), X)
    return X.mask(dense, 0) if hasattr(X, "iloc") else np.where(dense, 0, X)


def _dense(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return a checked mask as an array of bool."""
    values = mask.toarray() if sp.issparse(mask) else np.asarray(mask)
    if values.shape != shape:
        raise ValueError(
            f"mask must have the shape of X, {shape}, and be True where an entry is observed; got "
            f"shape {values.shape}."
        )
    if values.dtype != bool and not np.isin(values, (0, 1)).all():
        raise ValueError(
            "mask must be True where an entry is observed and False where it is hidden; got "
            f"values of type {values.dtype} other than 0 and 1."
        )
    return values.astype(bool)
