"""Export of draws to ArviZ, for its plots and summaries."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from pnmf_pyro.analysis.replicates import GROUP, draw_counts, draw_latents
from pnmf_pyro.data.checks import check_count, check_counts
from pnmf_pyro.data.random_state import RandomState, drawing_from, torch_generator
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.training.fitted import Fitted, fitted_module
from pnmf_pyro.transforms import get_loadings

# Replicated counts that an export may hold.
MOST_COUNTS = 1 << 27


def to_arviz(
    model: Fitted,
    X: Any = None,
    samples: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    n_draws: int = 200,
    *,
    random_state: RandomState = None,
) -> Any:
    """Draw from the posterior of some samples and features, as an object of ArviZ.

    There is one chain. Its draws are independent, from the fitted variational distribution and not
    from a Markov chain: R-hat and effective sample sizes mean nothing here and say nothing about
    the quality of the approximation.

    Parameters
    ----------
    model : PNMF, ModelFit or PoissonFactorization
        Fit, see :func:`~pnmf_pyro.training.fitted.fitted_module`.
    X : array-like or sparse matrix of shape (N, D), optional
        Counts of the fit, to be stored beside the draws.
    samples, features : sequence of int, optional
        Numbers of those to export; all unless given.
    n_draws : int
        Number of draws.
    random_state : int, RandomState, Generator or None
        Seed of the draws; None for different ones at each call.

    Returns
    -------
    arviz.InferenceData (ArviZ 0.x) or xarray.DataTree (ArviZ 1.x)
        `posterior` with `log_factors` (chain, draw, sample, component); `posterior_predictive` with
        `counts` (chain, draw, sample, feature), replicated from the same draws; `constant_data`
        with `loadings` (feature, component); and, with X, `observed_data` with `counts`.

    Raises
    ------
    ImportError
        If ArviZ is not installed.
    ValueError
        For numbers that are not of samples or features, and for an export that would be too large.
    """
    arviz, xarray = _packages()
    module = fitted_module(model)
    rows = _numbers("samples", samples, module.N)
    columns = _numbers("features", features, module.D)
    size = check_count("n_draws", n_draws) * len(rows) * len(columns)
    if size > MOST_COUNTS:
        raise ValueError(
            f"samples and features must be fewer: {n_draws} draws of {len(rows)} x {len(columns)} "
            f"counts are {size:.3g} numbers, more than {MOST_COUNTS:.3g}. Pass samples= and "
            "features= to choose some, or fewer n_draws."
        )
    seen = {} if X is None else {"observed_data": {"counts": _observed(module, X, rows, columns)}}
    F, counts = _draws(module, rows, columns, n_draws, random_state)
    groups: dict[str, dict[str, Any]] = {
        "posterior": {"log_factors": (("chain", "draw", "sample", "component"), F[None])},
        "posterior_predictive": {"counts": (("chain", "draw", "sample", "feature"), counts[None])},
        "constant_data": {"loadings": (("feature", "component"), get_loadings(model)[columns])},
        **seen,
    }
    coords = _coordinates(model, module, rows, columns, n_draws)
    sets = {name: _dataset(xarray, variables, coords) for name, variables in groups.items()}
    # By what the module holds: ArviZ 1.x answers to the old name as well, with a warning.
    inference_data = vars(arviz).get("InferenceData")
    return xarray.DataTree.from_dict(sets) if inference_data is None else inference_data(**sets)


def _dataset(xarray: ModuleType, variables: dict[str, Any], coords: dict[str, np.ndarray]) -> Any:
    used = {dim for dims, _ in variables.values() for dim in dims}
    return xarray.Dataset(variables, {dim: coords[dim] for dim in coords if dim in used})


def _coordinates(
    model: Fitted, module: PoissonFactorization, rows: np.ndarray, columns: np.ndarray, n_draws: int
) -> dict[str, np.ndarray]:
    """Names along each dimension."""
    names = np.asarray(getattr(model, "feature_names_in_", np.arange(module.D)))[columns]
    return {
        "chain": np.zeros(1, int),
        "draw": np.arange(n_draws),
        "sample": rows,
        "feature": names.astype(str) if names.dtype == object else names,
        "component": np.arange(module.L),
    }


def _observed(
    module: PoissonFactorization, X: Any, rows: np.ndarray, columns: np.ndarray
) -> tuple[tuple[str, str], np.ndarray]:
    seen = check_counts(X).numpy()
    if seen.shape != (module.N, module.D):
        raise ValueError(f"X must have shape {(module.N, module.D)}; got {seen.shape}.")
    chosen = seen[rows][:, columns]
    return ("sample", "feature"), chosen.toarray() if sp.issparse(chosen) else chosen


def _draws(
    module: PoissonFactorization,
    rows: np.ndarray,
    columns: np.ndarray,
    n_draws: int,
    random_state: RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-factors (n_draws, n, L), and counts (n_draws, n, d) replicated from them."""
    device = module.W.device
    samples = torch.from_numpy(rows).to(device)
    factors, counts = [], []
    with module.apart(inherit=True), drawing_from(torch_generator(random_state), device):
        for start in range(0, n_draws, GROUP):
            latents = draw_latents(module.guide, min(GROUP, n_draws - start))
            factors.append(latents.of(samples)["F"].mT.cpu().numpy())
            drawn = draw_counts(module, latents, samples)
            counts.append(drawn[..., torch.from_numpy(columns).to(device)].cpu().numpy())
    return np.concatenate(factors), np.concatenate(counts)


def _numbers(name: str, chosen: Sequence[int] | None, size: int) -> np.ndarray:
    if chosen is None:
        return np.arange(size)
    numbers = np.atleast_1d(np.asarray(chosen))
    whole = numbers.ndim == 1 and numbers.dtype.kind in "iu" and len(numbers) > 0
    if not whole or numbers.min() < 0 or numbers.max() >= size:
        raise ValueError(f"{name} must be whole numbers from 0 to {size - 1}; got {chosen!r}.")
    return numbers.astype(np.int64)


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        import arviz
        import xarray
    except ImportError as error:
        raise ImportError(
            "Export needs ArviZ. Install it with: pip install 'pnmf-pyro[arviz]'"
        ) from error
    return arviz, xarray
