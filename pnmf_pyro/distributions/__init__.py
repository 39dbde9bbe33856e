"""Distributions of the model, for use in any Pyro program."""

from pnmf_pyro.distributions.poisson_factors import PoissonFactors

__all__ = ["PoissonFactors"]
