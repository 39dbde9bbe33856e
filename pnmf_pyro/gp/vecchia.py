"""The sparse factor of a precision that the Vecchia approximation gives, and products with it.

With c(i) the neighbours of place i (Vecchia 1988; Katzfuss and Guinness 2021, section 2),

    f_i | f_c(i) ~ N( sum_k B_ik f_k, v_i ),
    B_i,c(i) = k(x_i, x_c) k(x_c, x_c)^-1,      v_i = k(x_i, x_i) - B_i,c(i) k(x_c, x_i),

so that (I - B) f has independent entries of variance v_i, and the precision of f is

    Q = (I - B)^T diag(1 / v) (I - B),          log det Q^-1 = sum_i log v_i.

In the ordering, B has entries below its diagonal only: Q^-1 and its root are triangular solves, see
:mod:`~pnmf_pyro.gp.triangular`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.cholesky import jittered_cholesky
from pnmf_pyro.gp.neighbors import NeighborGraph
from pnmf_pyro.gp.triangular import Triangle

# Numbers in the K x K matrices worked on at once: 1 MB, which a cache holds.
BLOCK = 1 << 17
# Conditional variance, relative to the variance, below which a diagonal is raised; and by how much.
LEAST = 1e-8
# Numbers in the columns of V that are multiplied at once.
COLUMNS = 1 << 22

Array = np.ndarray | Tensor
# C covariances among places of shape (..., n), of shape (C, ..., n, n), float64.
Covariances = Callable[[Places], Tensor]


def conditional_weights(
    targets: Places,
    sources: Places,
    neighbors: Array,
    covariances: Covariances,
    C: int = 1,
    dtype: torch.dtype = torch.float64,
    names: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weights (n, C, K) and the variances (C, n) of n targets given their neighbours.

    With (l, d) the last row of the Cholesky factor of the covariance of (x_c, x), and C the rest,
    B = l C^-1 and v = d^2. Where v is below 1e-8 of the variance k(x, x), as for identical places,
    the diagonal is raised until it is not. Neighbours, (n, K), are numbers of sources, or -1 for
    none, with the weight 0. Weights are of `dtype`. Errors give the `names`, (n,), of targets.
    """
    neighbors, device = torch.as_tensor(neighbors), targets.coordinates.device
    n, K = neighbors.shape
    names = np.arange(n) if names is None else names
    weights = torch.empty(n, C, K, dtype=dtype, device=device)
    variances = torch.empty(C, n, dtype=torch.float64, device=device)
    step = at_once(C * (K + 1) ** 2, BLOCK)
    for start in range(0, n, step):  # into place: weights are the largest array there is
        part = slice(start, start + step)
        near = neighbors[part].to(device, torch.long)
        factor = _factors(_joint_covariance(targets[part], sources, near, covariances), names[part])
        row, deviation = factor[..., -1:, :-1], factor[..., -1, -1]
        found = torch.linalg.solve_triangular(factor[..., :-1, :-1], row, upper=False, left=False)
        weights[part] = found[..., 0, :].masked_fill(near < 0, 0.0).movedim(0, 1)
        variances[:, part] = deviation.square()
    return weights, variances


def _joint_covariance(
    targets: Places, sources: Places, near: Tensor, covariances: Covariances
) -> Tensor:
    """Return the covariances of each target's neighbours and, last, the target.

    A missing neighbour is independent of all. The result is (C, n, K + 1, K + 1).
    """
    together = Places.concatenate([sources[near.clamp(min=0)], targets[:, None]])
    joint = covariances(together)
    if (near >= 0).all():
        return joint
    absent = torch.nn.functional.pad(near < 0, (0, 1))
    scale = joint[..., -1:, -1] * absent
    joint = joint.masked_fill(absent[:, :, None] | absent[:, None, :], 0.0)
    return joint + torch.diag_embed(scale)


def _factors(joint: Tensor, names: np.ndarray) -> Tensor:
    """Cholesky factors, with jitter on those matrices alone that need it."""
    factor, failed = torch.linalg.cholesky_ex(joint)
    enough = (failed == 0) & (factor[..., -1, -1].square() >= LEAST * joint[..., -1, -1])
    poor = (~enough).nonzero(as_tuple=True)
    if not len(poor[0]):
        return factor
    named = names[poor[1].cpu().numpy()]
    mended = jittered_cholesky(joint[poor], LEAST, "neighbours of places", named)
    return factor.index_put(poor, mended)


