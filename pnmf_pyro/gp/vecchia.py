"""The sparse factor of a precision that the Vecchia approximation gives, and products with it.

With c(i) the neighbours of place i (Vecchia 1988; Katzfuss and Guinness 2021, section 2),

    f_i | f_c(i) ~ N( sum_k B_ik f_k, v_i ),
    B_i,c(i) = k(x_i, x_c) k(x_c, x_c)^-1,      v_i = k(x_i, x_i) - B_i,c(i) k(x_c, x_i),

so that (I - B) f has independent entries of variance v_i, and the precision of f is

    Q = (I - B)^T diag(1 / v) (I - B),          log det Q^-1 = sum_i log v_i.

In the ordering, B has entries below its diagonal only: Q^-1 and its root are triangular solves.
Everything here is float64 on the CPU, where sparse solves are at home.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.cholesky import jittered_cholesky
from pnmf_pyro.gp.neighbors import NeighborGraph
from pnmf_pyro.gp.ordering import Covariance

# Numbers in the K x K matrices worked on at once: 2 MB, which a cache holds.
BLOCK = 1 << 18
# Conditional variance, relative to the variance, below which a diagonal is raised; and by how much.
LEAST = 1e-8
# Products of entries up to which threads cost more than they save, see docs/performance.md.
FEW_PRODUCTS = 4_000_000

Array = np.ndarray | Tensor
Matrix = TypeVar("Matrix", bound=sp.csr_matrix | SuperLU)


def conditional_weights(
    targets: Places,
    sources: Places,
    neighbors: Array,
    covariance: Covariance,
    variance: float,
    names: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weights (n, K) and the variances (n,) of n targets given their neighbours.

    With (l, d) the last row of the Cholesky factor of the covariance of (x_c, x), and C the rest,
    B = l C^-1 and v = d^2. Where v is below 1e-8 of the variance k(x, x), as for identical places,
    the diagonal is raised until it is not. Neighbours, (n, K), are numbers of sources, or -1 for
    none, with the weight 0. Errors give the `names`, (n,), of targets.
    """
    neighbors = torch.as_tensor(neighbors, dtype=torch.long)
    names = np.arange(len(targets)) if names is None else names
    step = max(1, BLOCK // (neighbors.shape[1] + 1) ** 2)
    parts = []
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        near = neighbors[part]
        joint = _joint_covariance(targets[part], sources, near, covariance, variance)
        factor = _factors(joint, variance, names[part])
        row, deviation = factor[:, -1:, :-1], factor[:, -1, -1]
        weights = torch.linalg.solve_triangular(factor[:, :-1, :-1], row, upper=False, left=False)
        parts.append((weights[:, 0].masked_fill(near < 0, 0.0), deviation.square()))
    weights, variances = zip(*parts, strict=True)
    return torch.cat(weights), torch.cat(variances)


def _joint_covariance(
    targets: Places, sources: Places, near: Tensor, covariance: Covariance, variance: float
) -> Tensor:
    """Return the covariance of each target's neighbours and, last, the target; (n, K + 1, K + 1).

    A missing neighbour is independent of all.
    """
    together = Places.concatenate([sources[near.clamp(min=0)], targets[:, None]])
    joint = covariance(together, together)
    absent = torch.cat([near < 0, near.new_zeros(len(near), 1, dtype=torch.bool)], 1)
    joint = joint.masked_fill(absent[:, :, None] | absent[:, None, :], 0.0)
    return joint + torch.diag_embed(variance * absent.to(joint.dtype))


def _factors(joint: Tensor, variance: float, names: np.ndarray) -> Tensor:
    """Cholesky factors, with jitter on those matrices alone that need it."""
    factor, failed = torch.linalg.cholesky_ex(joint)
    enough = (failed == 0) & (factor[:, -1, -1].square() >= LEAST * variance)
    poor = (~enough).nonzero()[:, 0]
    if not len(poor):
        return factor
    named = names[poor.numpy()]
    mended = jittered_cholesky(joint[poor], LEAST, "neighbours of places", named)
    return factor.index_copy(0, poor, mended)


class VecchiaFactor:
    """Q_l = (I - B_l)^T diag(1 / v_l) (I - B_l), for L components that share their neighbours.

    Vectors x of its methods have shape (L, N) or, R at once, (L, N, R); so have the results, in
    float64. Their places stand in the order of the user.

    Parameters
    ----------
    graph : NeighborGraph
    weights : Tensor of shape (L, N, K) or (1, N, K)
        B_i,c(i) of the place at each position of the ordering, as `graph.predecessors`.
    variances : Tensor of shape (L, N)
        v_i of the place at each position of the ordering; as an attribute, in the user's order.

    Attributes
    ----------
    matrices : list of 1 or L CSR matrices of shape (N, N)
        I - B in the ordering, where it is unit lower triangular.
    """

    def __init__(self, graph: NeighborGraph, weights: Tensor, variances: Tensor):
        self.graph, self.L, self.N = graph, len(variances), graph.N
        self.variances = variances.numpy()[:, graph.position]
        self.matrices = _residual_matrices(graph.predecessors, weights.numpy())
        self._into: np.ndarray | slice = graph.order
        self._back: np.ndarray | slice = graph.position
        self._solvers: list[SuperLU] = []  # filled when first needed, shared with `ordered`
        self._cache = Cache()

    def ordered(self) -> VecchiaFactor:
        """Return the factor of the same places numbered by their position in the ordering."""
        view = copy.copy(self)
        view.__dict__.pop("precision_diagonal", None)
        view._cache = Cache()
        view.graph = NeighborGraph(np.arange(self.N), self.graph.predecessors)
        view.variances = self.variances[:, self._into]
        view._into = view._back = slice(None)
        return view

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_solvers": []}  # SuperLU's objects cannot be pickled

    @cached_property
    def precision_diagonal(self) -> np.ndarray:
        """Q_ii = 1 / v_i + sum_j B_ji^2 / v_j, (L, N)."""
        return self._each(lambda A, x: A.power(2).T @ x, self.matrices, 1 / self.variances)

    def roughness(self, V: Tensor) -> Tensor:
        """Return the row sums of the squares of (I - B) V, (L, N), for V of shape (L, N, R)."""

        def make() -> Tensor:
            total = np.zeros(V.shape[:2])
            for column in V.detach().unbind(-1):  # one by one: memory
                total += np.square(self.multiply(column.double().cpu()))
            return torch.from_numpy(total)

        return self._cache("roughness", [V], make)

    @property
    def _triangular(self) -> list[SuperLU]:
        """Each I - B, ready to be solved.

        SuperLU in natural order neither pivots nor fills in here: its factor is the matrix itself.
        """
        options = {"permc_spec": "NATURAL", "diag_pivot_thresh": 0.0}
        if not self._solvers:
            self._solvers.extend(splu(A.tocsc(), **options) for A in self.matrices)
        return self._solvers

    def multiply(self, x: Array) -> np.ndarray:
        """Return (I - B) x, the deviation of each place from what its neighbours predict."""
        return self._each(lambda A, x: A @ x, self.matrices, x)

    def multiply_transposed(self, x: Array) -> np.ndarray:
        """Return (I - B)^T x."""
        return self._each(lambda A, x: A.T @ x, self.matrices, x)

    def solve(self, x: Array) -> np.ndarray:
        """Return (I - B)^-1 x."""
        return self._each(lambda LU, x: LU.solve(x), self._triangular, x)

    def solve_transposed(self, x: Array) -> np.ndarray:
        """Return (I - B)^-T x."""
        return self._each(lambda LU, x: LU.solve(x, trans="T"), self._triangular, x)

    def precision(self, x: Array) -> np.ndarray:
        """Return Q x."""
        residual = self.multiply(x)
        return self.multiply_transposed(residual / alongside(self.variances, residual))

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, list[sp.csr_matrix]]:
        """Return the numbers (m,) of the places that n rows of I - B combine, and the rows.

        The rows are 1 or L CSR matrices of shape (n, m).
        """
        parts = [A[self.graph.position[index]] for A in self.matrices]
        used, columns = np.unique(parts[0].indices, return_inverse=True)
        shape = (parts[0].shape[0], len(used))
        matrices = [sp.csr_matrix((A.data, columns, A.indptr), shape=shape) for A in parts]
        return self.graph.order[used], matrices

    def _each(
        self,
        operation: Callable[[Matrix, np.ndarray], np.ndarray],
        matrices: Sequence[Matrix],
        x: Array,
    ) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64)[:, self._into]
        return on_components(operation, matrices, x)[:, self._back]


