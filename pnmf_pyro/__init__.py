"""Probabilistic non-negative matrix factorisation of counts, as a Pyro program."""

from pnmf_pyro.estimator import PNMF

__version__ = "0.1.0"

__all__ = ["PNMF", "__version__"]
