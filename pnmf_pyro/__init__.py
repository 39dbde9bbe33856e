"""Probabilistic non-negative matrix factorisation of counts, as a Pyro program."""

from importlib.metadata import version

from pnmf_pyro.estimator import PNMF

__version__ = version("pnmf-pyro")

__all__ = ["PNMF", "__version__"]
