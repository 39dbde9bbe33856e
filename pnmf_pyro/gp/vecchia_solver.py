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

the Vecchia precision Q_M of the coarse grid, exactly. P^T diag(h) P is taken to be diagonal, w_M:
from the last place on, each passes its curvature, and what it was passed, to its neighbours in
proportion to abs(B). So no curvature is lost. (P^T h would be lumped as well. But predictions have
negative weights, and where h varies P^T h is far too small at some places.) The sum over coarser
and coarser grids M = N, N / 2, N / 4 ...

    A^-1 ~ (I - B)^-1 [ (D + diag(w))^-1
           + sum_M E (I - B)_MM diag(Q_M + w_M)^-1 (I - B)_MM^T E^T ] (I - B)^-T,

w_i that of the coarsest grid that has i, is an additive multilevel preconditioner (Bramble,
Pasciak and Xu 1990). It costs two triangular solves and no more: a solve with (I - B)^T that has
come from the end to M leaves (I - B)_MM^T E^T (I - B)^-T of what it was given, and a solve with
I - B that has come from the start to M takes the share of the grid as it is. They are in the type
of the factor's weights. docs/performance.md says how many steps it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro.data.parallel import ALONE, together, working_together
from pnmf_pyro.data.random_state import RandomState, check_random_state
from pnmf_pyro.gp.coupled import conjugate_gradients
from pnmf_pyro.gp.triangular import in_one_thread
from pnmf_pyro.gp.vecchia import Array, VecchiaFactor

# Steps of conjugate gradients at most.
MOST_STEPS = 100


class Solution(NamedTuple):
    """What conjugate gradients found: x, (L, N) or (L, N, R), after `iterations` products with A.

    The error, (L,) or (L, R), estimates sqrt(e^T A e / N), e the error of x: in posterior standard
    deviations, root mean square over places. Where x is the mean of q, the ELBO is lower than at
    the best mean by N / 2 times its square.
    """

    x: Tensor
    iterations: int
    error: Tensor


