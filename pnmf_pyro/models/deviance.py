"""How far counts are from their expected counts, in the measure that a Poisson model minimises."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro.data.checks import check_array, check_matrix
from pnmf_pyro.data.counts import CountsLike
from pnmf_pyro.data.log_rate import log_rate

Numbers: TypeAlias = Tensor | np.ndarray


def deviance(X: CountsLike, rate: Numbers | tuple[Numbers, Numbers]) -> float:
    r"""Return the Poisson deviance of counts from their rates, averaged over all n d entries.

    .. math:: \frac{2}{n d} \sum_{ij} \left(X_{ij} \log \frac{X_{ij}}{\mu_{ij}} - X_{ij}
        + \mu_{ij}\right)

    It is 0 where counts and rates are equal, and about 1 for Poisson counts of a large mean and
    their true rates. A rate of 0 where there are counts is taken as the smallest number whose
    logarithm is safe.

    Parameters
    ----------
    X : array, Tensor, sparse matrix, DataFrame or Counts of shape (n, d)
        Counts.
    rate : array or Tensor of shape (n, d), or tuple (factors, loadings)
        Expected counts mu, non-negative. Factors (n, L), times size factors where there are any,
        and loadings (d, L) stand for their product factors @ loadings.T, which is not built where
        the counts are sparse.

    Raises
    ------
    ValueError
        For shapes that do not agree, and for entries that are negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> round(pnmf_pyro.deviance(np.array([[0, 2], [1, 3]]), np.full((2, 2), 1.5)), 3)
    1.125
    """
    counts = check_matrix(X)
    n, d = counts.shape
    if isinstance(rate, tuple):
        factors, loadings = _check_product(rate, n, d)
        counts = counts.to(loadings.device).to(loadings.dtype)
        fitted = log_rate(counts, factors, loadings).sum()
        total_rate = factors.sum(0, dtype=torch.float64) @ loadings.sum(0, dtype=torch.float64)
    else:
        means = _check_rates("rate", rate).double()
        if means.shape != (n, d):
            raise ValueError(f"rate must have the shape of X, {n, d}; got {tuple(means.shape)}.")
        counts = counts.to(means.device).to(means.dtype)
        logs = means.clamp_min(torch.finfo(means.dtype).tiny).log()
        fitted = torch.stack(
            [(b.to_dense() * logs[rows]).sum() for rows, b in counts.blocks()]
        ).sum()
        total_rate = means.sum()
    saturated = [
        block.row_sums(torch.xlogy(b := block.values, b) - b) for _, block in counts.blocks()
    ]
    return float(2 * (torch.cat(saturated).sum() - fitted + total_rate) / (n * d))


def _check_product(rate: tuple[Numbers, ...], n: int, d: int) -> tuple[Tensor, Tensor]:
    """Factors (n, L) and loadings (d, L) of one floating-point type."""
    parts = [_check_rates("factors and loadings", part) for part in rate]
    shapes = [tuple(part.shape) for part in parts]
    L = shapes[0][-1] if shapes and shapes[0] else 0
    if shapes != [(n, L), (d, L)]:
        raise ValueError(
            f"rate must be a tuple (factors, loadings) of shapes ({n}, L) and ({d}, L) for X of "
            f"shape {n, d}; got {', '.join(map(str, shapes)) or 'an empty tuple'}."
        )
    factors, loadings = parts
    dtype = torch.promote_types(factors.dtype, loadings.dtype)
    return factors.to(dtype).contiguous(), loadings.to(dtype).contiguous()


def _check_rates(name: str, values: Numbers) -> Tensor:
    numbers = (
        values.detach() if isinstance(values, Tensor) else torch.tensor(check_array(name, values))
    )
    if not numbers.is_floating_point():
        numbers = numbers.double()
    if not bool(((numbers >= 0) & numbers.isfinite()).all()):
        raise ValueError(
            f"{name} must be finite and not negative; the lowest is {float(numbers.min()):g} and "
            f"the highest {float(numbers.max()):g}."
        )
    return numbers
