"""How draws of factors, loadings and size factors broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def leading_shape(F: Tensor, W: Tensor, s: Tensor | None = None) -> tuple[int, ...]:
    """Return what stands before (L, n), (d, L) and (n,) or (1, n), broadcast together."""
    shapes = [tuple(part.shape) for part in (F, W, s) if part is not None]
    n = shapes[0][-1]
    agree = F.ndim >= 2 <= W.ndim and shapes[0][-2] == shapes[1][-1]
    agree &= s is None or shapes[2][-2:] in ((n,), (1, n))
    leading: Sequence[int] = ()
    try:
        if max(map(len, shapes)) > 2:
            leading = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    except RuntimeError:
        agree = False
    if not agree:
        raise ValueError(
            "log_factors (..., L, n), loadings (..., d, L) and size_factors (n,) or (..., 1, n) "
            f"must agree in L, n and what stands before; got {', '.join(map(str, shapes))}."
        )
    return tuple(leading)
