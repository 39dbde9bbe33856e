"""Probabilistic non-negative matrix factorisation of counts, as a Pyro program."""

from importlib.metadata import version

from pnmf_pyro.estimator import PNMF
from pnmf_pyro.posterior_checks import posterior_predictive_check, prior_predictive_check
from pnmf_pyro.recipe import fit

__version__ = version("pnmf-pyro")

__all__ = [
    "PNMF",
    "__version__",
    "fit",
    "posterior_predictive_check",
    "prior_predictive_check",
]
