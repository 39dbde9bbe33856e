"""Products and solves with I - B, where B has entries below its diagonal only, front by front.

B has K entries in each row, at the predecessors of a position, with values for each of C sets of
weights. All sets are worked on at once: entry i C + c of a long vector is position i of set c, so
that what lies together is needed together. Rows of a front do not need one another. A solve
takes one product with a sparse matrix for each front, from the first to the last, and a solve with
the transpose goes from the last to the first. Torch has the same products on the CPU and on CUDA.

Positions between one grid and the next, see :mod:`~pnmf_pyro.gp.fronts`, are a *block*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pnmf_pyro.data.isolation import openmp
from pnmf_pyro.data.sparse_structure import csr_tensor
from pnmf_pyro.gp.fronts import fronts, grid_sizes

Map = Callable[[Tensor], Tensor]

# Entries of which a product in another precision makes a copy at a time.
CHUNK = 1 << 18


class Rows:
    """Rows of a sparse matrix, of which some can be taken without a copy.

    Parameters
    ----------
    starts : ndarray of shape (n + 1,)
        Where the entries of each row begin, on the CPU; a copy lies where the values are.
    columns : Tensor of int32, shape (m,)
    values : Tensor of shape (m,)
    width : int
        Number of columns.
    """

    def __init__(self, starts: np.ndarray, columns: Tensor, values: Tensor, width: int):
        self.starts, self.columns, self.values, self.width = starts, columns, values, width
        self._starts = torch.from_numpy(starts).to(values.device)

    @classmethod
    def of_neighbors(cls, near: np.ndarray, weights: Tensor, n_places: int) -> Rows:
        """Return the rows (n C, n_places C) with weights (n, C, K) at neighbours `near`, (n, K).

        Where a neighbour is -1, for none, its weights are 0.
        """
        n, C, K = weights.shape
        columns = torch.from_numpy(np.maximum(near, 0).astype(np.int32)).to(weights.device)[:, None]
        columns = columns * C + torch.arange(C, dtype=torch.int32, device=columns.device)[:, None]
        small = n * C * K < np.iinfo(np.int32).max
        starts = np.arange(n * C + 1, dtype=np.int32 if small else np.int64) * K
        return cls(starts, columns.flatten(), weights.flatten(), n_places * C)

    def part(self, first: int, stop: int, dtype: torch.dtype, entries: Map | None = None) -> Tensor:
        """Return the rows from `first` to before `stop` as CSR, of a function of the entries."""
        a, b = int(self.starts[first]), int(self.starts[stop])
        starts = (self._starts[first : stop + 1] - a).int()
        values = self.values[a:b].to(dtype)
        values = values if entries is None else entries(values)
        return csr_tensor(starts, self.columns[a:b], values, (stop - first, self.width))

    def transposed(self, first: int, stop: int) -> Rows:
        """Return the transpose of the rows from `first` to before `stop`.

        Columns from `stop` on must have no entries there, and are left out.
        """
        a, b = self.starts[first], self.starts[stop]
        starts = (self.starts[first : stop + 1] - a).astype(np.int32)
        entries = (part[a:b].cpu().numpy() for part in (self.values, self.columns))
        turned = sp.csr_matrix((*entries, starts), shape=(stop - first, stop)).tocsc()
        columns, values = (
            torch.from_numpy(part).to(self.values.device) for part in (turned.indices, turned.data)
        )
        return Rows(turned.indptr, columns, values, stop - first)

    def add_product(
        self, out: Tensor, x: Tensor, sign: int = 1, entries: Map | None = None
    ) -> None:
        """Add to `out`, (n, E), the product with x, (width, E), or subtract it with sign -1."""
        n = len(out)
        cuts = np.searchsorted(self.starts, np.arange(CHUNK, self.starts[n], CHUNK))
        for a, b in pairwise(np.unique([0, *cuts, n]).tolist()):
            add_product(out[a:b], self.part(a, b, x.dtype, entries), x, sign)


def add_product(out: Tensor, matrix: Tensor, x: Tensor, sign: int = 1) -> None:
    """Add the product of a sparse matrix, or subtract it with sign -1, in place."""
    if x.shape[1] == 1:  # much faster than a product with a matrix of one column
        out, x = out[:, 0], x[:, 0]
        torch.addmv(out, matrix, x, alpha=sign, out=out)
    else:
        torch.addmm(out, matrix, x, alpha=sign, out=out)


class Block:
    """The positions of B from `start` to before `stop`: rows, and columns as `transposed`.

    Vectors x are of shape (N C, E), and solves change them in place.
    """

    def __init__(self, rows: Rows, predecessors: np.ndarray, C: int, start: int, stop: int):
        self.rows, self.start, self.stop = rows, start * C, stop * C
        self.transposed = rows.transposed(self.start, self.stop)
        self.fronts = [(a * C, b * C) for a, b in fronts(predecessors, start, stop)]
        dtype = rows.values.dtype
        self._parts = list(self._make_parts(dtype))
        self._before = self.transposed.part(0, self.start, dtype)

    def solve(self, x: Tensor) -> None:
        """Solve (I - B) x = b for the block, given x before it and b in it."""
        for a, b, predicting, _ in self._parts_as(x.dtype):
            add_product(x[a:b], predicting, x)

    def solve_transposed(self, x: Tensor) -> None:
        """Solve (I - B)^T x = b for the block, given x after it; b loses its part before it."""
        own = x[self.start : self.stop]
        for a, b, _, predicted in reversed(self._parts_as(x.dtype)):
            add_product(x[a:b], predicted, own)
        if self.start:
            same = x.dtype == self._before.dtype
            before = self._before if same else self.transposed.part(0, self.start, x.dtype)
            add_product(x[: self.start], before, own)

    def pass_on(self, x: Tensor, share: Tensor) -> None:
        """Add to each position j what those i of the block pass on, abs(B_ij) share_i x_i."""
        passed = torch.zeros_like(x[self.start : self.stop])
        for a, b in reversed(self.fronts):
            add_product(x[a:b], self.transposed.part(a, b, x.dtype, torch.abs), passed)
            passed[a - self.start : b - self.start] = share[a:b] * x[a:b]
        self.transposed.add_product(x[: self.start], passed, entries=torch.abs)

    def _parts_as(self, dtype: torch.dtype) -> list[tuple[int, int, Tensor, Tensor]]:
        same = dtype == self.rows.values.dtype
        return self._parts if same else list(self._make_parts(dtype))

    def _make_parts(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Each front with its rows and its columns."""
        for a, b in self.fronts:
            yield a, b, self.rows.part(a, b, dtype), self.transposed.part(a, b, dtype)


