"""The Pyro program, its likelihood and its bound: the room to read in ten minutes.

It imports from `priors` and the rooms above that. Begin with
:mod:`~pnmf_pyro.models.factorization`, then :mod:`~pnmf_pyro.models.poisson` and
:mod:`~pnmf_pyro.models.elbo`.
"""

from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import ALL, PoissonFactorization
from pnmf_pyro.models.poisson import PoissonFactors

__all__ = ["ALL", "FactorizationELBO", "PoissonFactorization", "PoissonFactors"]
