"""Where a fit starts: loadings and factors from the counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from pnmf_pyro.data.checks import check_choice, check_count, check_matrix, check_positive
from pnmf_pyro.data.counts import Counts, CountsLike, Table
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.parallel import ALONE, Ranks
from pnmf_pyro.data.random_state import RandomState, check_random_state
from pnmf_pyro.data.stored import StoredCounts, StoredMatrix, decomposition_by_passes

# Smallest total of a sample or feature that is divided by, relative to their mean.
LEAST_TOTAL = 0.05

Factors = tuple[np.ndarray, np.ndarray]

# Multiplicative updates of factors from loadings that are given; the fit goes on from there.
UPDATES = 30

# Rows whose normals are drawn at once for other ranks.
BLOCK_ROWS = 1 << 16

# Smallest factor kept before taking logs, relative to the component's mean.
FLOOR = 1e-2


@isolated
def initialize_factors(
    X: CountsLike,
    n_components: int,
    init: str | None = None,
    random_state: RandomState = None,
    scale_log_mu: bool = True,
    target_std: float = 1.0,
) -> Factors:
    """Make loadings W and factors exp F to start from, X ~ exp(F) W^T.

    Parameters
    ----------
    X : array-like, Tensor, sparse matrix or Counts of shape (n_samples, n_features)
        Finite and non-negative. Sparse input is never made dense.
    n_components : int
    init : {None, 'random', 'nndsvd', 'nndsvda', 'nndsvdar', 'biwhitened', 'k-means'}
        `random`: absolute values of normals times sqrt(X.mean() / n_components).
        `nndsvd`: non-negative double singular value decomposition (Boutsidis and Gallopoulos
        2008), with zeros filled by the mean of X (`nndsvda`) or by small random values
        (`nndsvdar`). `biwhitened`: `nndsvda` of counts divided by the square roots of what they
        would be if samples and features were independent, by which Poisson noise has about the
        same variance everywhere (Landa, Zhang and Kluger 2022); it finds patterns of rare
        features, which large counts drown. `k-means`: centres of clusters of samples, and factors
        that are largest for a sample's own cluster. None: `nndsvda` where n_components <=
        min(n_samples, n_features), and `random` otherwise.
    random_state : int, RandomState, Generator or None
        Seed of `random`, `k-means` and the filling of `nndsvdar`; the others have no randomness.
    scale_log_mu : bool
        Whether the log-factors of each component are shifted and scaled to mean 0 and standard
        deviation `target_std`, as the prior has; W keeps the total of each component.
    target_std : float
        Standard deviation of log exp F where `scale_log_mu` is true.

    Returns
    -------
    W : ndarray of shape (n_features, n_components)
    exp_F : ndarray of shape (n_samples, n_components)
        Positive where `scale_log_mu` is true.

    Raises
    ------
    ValueError
        For an unknown `init`, too many components for it, and entries below 0, infinite or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from pnmf_pyro.initialization import initialize_factors
    >>> X = np.random.default_rng(0).poisson(5, size=(100, 50)).astype(np.float32)
    >>> W, exp_F = initialize_factors(X, n_components=5, init='nndsvda', random_state=42)
    >>> W.shape, exp_F.shape
    ((50, 5), (100, 5))
    """
    check_choice("init", init, (*INITS, None))
    check_count("n_components", n_components)
    check_positive("target_std", target_std)
    matrix = X if isinstance(X, StoredMatrix) else check_matrix(X).numpy()
    shape = (
        matrix.counts.ranks.whole(matrix.counts.shape)
        if isinstance(matrix, StoredMatrix)
        else matrix.shape
    )
    if init is None:
        init = "nndsvda" if n_components <= min(shape) else "random"
    make, limit = INITS[init]
    if n_components > limit(shape):
        raise ValueError(
            f"init={init!r} needs n_components <= {limit(shape)} for X of shape "
            f"{shape}; got n_components={n_components}. Use init='random'."
        )
    # In float64: what is zero but for rounding must not depend on the type of the numbers.
    if isinstance(matrix, StoredMatrix):
        wide: Table | StoredMatrix = matrix
        dtype = np.dtype(np.float32 if matrix.counts.dtype == torch.float32 else np.float64)
    else:
        wide, dtype = matrix.astype(np.float64, copy=False), matrix.dtype
    exp_F, W = make(wide, n_components, check_random_state(random_state))
    if scale_log_mu:
        W, exp_F = _scale_log(W, exp_F, target_std, _ranks(matrix))
    return W.astype(dtype), exp_F.astype(dtype)


def start_values(
    counts: Counts,
    n_components: int,
    init: str | np.ndarray | None,
    random_state: RandomState,
    size_factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Make W, (D, L), and exp F, (N, L), for a model to start from, on the device of the counts.

    The counts of a sample are divided by its size factor; the rest is :func:`initialize_factors`.
    Where `init` is an array of loadings (D, L), factors are those that these make likely.
    """
    if isinstance(init, np.ndarray):
        return _from_loadings(counts, n_components, init, size_factors)
    by_blocks = isinstance(counts, StoredCounts) or counts.ranks.size > 1
    matrix = StoredMatrix(counts) if by_blocks else counts.numpy()
    if size_factors is not None:
        matrix = _divide_rows(matrix, size_factors.cpu().numpy())
    W, exp_F = initialize_factors(matrix, n_components, init, random_state)
    return torch.from_numpy(W).to(counts.device), torch.from_numpy(exp_F).to(counts.device)


