"""Distributions of the model, for use in any Pyro program."""

from pnmf_pyro.distributions.poisson_factors import PoissonFactors, mean_deviance
from pnmf_pyro.distributions.vecchia import VecchiaNormal

__all__ = ["PoissonFactors", "VecchiaNormal", "mean_deviance"]
