"""Probabilistic non-negative matrix factorisation of counts, as a Pyro program."""

from importlib.metadata import version

from pnmf_pyro import interpretation, plotting, transforms
from pnmf_pyro.estimator import PNMF
from pnmf_pyro.interpretation import contributions, feature_scores, spatial_scores, top_features
from pnmf_pyro.recipe import fit

__version__ = version("pnmf-pyro")

__all__ = [
    "PNMF",
    "__version__",
    "contributions",
    "feature_scores",
    "fit",
    "interpretation",
    "plotting",
    "spatial_scores",
    "top_features",
    "transforms",
]