class Triangle:
    """I - B for C sets of weights, or for all L components where C is 1.

    Vectors x of its methods, and the results, have shape (N, L, R) and are contiguous.

    Parameters
    ----------
    predecessors : ndarray of int32, shape (N, K)
        Earlier positions, as :func:`~pnmf_pyro.gp.fronts.in_fronts` has them; -1 for none. Any
        order is right, and this one is fast.
    weights : Tensor of shape (N, C, K)
        B; 0 for predecessors that there are not. Solves are fastest for x of the same type.
    """

    def __init__(self, predecessors: np.ndarray, weights: Tensor):
        self.predecessors, self.weights = predecessors, weights
        N, self.C, _ = weights.shape
        self.rows = Rows.of_neighbors(predecessors, weights, N)
        self.blocks = [
            Block(self.rows, predecessors, self.C, *ends) for ends in pairwise([0, *grid_sizes(N)])
        ]

    def __reduce__(self) -> tuple[type, tuple[np.ndarray, Tensor]]:
        return type(self), (self.predecessors, self.weights)

    def flat(self, x: Tensor) -> Tensor:
        """Return x, (n, L, R), as the blocks take it, (n C, L R / C)."""
        return x.view(len(x) * self.C, -1)

    def multiply(self, x: Tensor) -> Tensor:
        """Return (I - B) x."""
        out = self.flat(x).clone()
        self.rows.add_product(out, self.flat(x), -1)
        return out.view(x.shape)

    def multiply_transposed(self, x: Tensor) -> Tensor:
        """Return (I - B)^T x."""
        out, given = self.flat(x).clone(), self.flat(x)
        for block in self.blocks:
            own = given[block.start : block.stop]
            block.transposed.add_product(out[: block.stop], own, -1)
        return out.view(x.shape)

    def solve(self, x: Tensor) -> Tensor:
        """Return (I - B)^-1 x."""
        out = self.flat(x).clone()
        with in_one_thread():
            for block in self.blocks:
                block.solve(out)
        return out.view(x.shape)

    def solve_transposed(self, x: Tensor) -> Tensor:
        """Return (I - B)^-T x."""
        out = self.flat(x).clone()
        with in_one_thread():
            for block in reversed(self.blocks):
                block.solve_transposed(out)
        return out.view(x.shape)

    def passed_on(self, x: Tensor) -> Iterator[Tensor]:
        """Let each position, from the last one on, pass all it has to its predecessors.

        Each gets a share in proportion to abs(B); without weights none gets any. Give what the
        positions of each grid have when all later ones have passed on theirs, (M, L, R), from the
        finest grid on; x, (N, L, R), changes.
        """
        given, share = self.flat(x), self._shares
        with in_one_thread():
            for block in reversed(self.blocks):
                yield given[: block.stop].view(-1, *x.shape[1:])
                block.pass_on(given, share)

    @cached_property
    def _shares(self) -> Tensor:
        """1 / sum_j abs(B_ij) of each row, (N C, 1); 0 without weights."""
        total = torch.linalg.vector_norm(self.weights, 1, -1).view(-1, 1)  # makes no copy of B
        return torch.where(total > torch.finfo(total.dtype).tiny, 1 / total, 0)

    def grid_diagonals(self, D: Tensor) -> Iterator[Tensor]:
        """Return the diagonals of (I - B)_MM^T diag(D) (I - B)_MM for the grids, each (M, L, 1).

        M are the sizes of the grids, from the coarsest on, and D has shape (N, L, 1).
        """
        diagonal = self.flat(D).clone()
        for block in self.blocks:
            own = self.flat(D)[block.start : block.stop]
            block.transposed.add_product(diagonal[: block.stop], own, entries=torch.square)
            yield diagonal[: block.stop].clone().view(-1, *D.shape[1:])


def in_one_thread() -> AbstractContextManager:
    """Work in one thread: a front has too little work for several, which wait for one another."""
    return openmp().limit(limits=1)
