r"""Term (a) of the ELBO, sum_j X_ij log sum_l A_il W_jl, with its gradients: the hot kernel.

With rho = A W^T and the entries G_ij = X_ij / rho_ij at the stored counts,

    value_i        = sum_j X_ij log rho_ij
    d value / dA   = G W        (n, L)
    d value / dW   = G^T A      (d, L)

so a value with both gradients costs one sampled product and two sparse-dense products. Both
gradients are made on the way forward, block by block: nothing as large as X outlives its block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pnmf_pyro.data.counts import Counts

# Columns below which the compiled product at stored entries takes up to ten times as long.
LEAST_COLUMNS = 8


def log_rate(counts: Counts, factors: Tensor, loadings: Tensor) -> Tensor:
    """Return sum_j X_ij log rho_ij in float64, shape (n,), with rho = factors @ loadings.T.

    Differentiable (once) in the factors exp F, (n, L), and the loadings W, (d, L), which are
    non-negative.
    """
    if torch.is_grad_enabled() and (factors.requires_grad or loadings.requires_grad):
        return _LogRate.apply(counts, factors, loadings, False)
    parts = []
    for rows, block in counts.blocks():
        rho = rates(block, factors[rows], loadings)
        parts.append(block.row_sums(block.values * rho.log()))
    return torch.cat(parts)


def log_rate_and_moments(
    counts: Counts, factors: Tensor, loadings: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`log_rate` with sum_j X_ij phi_ijl and sum_j X_ij phi_ijl^2, of shape (n, L).

    phi_ijl = W_jl exp F_il / rho_ij is the share of component l in a rate. The two sums, which are
    not differentiable, give the curvature

        d^2 / dF_il^2  sum_j X_ij log rho_ij = sum_j X_ij phi_ijl (1 - phi_ijl).
    """
    return _LogRate.apply(counts, factors, loadings, True)


def log_rate_with_gradients(
    counts: Counts, factors: Tensor, loadings: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values of :func:`log_rate`, and the gradients of their sum, (n, L) and (d, L).

    In the sum that is differentiated each sample has its weight, (n,), which is 1 unless given.
    """
    values, factors_gradient = [], []
    loadings_gradient = torch.zeros_like(loadings)
    for rows, block in counts.blocks():
        A = factors[rows]
        rho = rates(block, A, loadings)
        ratio = block.values / rho
        values.append(block.row_sums(rho.log_().mul_(block.values)))
        factors_gradient.append(block.matmul(ratio, loadings))
        weighted = A if weights is None else A * weights[rows, None]
        loadings_gradient += block.transposed_matmul(ratio, weighted)
    gradient = torch.cat(factors_gradient)
    if weights is not None:
        gradient = gradient * weights[:, None]
    return torch.cat(values), gradient, loadings_gradient


def second_moments(
    counts: Counts, factors: Tensor, loadings: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Return sum_j X_ij phi_ijl phi_ijm for pairs of components (l, m), of shape (n, n_pairs).

    Parameters
    ----------
    counts : Counts of shape (n, d)
    factors, loadings : Tensor of shape (n, L) and (d, L)
        exp F and W.
    first, second : Tensor of int64, shape (n_pairs,)
        The l and the m of each pair.
    """
    parts = []
    largest = torch.finfo(factors.dtype).max ** 0.75
    products = loadings[:, first] * loadings[:, second]
    for rows, block in counts.blocks():
        rho = rates(block, factors[rows], loadings)
        steep = (block.values / rho.square_()).clamp_max_(largest)
        parts.append(block.matmul(steep, products))
    return torch.cat(parts).mul_(factors[:, first]).mul_(factors[:, second])


def rates(block: Counts, factors: Tensor, loadings: Tensor) -> Tensor:
    """Return the rates at stored entries, kept above zero so that log and 1/rho stay finite."""
    floor = torch.finfo(factors.dtype).tiny ** 0.5
    if (missing := LEAST_COLUMNS - factors.shape[1]) > 0:
        factors, loadings = (
            torch.nn.functional.pad(one, (0, missing)) for one in (factors, loadings)
        )
    return block.inner(factors, loadings).clamp_min_(floor)


class _LogRate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, counts: Counts, factors: Tensor, loadings: Tensor, with_moments: bool
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        values, *gradients = log_rate_with_gradients(counts, factors, loadings)
        ctx.counts = counts
        ctx.save_for_backward(factors, loadings, *gradients)
        if not with_moments:
            return values
        each = torch.arange(factors.shape[1], device=factors.device)
        first = factors * gradients[0]
        second = second_moments(counts, factors, loadings, each, each)
        ctx.mark_non_differentiable(first, second)
        return values, first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor, *unused: Tensor) -> tuple[None, Tensor, Tensor, None]:
        factors, loadings, factors_gradient, loadings_gradient = ctx.saved_tensors
        weights = weights.to(factors.dtype)
        if bool((weights == weights[0]).all()):
            return None, factors_gradient * weights[0], loadings_gradient * weights[0], None
        _, *weighted = log_rate_with_gradients(ctx.counts, factors, loadings, weights)
        return None, weighted[0], weighted[1], None
