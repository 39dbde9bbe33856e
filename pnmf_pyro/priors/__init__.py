"""Priors over the log-factors."""

from pnmf_pyro.priors.base import Prior
from pnmf_pyro.priors.gaussian import GaussianPrior

__all__ = ["GaussianPrior", "Prior"]