class VecchiaPosterior:
    """N(0, (Q_l + diag(h_l))^-1) for a fixed Q, given by its factor, and any h >= 0, (L, N).

    Places stand in the order of the user everywhere.
    """

    def __init__(self, factor: VecchiaFactor):
        self.factor = factor

    def solve(
        self,
        curvature: Array,
        b: Array,
        start: Array | None = None,
        *,
        tolerance: float = 0.01,
        max_iterations: int = MOST_STEPS,
        dtype: torch.dtype = torch.float64,
    ) -> Solution:
        """Solve (Q_l + diag(h_l)) x_l = b_l by preconditioned conjugate gradients.

        Every step lowers x^T A x / 2 - b^T x, so fewer steps than the tolerance asks for are a step
        in the right direction too. The first x is `start`, or 0. The tolerance is the largest error
        of x, in posterior standard deviations. b and x have shape (L, N) or (L, N, R). All but the
        preconditioner is of `dtype`. What is not finite, or a negative h, raises a ValueError.
        """
        factor = self.factor
        h = factor.ordered(self._checked_curvature(curvature), dtype)
        r, single = factor.ordered(self._checked("b", b), dtype), b.ndim == 2
        x = torch.zeros_like(r)
        if start is not None:
            x = factor.ordered(self._checked("start", start), dtype)
            r -= factor.ordered_precision(x) + h * x
        del b, start  # so that their memory can be used
        iteration, error = self._descend(h, x, r, tolerance, max_iterations)
        found = factor.restored(x)
        if single:
            found, error = found[..., 0], error[..., 0]
        return Solution(found, iteration, error)

    def _descend(
        self, h: Tensor, x: Tensor, r: Tensor, tolerance: float, max_iterations: int
    ) -> tuple[int, Tensor]:
        """Move x, in place, until r = b - A x is small; return the steps and the error, (L, R).

        All are in the ordering, of shape (N, L, R). Ranks that work together share the components.
        """
        ranks = together()
        if ranks.size > 1:
            mine = ranks.part(self.factor.L)
            own_h, own_x, own_r = (one[:, mine].contiguous() for one in (h, x, r))
            with working_together(ALONE):
                alone = VecchiaPosterior(self.factor.of(mine))
                steps, error = alone._descend(own_h, own_x, own_r, tolerance, max_iterations)
            x.copy_(ranks.stacked(own_x, 1))
            r.copy_(ranks.stacked(own_r, 1))
            return max(ranks.gathered(steps)), ranks.stacked(error, 0)
        precondition = _Preconditioner(self.factor, h)
        direction, power = torch.zeros_like(r), torch.ones_like(r[0])
        for iteration in range(max_iterations + 1):
            z = precondition(r)
            previous, power = power, (r * z).sum(0)
            active = power > tolerance**2 * self.factor.N
            if iteration == max_iterations or not active.any():
                break
            turn = torch.where(previous > 0, power / previous, 0.0) * (iteration > 0)
            direction = z.addcmul_(turn, direction)
            product = self.factor.ordered_precision(direction).addcmul_(h, direction)
            curved = (direction * product).sum(0)
            step = torch.where(active, power / torch.where(active, curved, 1.0), 0.0)
            x.addcmul_(step, direction)
            r.addcmul_(-step, product)
        return iteration, (power / self.factor.N).sqrt()

    def sample(
        self,
        curvature: Array,
        n_draws: int,
        random_state: RandomState = None,
        *,
        less: float = 0.0,
        tolerance: float = 0.1,
    ) -> Tensor:
        """Draw f from N(0, A^-1), (L, N, n_draws): solve A f = b with b from N(0, A).

        b = (I - B)^T D^1/2 e + h^1/2 e' with independent standard normal e and e' (Papandreou and
        Yuille 2010). All is in the type of the factor's weights.

        Parameters
        ----------
        curvature : Tensor of shape (L, N)
        n_draws : int
        random_state : int, RandomState or None
        less : float
            Part that is taken off of the deviation of each place from its mean given all others,
            diag(d) A f with d the conditional variances: nothing with 0; with 1 means given all
            others are left.
        tolerance : float
            As of `solve`.
        """
        random, factor = check_random_state(random_state), self.factor
        curvature = self._checked_curvature(curvature)
        h = factor.ordered(curvature, factor.dtype)
        b = self._noise(random, n_draws).div_(factor.ordered_variances.sqrt().to(factor.dtype))
        b = factor.triangle.multiply_transposed(b)
        b += self._noise(random, n_draws).mul_(h.sqrt())
        f = torch.zeros_like(b)
        self._descend(h, f, b, tolerance, MOST_STEPS)
        del b  # what is left of it
        if less:
            product = factor.ordered_precision(f).addcmul_(h, f)
            diagonal = factor.ordered(self.conditional_variances(curvature), f.dtype)
            f.addcmul_(diagonal, product, value=-less)
        return factor.restored(f)

    def _noise(self, random: np.random.RandomState, n_draws: int) -> Tensor:
        """Standard normals in the ordering, (N, L, n_draws)."""
        factor = self.factor
        noise = factor.variances.new_empty(factor.N, factor.L, n_draws, dtype=factor.dtype)
        for l in range(factor.L):  # drawn in float64, which takes twice the memory
            drawn = torch.from_numpy(random.normal(size=(factor.N, n_draws))).to(
                factor.order.device
            )
            noise[:, l] = drawn[factor.order]
        return noise

    def solve_coupled(
        self, information: Tensor, told: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Solve (Q + H) x = told, (L, N, R), with blocks H (N, L, L) that couple components.

        With a generator x is a draw: noise of covariance Q is added to the right side. All is in
        the type of the factor's weights.
        """
        factor = self.factor
        H = information.to(factor.order.device, factor.dtype)[factor.order]
        b = factor.ordered(told, factor.dtype)
        if generator is not None:
            noise = torch.randn(b.shape, generator=generator, dtype=b.dtype).to(b)
            spread = factor.ordered_variances.sqrt().to(b)
            b += factor.triangle.multiply_transposed(noise.div_(spread))
        h = H.diagonal(dim1=-2, dim2=-1).clamp_min(0)[..., None]
        x = conjugate_gradients(
            lambda x: torch.baddbmm(factor.ordered_precision(x), H, x),
            _Preconditioner(factor, h),
            b,
        )
        return factor.restored(x)

    def conditional_variances(self, curvature: Array) -> Tensor:
        """Return 1 / (Q_ii + h_i), (L, N), given all other places: the best d of a diagonal q."""
        return 1 / (self.factor.precision_diagonal + self._checked_curvature(curvature))

    def smooth_part(
        self,
        curvature: Array,
        rank: int,
        random_state: RandomState = None,
        *,
        tolerance: float = 0.1,
    ) -> Tensor:
        """Return V, (L, N, rank), with E V V^T + diag(d) near A^-1, d the conditional variances.

        With `rank` posterior draws f the columns of V are (I - diag(d) A / 2) f / sqrt(rank): their
        part at a wavelength where the field is uncertain stays, and what d holds already, the
        deviation of a place from what all others predict, goes. Where lambda is an eigenvalue of
        diag(d)^1/2 A diag(d)^1/2, variances of V V^T relative to d are (1 - lambda / 2)^2 / lambda,
        which with the 1 of d is 1 / lambda + lambda / 4. So draws from N(m, V V^T + diag(d)) are
        as smooth as the posterior and vary as much, in the mean over draws of V.
        """
        draws = self.sample(curvature, rank, random_state, less=0.5, tolerance=tolerance)
        return draws.div_(rank**0.5)

    def _checked_curvature(self, curvature: Array) -> Tensor:
        h = self._checked("curvature", curvature)
        if (h < 0).any():
            raise ValueError(
                f"curvature must not be negative; place {(h < 0).nonzero()[0, 1]} has {h.min()}. "
                "Use a form that cannot be, such as the expected rate."
            )
        return h

    def _checked(self, name: str, value: Array) -> Tensor:
        """Return values as float64; conjugate gradients would go on with NaN to the end."""
        array = torch.as_tensor(value).detach().to(self.factor.variances)
        finite = array.isfinite()
        if not finite.all():
            bad = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"{name} must be finite; component {bad[0]}, place {bad[1]} is "
                f"{array[tuple(bad)]}. Shorten the step that led there."
            )
        return array


class _Preconditioner:
    """The approximate inverse of Q + diag(h) at the top of this file, in the ordering."""

    def __init__(self, factor: VecchiaFactor, h: Tensor):
        self.triangle = triangle = factor.triangle
        dtype = triangle.weights.dtype
        weights, self.inverses = torch.empty_like(h), []
        diagonals = reversed(factor.grid_diagonals)
        passed_on = triangle.passed_on(h.to(dtype).clone())
        for passed, diagonal in zip(passed_on, diagonals, strict=True):
            M = len(passed)
            weights[:M] = passed
            self.inverses.append((1 / (diagonal + weights[:M])).to(dtype))
        self.fine = (1 / (1 / factor.ordered_variances + weights)).to(dtype)

    def __call__(self, r: Tensor) -> Tensor:
        z = r.to(self.fine.dtype, copy=True)
        (finest, *inverses), grids = self.inverses, self._grids(z)
        next(grids)  # the finest is r
        shares = [part * inverse for part, inverse in zip(grids, inverses, strict=True)]
        x = self.triangle.flat(z.mul_(self.fine))
        *coarser, last = self.triangle.blocks
        with in_one_thread():
            for block, share in zip(coarser, reversed(shares), strict=True):
                block.solve(x)
                x[: block.stop] += self.triangle.flat(share)
            last.solve(x)
        return z.addcmul_(r.to(z.dtype), finest).to(r.dtype)

    def _grids(self, z: Tensor) -> Iterator[Tensor]:
        """Solve with (I - B)^T in place, and give what is left on each grid on the way."""
        x, columns = self.triangle.flat(z), z.shape[1:]
        with in_one_thread():
            for block in reversed(self.triangle.blocks):
                yield x[: block.stop].view(-1, *columns)
                block.solve_transposed(x)
