"""Quantities of q(F) for all samples, worked out a block of samples at a time.

What is returned has to fit in memory; what is needed on the way to it does not grow with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from pyro.distributions import Normal
from torch import Tensor

from pnmf_pyro.counts import BLOCK_ENTRIES
from pnmf_pyro.priors import Prior


def by_samples(
    prior: Prior,
    quantity: Callable[[Normal], Tensor],
    return_tensor: bool,
    leading: tuple[int, ...] = (),
) -> np.ndarray | Tensor:
    r"""Return a quantity of the marginals of q(F) for all samples.

    Parameters
    ----------
    prior : Prior
    quantity : callable
        From the marginal of n samples, of shape (L, n), to a tensor of shape (\*leading, L, n).
    return_tensor : bool
        Return a tensor, on the device of the prior, rather than an array.
    leading : tuple of int

    Returns
    -------
    ndarray or Tensor of shape (\*leading, N, L)
        In memory of its own, of the prior's floating-point type.
    """
    if not isinstance(prior, Prior):
        raise ValueError(
            f"prior must be a Prior such as a GaussianPrior; got {type(prior).__name__}. "
            "For that of a fitted model use get_prior(model)."
        )
    like = next(prior.parameters())
    device = like.device if return_tensor else torch.device("cpu")
    output = torch.empty(*leading, prior.N, prior.L, dtype=like.dtype, device=device)
    size = max(1, BLOCK_ENTRIES // max(1, math.prod(leading) * prior.L))
    with torch.no_grad():
        for start in range(0, prior.N, size):
            stop = min(start + size, prior.N)
            whole = size >= prior.N
            index = None if whole else torch.arange(start, stop, device=like.device)
            output[..., start:stop, :] = quantity(prior.marginal(index)).mT
    return output if return_tensor else output.numpy()
