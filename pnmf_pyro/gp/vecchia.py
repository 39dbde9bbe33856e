r"""The sparse factor of a precision that the Vecchia approximation gives, and products with it.

With c(i) the neighbours of spot i (Vecchia 1988; Katzfuss and Guinness 2021, section 2),

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
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from pnmf_pyro.gp.neighbors import Covariance, NeighborGraph

# Numbers in the K x K matrices worked on at once: 2 MB, which a cache holds.
BLOCK = 1 << 18
# Relative to the variance: what is added to the diagonal where a conditional variance falls below
# the first of these, and how far it may grow before that is an error.
JITTERS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
NAMED_AT_MOST = 5

# Products of entries, over all components, up to which threads take longer to begin than they save:
# in two of them, on a busy machine, 7 ms against 4 at 2.5 million and 18 against 18 at 10 million.
FEW_PRODUCTS = 4_000_000

Operation = Callable[[Any, np.ndarray], np.ndarray]


def conditional_weights(
    targets: Tensor,
    sources: Tensor,
    neighbors: Any,
    covariance: Covariance,
    variance: float,
    names: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return the weights and the variance of each target given its neighbours.

    B = k(x, x_c) k(x_c, x_c)^-1 and v = k(x, x) - B k(x_c, x), from one Cholesky factor of the
    covariance of (x_c, x): with (l, d) its last row and C the rest, B = l C^-1 and v = d^2. Where v
    is below 1e-8 of the variance, as for identical spots, the diagonal is raised until it is not.

    Parameters
    ----------
    targets : Tensor of shape (n, q)
        Rows that the covariance is a function of.
    sources : Tensor of shape (N, q)
    neighbors : ndarray or Tensor of int, shape (n, K)
        Rows of `sources`, -1 for none.
    covariance : callable
        ``covariance(A, B)`` of shape (..., n, m) for A (..., n, q) and B (..., m, q), float64.
    variance : float
        k(x, x).
    names : array of shape (n,), optional
        What a target is called in an error; its number unless given.

    Returns
    -------
    weights : Tensor of shape (n, K)
        0 where there is no neighbour.
    variances : Tensor of shape (n,)

    Raises
    ------
    ValueError
        If a covariance is not finite, or not positive definite even with 1e-3 of the variance
        added to its diagonal; the targets are named.
    """
    neighbors = torch.as_tensor(neighbors, dtype=torch.long)
    names = np.arange(len(targets)) if names is None else np.asarray(names)
    K = neighbors.shape[1]
    parts = []
    for start in range(0, len(targets), max(1, BLOCK // (K + 1) ** 2)):
        part = slice(start, start + max(1, BLOCK // (K + 1) ** 2))
        near = neighbors[part]
        joint = _joint_covariance(targets[part], sources, near, covariance, variance)
        factor = _cholesky(joint, variance, names[part])
        row, deviation = factor[:, -1:, :-1], factor[:, -1, -1]
        weights = torch.linalg.solve_triangular(factor[:, :-1, :-1], row, upper=False, left=False)
        parts.append((weights[:, 0].masked_fill(near < 0, 0.0), deviation.square()))
    weights, variances = zip(*parts, strict=True)
    return torch.cat(weights), torch.cat(variances)


def _joint_covariance(
    targets: Tensor, sources: Tensor, near: Tensor, covariance: Covariance, variance: float
) -> Tensor:
    """Covariance of each target's neighbours and, last, the target; (n, K + 1, K + 1).

    A missing neighbour is independent of all.
    """
    rows = torch.cat([sources[near.clamp(min=0)], targets[:, None]], 1)
    joint = covariance(rows, rows)
    absent = torch.cat([near < 0, near.new_zeros(len(near), 1, dtype=torch.bool)], 1)
    joint = joint.masked_fill(absent[:, :, None] | absent[:, None, :], 0.0)
    return joint + torch.diag_embed(variance * absent.to(joint.dtype))


def _cholesky(joint: Tensor, variance: float, names: np.ndarray) -> Tensor:
    """Cholesky factors, with jitter on those matrices that need it."""
    finite = torch.isfinite(joint).flatten(1).all(1)
    _raise_named(names[~finite.numpy()], "is not finite", "Check the kernel's hyperparameters.")
    factor = _factor(joint)
    for jitter in JITTERS:
        poor = _is_poor(factor, variance).nonzero()[:, 0]
        if not len(poor):
            return factor
        raised = joint[poor] + jitter * variance * torch.eye(joint.shape[1], dtype=joint.dtype)
        factor = factor.index_copy(0, poor, _factor(raised))
    poor = _is_poor(factor, variance)
    hint = (
        f"even with {JITTERS[-1]} of the variance on its diagonal. Check that the kernel is "
        "positive definite, or use a shorter lengthscale or a smaller K."
    )
    _raise_named(names[poor.numpy()], "is not positive definite", hint)
    return factor


def _factor(joint: Tensor) -> Tensor:
    """Cholesky factors; NaN where there is none."""
    factor, failed = torch.linalg.cholesky_ex(joint)
    return factor.masked_fill((failed > 0)[:, None, None], torch.nan)


def _is_poor(factor: Tensor, variance: float) -> Tensor:
    return ~(factor[:, -1, -1].detach().square() >= JITTERS[0] * variance)


def _raise_named(names: np.ndarray, what: str, hint: str) -> None:
    if len(names):
        more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
        raise ValueError(
            f"the covariance of spots {names[:NAMED_AT_MOST].tolist()}{more} and their neighbours "
            f"{what}: {hint}"
        )


class VecchiaFactor:
    """Q_l = (I - B_l)^T diag(1 / v_l) (I - B_l), for L components that share their neighbours.

    Vectors x of its methods have shape (L, N) or, R at once, (L, N, R); so have the results, in
    float64. Their spots stand in the order of the user.

    Parameters
    ----------
    graph : NeighborGraph
    weights : Tensor or ndarray of shape (L, N, K) or (1, N, K)
        B_i,c(i) of the spot at each position of the ordering, as `graph.predecessors`. One set
        serves all components that differ in their variance alone.
    variances : Tensor or ndarray of shape (L, N)
        v_i of the spot at each position of the ordering.

    Attributes
    ----------
    matrices : list of 1 or L CSR matrices of shape (N, N)
        I - B in the ordering, where it is unit lower triangular.
    variances : ndarray of shape (L, N)
        v_i in the order of the user.

    Raises
    ------
    ValueError
        If the shapes do not fit together, or a variance is not positive and finite.
    """

    def __init__(self, graph: NeighborGraph, weights: Any, variances: Any):
        weights, variances = (np.asarray(x, dtype=np.float64) for x in (weights, variances))
        self.graph, self.L, self.N = graph, len(variances), graph.N
        sets = {(one, graph.N, graph.K) for one in (1, self.L)}
        if weights.shape not in sets or variances.shape != (self.L, self.N):
            raise ValueError(
                f"weights must have shape (L or 1, {graph.N}, {graph.K}) and variances "
                f"(L, {graph.N}); got {weights.shape} and {variances.shape}."
            )
        bad = ~((variances > 0) & np.isfinite(variances)).all(0)
        _raise_named(graph.order[bad], "gives no positive variance", "Check the kernel.")
        self.variances = variances[:, graph.position]
        self.matrices = _residual_matrices(graph.predecessors, weights)
        self._into: Any = graph.order
        self._back: Any = graph.position
        self._solvers: list[Any] = []  # filled when first needed, shared with copies

    @classmethod
    def from_kernels(
        cls,
        graph: NeighborGraph,
        features: Any,
        covariances: Sequence[Covariance],
        variances: Sequence[float],
    ) -> VecchiaFactor:
        """Compute the weights of L components from their kernels.

        Parameters
        ----------
        graph : NeighborGraph
        features : ndarray or Tensor of shape (N, q)
            What the covariances are functions of.
        covariances : sequence of callable
            See :func:`conditional_weights`.
        variances : sequence of float
            k(x, x) of each.

        Raises
        ------
        ValueError
            See :func:`conditional_weights`.
        """
        rows = torch.as_tensor(features, dtype=torch.float64).detach().cpu()[graph.order]
        with torch.no_grad():
            parts = [
                conditional_weights(
                    rows, rows, graph.predecessors, covariance, variance, graph.order
                )
                for covariance, variance in zip(covariances, variances, strict=True)
            ]
        weights, conditional = zip(*parts, strict=True)
        return cls(graph, torch.stack(weights), torch.stack(conditional))

    def rescaled(self, factors: Any) -> VecchiaFactor:
        """Return components whose covariances are this one's times `factors`, (L,), sharing B."""
        scaled = self._copy()
        scaled.variances = self.variances * np.asarray(factors, dtype=np.float64)[:, None]
        scaled.L = len(scaled.variances)
        return scaled

    def ordered(self) -> VecchiaFactor:
        """Return the factor of the same spots numbered by their position in the ordering."""
        view = self._copy()
        view.graph = NeighborGraph(np.arange(self.N), self.graph.predecessors)
        view.variances = self.variances[:, self._into]
        view._into = view._back = slice(None)
        return view

    def _copy(self) -> VecchiaFactor:
        """Share the matrices and their solvers, and nothing that depends on variances."""
        other = copy.copy(self)
        other._solvers = self._solvers
        for cached in ("log_determinant", "precision_diagonal"):
            other.__dict__.pop(cached, None)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_solvers": []}  # SuperLU's objects cannot be pickled

    @cached_property
    def log_determinant(self) -> np.ndarray:
        """Log determinant of the covariance, sum_i log v_i; (L,)."""
        return np.log(self.variances).sum(1)

    @cached_property
    def precision_diagonal(self) -> np.ndarray:
        """Q_ii = 1 / v_i + sum_j B_ji^2 / v_j, (L, N)."""
        return self._each(lambda A, x: A.power(2).T @ x, self.matrices, 1 / self.variances)

    @property
    def _triangular(self) -> list[Any]:
        """Each I - B, ready to be solved.

        SuperLU in natural order neither pivots nor fills in here: its factor is the matrix itself.
        """
        options = {"permc_spec": "NATURAL", "diag_pivot_thresh": 0.0}
        if not self._solvers:
            self._solvers.extend(splu(A.tocsc(), **options) for A in self.matrices)
        return self._solvers

    def multiply(self, x: Any) -> np.ndarray:
        """Return (I - B) x, what each spot deviates from what its neighbours predict."""
        return self._each(lambda A, x: A @ x, self.matrices, x)

    def multiply_transposed(self, x: Any) -> np.ndarray:
        """Return (I - B)^T x."""
        return self._each(lambda A, x: A.T @ x, self.matrices, x)

    def solve(self, x: Any) -> np.ndarray:
        """Return (I - B)^-1 x."""
        return self._each(lambda LU, x: LU.solve(x), self._triangular, x)

    def solve_transposed(self, x: Any) -> np.ndarray:
        """Return (I - B)^-T x."""
        return self._each(lambda LU, x: LU.solve(x, trans="T"), self._triangular, x)

    def precision(self, x: Any) -> np.ndarray:
        """Return Q x."""
        x = np.asarray(x)
        variances = self.variances if x.ndim == 2 else self.variances[..., None]
        return self.multiply_transposed(self.multiply(x) / variances)

    def rows(self, spots: Any) -> tuple[np.ndarray, list[Any]]:
        """Return the rows of I - B for n spots, and which m spots they combine.

        Returns
        -------
        combined : ndarray of int64, shape (m,)
        matrices : list of 1 or L CSR matrices of shape (n, m)
        """
        parts = [A[self.graph.position[np.asarray(spots)]] for A in self.matrices]
        used, columns = np.unique(parts[0].indices, return_inverse=True)
        shape = (parts[0].shape[0], len(used))
        matrices = [sp.csr_matrix((A.data, columns, A.indptr), shape=shape) for A in parts]
        return self.graph.order[used], matrices

    def _each(self, operation: Operation, matrices: Sequence[Any], x: Any) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64)[:, self._into]
        return on_components(operation, matrices, x)[:, self._back]


def on_components(operation: Operation, matrices: Sequence[Any], x: np.ndarray) -> np.ndarray:
    """Apply one matrix to all components of x, (L, N) or (L, N, R), or one to each.

    Parameters
    ----------
    operation : callable
        ``operation(matrix, columns)`` with columns of shape (N, any).
    """
    if len(matrices) == 1:
        columns = np.moveaxis(x, 0, 1)
        product = operation(matrices[0], columns.reshape(len(columns), -1))
        return np.moveaxis(product.reshape(len(product), *columns.shape[1:]), 1, 0)
    work = sum(one.nnz for one in matrices) * (x[0].size // x.shape[1])
    if work < FEW_PRODUCTS or torch.get_num_threads() == 1:
        return np.stack(list(map(operation, matrices, x)))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # scipy lets go of the lock
        return np.stack(list(threads.map(operation, matrices, x)))


def _residual_matrices(neighbors: np.ndarray, weights: np.ndarray) -> list[Any]:
    """I - B as CSR matrices that share their structure.

    Columns are in order, as scipy would put them, in place, for one matrix and break the others.
    """
    N = len(neighbors)
    columns = np.concatenate([neighbors, np.arange(N, dtype=np.int32)[:, None]], 1)
    order = columns.argsort(1)
    columns = np.take_along_axis(columns, order, 1)
    kept = columns >= 0
    starts = np.r_[0, kept.sum(1).cumsum()]
    index = np.int32 if starts[-1] < np.iinfo(np.int32).max else np.int64
    columns, starts = columns[kept].astype(index), starts.astype(index)
    matrices = []
    for one in weights:
        values = np.take_along_axis(np.concatenate([-one, np.ones((N, 1))], 1), order, 1)[kept]
        matrices.append(sp.csr_matrix((values, columns, starts), shape=(N, N)))
        matrices[-1].has_sorted_indices = True
    return matrices
