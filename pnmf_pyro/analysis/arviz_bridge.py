"""Export of draws to ArviZ, for its plots and summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from pnmf_pyro.analysis.replicates import GROUP, draw_counts, draw_posterior
from pnmf_pyro.data.checks import check_count
from pnmf_pyro.data.counts import CountsLike
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.random_state import RandomState, drawing_from, torch_generator
from pnmf_pyro.estimator.inputs import keys_of
from pnmf_pyro.estimator.results import chosen_numbers, counts_of_fit, import_optional
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.training.fitted import Fitted, fitted_module
from pnmf_pyro.transforms import get_loadings

# Replicated counts that an export may hold.
MOST_COUNTS = 1 << 27


def to_arviz(
    model: Fitted,
    X: CountsLike | None = None,
    samples: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    n_draws: int = 200,
    *,
    random_state: RandomState = None,
) -> Any:
    """Draw from the posterior of some samples and features, as an object of ArviZ.

    There is one chain. Its draws are independent, from the posterior that the fit found, joint over
    the components of a sample, and not from a Markov chain: R-hat and effective sample sizes say
    nothing of the approximation.

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
    """
    need = "Export needs ArviZ"
    arviz, xarray = (import_optional(name, need, "arviz") for name in ("arviz", "xarray"))
    module = fitted_module(model)
    rows = chosen_numbers("samples", samples, module.N)
    columns = chosen_numbers("features", features, module.D)
    size = check_count("n_draws", n_draws) * len(rows) * len(columns)
    if size > MOST_COUNTS:
        raise ValueError(
            f"samples and features must be fewer: {n_draws} draws of {len(rows)} x {len(columns)} "
            f"counts are {size:.3g} numbers, more than {MOST_COUNTS:.3g}. Pass samples= and "
            "features= to choose some, or fewer n_draws."
        )
    F, counts = _draws(module, rows, columns, n_draws, random_state)
    groups: dict[str, dict[str, Any]] = {
        "posterior": {"log_factors": (("chain", "draw", "sample", "component"), F[None])},
        "posterior_predictive": {"counts": (("chain", "draw", "sample", "feature"), counts[None])},
        "constant_data": {"loadings": (("feature", "component"), get_loadings(model)[columns])},
    }
    if X is not None:
        chosen = counts_of_fit(keys_of(model).counts(X), (module.N, module.D)).numpy()[rows][
            :, columns
        ]
        observed = chosen.toarray() if sp.issparse(chosen) else chosen
        groups["observed_data"] = {"counts": (("sample", "feature"), observed)}
    names = np.asarray(getattr(model, "feature_names_in_", np.arange(module.D)))[columns]
    coords = {
        "chain": np.zeros(1, int),
        "draw": np.arange(n_draws),
        "sample": rows,
        "feature": names.astype(str) if names.dtype == object else names,
        "component": np.arange(module.L),
    }
    sets = {}
    for name, variables in groups.items():
        used = {dim for dims, _ in variables.values() for dim in dims}
        sets[name] = xarray.Dataset(variables, {dim: coords[dim] for dim in coords if dim in used})
    # By what the module holds: ArviZ 1.x answers to the old name as well, with a warning.
    inference_data = vars(arviz).get("InferenceData")
    return xarray.DataTree.from_dict(sets) if inference_data is None else inference_data(**sets)


@isolated
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
            latents = draw_posterior(module, min(GROUP, n_draws - start))
            factors.append(latents.of(samples)["F"].mT.cpu().numpy())
            drawn = draw_counts(module, latents, samples)
            counts.append(drawn[..., torch.from_numpy(columns).to(device)].cpu().numpy())
    return np.concatenate(factors), np.concatenate(counts)
