"""What a kernel and places make of the Vecchia approximation: who conditions whom, and how.

The parts before this one know points and callables; this one knows kernels with hyperparameters of
their own for each component, and places in groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from pnmf_pyro.data.checks import check_choice, check_count
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.cache import Remembered
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.neighbors import (
    METHODS,
    NeighborGraph,
    build_graph,
    nearest,
    neighbors_of_batch,
    order_spots,
)
from pnmf_pyro.gp.ordering import Covariance, max_min_order
from pnmf_pyro.gp.vecchia import VecchiaFactor, conditional_weights
from pnmf_pyro.gp.vecchia_solver import VecchiaPosterior


class Neighborhoods:
    """The neighbours of places, and the weights that a kernel gives them.

    Parameters
    ----------
    kernel : SpatialKernel
        For one set of hyperparameters or one for each component; its present values count.
    places : Places of shape (N,)
    L : int
        Number of components.
    K : int
        Neighbours of a place, N - 1 where it is larger.
    method : {'knn', 'probabilistic'}
        See :func:`~pnmf_pyro.gp.neighbors.build_graph`.
    kept : bool
        Find neighbours and weights once for all. Otherwise they are found when they are needed, and
        a batch finds its own alone.
    seed : int
        Of the draws of 'probabilistic'.
    """

    def __init__(
        self,
        kernel: SpatialKernel,
        places: Places,
        L: int,
        K: int,
        method: str = "knn",
        kept: bool = True,
        seed: int = 0,
    ):
        self.kernel, self.places, self.L, self.kept = kernel, places, L, kept
        self.K = min(check_count("K", K), len(places) - 1)
        self.method, self.seed = check_choice("neighbors", method, METHODS), seed
        self._once = Remembered()

    @property
    def posterior(self) -> VecchiaPosterior:
        """Solver of posteriors under the factor."""
        if not self.kept:
            return VecchiaPosterior(self._make_factor())
        return self._once(
            "factor", self.kernel.buffers(), lambda: VecchiaPosterior(self._make_factor())
        )

    @property
    def factor(self) -> VecchiaFactor:
        """Factor of the precision of all L components over all places."""
        return self.posterior.factor

    def roughness(self, low_rank: Tensor) -> Tensor:
        """Return the sum over columns of ``r_i(V_.r)^2`` for V of shape (L, N, R), (L, N)."""

        def make() -> Tensor:
            columns = (self.factor.multiply(v.double().cpu()) for v in low_rank.unbind(-1))
            return torch.from_numpy(sum(np.square(column) for column in columns))

        return self._once("roughness", (*self.kernel.buffers(), low_rank), make)

    def weights_of(self, spots: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
        """Return neighbours of spots, found anew, with their weights and conditional variances.

        Returns
        -------
        neighbors : ndarray of shape (n, K)
        weights : Tensor of shape (C, n, K)
        variances : Tensor of shape (L, n)
        """
        near = self._neighbors_of(spots)
        rows = self._rows(self.places)
        weights, variances = self._weights(rows[spots], rows, near, spots)
        return near, weights, variances

    def nearest_to(self, places: Places) -> np.ndarray:
        """Return the K nearest of the own places to others, (n, K)."""
        return nearest(
            self.places.coordinates,
            places.coordinates.cpu(),
            self.K,
            **self._arguments(self._grouped),
            new_features=self._rows(places),
        )

    def kernels(self) -> list[tuple[Covariance, float]]:
        """Covariance of rows and variance, for each of the L components."""
        sets = len(self.kernel.sigma)
        found = [self._kernel(c) for c in range(sets)]
        return found * (self.L // sets)

    def rows(self, places: Places) -> tuple[Tensor, Tensor]:
        """Rows that :meth:`kernels` are functions of, at the own places and at others."""
        return self._rows(self.places), self._rows(places)

    def conditionals(self, places: Places) -> Conditionals:
        """Condition other places on the own ones, and on one another as far as they come first."""
        N = len(self.places)
        order = max_min_order(places.coordinates.cpu().numpy())[0]
        both = self._joined(places)
        rows = self._rows(both)
        new = np.arange(N, N + len(places))
        near = neighbors_of_batch(
            np.r_[np.arange(N), N + order],
            new,
            both.coordinates,
            self.K,
            **self._arguments(self._grouped, both),
        )
        weights, variances = self._weights(rows[new], rows, near, new - N)
        return Conditionals(near, weights, variances, order, N)

    def _joined(self, places: Places) -> Places:
        mine, other = self.places, places.to(torch.device("cpu"))
        groups = None
        if mine.groups is not None and other.groups is not None:
            groups = torch.cat([mine.groups, other.groups])
        return Places(torch.cat([mine.coordinates, other.coordinates]), groups)

    def _make_factor(self) -> VecchiaFactor:
        graph = self._graph() if not self.kept else self._once("graph", self._decisive, self._graph)
        rows = self._rows(self.places)[graph.order]
        weights, variances = self._weights(rows, rows, graph.predecessors, graph.order)
        return VecchiaFactor(graph, weights, variances)

    def _graph(self) -> NeighborGraph:
        return build_graph(self.places.coordinates, self.K, **self._search())

    def _neighbors_of(self, spots: np.ndarray) -> np.ndarray:
        arguments = self._arguments(self._grouped)
        order = self._once(
            "order",
            self._decisive,
            lambda: order_spots(self.places.coordinates, **arguments),
        )
        coordinates = self.places.coordinates
        return neighbors_of_batch(order, spots, coordinates, self.K, **self._search())

    def _weights(
        self, targets: Tensor, sources: Tensor, near: Any, names: Any
    ) -> tuple[Tensor, Tensor]:
        """Weights (C, n, K) and variances (L, n) of targets given their neighbours."""
        kernels = self.kernels()[: len(self.kernel.sigma)]
        weights = torch.empty(len(kernels), *near.shape, dtype=torch.float64)
        variances = torch.empty(len(kernels), len(near), dtype=torch.float64)
        for c, pair in enumerate(kernels):  # into place: all weights are the largest array there is
            with torch.no_grad():
                found = conditional_weights(targets, sources, near, *pair, names)
            weights[c], variances[c] = found
        return weights, variances.expand(self.L, -1)

    @property
    def _grouped(self) -> bool:
        return self.places.groups is not None

    @property
    def _decisive(self) -> Sequence[Tensor]:
        """What the choice of neighbours depends on."""
        needed = self._grouped or self.method == "probabilistic"
        return list(self.kernel.buffers()) if needed else []

    def _search(self) -> dict[str, Any]:
        probabilistic = self.method == "probabilistic"
        arguments = self._arguments(self._grouped or probabilistic)
        return {**arguments, "method": self.method, "random_state": self.seed}

    def _arguments(self, with_kernel: bool, places: Places | None = None) -> dict[str, Any]:
        """Arguments of a search of neighbours: near is what the kernel says, where it matters."""
        places = self.places if places is None else places
        covariance = self._kernel(None)[0] if with_kernel else None
        return {
            "groups": places.groups,
            "covariance": covariance,
            "features": self._rows(places),
        }

    def _kernel(self, c: int | None) -> tuple[Covariance, float]:
        """Covariance of rows and variance under one set of hyperparameters, or their means."""
        kernel = self.kernel.select(c)

        def covariance(A: Tensor, B: Tensor) -> Tensor:
            places = self._of(A)
            return kernel(places, places if A is B else self._of(B))[0]

        return covariance, float(kernel.variance(self.places.to(torch.device("cpu"))).max())

    def _rows(self, places: Places) -> Tensor:
        return places.inputs.cpu()

    def _of(self, rows: Tensor) -> Places:
        return Places.of_inputs(rows, self._grouped)


class Conditionals:
    """Draws at n new places given draws at N known ones.

    Parameters
    ----------
    near : ndarray of shape (n, K)
        Numbers of known places, and N + those of new ones that come earlier; -1 for none.
    weights : Tensor of shape (C, n, K)
    variances : Tensor of shape (L, n)
    order : ndarray of shape (n,)
        The new place at each position.
    N : int

    Attributes
    ----------
    used : ndarray
        Known places of which draws are needed.
    """

    def __init__(
        self, near: np.ndarray, weights: Tensor, variances: Tensor, order: np.ndarray, N: int
    ):
        n = len(near)
        self.order, self.deviations = order, variances.sqrt().numpy()
        row, column = np.nonzero(near >= 0)
        numbers = near[row, column]
        known = numbers < N
        self.used, which = np.unique(numbers[known], return_inverse=True)
        position = np.empty(n, np.int64)
        position[order] = np.arange(n)
        self.of_known, self.among_new = [], []
        for B in weights.numpy():
            values = B[row, column]
            known_part = (values[known], (row[known], which))
            self.of_known.append(sp.csr_matrix(known_part, shape=(n, len(self.used))))
            pairs = position[row[~known]], position[numbers[~known] - N]
            later = sp.csr_matrix((values[~known], pairs), shape=(n, n))
            lower = sp.identity(n, format="csc") - later.tocsc()
            self.among_new.append(splu(lower, permc_spec="NATURAL", diag_pivot_thresh=0.0))

    def draw(self, known: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return draws, (L, n, E), from draws at :attr:`used` (L, m, E), and standard normals."""
        drawn = np.empty(noise.shape)
        for l, field in enumerate(known):
            c = l % len(self.of_known)
            right = self.of_known[c] @ field + self.deviations[l, :, None] * noise[l]
            drawn[l][self.order] = self.among_new[c].solve(right[self.order])
        return drawn
