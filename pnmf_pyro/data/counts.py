"""A count matrix as the objective sees it: stored entries, and four products over them.

Term (a) of the ELBO, its gradients and every closed form of the model need the stored entries of X
alone. Dense and CSR counts offer the same products, `inner`, `row_sums`, `matmul` and
`transposed_matmul`, written with "entries" e, one number for each stored entry: one formula for X.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike
from pyro.ops.provenance import extract_provenance
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.parallel import ALONE, Ranks
from pnmf_pyro.data.sparse_structure import (
    check_torch_structure,
    checked_csr,
    csr_tensor,
    has_sampled_addmm,
)

# Total of a sample from which on all is computed in float64; float32 failed at ten times as much.
LARGE_TOTAL = 1e5


class Counts(ABC):
    """A non-negative matrix X of shape (n, d), samples by features, of which `values` are stored.

    Counts are no tensor, but stand for their dense one. A function of torch sees :meth:`to_dense`,
    so that `torch.stack([X, X])` is a dense tensor. Pyro, which takes counts as an observed value,
    calls some methods of a tensor; only `expand` and `reshape` of these make X dense.
    """

    values: Tensor
    shape: tuple[int, int]
    ranks: Ranks = ALONE  # among which the rows of a table are shared out
    runs_of_batch: int | None = None  # runs of rows in a shuffled batch, where runs are read

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device that holds the values."""
        return self.values.device

    @abstractmethod
    def inner(self, A: Tensor, B: Tensor) -> Tensor:
        """Return (A B^T)_ij at the stored entries."""

    @abstractmethod
    def row_sums(self, entries: Tensor) -> Tensor:
        """Return sum_j entries_ij in float64, shape (n,)."""

    @abstractmethod
    def matmul(self, entries: Tensor, B: Tensor) -> Tensor:
        """Return sum_j entries_ij B_jl, shape (n, L)."""

    @abstractmethod
    def transposed_matmul(self, entries: Tensor, A: Tensor) -> Tensor:
        """Return sum_i entries_ij A_il, shape (d, L)."""

    @abstractmethod
    def spread(self, of_features: Tensor) -> Tensor:
        """Return the value of its feature, (d,), at each stored entry."""

    @abstractmethod
    def with_values(self, values: Tensor) -> Counts:
        """Return counts with other values at the stored entries."""

    @abstractmethod
    def rows(self, index: Tensor | slice) -> Counts:
        """Return the samples `index` as counts of their own."""

    @abstractmethod
    def columns(self, index: Tensor) -> Counts:
        """Return the features `index` as counts of their own."""

    @abstractmethod
    def to(self, like: torch.device | torch.dtype) -> Counts:
        """Return the same counts on a device, or with values of a floating-point type."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return X as a dense tensor of shape (n, d)."""

    @abstractmethod
    def numpy(self) -> np.ndarray | sp.csr_matrix:
        """Return X as an array, or as a CSR matrix where it is sparse; not copied on the CPU."""

    @property
    @abstractmethod
    def cuts(self) -> list[int]:
        """Row numbers at which X is cut into blocks, see :func:`~pnmf_pyro.data.blocks.at_once`."""

    @cached_property
    def _blocks(self) -> list[tuple[slice, Counts]]:
        slices = [slice(a, b) for a, b in zip(self.cuts[:-1], self.cuts[1:], strict=True)]
        return [(s, self.rows(s)) for s in slices] if len(slices) > 1 else []  # X: a cycle

    def blocks(self) -> Iterator[tuple[slice, Counts]]:
        """Iterate over (rows, counts of these rows), which together are X; several are kept."""
        return iter(self._blocks or [(slice(None), self)])

    @cached_property
    def row_totals(self) -> Tensor:
        """Row totals sum_j X_ij in float64, shape (n,)."""
        return torch.cat([block.row_sums(block.values) for _, block in self.blocks()])

    @cached_property
    def whole(self) -> bool:
        """Whether all values are finite whole numbers of at least 0."""
        low, high = self.values.aminmax() if self.values.numel() else (0, 0)
        whole = (self.values == self.values.floor()).all()
        return bool(low >= 0 and high < float("inf") and whole)

    @cached_property
    def log_factorials(self) -> Tensor:
        """Row sums of log X_ij!, that is sum_j lgamma(X_ij + 1), in float64, shape (n,)."""
        logs = [b.row_sums(torch.lgamma(b.values.double() + 1)) for _, b in self.blocks()]
        return torch.cat(logs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Call a function of torch with dense tensors in its arguments."""
        given = (tuple(args), dict(kwargs or {}))
        args, kwargs = tree_map_only(Counts, lambda counts: counts.to_dense(), given)
        return func(*args, **kwargs)

    def detach(self) -> Counts:
        """Return the counts themselves, which carry no gradient."""
        return self

    data = property(detach)

    def dim(self) -> int:
        """Return the number of dimensions, 2."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of entries n d, stored or not."""
        return self.shape[0] * self.shape[1]

    def expand(self, *shape: int) -> Tensor:
        """Return X as a dense tensor, expanded."""
        return self.to_dense().expand(*shape)

    def reshape(self, *shape: int) -> Tensor:
        """Return X as a dense tensor, reshaped."""
        return self.to_dense().reshape(*shape)


@extract_provenance.register(Counts)
def _without_provenance(counts: Counts) -> tuple[Tensor, frozenset[str]]:
    """Give `pyro.render_model` a tensor, which it marks as what a sample statement gave."""
    return counts.to_dense(), frozenset()


class DenseCounts(Counts):
    """Counts held as a dense tensor of shape (n, d); every entry counts as stored."""

    def __init__(self, values: Tensor):
        self.values = values
        self.shape = (values.shape[0], values.shape[1])

    def inner(self, A: Tensor, B: Tensor) -> Tensor:  # noqa: D102 - the interface says it
        return A @ B.mT

    def row_sums(self, entries: Tensor) -> Tensor:  # noqa: D102
        return entries.sum(1, dtype=torch.float64)

    def matmul(self, entries: Tensor, B: Tensor) -> Tensor:  # noqa: D102
        return entries @ B

    def transposed_matmul(self, entries: Tensor, A: Tensor) -> Tensor:  # noqa: D102
        return entries.mT @ A

    def spread(self, of_features: Tensor) -> Tensor:  # noqa: D102
        return of_features.expand(self.shape)

    def with_values(self, values: Tensor) -> DenseCounts:  # noqa: D102
        return DenseCounts(values)

    def rows(self, index: Tensor | slice) -> DenseCounts:  # noqa: D102
        return DenseCounts(self.values[index])

    def columns(self, index: Tensor) -> DenseCounts:  # noqa: D102
        return DenseCounts(self.values[:, index])

    def to(self, like: torch.device | torch.dtype) -> DenseCounts:  # noqa: D102
        return DenseCounts(self.values.to(like))

    def to_dense(self) -> Tensor:  # noqa: D102
        return self.values

    def numpy(self) -> np.ndarray:  # noqa: D102
        return self.values.cpu().numpy()

    @property
    def cuts(self) -> list[int]:  # noqa: D102
        n, d = self.shape
        return [*range(0, n, at_once(d)), n]


@dataclass(eq=False, repr=False)
class SparseCounts(Counts):
    """Counts held as compressed sparse rows (CSR); only stored entries cost time and memory.

    The entries of row i, `values` (n_stored,) in the columns `columns_of` (n_stored,), are those
    from `row_starts[i]` to `row_starts[i + 1]`, (n + 1,).
    """

    row_starts: Tensor
    columns_of: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_scipy(cls, matrix: sp.csr_matrix) -> SparseCounts:
        """Take over a scipy CSR matrix (or array); its values are not copied."""
        values = matrix.data if matrix.data.flags.writeable else matrix.data.copy()
        return cls(
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            torch.from_numpy(matrix.indices.astype(np.int32)),
            torch.from_numpy(values),
            matrix.shape,
        )

    def _with(self, entries: Tensor) -> Tensor:
        """Return entries as a CSR tensor of the structure of X."""
        return csr_tensor(self._starts, self.columns_of, entries, self.shape)

    @cached_property
    def _pattern(self) -> Tensor:
        return self._with(torch.zeros_like(self.values))

    @cached_property
    def _starts(self) -> Tensor:
        return self.row_starts.int()

    @cached_property
    def _transpose(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row starts and columns of X^T, and where each of its entries stands in X."""
        numbers = np.arange(len(self.values), dtype=np.int32)
        arrays = (numbers, self.columns_of.cpu().numpy(), self._starts.cpu().numpy())
        by_column = sp.csr_matrix(arrays, shape=self.shape).tocsc()
        parts = (by_column.indptr, by_column.indices, by_column.data)
        starts, rows, order = (torch.from_numpy(part).to(self.device) for part in parts)
        return starts, rows, order

    def inner(self, A: Tensor, B: Tensor) -> Tensor:  # noqa: D102
        if has_sampled_addmm(self.device.type, self.dtype):
            return torch.sparse.sampled_addmm(self._pattern, A, B.mT, beta=0.0).values()
        rows = torch.arange(len(A), device=A.device).repeat_interleave(self.row_starts.diff())
        return (A[rows] * B[self.columns_of]).sum(1)

    def row_sums(self, entries: Tensor) -> Tensor:  # noqa: D102
        return torch.segment_reduce(entries.double(), "sum", offsets=self.row_starts)

    def matmul(self, entries: Tensor, B: Tensor) -> Tensor:  # noqa: D102
        return self._with(entries) @ B

    def transposed_matmul(self, entries: Tensor, A: Tensor) -> Tensor:  # noqa: D102
        starts, rows, order = self._transpose
        values = entries.index_select(0, order)
        return csr_tensor(starts, rows, values, (self.shape[1], self.shape[0])) @ A

    def spread(self, of_features: Tensor) -> Tensor:  # noqa: D102
        return of_features.index_select(0, self.columns_of)

    def with_values(self, values: Tensor) -> SparseCounts:  # noqa: D102
        return replace(self, values=values)

    def rows(self, index: Tensor | slice) -> SparseCounts:  # noqa: D102
        if isinstance(index, slice):
            starts = self.row_starts[index.start : index.stop + 1]
            entries: Tensor | slice = slice(int(starts[0]), int(starts[-1]))
            starts = starts - starts[0]
        else:
            first, lengths = self.row_starts[index], self.row_starts.diff()[index]
            starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            offsets = torch.repeat_interleave(first - starts[:-1], lengths)
            entries = offsets + torch.arange(len(offsets), device=self.device)
        shape = (len(starts) - 1, self.shape[1])
        return SparseCounts(starts, self.columns_of[entries], self.values[entries], shape)

    def columns(self, index: Tensor) -> SparseCounts:  # noqa: D102
        selected = self.numpy()[:, index.cpu().numpy()]
        return SparseCounts.from_scipy(selected).to(self.device)

    def to(self, like: torch.device | torch.dtype) -> SparseCounts:  # noqa: D102
        values = self.values.to(like)
        starts, columns = self.row_starts.to(values.device), self.columns_of.to(values.device)
        return SparseCounts(starts, columns, values, self.shape)

    def to_dense(self) -> Tensor:  # noqa: D102
        return self._with(self.values).to_dense()

    def numpy(self) -> sp.csr_matrix:  # noqa: D102
        parts = (self.values, self.columns_of, self.row_starts)
        return sp.csr_matrix(tuple(part.cpu().numpy() for part in parts), shape=self.shape)

    @property
    def cuts(self) -> list[int]:  # noqa: D102
        marks = self.row_starts.new_tensor(range(at_once(1), len(self.values), at_once(1)))
        return sorted({0, *torch.searchsorted(self.row_starts, marks).tolist(), self.shape[0]})


# Matrices that torch, numpy and scipy have, and what `Counts.numpy` returns.
MatrixLike: TypeAlias = Tensor | np.ndarray | sp.spmatrix | sp.sparray
Table: TypeAlias = np.ndarray | sp.csr_matrix | sp.csr_array
# What a fit takes: as counts tables of pandas and lists of rows as well, and beside them arrays.
CountsLike: TypeAlias = Counts | MatrixLike | ArrayLike
MaybeArray: TypeAlias = ArrayLike | None


def as_counts(X: Counts | MatrixLike) -> Counts:
    """View a matrix of shape (n, d) as counts, without checking its entries beyond their type.

    float64 stays float64. Other real numbers become float32, or float64 where a sample has more
    than `LARGE_TOTAL` counts; anything else is a ValueError. Repeated entries of a sparse matrix
    are added up, stored zeros dropped, on a copy.
    """
    if isinstance(X, Counts):
        return X
    if len(X.shape) != 2:
        raise ValueError(f"X must have shape (samples, features); got {tuple(X.shape)}.")
    counts: Counts
    if isinstance(X, Tensor) and X.layout == torch.strided:
        counts = DenseCounts(_floating(X.detach()))
    elif isinstance(X, Tensor):
        counts = SparseCounts.from_scipy(_torch_to_scipy(X.detach())).to(X.device)
    elif sp.issparse(X):
        counts = SparseCounts.from_scipy(_canonical(checked_csr(X)))
    else:
        counts = DenseCounts(torch.from_numpy(np.array(_real(np.asarray(X)))))
    return counts.to(torch.float64) if (counts.row_totals > LARGE_TOTAL).any() else counts


def transposed_counts(X: MatrixLike) -> Counts:
    """View a matrix of shape (d, n), features by samples, as counts; see :func:`as_counts`."""
    if isinstance(X, Tensor) and X.layout != torch.strided:
        return as_counts(_torch_to_scipy(X.detach()).T).to(X.device)
    return as_counts((checked_csr(X) if sp.issparse(X) else X).T)


def _floating(X: Tensor) -> Tensor:
    if X.is_complex():
        raise ValueError(f"X must hold real numbers; got {X.dtype}.")
    if X.dtype in (torch.float32, torch.float64):
        return X
    return X.double() if (X > LARGE_TOTAL).any() else X.float()


def _real(X: Table) -> Table:
    if X.dtype.kind not in "biuf":
        raise ValueError(f"X must hold real numbers; got {X.dtype}.")
    if X.dtype in (np.float32, np.float64):
        return X
    largest = np.asarray(X.data if sp.issparse(X) else X).max(initial=0)
    return X.astype(np.float64 if float(largest) > LARGE_TOTAL else np.float32)


def _canonical(matrix: sp.csr_matrix) -> sp.csr_matrix:
    matrix = _real(matrix)
    if matrix.has_canonical_format and np.count_nonzero(matrix.data) == matrix.nnz:
        return matrix
    matrix = matrix.copy()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _torch_to_scipy(X: Tensor) -> sp.csr_matrix:
    check_torch_structure(X)
    coo = X.cpu().to_sparse_coo().coalesce()
    rows, columns = coo.indices().numpy()
    values = _floating(coo.values()).numpy()
    return _canonical(sp.csr_matrix((values, (rows, columns)), shape=tuple(X.shape)))
