"""The structure of sparse matrices, checked before compiled code trusts it.

Compiled code of scipy and torch reads and writes wherever indices point. Those of a damaged file
or of arrays changed by hand point outside of the matrix.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

DAMAGED = (
    "X must be a sparse matrix whose indices fit its shape; got {}. It is damaged: build it again "
    "from its source, for example with scipy.sparse.csr_matrix."
)


def checked_csr(X: sp.spmatrix | sp.sparray) -> sp.csr_matrix:
    """Return a sparse matrix as CSR; raise a ValueError where its structure is damaged.

    The arrays of a CSR matrix are shared.
    """
    if X.format not in ("csr", "csc", "bsr", "coo"):
        X = X.tocsr()
    if X.format == "coo":
        for name, numbers, size in zip(("row", "column"), (X.row, X.col), X.shape, strict=True):
            _check_range(f"{name} numbers", numbers, size, len(X.data))
    else:
        _check_compressed(X)
    return sp.csr_matrix(X)


def _check_compressed(X: sp.spmatrix | sp.sparray) -> None:
    sizes = X.shape
    if X.format == "bsr":
        sizes = tuple(size // block for size, block in zip(X.shape, X.blocksize, strict=True))
    lines, across = sizes[::-1] if X.format == "csc" else sizes
    starts = X.indptr
    if len(starts) != lines + 1 or starts[0] != 0 or starts[-1] != len(X.indices):
        raise ValueError(
            DAMAGED.format(
                f"an indptr of {len(starts)} numbers that ends at {starts[-1:]} for "
                f"{lines} lines and {len(X.indices)} indices"
            )
        )
    if (starts[1:] < starts[:-1]).any():
        raise ValueError(DAMAGED.format("an indptr that decreases"))
    _check_range("indices", X.indices, across, len(X.data))


def _check_range(what: str, numbers: np.ndarray, size: int, n_stored: int) -> None:
    if len(numbers) != n_stored:
        raise ValueError(DAMAGED.format(f"{len(numbers)} {what} for {n_stored} entries"))
    low, high = (numbers.min(), numbers.max()) if len(numbers) else (0, 0)
    if low < 0 or (high >= size and len(numbers)):
        raise ValueError(DAMAGED.format(f"{what} from {low} to {high} for a size of {size}"))


def check_torch_structure(X: Tensor) -> None:
    """Raise a ValueError where the indices of a sparse tensor do not fit its shape."""
    try:
        if X.layout == torch.sparse_coo:
            parts = (X._indices(), X._values(), X.shape)
            torch.sparse_coo_tensor(*parts, check_invariants=True)
            return
        by_row = X.layout in (torch.sparse_csr, torch.sparse_bsr)
        starts = X.crow_indices() if by_row else X.ccol_indices()
        indices = X.col_indices() if by_row else X.row_indices()
        torch.sparse_compressed_tensor(
            starts, indices, X.values(), X.shape, layout=X.layout, check_invariants=True
        )
    except RuntimeError as error:
        raise ValueError(DAMAGED.format(str(error).splitlines()[0])) from error


def csr_tensor(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a CSR tensor of a checked structure."""
    _spend_csr_warning()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@cache
def _spend_csr_warning() -> None:
    """Let torch say unheard, as it does once in a process, that CSR is a young feature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.zeros(1, 1).to_sparse_csr()


@cache
def has_sampled_addmm(device: str, dtype: torch.dtype) -> bool:
    """Say whether this build of torch has the sampled product for CSR."""
    one = torch.ones(1, 1, device=device, dtype=dtype)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        torch.sparse.sampled_addmm(csr_tensor(ends, ends[:1], one[0], (1, 1)), one, one, beta=0.0)
    except RuntimeError:
        return False
    return True
