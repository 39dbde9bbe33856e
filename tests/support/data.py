"""Tables that several test files share, and ways to look at them."""

import numpy as np
import scipy.sparse as sp

from tests.support import dense_fields


def simulate(seed: int, N: int, D: int, L: int, mean: float = 5.0):
    """Counts from the model with sparse loadings; returns X, F (N, L) and W (D, L)."""
    random = np.random.default_rng(seed)
    F = random.normal(size=(N, L))
    W = random.gamma(0.3, 1.0, size=(D, L))
    W *= mean / (W.sum(1).mean() * np.exp(0.5))
    return random.poisson(np.exp(F) @ W.T), F, W


def tissue(N=60, D=20, L=2, seed=0, groups=1, kernel="Matern32"):
    """Counts whose factors are draws of a field with separate loadings."""
    random = np.random.default_rng(seed)
    x = random.uniform(size=(N, 2))
    labels = np.array(["a", "b", "c"])[random.integers(groups, size=N)]
    K = dense_fields.covariance(kernel, x, x, 0.4, 1.0) + 1e-9 * np.eye(N)
    F = np.linalg.cholesky(K) @ random.normal(size=(N, L))
    W = np.kron(np.eye(L), np.full((D // L, 1), 4.0)) + 0.05
    return random.poisson(np.exp(F) @ W.T).astype(np.float64), x, labels, F, W


def table_with_empty_parts() -> np.ndarray:
    """Counts with an empty row and an empty column, (12, 8)."""
    X = np.random.default_rng(0).poisson(0.8, (12, 8)).astype(np.float64)
    X[4], X[:, 2], X[11] = 0, 0, 1
    X[11, 2] = 0
    return X


def with_entry(value, X=None) -> np.ndarray:
    """A table of ones, or a copy of X, in which one entry is `value`."""
    X = np.ones((3, 4)) if X is None else X.astype(float)
    X[1, 2] = value
    return X


def as_dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)
