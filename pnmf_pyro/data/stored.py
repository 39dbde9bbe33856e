"""Counts that stay in a store and are read a slice of rows at a time, in the order of the rows.

While one slice is worked on, a thread reads the next. The first pass checks all entries and keeps
the totals of rows and columns; later passes find out whether a slice has changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import numpy as np
import scipy.sparse as sp
import torch
from scipy import linalg
from torch import Tensor

from pnmf_pyro.data.checks import check_matrix
from pnmf_pyro.data.counts import Counts, DenseCounts, SparseCounts, Table, as_counts
from pnmf_pyro.data.parallel import ALONE, Ranks
from pnmf_pyro.data.tables import hash_of, hash_of_table

# Stored entries of a slice.
SLICE_ENTRIES = 1 << 20

# Runs of rows in a shuffled batch. Fewer are read faster, and more are more alike.
RUNS = 16

Read = Callable[[Sequence[slice]], Table]


@dataclass
class FirstPass:
    """What the first pass over a store finds of its slices, one after another."""

    row_totals: list[Tensor] = field(default_factory=list)
    log_factorials: list[Tensor] = field(default_factory=list)
    marks: list[tuple[int, float]] = field(default_factory=list)
    whole: bool = True


class StoredCounts(Counts):
    """Counts X of shape (N, D) in a store; of several ranks, each reads slices of its own alone.

    Rows in any order are read run by run.

    Parameters
    ----------
    read : callable
        Function from runs of rows, slices with a start and a stop, to these rows one after
        another, an array or a CSR matrix.
    shape : tuple of (int, int)
    n_stored : int
        Number of stored entries.
    name : str
        Name of the store, for errors.
    ranks : Ranks
        Processes among which the rows are shared out.

    Attributes
    ----------
    first : int
        Number of the first row of this rank in the store.
    digest : str
        What the counts of all ranks are known by.

    Raises
    ------
    ValueError
        For entries that are no counts, see :func:`~pnmf_pyro.data.checks.check_matrix`, and for a
        store that cannot be read.
    """

    runs_of_batch = RUNS

    def __init__(
        self,
        read: Read,
        shape: tuple[int, int],
        n_stored: int,
        name: str,
        ranks: Ranks = ALONE,
    ):
        N, D = (int(n) for n in shape)
        ranks.agree(shape=(N, D), stored=n_stored)
        size = max(1, SLICE_ENTRIES * N // max(1, n_stored))
        self.ranks, cuts = ranks.sharing([*range(0, N, size), N])
        self.read, self.name, self.first = read, name, cuts[0]
        self._cuts = [cut - self.first for cut in cuts]
        self.shape = (self._cuts[-1], D)
        n_stored = n_stored * self._cuts[-1] // max(1, N)
        self._as_it_is: dict[int, bool] = {}
        self._digests: list[str] = []
        found, dtype = FirstPass(), torch.float32
        column_totals = torch.zeros(D, dtype=torch.float64)
        for _, block in self._slices(self._checked):
            dtype = torch.promote_types(dtype, block.dtype)
            totals = block.row_sums(block.values)
            found.row_totals.append(totals)
            found.log_factorials.append(block.log_factorials)
            found.whole &= block.whole
            found.marks.append(_mark(block))
            column_totals += _column_totals(block)
        digests: list[str] = []
        for of_rank, whole, own in self.ranks.gathered((dtype, found.whole, self._digests)):
            dtype, found.whole = torch.promote_types(dtype, of_rank), found.whole and whole
            digests += own
        self.digest = hash_of(N, D, digests)
        self._marks = dict(zip(self._cuts[:-1], found.marks, strict=True))
        self.values = torch.zeros(1, dtype=dtype).expand(n_stored)  # which takes no memory
        self.row_totals = torch.cat(found.row_totals)
        self.log_factorials = torch.cat(found.log_factorials)
        self.whole, self.column_totals = found.whole, column_totals

    @property
    def cuts(self) -> list[int]:  # noqa: D102 - the interface says it
        return self._cuts

    def blocks(self) -> Iterator[tuple[slice, Counts]]:
        """Iterate over (rows, counts of these rows), each read while the last is worked on."""
        return self._slices(self._unchanged)

    def rows(self, index: Tensor | slice) -> Counts:  # noqa: D102
        return self._typed(self._read([index] if isinstance(index, slice) else _runs(index)))

    def matmul(self, entries: Tensor, B: Tensor) -> Tensor:
        """Return X B, of shape (N, L); `entries` must be `values`, which stand for those of X."""
        return torch.cat(
            [block.matmul(block.values, B.to(block.dtype)) for _, block in self.blocks()]
        )

    def transposed_matmul(self, entries: Tensor, A: Tensor) -> Tensor:
        """Return X^T A, of shape (D, L); `entries` must be `values`, which stand for those of X."""
        found = A.new_zeros(self.shape[1], A.shape[1])
        for rows, block in self.blocks():
            found += block.transposed_matmul(block.values, A[rows].to(block.dtype)).to(A)
        return found

    def to(self, like: torch.device | torch.dtype) -> StoredCounts:
        """Return the counts themselves, if they are of this type and device."""
        if like in (self.dtype, self.device):
            return self
        self._refuse(f"conversion to {like}")

    def inner(self, A: Tensor, B: Tensor) -> NoReturn:  # noqa: D102
        self._refuse("a number for each stored entry")

    def row_sums(self, entries: Tensor) -> NoReturn:  # noqa: D102
        self._refuse("a number for each stored entry")

    def spread(self, of_features: Tensor) -> NoReturn:  # noqa: D102
        self._refuse("a number for each stored entry")

    def with_values(self, values: Tensor) -> NoReturn:  # noqa: D102
        self._refuse("other values")

    def columns(self, index: Tensor) -> NoReturn:  # noqa: D102
        self._refuse("a choice of features (y_batch_size)")

    def to_dense(self) -> NoReturn:  # noqa: D102
        self._refuse("all counts at once")

    def numpy(self) -> NoReturn:  # noqa: D102
        self._refuse("all counts at once")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"This needs {what}, and the counts are in a store, {self.name}, that is read by "
            "slices. Read it into memory, such as with anndata.read_h5ad, and pass that."
        )

    def _slices(self, read: Callable[[int, int], Counts]) -> Iterator[tuple[slice, Counts]]:
        with ThreadPoolExecutor(1, "pnmf-pyro-store") as thread:
            pairs = list(zip(self._cuts[:-1], self._cuts[1:], strict=True))
            ahead = thread.submit(read, *pairs[0])
            for number, (start, stop) in enumerate(pairs):
                block = ahead.result()
                if number + 1 < len(pairs):
                    ahead = thread.submit(read, *pairs[number + 1])
                yield slice(start, stop), block

    def _read(self, runs: Sequence[slice]) -> Table:
        runs = [slice(run.start + self.first, run.stop + self.first) for run in runs]
        rows = f"rows {min(run.start for run in runs)} to {max(run.stop for run in runs) - 1}"
        try:
            table = self.read(runs)
        except Exception as error:  # whatever the store's library raises
            raise ValueError(
                f"{self.name} cannot be read at {rows}: {error}. The file may be cut off or "
                "damaged; write it anew."
            ) from error
        if table.shape != (sum(run.stop - run.start for run in runs), self.shape[1]):
            raise ValueError(f"{self.name} is cut off: {rows} are not there.")
        return sp.csr_matrix(table) if sp.issparse(table) else np.asarray(table)

    def _checked(self, start: int, stop: int) -> Counts:
        table = self._read([slice(start, stop)])
        try:
            block = check_matrix(table)
            self._as_it_is[start] = _is_plain(table, block)
            self._digests.append(hash_of_table(block.numpy()))
            return block
        except ValueError as error:
            raise ValueError(f"{self.name}, {self._named(start, stop)}: {error}") from error

    def _unchanged(self, start: int, stop: int) -> Counts:
        block = self._typed(self._read([slice(start, stop)]), self._as_it_is[start])
        if _mark(block) != self._marks[start]:
            raise ValueError(
                f"{self.name} changed while it was read: {self._named(start, stop)} are not what "
                "they were. Fit a copy that nothing writes to."
            )
        return block

    def _named(self, start: int, stop: int) -> str:
        return f"rows {start + self.first} to {stop - 1 + self.first}"

    def _typed(self, table: Table, as_it_is: bool = False) -> Counts:
        block = SparseCounts.from_scipy(table) if as_it_is else as_counts(table)
        block = block if block.dtype == self.dtype else block.to(self.dtype)
        return PassingCounts(**vars_of(block)) if isinstance(block, SparseCounts) else block


def joined(read: Callable[[slice], Table], several: Read | None = None) -> Read:
    """Return what reads runs of rows, from what reads one, or from what reads several at once."""

    def of_runs(runs: Sequence[slice]) -> Table:
        if len(runs) == 1:
            return read(runs[0])
        if several is not None:
            return several(runs)
        parts = [read(run) for run in runs]
        return sp.vstack(parts, "csr") if sp.issparse(parts[0]) else np.concatenate(parts)

    return of_runs


def _runs(index: Tensor) -> list[slice]:
    """Return the runs of numbers that follow one another in an index."""
    cuts = (torch.diff(index) != 1).nonzero()[:, 0] + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in index.tensor_split(cuts.cpu())]


def _is_plain(table: Any, block: Counts) -> bool:
    """Whether a slice is as counts are held, so that later passes need not look."""
    same = table.dtype in (np.float32, np.float64) and sp.issparse(table)
    return bool(same and table.has_canonical_format and table.nnz == block.values.numel())


def _mark(block: Counts) -> tuple[int, float]:
    """What a slice is known by: the number and the sum of its entries."""
    return block.values.numel(), float(block.values.sum(dtype=torch.float64))


def _column_totals(block: Counts) -> Tensor:
    found = torch.zeros(block.shape[1], dtype=torch.float64)
    if isinstance(block, SparseCounts):
        return found.index_add_(0, block.columns_of.long(), block.values.double())
    assert isinstance(block, DenseCounts)
    return block.values.sum(0, dtype=torch.float64)


class PassingCounts(SparseCounts):
    """Rows that are used once: their transpose, which costs more than a product, is not made."""

    def transposed_matmul(self, entries: Tensor, A: Tensor) -> Tensor:  # noqa: D102
        parts = (entries.numpy(), self.columns_of.numpy(), self._starts.numpy())
        return torch.from_numpy(sp.csr_matrix(parts, shape=self.shape).T @ A.numpy())

    @property
    def cuts(self) -> list[int]:  # noqa: D102
        return [0, self.shape[0]]


def vars_of(block: SparseCounts) -> dict[str, Any]:
    """What a block is made of."""
    return {one.name: getattr(block, one.name) for one in fields(block)}


class StoredMatrix:
    """a^-1 X b^-1 in float64, with the products that a decomposition needs, block by block.

    Where ranks share the rows, products that are over rows are of the rows of this one, and sums
    over rows are of all.

    Parameters
    ----------
    counts : Counts of shape (N, D)
        Counts in a store, or rows of a rank.
    rows, columns : ndarray of shape (N,) and (D,), optional
        a and b; 1 unless given.
    """

    ndim, dtype = 2, np.dtype(np.float64)

    def __init__(
        self,
        counts: Counts,
        rows: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ):
        self.counts, self.shape, self.ranks = counts, counts.shape, counts.ranks
        self.a = np.ones(self.shape[0]) if rows is None else rows
        self.b = np.ones(self.shape[1]) if columns is None else columns

    def divided(
        self, rows: np.ndarray | None = None, columns: np.ndarray | None = None
    ) -> StoredMatrix:
        """Return the matrix with rows and columns divided by more."""
        a = self.a if rows is None else self.a * rows
        return StoredMatrix(self.counts, a, self.b if columns is None else self.b * columns)

    def __matmul__(self, B: np.ndarray) -> np.ndarray:
        scaled = B / self.b[:, None]
        found = np.empty((self.shape[0], B.shape[1]))
        for rows, block in self.counts.blocks():
            found[rows] = block.numpy().astype(np.float64, copy=False) @ scaled
        found /= self.a[:, None]
        return found

    def left(self, A: np.ndarray) -> np.ndarray:
        """Return the product of the transpose with A, (D, K)."""
        found = np.zeros((self.shape[1], A.shape[1]))
        for rows, block in self.counts.blocks():
            block_of_A = A[rows] / self.a[rows, None]
            found += block.numpy().astype(np.float64, copy=False).T @ block_of_A
        return self.ranks.total(torch.from_numpy(found)).numpy() / self.b[:, None]

    def sum(self, axis: int | None = None) -> np.ndarray | float:
        """Return sums along an axis, or that of all; one more pass where it is scaled."""
        if axis == 1:
            return (self @ np.ones((self.shape[1], 1)))[:, 0]
        found = self.left(np.ones((self.shape[0], 1)))[:, 0]
        return found if axis == 0 else float(found.sum())

    def mean(self) -> float:
        """Return the mean of all entries."""
        N, D = self.counts.ranks.whole(self.counts.shape)
        return float(self.sum()) / (N * D)


def decomposition_by_passes(
    X: StoredMatrix, L: int, random_state: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first L singular vectors and values as scikit-learn's `randomized_svd` does.

    Its steps on a matrix as it is (transpose=False), with two passes over the store for each. Of U
    each rank has its own rows.
    """
    Q = np.random.RandomState(random_state).normal(size=(X.shape[1], L + 10))
    for _ in range(7 if min(X.counts.ranks.whole(X.counts.shape)) > 10 * L else 4):
        Q, _ = linalg.lu(X.left(X @ Q), permute_l=True)
    Q = _orthonormal(X @ Q, X.ranks)
    Uhat, S, Vt = linalg.svd(X.left(Q).T, full_matrices=False)
    U = Q @ Uhat[:, :L]
    largest = np.stack(X.ranks.gathered(U[np.abs(U).argmax(0), np.arange(L)]))
    largest = largest[np.abs(largest).argmax(0), np.arange(L)]
    signs = np.where(largest < 0, -1.0, 1.0)
    U *= signs
    return U, S[:L], Vt[:L] * signs[:, None]


def _orthonormal(A: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Return the rows of this rank of an orthonormal basis of the columns of A.

    Each rank factorises its own rows, and all of them the triangles that this leaves.
    """
    Q, R = linalg.qr(A, mode="economic", overwrite_a=True)
    triangles = ranks.gathered(R)
    start = sum(len(one) for one in triangles[: ranks.rank])
    together, _ = linalg.qr(np.concatenate(triangles), mode="economic")
    return Q @ together[start : start + len(R)]
