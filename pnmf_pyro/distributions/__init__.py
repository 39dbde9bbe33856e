"""Distributions of the model, for use in any Pyro program."""

from pnmf_pyro.distributions.poisson_factors import PoissonFactors, mean_deviance

__all__ = ["PoissonFactors", "mean_deviance"]
