"""What a kernel makes of places: their neighbours, the factor of the precision, predictions.

:mod:`~pnmf_pyro.gp.neighbors` and :mod:`~pnmf_pyro.gp.vecchia` know one covariance; this file knows
kernels, which may have hyperparameters for each component.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro.data.checks import check_choice, check_count
from pnmf_pyro.data.parallel import together
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import check_random_state
from pnmf_pyro.gp.cache import Cache
from pnmf_pyro.gp.fronts import in_fronts
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.neighbors import METHODS, NeighborGraph, build_graph, nearest, nearest_before
from pnmf_pyro.gp.ordering import Covariance, max_min_order
from pnmf_pyro.gp.triangular import Rows, Triangle
from pnmf_pyro.gp.vecchia import Array, VecchiaFactor, conditional_weights
from pnmf_pyro.gp.vecchia_solver import VecchiaPosterior

CPU = torch.device("cpu")


class Neighborhoods:
    """The K neighbours of each of N places, and their weights for each of L components.

    The kernel has one set of hyperparameters or one for each component, and its present values
    count. The `method` is 'knn' or 'probabilistic', see
    :func:`~pnmf_pyro.gp.neighbors.build_graph`; `seed` is that of its draws. With `precompute`
    neighbours and weights are kept while the kernel stays the same. Weights are held as `dtype`, on
    the device of the kernel.
    """

    def __init__(
        self,
        kernel: SpatialKernel,
        places: Places,
        L: int,
        K: int,
        method: str = "knn",
        precompute: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ):
        self.kernel, self.places, self.L = kernel, places.to(CPU), L
        self.K = min(check_count("K", K), len(places) - 1)
        self.method = check_choice("neighbors", method, METHODS)
        self.precompute, self.seed, self.dtype = precompute, seed, dtype
        self._cache = Cache()

    @property
    def factor(self) -> VecchiaFactor:
        """Factor of the precision of all L components over all places."""
        return self.posterior.factor

    @property
    def posterior(self) -> VecchiaPosterior:
        """Solver of posteriors under the factor."""
        if not self.precompute:
            return VecchiaPosterior(self._factor(self._graph()))
        kernel = list(self.kernel.buffers())
        by_kernel = self.method == "probabilistic" or self.places.groups is not None
        graph = self._cache("graph", kernel if by_kernel else [], self._graph)
        return self._cache("posterior", kernel, lambda: VecchiaPosterior(self._factor(graph)))

    def predict(
        self, places: Places, mean: Tensor, diagonal: Tensor, low_rank: Tensor, prior_mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict n other places, (L, n), from q(f) = N(m, V V^T + diag(d)) at the own ones.

        Given its K nearest places, f* ~ N(c + sum_k b_k (f_k - c), v*) with c the mean of the
        prior, so that the mean of f* is c + sum_k b_k (m_k - c), and its variance
        v* + sum_k b_k^2 d_k + sum_r (sum_k b_k V_kr)^2; m and d are of shape (L, N), V (L, N, R)
        and c (L,).
        """
        places = places.to(CPU)
        near = torch.from_numpy(nearest(self.places, places, self.K, self._covariance())).long()
        weights, variances = self._weights(places, self.places, near)
        near = near.to(weights.device)
        mean, diagonal, low_rank, c = (
            x.to(variances) for x in (mean, diagonal, low_rank, prior_mean[:, None])
        )
        predicted, spread = torch.empty_like(variances), variances.clone()
        for l in range(self.L):
            B = weights[:, l % weights.shape[1]]
            predicted[l] = c[l] + (B * (mean[l] - c[l])[near]).sum(1)
            spread[l] += (B.square() * diagonal[l][near]).sum(1)
            for column in low_rank[l].unbind(-1):  # one by one: no array of (n, K, R)
                spread[l] += (B * column[near]).sum(1).square()
        return predicted, spread

    def carry(self, places: Places, values: Tensor) -> tuple[Tensor, Tensor]:
        """Predict n other places, (L, n, R), from values (L, N, R), each by its K nearest.

        The variance that is left, (L, n), comes with it.
        """
        places = places.to(CPU)
        near = torch.from_numpy(nearest(self.places, places, self.K, self._covariance())).long()
        weights, variances = self._weights(places, self.places, near)
        near, values = near.to(weights.device), values.to(variances)
        carried = variances.new_empty(*variances.shape, values.shape[-1])
        for l in range(self.L):
            B = weights[:, l % weights.shape[1]].to(values)
            for r, column in enumerate(values[l].unbind(-1)):
                carried[l, :, r] = (B * column[near]).sum(1)
        return carried, variances

    def conditionals(self, places: Places) -> Conditionals:
        """Condition other places on the own ones, and on one another as far as they come first."""
        places, N = places.to(CPU), len(self.places)
        order = max_min_order(places.coordinates.numpy())
        ordered = places[order]
        both = Places.concatenate([self.places, ordered])
        near = nearest_before(both, self.K, N, self._covariance())
        numbers, earlier = in_fronts(np.maximum(near - N, -1))
        order, near = order[numbers], near[numbers]
        near = np.where(earlier < 0, near, N + earlier)
        ordered = ordered[numbers]
        both = Places.concatenate([self.places, ordered])
        weights, variances = self._weights(ordered, both, near, order)
        return Conditionals(near, weights, variances, order, N)

    def _graph(self) -> NeighborGraph:
        random = check_random_state(self.seed) if self.method == "probabilistic" else None
        return build_graph(self.places, self.K, self._covariance(), random).in_fronts()

    def _factor(self, graph: NeighborGraph) -> VecchiaFactor:
        ordered = self.places[graph.order]
        weights = self._weights(ordered, ordered, graph.predecessors, graph.order)
        return VecchiaFactor(graph, *weights)

    @torch.no_grad()
    def _weights(
        self, targets: Places, sources: Places, near: Array, names: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights (n, C, K) and variances (L, n) of targets given their neighbours."""
        values, scale = self._distinct_sets()
        targets, sources = targets.to(scale.device), sources.to(scale.device)
        ranks = together()
        mine = ranks.part(len(targets))
        weights, variances = conditional_weights(
            targets[mine],
            sources,
            near[mine],
            lambda places: self.kernel.covariance(places, None, values),
            len(values["sigma"]),
            self.dtype,
            np.arange(len(targets))[mine] if names is None else names[mine],
        )
        weights, variances = ranks.stacked(weights, 0), ranks.stacked(variances, 1)
        return weights, (scale * variances).expand(self.L, -1)

    def _distinct_sets(self) -> tuple[dict[str, Tensor], Tensor]:
        """Hyperparameters of sets that differ in weights, and a factor of variances, (1 or C, 1).

        Weights depend on the lengthscale and on the nugget relative to sigma.
        """
        values = self.kernel.hyperparameters
        sigma = values["sigma"]
        shape = {**values, "sigma": sigma / sigma, "nugget": values["nugget"] / sigma}
        if all((one == one[0]).all() for one in shape.values()):
            first = {name: value[:1] for name, value in values.items()}
            return first, (sigma / sigma[0]).square()[:, None]
        return values, torch.ones_like(sigma[:1, None])

    def _covariance(self) -> Covariance:
        """Covariance under the geometric means of the hyperparameters over all sets, on the CPU."""
        return _OfOneSet(self.kernel.select(None))


class _OfOneSet:
    """Covariance of a kernel of one set of hyperparameters, with the distances of its groups."""

    def __init__(self, kernel: SpatialKernel):
        self.kernel = kernel
        self.group_parts = kernel.group_parts if kernel.is_grouped else None

    def __call__(self, a: Places, b: Places) -> Tensor:
        return self.kernel(a, b)[0]


class Conditionals:
    """Draws at n new places given draws at N known ones: at those of the numbers `used`, (m,).

    The neighbours `near`, (n, K), of the new place at each position are numbers of known places, N
    + positions of earlier new ones, or -1 for none; `weights`, (n, 1 or L, K), and `variances`, (L,
    n), are given them. `order`, (n,), has the number of the new place at each position.
    """

    def __init__(
        self, near: np.ndarray, weights: Tensor, variances: Tensor, order: np.ndarray, N: int
    ):
        self.order = torch.from_numpy(order).to(weights.device)
        self.deviations = variances.sqrt().T[..., None]
        known = (near >= 0) & (near < N)
        used, which = np.unique(near[known], return_inverse=True)
        self.used = torch.from_numpy(used).long().to(weights.device)
        places = np.full(near.shape, -1)
        places[known] = which
        from_known = torch.from_numpy(known[:, None]).to(weights.device)
        self.from_known = Rows.of_neighbors(places, weights * from_known, len(used))
        self.among_new = Triangle(np.maximum(near - N, -1), weights * ~from_known)

    def draw(self, known: Tensor, noise: Tensor) -> Tensor:
        """Draw, (L, n, E), given draws at `used`, (L, m, E), from standard normals (L, n, E)."""
        flat = self.among_new.flat
        deviation = (self.deviations * noise.movedim(1, 0)[self.order]).contiguous()
        self.from_known.add_product(flat(deviation), flat(known.movedim(1, 0).contiguous()))
        drawn = torch.empty_like(noise)
        drawn[:, self.order] = self.among_new.solve(deviation).movedim(0, 1)
        return drawn
