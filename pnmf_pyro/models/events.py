"""Sparse tables of Poisson counts, drawn event by event."""

from __future__ import annotations

import torch
from torch import Tensor


def count_events(factors: Tensor, loadings: Tensor) -> Tensor:
    """Draw X_ij ~ Poisson(sum_l factors_li W_jl) from its events, a dense (n, d) tensor.

    Sample i has Poisson(factors_li sum_j W_jl) events of component l, and each falls on feature j
    with probability W_jl / sum_j W_jl: their counts are independent Poisson with the rates of X.
    """
    (_, n), d = factors.shape, len(loadings)
    numbers = torch.poisson(factors * loadings.sum(0)[:, None]).long()
    ladders = loadings.T.double().cumsum(1)
    features = [
        torch.searchsorted(
            ladder, ladder[-1] * torch.rand(m, dtype=ladder.dtype, device=ladder.device), right=True
        )
        for ladder, m in zip(ladders, numbers.sum(1).tolist(), strict=True)
    ]
    samples = torch.arange(n, device=factors.device).expand_as(numbers)
    rows = torch.repeat_interleave(samples.reshape(-1), numbers.reshape(-1))
    events = rows * d + torch.cat(features).clamp_max(d - 1)
    table = factors.new_zeros(n * d)
    return table.scatter_add_(0, events, table.new_ones(len(events))).reshape(n, d)
