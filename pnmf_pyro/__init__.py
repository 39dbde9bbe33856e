"""Probabilistic non-negative matrix factorisation of counts, as a Pyro program."""

__version__ = "0.1.0"

from pnmf_pyro import plotting, transforms
from pnmf_pyro.analysis import interpretation
from pnmf_pyro.analysis.interpretation import (
    contributions,
    feature_scores,
    spatial_scores,
    top_features,
)
from pnmf_pyro.analysis.matching import match_factors
from pnmf_pyro.analysis.predictive_checks import posterior_predictive_check, prior_predictive_check
from pnmf_pyro.analysis.selection import select_n_components
from pnmf_pyro.estimator.fit_model import fit_model
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.recipe import fit

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
