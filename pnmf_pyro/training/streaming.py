"""Quantities of q(F) for all samples, worked out a block of samples at a time.

What is returned has to fit in memory; what is needed on the way to it does not grow with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro.distributions import Normal
from torch import Tensor

from pnmf_pyro.data.counts import BLOCK_ENTRIES
from pnmf_pyro.priors.base import Field


def by_samples(
    field: Field,
    quantity: Callable[[Tensor | None], Tensor],
    return_tensor: bool,
    leading: tuple[int, ...] = (),
) -> np.ndarray | Tensor:
    r"""Return a quantity of q(F) for all samples of a field.

    Parameters
    ----------
    field : Field
        A prior, or what a spatial one says of other places.
    quantity : callable
        From the numbers of n samples, or None for all, to a tensor of shape (\*leading, L, n).
    return_tensor : bool
        Return a tensor, on the device of the field, rather than an array.
    leading : tuple of int

    Returns
    -------
    ndarray or Tensor of shape (\*leading, N, L)
        In memory of its own, of the field's floating-point type.
    """
    size = max(1, BLOCK_ENTRIES // max(1, math.prod(leading) * field.L))
    with torch.no_grad():
        first = quantity(None if size >= field.N else torch.arange(min(size, field.N)))
        device = first.device if return_tensor else torch.device("cpu")
        output = torch.empty(*leading, field.N, field.L, dtype=first.dtype, device=device)
        for start in range(0, field.N, size):
            stop = min(start + size, field.N)
            part = first if start == 0 else quantity(torch.arange(start, stop))
            output[..., start:stop, :] = part.mT
    return output if return_tensor else output.numpy()


def marginals(field: Field, quantity: Callable[[Normal], Tensor], return_tensor: bool) -> Any:
    """Return a quantity of the marginals of q(F), from shape (L, n) each, of shape (N, L)."""
    return by_samples(field, lambda index: quantity(field.marginal(index)), return_tensor)
