"""Cholesky factors of covariance matrices that are nearly singular."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# How far the jitter may grow before a matrix is given up: times ten at each attempt.
ATTEMPTS = 6


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
        raised = covariance + torch.diag_embed((added * level).expand_as(diagonal))
        tril, failed = torch.linalg.cholesky_ex(raised)
        if not bool(failed.any()):
            if attempt:
                warnings.warn(
                    f"The covariance of the {what} is nearly singular: jitter was raised from "
                    f"{jitter:g} to {added:g}. Remove places that are nearly the same, or pass a "
                    "shorter lengthscale or a larger jitter.",
                    UserWarning,
                    stacklevel=3,
                )
            return tril
    raise ValueError(
        f"The covariance of the {what} could not be factorised even with jitter={added:g}. Check "
        "coordinates for extreme values, or pass a shorter lengthscale or a larger jitter."
    )