def _from_loadings(
    counts: Counts, L: int, loadings: np.ndarray, size_factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Start from loadings (D, L), and the factors that multiplicative updates find for them."""
    if loadings.shape != (counts.shape[1], L):
        raise ValueError(
            f"init must be loadings of shape ({counts.shape[1]}, {L}), features by components, or "
            f"name a start; got an array of shape {loadings.shape}."
        )
    W = torch.from_numpy(loadings).to(counts.values)
    s = W.new_ones(1, 1) if size_factors is None else size_factors.to(W)[:, None]
    tiny = torch.finfo(W.dtype).tiny
    rates = (s * W.sum(0)).clamp_min(tiny)
    exp_F = (counts.row_totals.to(W)[:, None] / rates.sum(1, keepdim=True)).repeat(1, L)
    for _ in range(UPDATES):
        ratio = counts.values / counts.inner(exp_F, W).clamp_min(tiny)
        exp_F = exp_F * counts.matmul(ratio, W) / rates
    mean = counts.ranks.total(exp_F.sum(0)) / counts.ranks.whole(counts.shape)[0]
    return W, exp_F.maximum(FLOOR * mean).clamp_min(tiny)


def _divide_rows(matrix: Any, divisors: np.ndarray) -> Any:
    if isinstance(matrix, StoredMatrix):
        return matrix.divided(divisors)
    if isinstance(matrix, np.ndarray):
        return matrix / divisors[:, None]
    return sp.csr_matrix(sp.diags_array(1 / divisors, dtype=matrix.dtype) @ matrix)


def _random(X: Table, L: int, random: np.random.RandomState) -> Factors:
    typical = np.sqrt(X.mean() / L)
    exp_F = typical * np.abs(_normals_of_rows(X, L, random))
    W = typical * np.abs(random.standard_normal((X.shape[1], L)))
    return exp_F, W


def _nndsvd(X: Any, L: int, random: np.random.RandomState) -> Factors:
    """Take the larger of the positive and the negative part of each singular pair."""
    # Random directions of features: neither a seed nor the order of the samples matters.
    by_passes, ranks = isinstance(X, StoredMatrix), _ranks(X)
    decompose = decomposition_by_passes if by_passes else partial(randomized_svd, transpose=False)
    U, S, Vt = decompose(X, L, random_state=0)
    exp_F, W = np.zeros_like(U), np.zeros_like(Vt.T)
    exp_F[:, 0] = np.sqrt(S[0]) * _without_rounding(np.abs(U[:, 0]), ranks)
    W[:, 0] = np.sqrt(S[0]) * _without_rounding(np.abs(Vt[0]))
    for k in range(1, L):
        parts = [(np.maximum(sign * U[:, k], 0), np.maximum(sign * Vt[k], 0)) for sign in (1, -1)]
        lengths = [(_norm(u, ranks), np.linalg.norm(v)) for u, v in parts]
        best = int(np.argmax([of_u * of_v for of_u, of_v in lengths]))
        (u, v), (of_u, of_v) = parts[best], lengths[best]
        if of_u * of_v > 0:
            size = np.sqrt(S[k] * of_u * of_v)
            exp_F[:, k] = size * _without_rounding(u, ranks) / of_u
            W[:, k] = size * _without_rounding(v) / of_v
    return exp_F, W


def _norm(part: np.ndarray, ranks: Ranks) -> float:
    """Length of a vector of which each rank has its own rows."""
    return float(np.linalg.norm(ranks.gathered(np.linalg.norm(part))))


def _without_rounding(part: np.ndarray, ranks: Ranks = ALONE) -> np.ndarray:
    """Return entries, those that are zero but for the rounding of the decomposition as zero."""
    largest = max(ranks.gathered(part.max()))
    return np.where(part > np.sqrt(np.finfo(part.dtype).eps) * largest, part, 0)


def _nndsvda(X: Table, L: int, random: np.random.RandomState) -> Factors:
    exp_F, W = _nndsvd(X, L, random)
    mean = X.mean()
    return np.where(exp_F > 0, exp_F, mean), np.where(W > 0, W, mean)


def _nndsvdar(X: Table, L: int, random: np.random.RandomState) -> Factors:
    def fill(part: np.ndarray, normals: np.ndarray) -> np.ndarray:
        return np.where(part > 0, part, np.abs(mean * normals / 100))

    exp_F, W = _nndsvd(X, L, random)
    mean, of_rows = X.mean(), _normals_of_rows(X, L, random)
    return fill(exp_F, of_rows), fill(W, random.standard_normal(W.shape))


def _biwhitened(X: Any, L: int, random: np.random.RandomState) -> Factors:
    ranks = _ranks(X)
    rows = _floored(np.asarray(X.sum(1)).ravel(), ranks)
    columns = _floored(np.asarray(X.sum(0)).ravel())
    a, b = (np.sqrt(one / np.sqrt(_sum(rows, ranks))) for one in (rows, columns))
    if isinstance(X, StoredMatrix):
        whitened = X.divided(a, b)
    else:
        whitened = _divide_rows(_divide_rows(X, a).T, b).T
    exp_F, W = _nndsvda(whitened, L, random)
    return exp_F * a[:, None], W * b[:, None]


def _floored(totals: np.ndarray, ranks: Ranks = ALONE) -> np.ndarray:
    """Return totals raised where a single count divided by them would be the largest of all."""
    return np.maximum(totals, LEAST_TOTAL * (_mean(totals, ranks) or 1.0))


def _ranks(X: Table | StoredMatrix) -> Ranks:
    """Return the processes among which the rows of a matrix are shared out."""
    return X.ranks if isinstance(X, StoredMatrix) else ALONE


def _sum(of_rows: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Return sums over the rows of all ranks."""
    return ranks.total(torch.from_numpy(np.atleast_1d(of_rows.sum(0)))).numpy()


def _mean(of_rows: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Return means over the rows of all ranks."""
    return _sum(of_rows, ranks) / sum(ranks.gathered(len(of_rows)))


def _normals_of_rows(X: Table | StoredMatrix, L: int, random: np.random.RandomState) -> np.ndarray:
    """Return normals (N, L) of rows; a rank takes its own of those that one process draws."""
    ranks, n = _ranks(X), X.shape[0]
    if ranks.size == 1:
        return random.standard_normal((n, L))
    _draw_away(random, ranks.rows.start, L)
    found = random.standard_normal((n, L))
    _draw_away(random, ranks.n_rows - ranks.rows.stop, L)
    return found


def _draw_away(random: np.random.RandomState, n: int, L: int) -> None:
    for start in range(0, n, BLOCK_ROWS):
        random.standard_normal((min(BLOCK_ROWS, n - start), L))


def _k_means(X: Table, L: int, random: np.random.RandomState) -> Factors:
    from sklearn.cluster import KMeans  # slow to import, and seldom needed

    clusters = KMeans(L, n_init=1, random_state=random).fit(X)
    exp_F = np.full((X.shape[0], L), 1 / L)
    exp_F[np.arange(X.shape[0]), clusters.labels_] += 1
    W = np.maximum(clusters.cluster_centers_.T, 0) + FLOOR * X.mean()
    return exp_F, W / 2


INITS: dict[str, tuple[Callable[..., Factors], Callable[[tuple[int, int]], float]]] = {
    "random": (_random, lambda shape: np.inf),
    "nndsvd": (_nndsvd, min),
    "nndsvda": (_nndsvda, min),
    "nndsvdar": (_nndsvdar, min),
    "biwhitened": (_biwhitened, min),
    "k-means": (_k_means, lambda shape: shape[0]),
}


def _scale_log(W: np.ndarray, exp_F: np.ndarray, target_std: float, ranks: Ranks) -> Factors:
    totals = _sum(exp_F, ranks)
    floor = np.maximum(FLOOR * _mean(exp_F, ranks), np.finfo(exp_F.dtype).tiny)
    log_F = np.log(np.maximum(exp_F, floor))
    log_F -= _mean(log_F, ranks)
    spread = np.sqrt(_mean(np.square(log_F), ranks))
    log_F *= target_std / np.where(spread > 1e-6, spread, 1)
    exp_F = np.exp(log_F)
    return W * (totals / _sum(exp_F, ranks)), exp_F
