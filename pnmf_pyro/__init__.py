"""Probabilistic non-negative matrix factorisation of counts, as a Pyro program.

Names and rooms are imported when they are first asked for, since scikit-learn, scipy and torch take
seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "PNMF",
    "__version__",
    "calibrate",
    "contributions",
    "deviance",
    "differential_features",
    "domains",
    "effects_table",
    "feature_scores",
    "fit",
    "fit_model",
    "group_levels",
    "importance_of_space",
    "interpretation",
    "match_factors",
    "plan",
    "plotting",
    "posterior_predictive_check",
    "predict_as",
    "prior_predictive_check",
    "select_n_components",
    "spatial_scores",
    "top_features",
    "transforms",
]

if TYPE_CHECKING:
    from pnmf_pyro import plotting, transforms
    from pnmf_pyro.analysis import interpretation
    from pnmf_pyro.analysis.calibration import calibrate
    from pnmf_pyro.analysis.clustering import domains
    from pnmf_pyro.analysis.differential import differential_features
    from pnmf_pyro.analysis.effects import effects_table
    from pnmf_pyro.analysis.groups import group_levels, predict_as
    from pnmf_pyro.analysis.importance import importance_of_space
    from pnmf_pyro.analysis.interpretation import (
        contributions,
        feature_scores,
        spatial_scores,
        top_features,
    )
    from pnmf_pyro.analysis.matching import match_factors
    from pnmf_pyro.analysis.predictive_checks import (
        posterior_predictive_check,
        prior_predictive_check,
    )
    from pnmf_pyro.analysis.selection import select_n_components
    from pnmf_pyro.estimator.fit import fit, plan
    from pnmf_pyro.estimator.fit_model import fit_model
    from pnmf_pyro.estimator.pnmf import PNMF
    from pnmf_pyro.models.deviance import deviance

_HOMES = {
    "PNMF": "estimator.pnmf",
    "calibrate": "analysis.calibration",
    "contributions": "analysis.interpretation",
    "deviance": "models.deviance",
    "differential_features": "analysis.differential",
    "domains": "analysis.clustering",
    "effects_table": "analysis.effects",
    "feature_scores": "analysis.interpretation",
    "fit": "estimator.fit",
    "fit_model": "estimator.fit_model",
    "group_levels": "analysis.groups",
    "importance_of_space": "analysis.importance",
    "match_factors": "analysis.matching",
    "plan": "estimator.fit",
    "posterior_predictive_check": "analysis.predictive_checks",
    "predict_as": "analysis.groups",
    "prior_predictive_check": "analysis.predictive_checks",
    "select_n_components": "analysis.selection",
    "spatial_scores": "analysis.interpretation",
    "top_features": "analysis.interpretation",
}
_ROOMS = {
    "interpretation": "analysis.interpretation",
    **{
        room: room
        for room in (
            *("analysis", "command_line", "custom_modules", "data", "estimator", "gp"),
            *("initialization", "models", "plotting", "priors", "training", "transforms"),
        )
    },
}


def _named(name: str) -> Any:
    """Import what a name of the package stands for (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(f"pnmf_pyro.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"pnmf_pyro.{_ROOMS[name]}")
    raise AttributeError(f"module 'pnmf_pyro' has no attribute {name!r}")


if not TYPE_CHECKING:  # which would take any name for known
    __getattr__ = _named


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
