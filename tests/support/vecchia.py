"""Places, kernels and Vecchia factors, and the dense matrices that they stand for."""

import numpy as np
import torch

from pnmf_pyro.gp.neighbors import build_graph
from pnmf_pyro.gp.vecchia import VecchiaFactor

LENGTHSCALES = (0.15, 0.4)
SCALES = (1.0, 2.5)  # k(x, x)
VERY_CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def matern32(lengthscale, variance=1.0):
    def covariance(A, B):
        r = torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist")
        scaled = np.sqrt(3) * r / lengthscale
        return variance * (1 + scaled) * torch.exp(-scaled)

    return covariance


def rbf(lengthscale, variance=1.0):
    return lambda A, B: variance * torch.exp(-0.5 * (torch.cdist(A, B) / lengthscale) ** 2)


KERNELS = [matern32(*pair) for pair in zip(LENGTHSCALES, SCALES, strict=True)]


def places(N=60, p=2, seed=0):
    random = np.random.default_rng(seed).random((N, p))
    if p == 1:  # no two so close that jitter is called for
        return (np.arange(N)[:, None] + 0.5 * random) / N
    return random


def make(points, K, kernels=KERNELS, variances=SCALES):
    graph = build_graph(points, K)
    return VecchiaFactor.from_kernels(graph, points, kernels, variances)


def exact_covariance(points, kernels=KERNELS):
    rows = torch.tensor(points)
    return np.stack([k(rows, rows).numpy() for k in kernels])


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
    points = places(N)
    return points, make(points, N - 1), exact_covariance(points)


def few_neighbours(kind):
    """Places, a factor with few neighbours, and its covariance by dense recursion."""
    points = places(60, {"line": 1, "space": 3}.get(kind, 2))
    if kind == "shared":  # one set of weights, variances that differ
        factor = make(points, 6, KERNELS[:1], SCALES[:1]).rescaled([1.0, 2.5])
        covariance = vecchia_covariance(points, factor.graph, KERNELS[:1])
        return points, factor, np.concatenate([covariance, 2.5 * covariance])
    factor = make(points, 1 if kind == "one neighbour" else 6)
    return points, factor, vecchia_covariance(points, factor.graph)
