"""Priors over the log-factors."""

from pnmf_pyro.priors.base import Prior
from pnmf_pyro.priors.gaussian import GaussianPrior
from pnmf_pyro.priors.lcgp import LCGP
from pnmf_pyro.priors.svgp import SVGP

__all__ = ["LCGP", "SVGP", "GaussianPrior", "Prior"]
