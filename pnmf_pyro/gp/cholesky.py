"""Cholesky factors of nearly singular covariance matrices, and what is read off a factor."""

from __future__ import annotations

import torch
from torch import Tensor

from pnmf_pyro.data.checks import warn

# How far the jitter may grow before a matrix is given up: times ten at each attempt.
ATTEMPTS = 6

# Rows or columns of a symmetric matrix that are made together.
BLOCK = 128


def jittered_cholesky(covariance: Tensor, jitter: float, what: str = "inducing points") -> Tensor:
    """Return the lower Cholesky factor of a covariance with something added to its diagonal.

    Parameters
    ----------
    covariance : Tensor of shape (..., n, n), float64
    jitter : float
        Added to the diagonal, relative to its mean; multiplied by ten while the factorisation
        fails.
    what : str
        What the rows are, for messages.

    Raises
    ------
    ValueError
        Where a hundred thousand times the jitter is not enough.

    Warns
    -----
    UserWarning
        Where more than the given jitter was needed.
    """
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    level = diagonal.mean(-1, keepdim=True)
    for attempt in range(ATTEMPTS):
        added = jitter * 10**attempt
        raised = covariance.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(added * level)
        tril, failed = torch.linalg.cholesky_ex(raised)
        if not bool(failed.any()):
            if attempt:
                warn(
                    f"The covariance of the {what} is nearly singular: jitter was raised from "
                    f"{jitter:g} to {added:g}. Remove places that are nearly the same, or pass a "
                    "shorter lengthscale or a larger jitter."
                )
            return tril
    raise ValueError(
        f"The covariance of the {what} could not be factorised even with jitter={added:g}. Check "
        "coordinates for extreme values, or pass a shorter lengthscale or a larger jitter."
    )


def solve(tril: Tensor, vectors: Tensor) -> Tensor:
    """Return the solutions x of tril tril^T x = b, of the shape of the vectors b.

    Many vectors share a pass; `torch.cholesky_solve` would copy several matrices for it.

    Parameters
    ----------
    tril : Tensor of shape (L, n, n)
        Lower triangular.
    vectors : Tensor of shape (..., L, n)
    """
    columns = vectors.reshape(-1, *vectors.shape[-2:]).permute(1, 2, 0)
    half = torch.linalg.solve_triangular(tril, columns, upper=False)
    whole = torch.linalg.solve_triangular(tril.mT, half, upper=True)
    return whole.permute(2, 0, 1).reshape(vectors.shape)


def inverse_diagonal(tril: Tensor) -> Tensor:
    """Return the diagonal of the inverse of a matrix from its lower Cholesky factor, (..., n).

    It holds the squared norms of the columns of tril^{-1}, made in blocks below the diagonal:
    n^3 / 3 operations and no second matrix.

    Parameters
    ----------
    tril : Tensor of shape (..., n, n)
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
    """Return the log-determinant of a matrix from its lower Cholesky factor, (...).

    Parameters
    ----------
    tril : Tensor of shape (..., n, n)
    """
    return 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
