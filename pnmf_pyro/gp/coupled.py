"""Solves with a precision that couples the components of a place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def conjugate_gradients(
    product: Map, precondition: Map, b: Tensor, *, tolerance: float = 0.03, most: int = 100
) -> Tensor:
    """Solve P x = b, for R right sides at once.

    They are in the last dimension of x and b, which have three: components and places, or places
    and components, come first.

    Parameters
    ----------
    product, precondition : callable
        From x to P x, and to what is near P^-1 x; both are linear, symmetric and positive.
    b : Tensor of shape (L, M, R) or (M, L, R)
    tolerance : float
        Error of x at which to stop, relative to x in the norm of P.
    most : int
        Number of products at most.
    """
    x, r = torch.zeros_like(b), b.clone()
    direction, power, first = torch.zeros_like(b), b.new_ones(b.shape[-1]), None
    for iteration in range(most):
        z = precondition(r)
        previous, power = power, (r * z).sum((0, 1))
        first = power if first is None else first
        active = power > tolerance**2 * first
        if not bool(active.any()):
            break
        turn = torch.where(previous > 0, power / previous, 0.0) * (iteration > 0)
        direction = z + turn * direction
        moved = product(direction)
        curved = (direction * moved).sum((0, 1))
        step = torch.where(active, power / torch.where(active, curved, 1.0), 0.0)
        x += step * direction
        r -= step * moved
    return x


def times_blocks(blocks: Tensor, x: Tensor) -> Tensor:
    """Return the products of blocks (N, L, L), one for each place, with x (L, N, R)."""
    return torch.einsum("nlk,knr->lnr", blocks, x)
