"""Solves with the posterior precision Q + diag(h) of a Vecchia field, and draws from it.

Where an observation of each place has curvature h_i >= 0, the posterior mean, draws and variances
of the field need solves with

    A = Q + diag(h) = (I - B)^T D (I - B) + diag(h),        D = diag(1 / v).

Q is like a differential operator of high order, on which conjugate gradients with a diagonal
preconditioner stall. The factor with an updated diagonal, (I - B)^T (D + diag(h)) (I - B) (Kuendig
and Sigrist 2024), is good where Q dominates, but misses much of h in smooth fields. The ordering
offers a multigrid method (Schaefer, Sullivan and Owhadi 2021): its first M places are a coarse
grid, and with P = (I - B)^-1 E (I - B)_MM, the prediction of all places from these, E the first M
columns of the identity,

    P^T Q P = (I - B)_MM^T D_MM (I - B)_MM,

the Vecchia precision Q_M of the coarse grid, exactly. P^T diag(h) P is close to diag(P^T h), since
predictions nearly sum to one. So the sum over coarser and coarser grids M = N, N / 2, N / 4 ...

    A^-1 ~ (I - B)^-1 [ (D + diag(w))^-1
           + sum_M E (I - B)_MM diag(Q_M + P^T h)^-1 (I - B)_MM^T E^T ] (I - B)^-T,

w_i = (P^T h)_i on the coarsest grid that has i, is an additive multilevel preconditioner (Bramble,
Pasciak and Xu 1990). It costs two triangular solves and four products; docs/performance.md says how
many steps that takes.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from pnmf_pyro.data.random_state import RandomState, check_random_state
from pnmf_pyro.gp.vecchia import Array, VecchiaFactor, alongside, on_components

COARSENING = 2
COARSEST = 10


class Solution(NamedTuple):
    """What conjugate gradients found: x, (L, N) or (L, N, R), after `iterations` products with A.

    The error, (L,) or (L, R), estimates sqrt(e^T A e / N), e the error of x: in posterior standard
    deviations, root mean square over places. Where x is the mean of q, the ELBO is lower than at
    the best mean by N / 2 times its square.
    """

    x: np.ndarray
    iterations: int
    error: np.ndarray


class VecchiaPosterior:
    """N(0, (Q_l + diag(h_l))^-1) for a fixed Q, given by its factor, and any h >= 0, (L, N).

    Places stand in the order of the user everywhere.
    """

    def __init__(self, factor: VecchiaFactor):
        self.factor = factor
        self._ordered = factor.ordered()
        self._sizes = [factor.N]
        while self._sizes[-1] // COARSENING >= COARSEST:
            self._sizes.append(self._sizes[-1] // COARSENING)

    def solve(
        self,
        curvature: Array,
        b: Array,
        start: Array | None = None,
        *,
        tolerance: float = 0.01,
        max_iterations: int = 100,
    ) -> Solution:
        """Solve (Q_l + diag(h_l)) x_l = b_l by preconditioned conjugate gradients.

        Every step lowers x^T A x / 2 - b^T x, so fewer steps than the tolerance asks for are a step
        in the right direction too. The first x is `start`, or 0. The tolerance is the largest error
        of x, in posterior standard deviations. b and x have shape (L, N) or (L, N, R). What is not
        finite, or a negative h, raises a ValueError.
        """
        order = self.factor.graph.order
        h = self._checked_curvature(curvature)[:, order]
        r = self._checked("b", b)[:, order]
        x = np.zeros_like(r)
        precondition = _Preconditioner(self, h)
        weights = alongside(h, r)
        if start is not None:
            x = self._checked("start", start)[:, order]
            r = r - self._ordered.precision(x) - weights * x
        direction, power = np.zeros_like(r), np.ones(1)
        for iteration in range(max_iterations + 1):
            z = precondition(r)
            previous, power = power, (r * z).sum(1, keepdims=True)
            active = power > tolerance**2 * self.factor.N
            if iteration == max_iterations or not active.any():
                break
            direction = z + power / previous * direction * (iteration > 0)
            product = self._ordered.precision(direction) + weights * direction
            curved = (direction * product).sum(1, keepdims=True)
            step = np.where(active, power / np.where(active, curved, 1.0), 0.0)
            x += step * direction
            r -= step * product
        error = np.sqrt(power[:, 0] / self.factor.N)
        return Solution(x[:, self.factor.graph.position], iteration, error)

    def sample(
        self,
        curvature: Array,
        n_draws: int,
        random_state: RandomState = None,
        *,
        tolerance: float = 0.1,
    ) -> np.ndarray:
        """Draw from N(0, A^-1), (L, N, n_draws): solve A x = b with b from N(0, A).

        b = (I - B)^T D^1/2 e + h^1/2 e' with independent standard normal e and e' (Papandreou and
        Yuille 2010).
        """
        h = self._checked_curvature(curvature)
        random = check_random_state(random_state)
        shape = (*h.shape, n_draws)
        of_prior = random.normal(size=shape) / np.sqrt(self.factor.variances)[..., None]
        of_data = random.normal(size=shape) * np.sqrt(h)[..., None]
        b = self.factor.multiply_transposed(of_prior) + of_data
        return self.solve(h, b, tolerance=tolerance).x

    def conditional_variances(self, curvature: Array) -> np.ndarray:
        """Return 1 / (Q_ii + h_i), (L, N), given all other places: the best d of a diagonal q."""
        return 1 / (self.factor.precision_diagonal + self._checked_curvature(curvature))

    def smooth_part(
        self,
        curvature: Array,
        rank: int,
        random_state: RandomState = None,
        *,
        tolerance: float = 0.1,
    ) -> np.ndarray:
        """Return V, (L, N, rank), with E V V^T + diag(d) near A^-1, d the conditional variances.

        With `rank` posterior draws f the columns of V are (I - diag(d) A / 2) f / sqrt(rank): their
        part at a wavelength where the field is uncertain stays, and what d holds already, the
        deviation of a place from what all others predict, goes. Where lambda is an eigenvalue of
        diag(d)^1/2 A diag(d)^1/2, variances of V V^T relative to d are (1 - lambda / 2)^2 / lambda,
        which with the 1 of d is 1 / lambda + lambda / 4. So draws from N(m, V V^T + diag(d)) are
        as smooth as the posterior and vary as much, in the mean over draws of V.
        """
        h = self._checked_curvature(curvature)
        draws = self.sample(h, rank, random_state, tolerance=tolerance)
        product = self.factor.precision(draws) + h[..., None] * draws
        filtered = draws - 0.5 * self.conditional_variances(h)[..., None] * product
        return filtered / np.sqrt(rank)

    def _checked_curvature(self, curvature: Array) -> np.ndarray:
        h = self._checked("curvature", curvature)
        if (h < 0).any():
            raise ValueError(
                f"curvature must not be negative; place {np.argwhere(h < 0)[0, 1]} has {h.min()}. "
                "Use a form that cannot be, such as the expected rate."
            )
        return h

    def _checked(self, name: str, value: Array) -> np.ndarray:
        """Return values as float64; conjugate gradients would go on with NaN to the end."""
        array = np.asarray(value, dtype=np.float64)
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            raise ValueError(
                f"{name} must be finite; component {bad[0, 0]}, place {bad[0, 1]} is "
                f"{array[tuple(bad[0])]}. Shorten the step that led there."
            )
        return array

    @cached_property
    def _grids(self) -> list[tuple[int, list[sp.csr_matrix], np.ndarray]]:
        """Tuples (M, (I - B)_MM of each matrix, diagonal of Q_M) from N downwards."""
        matrices, D = self.factor.matrices, 1 / self._ordered.variances
        diagonal, grids, start = np.zeros_like(D), [], 0
        for M in reversed(self._sizes):
            added = [A[start:M].power(2) for A in matrices]
            diagonal = diagonal + on_components(_transposed_product, added, D[:, start:M])
            grids.append((M, _leading(matrices, M), diagonal[:, :M]))
            start = M
        return grids[::-1]


class _Preconditioner:
    """The approximate inverse of Q + diag(h) at the top of this file, in the ordering."""

    def __init__(self, posterior: VecchiaPosterior, h: np.ndarray):
        self.factor = posterior._ordered
        spread = self.factor.solve_transposed(h)
        weights = np.empty_like(h)
        self.grids = []
        for M, matrices, diagonal in posterior._grids:
            lumped = on_components(_transposed_product, matrices, spread[:, :M])
            lumped = np.maximum(lumped, h[:, :M])  # a prediction may have negative weights
            weights[:, :M] = lumped
            self.grids.append((M, matrices, 1 / (diagonal + lumped)))
        self.fine = 1 / (1 / self.factor.variances + weights)

    def __call__(self, r: np.ndarray) -> np.ndarray:
        z = self.factor.solve_transposed(r)
        total = z * alongside(self.fine, z)
        for M, matrices, inverse in self.grids:
            coarse = on_components(_transposed_product, matrices, z[:, :M])
            total[:, :M] += on_components(_product, matrices, coarse * alongside(inverse, coarse))
        return self.factor.solve(total)


def _product(A: sp.csr_matrix, x: np.ndarray) -> np.ndarray:
    return A @ x


def _transposed_product(A: sp.csr_matrix, x: np.ndarray) -> np.ndarray:
    return A.T @ x


def _leading(matrices: list[sp.csr_matrix], M: int) -> list[sp.csr_matrix]:
    """Return the first M rows and columns of lower triangular CSR matrices, as views."""
    parts = []
    for A in matrices:
        end = A.indptr[M]
        arrays = (A.data[:end], A.indices[:end], A.indptr[: M + 1])
        parts.append(sp.csr_matrix(arrays, shape=(M, M), copy=False))
    return parts
