"""The recommended settings of a fit, by size, space and what the user wants otherwise."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from pnmf_pyro.data.counts import MaybeArray
from pnmf_pyro.estimator.effects import without_effect
from pnmf_pyro.estimator.parameters import check_values
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.stages import (
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleLoadings,
    WarmUp,
)
from pnmf_pyro.models.factorization import has_closed_form
from pnmf_pyro.priors import Prior

logger = logging.getLogger("pnmf_pyro")

# Steps in closed form, which have no learning rate to choose: from a decomposition of the counts,
# or of biwhitened ones where that leads higher, first up a bound without noise until that has
# settled, then up the tighter one, at fixed points. docs/performance.md has what this gains.
RECIPE: dict[str, Any] = {
    "mode": "expanded",
    "training_mode": "natural",
    "loadings_mode": "multiplicative",
    "scale_pf": "auto",
    "E": "fixed",
    "init": (None, "biwhitened"),
    "max_iter": 4000,
    "tol": 1e-3,
    "random_state": 0,
    "stages": (WarmUp(), Settle()),
}

# In space: first without it, then hyperparameters and the kernel by prediction, then the fields.
SPATIAL: dict[str, Any] = {
    **RECIPE,
    "mode": "lower-bound",
    "spatial": True,
    "kernel": ("Matern32", "Matern12", "Matern52"),
    "train_lengthscale": True,
    "learn": ("sigma", "nugget"),
    "stages": (WarmUp(), LearnHyperparameters(), Settle()),
}

# With an inducing point at each place, what predicts best smooths the samples themselves a little
# too much, and loadings that have a prior predict better.
CLOSER = (
    WarmUp(kl_weight=0.6),
    LearnHyperparameters(),
    Settle(kl_weight=0.6),
    RestoreSpread(),
    SettleLoadings(shrink=True),
)

# With neighbours, the part of q(F) that is correlated over places comes when the rest has settled.
NEIGHBORS = (WarmUp(), LearnHyperparameters(), Settle(), Correlate(), Settle())

# Another likelihood has no steps in closed form.
ANY_LIKELIHOOD: dict[str, Any] = {
    "mode": "expanded",
    "training_mode": "standard",
    "loadings_mode": "softplus",
    "E": 3,
    "learning_rate": 0.2,
    "init": None,
    "max_iter": 1000,
    "tol": 0.0,
    "stages": None,
}

# Up to so many samples each place is an inducing point; beyond, each is conditioned on its
# neighbours. Where that is not wanted (local=False), there are this many inducing points. With
# another likelihood places have neighbours as well: gradients train their q(F) far better.
ALL_INDUCING = 1500
INDUCING = 1000
NEIGHBOURS = 50


PRIORS = {
    False: "summarised by inducing points (SVGP)",
    True: "each conditioned on its neighbours (LCGP, local=True)",
}


def recommended(
    shape: tuple[int, int],
    coords: MaybeArray,
    groups: MaybeArray,
    n_components: int,
    parameters: dict[str, Any],
) -> PNMF:
    """Return the estimator that `fit` trains, with what it chooses and the user wants otherwise."""
    check_values({"n_components": n_components, **parameters})
    n_samples, n_features = shape
    recipe = RECIPE if coords is None else _spatial(n_samples, groups, parameters)
    if _without_closed_form(parameters) or not _is_natural(parameters.get("prior")):
        recipe = {**recipe, **ANY_LIKELIHOOD}
    if parameters.get("mode") == "simple":
        recipe = {**recipe, "E": 3}  # which needs draws
    chosen = {**recipe, **parameters}
    if n_components > min(n_samples, n_features):  # more than a decomposition has
        chosen = {**chosen, "init": None, **parameters}
    model = PNMF(n_components=n_components, **chosen)
    _reset_without_effect(model, chosen.keys() - parameters.keys())
    described = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    logger.info("fit with n_components=%d, %s", n_components, described)
    if model.spatial:
        logger.info("%d places, %s", n_samples, PRIORS[model.local])
    return model


def _reset_without_effect(model: PNMF, chosen_here: Collection[str]) -> None:
    """Put what the recipe chose, and does not act, to its default: it is not for a warning."""
    defaults = PNMF(model.n_components)
    idle = set(without_effect(model)) & set(chosen_here)
    model.set_params(**{name: getattr(defaults, name) for name in idle})


def _spatial(n_samples: int, groups: MaybeArray, parameters: dict[str, Any]) -> dict[str, Any]:
    """The recipe in space, by size, groups and what the user wants otherwise."""
    few = n_samples <= ALL_INDUCING and not _without_closed_form(parameters)
    chosen = {**SPATIAL, "num_inducing": n_samples if few else INDUCING, "local": not few}
    chosen["K"] = max(1, min(NEIGHBOURS, n_samples - 1))
    wanted = {**chosen, **parameters}
    closed_forms = all(wanted[mode] == RECIPE[mode] for mode in ("training_mode", "loadings_mode"))
    if wanted["local"]:
        chosen["stages"] = NEIGHBORS
    elif few and closed_forms:
        chosen["stages"] = CLOSER
    if groups is not None:
        chosen |= {"multigroup": True, "learn": (*SPATIAL["learn"], "group_diff_param")}
    return chosen


def _without_closed_form(parameters: dict[str, Any]) -> bool:
    """Whether the likelihood is an object of the user's that has no steps in closed form."""
    likelihood = parameters.get("likelihood")
    return not isinstance(likelihood, str) and not has_closed_form(likelihood)


def _is_natural(prior: Prior | None) -> bool:
    """Whether natural-gradient steps can train a prior; those that are named by parameters, yes."""
    return prior is None or prior.natural
