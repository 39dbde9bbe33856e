"""How far counts are from their expected counts, in the measure that a Poisson model minimises."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pnmf_pyro.data.checks import check_array, check_matrix
from pnmf_pyro.data.counts import Counts, CountsLike, SparseCounts
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.log_rate import log_rate
from pnmf_pyro.data.masks import Mask, hide

Numbers: TypeAlias = Tensor | np.ndarray


@isolated
def deviance(X: CountsLike, rate: Numbers | tuple[Numbers, Numbers], *, mask: Mask = None) -> float:
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
    mask : array-like or sparse matrix of shape (n, d), optional
        True where an entry counts; the mean is then over these. Unlike that of a fit it may be true
        for what was hidden there, to see how well that is predicted.

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
    X, hidden = hide(X, mask, told=False)
    counts = check_matrix(X)
    n, d = counts.shape
    if isinstance(rate, tuple):
        rate = _check_product(rate, n, d)
    else:
        rate = _check_rates("rate", rate).double()
        if rate.shape != (n, d):
            raise ValueError(f"rate must have the shape of X, {n, d}; got {tuple(rate.shape)}.")
    if hidden is None:
        return _total(counts, rate) / (n * d)
    n_seen = n * d - len(hidden.values)
    if not n_seen:
        raise ValueError("mask must be True for at least one entry; it hides all of them.")
    if 2 * n_seen < n * d:
        return _total_at(_others(hidden), counts, rate) / n_seen
    # The counts are 0 where they are hidden, and what these add is taken off.
    return (_total(counts, rate) - _total_at(hidden, counts, rate)) / n_seen


def _total(counts: Counts, rate: Tensor | tuple[Tensor, Tensor]) -> float:
    """Return the deviance summed over all entries."""
    if isinstance(rate, tuple):
        factors, loadings = rate
        counts = counts.to(loadings.device).to(loadings.dtype)
        fitted = log_rate(counts, factors, loadings).sum()
        total_rate = factors.sum(0, dtype=torch.float64) @ loadings.sum(0, dtype=torch.float64)
    else:
        counts = counts.to(rate.device).to(rate.dtype)
        logs = rate.clamp_min(torch.finfo(rate.dtype).tiny).log()
        fitted = torch.stack(
            [(b.to_dense() * logs[rows]).sum() for rows, b in counts.blocks()]
        ).sum()
        total_rate = rate.sum()
    saturated = [
        block.row_sums(torch.xlogy(b := block.values, b) - b) for _, block in counts.blocks()
    ]
    return float(2 * (torch.cat(saturated).sum() - fitted + total_rate))


def _total_at(cells: SparseCounts, counts: Counts, rate: Tensor | tuple[Tensor, Tensor]) -> float:
    """Return the deviance summed over some entries, those that are stored in `cells`."""
    rows, columns = cells.numpy().nonzero()
    if isinstance(rate, tuple):
        factors, loadings = rate
        means = cells.to(loadings.device).to(loadings.dtype).inner(factors, loadings)
    else:
        means = rate[torch.from_numpy(rows), torch.from_numpy(columns)]
    table: Any = counts.numpy()
    x = torch.from_numpy(np.asarray(table[rows.copy(), columns.copy()]).ravel()).double()
    means = means.cpu().double()
    logs = torch.xlogy(x, x) - x * means.clamp_min(torch.finfo(torch.float32).tiny).log()
    return float(2 * (logs - x + means).sum())


def _others(hidden: SparseCounts) -> SparseCounts:
    """Store the entries that are not stored."""
    seen = sp.csr_matrix(hidden.numpy().toarray() == 0, dtype=np.float32)
    return SparseCounts.from_scipy(seen)


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