class VecchiaFactor:
    """Q_l = (I - B_l)^T diag(1 / v_l) (I - B_l), for L components that share their neighbours.

    Vectors x of its methods have shape (L, N) or, R at once, (L, N, R); so have the results, in
    float64 on the device of the weights. Their places stand in the order of the user.

    Parameters
    ----------
    graph : NeighborGraph
    weights : Tensor of shape (N, L, K) or (N, 1, K)
        B_i,c(i) of the place at each position of the ordering, as `graph.predecessors`. They are
        held in this type, in which the preconditioner of a posterior works.
    variances : Tensor of shape (L, N), float64
        v_i of the place at each position of the ordering; as an attribute, in the user's order.

    Attributes
    ----------
    triangle : Triangle
        I - B in the ordering.
    order, position : Tensor of int64, shape (N,)
        As of the graph, on the device.
    """

    def __init__(self, graph: NeighborGraph, weights: Tensor, variances: Tensor):
        self.graph, self.L, self.N = graph, len(variances), graph.N
        self.triangle = Triangle(graph.predecessors, weights)
        self.order, self.position = (
            torch.from_numpy(numbers).to(weights.device)
            for numbers in (graph.order, graph.position)
        )
        self.variances = variances.index_select(1, self.position)
        self._cache = Cache()

    @cached_property
    def grid_diagonals(self) -> list[Tensor]:
        """Diagonals of Q_M in the ordering, for the grids from the coarsest on, each (M, L, 1)."""
        return list(self.triangle.grid_diagonals(self.ordered(1 / self.variances)))

    def of(self, components: slice) -> VecchiaFactor:
        """Return the factor of some of the components."""
        weights = self.triangle.weights
        own = weights if weights.shape[1] == 1 else weights[:, components].contiguous()
        variances = self.ordered_variances[:, components, 0].T
        make = partial(VecchiaFactor, self.graph, own, variances)
        return self._cache(str(components), [self.variances], make)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.triangle.weights.dtype

    @property
    def precision_diagonal(self) -> Tensor:
        """Q_ii = 1 / v_i + sum_j B_ji^2 / v_j, (L, N)."""
        return self.restored(self.grid_diagonals[-1])[..., 0]

    def roughness(self, V: Tensor) -> Tensor:
        """Return the row sums of the squares of (I - B) V, (L, N), for V of shape (L, N, R)."""

        def make() -> Tensor:
            total = torch.zeros_like(self.variances)
            for columns in V.detach().split(at_once(self.L * self.N, COLUMNS), -1):
                total += self.multiply(columns).square().sum(-1)
            return total

        return self._cache("roughness", [V], make)

    def multiply(self, x: Array) -> Tensor:
        """Return (I - B) x, the deviation of each place from what its neighbours predict."""
        return self._each(self.triangle.multiply, x)

    def multiply_transposed(self, x: Array) -> Tensor:
        """Return (I - B)^T x."""
        return self._each(self.triangle.multiply_transposed, x)

    def solve(self, x: Array) -> Tensor:
        """Return (I - B)^-1 x."""
        return self._each(self.triangle.solve, x)

    def solve_transposed(self, x: Array) -> Tensor:
        """Return (I - B)^-T x."""
        return self._each(self.triangle.solve_transposed, x)

    def precision(self, x: Array) -> Tensor:
        """Return Q x."""
        return self._each(self.ordered_precision, x)

    def ordered_precision(self, x: Tensor) -> Tensor:
        """Return Q x for x of shape (N, L, R), places in the ordering."""
        residual = self.triangle.multiply(x).div_(self.ordered_variances.to(x.dtype))
        return self.triangle.multiply_transposed(residual)

    def neighbors(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers, (n, K), of the neighbours of n places, and weights (1 or L, n, K).

        Where there is no neighbour the weight is 0.
        """
        positions = self.position[index]
        near = torch.from_numpy(self.graph.predecessors[positions.cpu().numpy()]).long()
        weights = self.triangle.weights[positions].movedim(1, 0)
        return self.order[near.clamp_min(0).to(index.device)], weights

    def ordered(self, x: Array, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return x, (L, N) or (L, N, R), in the ordering, of shape (N, L, R)."""
        x = torch.as_tensor(x).detach().to(self.order.device, dtype)
        x = x if x.ndim == 3 else x[..., None]
        return x.index_select(1, self.order).movedim(1, 0).contiguous()

    def restored(self, x: Tensor) -> Tensor:
        """Return x, (N, L, R), in the order of the user, (L, N, R)."""
        return x.movedim(0, 1).index_select(1, self.position)

    @cached_property
    def ordered_variances(self) -> Tensor:
        """v_i in the ordering, (N, L, 1)."""
        return self.ordered(self.variances)

    def _each(self, operation: Callable[[Tensor], Tensor], x: Array) -> Tensor:
        found = self.restored(operation(self.ordered(x)))
        return found if x.ndim == 3 else found[..., 0]
