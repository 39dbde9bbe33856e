"""Places, kernels and Vecchia factors, and the dense matrices that they stand for."""

import numpy as np
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.neighbors import build_graph
from pnmf_pyro.gp.vecchia import VecchiaFactor, conditional_weights

LENGTHSCALES = (0.15, 0.4)
SCALES = (1.0, 2.5)  # k(x, x)
VERY_CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def distances(A, B):
    exactly = "donot_use_mm_for_euclid_dist"
    return torch.cdist(A.coordinates, B.coordinates, compute_mode=exactly)


def matern32(lengthscale, variance=1.0):
    def covariance(A, B):
        scaled = np.sqrt(3) * distances(A, B) / lengthscale
        return variance * (1 + scaled) * torch.exp(-scaled)

    return covariance


def rbf(lengthscale, variance=1.0):
    return lambda A, B: variance * torch.exp(-0.5 * (distances(A, B) / lengthscale) ** 2)


KERNELS = [matern32(*pair) for pair in zip(LENGTHSCALES, SCALES, strict=True)]


def points_of(N=60, p=2, seed=0):
    random = np.random.default_rng(seed).random((N, p))
    if p == 1:  # no two so close that jitter is called for
        return (np.arange(N)[:, None] + 0.5 * random) / N
    return random


def make(points, K, kernels=KERNELS, share=None, dtype=torch.float64):
    """A factor of one component for each kernel, or for each of some factors on the first one."""
    places = Places(torch.tensor(points))
    graph = build_graph(places, K).in_fronts()
    ordered = places[graph.order]
    weights, conditional = conditional_weights(
        ordered, ordered, graph.predecessors, among(*kernels), len(kernels), dtype, graph.order
    )
    if share is not None:
        conditional = conditional * torch.tensor(share)[:, None]
    return VecchiaFactor(graph, weights, conditional)


def among(*kernels):
    """Covariances among places, of each kernel."""
    return lambda places: torch.stack([kernel(places, places) for kernel in kernels])


def neighbors_of(graph):
    """Numbers of the places that each place is conditioned on, (N, K), -1 for none."""
    predecessors = graph.predecessors[graph.position]
    return np.where(predecessors < 0, -1, graph.order[predecessors])


def exact_covariance(points, kernels=KERNELS):
    places = Places(torch.tensor(points))
    return np.stack([k(places, places).numpy() for k in kernels])


def vecchia_covariance(points, graph, kernels=KERNELS):
    """Entry by entry, from the conditionals: Cov(f_i, f_j) = sum_k B_ik Cov(f_k, f_j) for j < i."""
    result = []
    for exact in exact_covariance(points, kernels):
        C = np.zeros_like(exact)
        done = []
        for position, i in enumerate(graph.order):
            near = [graph.order[j] for j in graph.predecessors[position] if j >= 0]
            B = np.linalg.solve(exact[np.ix_(near, near)], exact[near, i])
            v = exact[i, i] - B @ exact[near, i]
            C[i, done] = C[done, i] = B @ C[np.ix_(near, done)]
            C[i, i] = v + B @ C[np.ix_(near, near)] @ B
            done.append(i)
        result.append(C)
    return np.stack(result)


def dense_log_density(x, mean, covariance):
    deviation = x - mean
    _, determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (deviation @ np.linalg.solve(covariance, deviation) + determinant)


def variational(N, R=3, seed=1, L=2):
    """Means, diagonals and low-rank parts of a q."""
    random = np.random.default_rng(seed)
    m, V = random.normal(size=(L, N)), random.normal(size=(L, N, R))
    d = random.gamma(2.0, 0.2, size=(L, N))
    return [torch.tensor(x, requires_grad=True) for x in (m, d, V)]


def dense_q(m, d, V=None):
    m, d = m.detach().numpy(), d.detach().numpy()
    S = np.stack([np.diag(one) for one in d])
    return m, S if V is None else S + (V @ V.mT).detach().numpy()


SPARSE = ("plane", "line", "space", "one neighbour", "shared")


def all_before(N=200):
    """Places, a factor in which each is conditioned on all before, and the exact covariance."""
    points = points_of(N)
    return points, make(points, N - 1), exact_covariance(points)


def few_neighbours(kind):
    """Places, a factor with few neighbours, and its covariance by dense recursion."""
    points = points_of(60, {"line": 1, "space": 3}.get(kind, 2))
    if kind == "shared":  # one set of weights, variances that differ
        factor = make(points, 6, KERNELS[:1], share=[1.0, 2.5])
        covariance = vecchia_covariance(points, factor.graph, KERNELS[:1])
        return points, factor, np.concatenate([covariance, 2.5 * covariance])
    factor = make(points, 1 if kind == "one neighbour" else 6)
    return points, factor, vecchia_covariance(points, factor.graph)
