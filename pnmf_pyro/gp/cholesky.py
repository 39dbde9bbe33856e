"""Cholesky factors of covariance matrices, and what is read off a factor.

:func:`jittered_cholesky` factorises every covariance that a kernel makes. Matrices that are well
conditioned by construction, as the identity plus a covariance, need no jitter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro.data.checks import some_of, warn

# Attempts to factorise a matrix, each with ten times the jitter of the one before.
ATTEMPTS = 6

# Rows or columns of a symmetric matrix that are made together.
BLOCK = 128


def jittered_cholesky(
    covariance: Tensor,
    jitter: float,
    what: str = "inducing points",
    names: np.ndarray | None = None,
) -> Tensor:
    """Return the lower Cholesky factors of covariances (..., n, n) that may be nearly singular.

    The diagonal of each matrix is raised by the jitter, relative to its mean. Where the
    factorisation still fails, it is raised by ten times as much, with a warning, and so on for that
    matrix, up to a hundred thousand times; an entry that is not finite, or a matrix that still
    fails then, is a ValueError. Messages say `what` the rows are, and have the names (...) of the
    matrices.
    """
    matrices = covariance.reshape(-1, *covariance.shape[-2:])
    bad = (~torch.isfinite(matrices).flatten(1).all(1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"The covariance of the {what}{_named(names, bad)} is not finite. Check coordinates "
            "for extreme values, and hyperparameters of the kernel such as the lengthscale."
        )
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    left, tril = torch.arange(len(matrices), device=matrices.device), matrices
    for attempt in range(ATTEMPTS):
        added = jitter * 10**attempt
        raised = matrices[left]  # a copy
        raised.diagonal(dim1=-2, dim2=-1).add_(added * mean[left, None])
        factors, failed = torch.linalg.cholesky_ex(raised)
        tril = tril.index_copy(0, left, factors) if attempt else factors
        if not bool(failed.any()):
            if attempt:
                warn(
                    f"The covariance of the {what}{_named(names, left)} is nearly singular: jitter "
                    f"was raised from {jitter:g} to {added:g}. Remove places that are nearly the "
                    "same, or pass a shorter lengthscale or a larger jitter."
                )
            return tril.reshape(covariance.shape)
        left = left[failed > 0]
    raise ValueError(
        f"The covariance of the {what}{_named(names, left)} is not positive definite, even with "
        f"{added:g} of its variance added to the diagonal. Check coordinates for extreme values, "
        "and that the kernel is a covariance; or pass a shorter lengthscale, a larger jitter or a "
        "smaller K."
    )


def _named(names: np.ndarray | None, which: Tensor) -> str:
    """Return the names of some matrices as the end of a phrase, "" without names."""
    return "" if names is None else f" {some_of(names[which.cpu().numpy()].tolist())}"


def solve(tril: Tensor, vectors: Tensor) -> Tensor:
    """Return the solutions x of tril tril^T x = b for lower triangles (L, n, n) and b (..., L, n).

    Many vectors share a pass; `torch.cholesky_solve` would copy several matrices for it.
    """
    columns = vectors.reshape(-1, *vectors.shape[-2:]).permute(1, 2, 0)
    half = torch.linalg.solve_triangular(tril, columns, upper=False)
    whole = torch.linalg.solve_triangular(tril.mT, half, upper=True)
    return whole.permute(2, 0, 1).reshape(vectors.shape)


def inverse_diagonal(tril: Tensor) -> Tensor:
    """Return the diagonal (..., n) of the inverse of a matrix from its Cholesky factor (..., n, n).

    It holds the squared norms of the columns of tril^{-1}, made in blocks below the diagonal:
    n^3 / 3 operations and no second matrix.
    """
    n = tril.shape[-1]
    identity = torch.eye(n, BLOCK).to(tril)
    found = []
    for first in range(0, n, BLOCK):
        right = identity[: n - first].expand(*tril.shape[:-2], -1, -1)
        columns = torch.linalg.solve_triangular(tril[..., first:, first:], right, upper=False)
        found.append(columns.square_().sum(-2))
    return torch.cat(found, -1)[..., :n]


def log_det(tril: Tensor) -> Tensor:
    """Return the log-determinants (...) of matrices from their Cholesky factors (..., n, n)."""
    return 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
