"""Priors over the log-factors F, each with its variational family.

A prior is a model, a guide and the marginals of q(F). It imports from `data`, `gp` and
`custom_modules`. Begin with :mod:`~pnmf_pyro.priors.base`, then :mod:`~pnmf_pyro.priors.gaussian`.
"""

from pnmf_pyro.priors.base import Prior
from pnmf_pyro.priors.gaussian import GaussianPrior
from pnmf_pyro.priors.lcgp import LCGP
from pnmf_pyro.priors.side_by_side import SideBySide
from pnmf_pyro.priors.svgp import SVGP

__all__ = ["LCGP", "SVGP", "GaussianPrior", "Prior", "SideBySide"]
