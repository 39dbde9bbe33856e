"""Probabilistic non-negative matrix factorisation of counts, as a Pyro program."""

from importlib.metadata import version

from pnmf_pyro import interpretation, plotting, transforms
from pnmf_pyro.estimator import PNMF
from pnmf_pyro.interpretation import contributions, feature_scores, spatial_scores, top_features
from pnmf_pyro.matching import match_factors
from pnmf_pyro.own_models import fit_model
from pnmf_pyro.posterior_checks import posterior_predictive_check, prior_predictive_check
from pnmf_pyro.recipe import fit
from pnmf_pyro.selection import select_n_components

__version__ = version("pnmf-pyro")

__all__ = [
    "PNMF",
    "__version__",
    "contributions",
    "feature_scores",
    "fit",
    "fit_model",
    "interpretation",
    "match_factors",
    "plotting",
    "posterior_predictive_check",
    "prior_predictive_check",
    "select_n_components",
    "spatial_scores",
    "top_features",
    "transforms",
]