def on_components(
    operation: Callable[[Matrix, np.ndarray], np.ndarray], matrices: Sequence[Matrix], x: np.ndarray
) -> np.ndarray:
    """Apply one matrix to all components of x, (L, N) or (L, N, R), or one to each.

    The operation is called with a matrix and columns of shape (N, any).
    """
    if len(matrices) == 1:
        columns = np.moveaxis(x, 0, 1)
        product = operation(matrices[0], columns.reshape(len(columns), -1))
        return np.moveaxis(product.reshape(len(product), *columns.shape[1:]), 1, 0)
    work = sum(A.nnz for A in matrices) * (x[0].size // x.shape[1])
    if work < FEW_PRODUCTS or torch.get_num_threads() == 1:
        return np.stack(list(map(operation, matrices, x)))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # scipy lets go of the lock
        return np.stack(list(threads.map(operation, matrices, x)))


def alongside(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return weights (L, N) in a shape that broadcasts with x, (L, N) or (L, N, R)."""
    return weights if x.ndim == 2 else weights[..., None]


def _residual_matrices(predecessors: np.ndarray, weights: np.ndarray) -> list[sp.csr_matrix]:
    """I - B as CSR matrices that share their structure, their columns in order."""
    N = len(predecessors)
    columns = np.concatenate([predecessors, np.arange(N, dtype=np.int32)[:, None]], 1)
    order = columns.argsort(1)
    columns = np.take_along_axis(columns, order, 1)
    present = columns >= 0
    starts = np.r_[0, present.sum(1).cumsum()]
    index = np.int32 if starts[-1] < np.iinfo(np.int32).max else np.int64
    columns, starts = columns[present].astype(index), starts.astype(index)
    matrices = []
    for B in weights:
        values = np.take_along_axis(np.concatenate([-B, np.ones((N, 1))], 1), order, 1)[present]
        matrices.append(sp.csr_matrix((values, columns, starts), shape=(N, N)))
    return matrices
