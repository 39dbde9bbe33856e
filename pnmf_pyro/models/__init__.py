"""The Pyro program, its likelihood and its bound: the room to read in ten minutes.

It imports from `priors` and the rooms above that. Begin with
:mod:`~pnmf_pyro.models.factorization`, then :mod:`~pnmf_pyro.models.poisson` and
:mod:`~pnmf_pyro.models.elbo`.
"""

from collections.abc import Callable

from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import ALL, Likelihood, PoissonFactorization
from pnmf_pyro.models.negative_binomial import NegativeBinomial
from pnmf_pyro.models.poisson import PoissonFactors

# Likelihoods that have a name: what makes the part of a model, given the number of features.
LIKELIHOODS: dict[str, Callable[[int], Likelihood | None]] = {
    "poisson": lambda n_features: None,
    "negative-binomial": NegativeBinomial,
}

__all__ = [
    "ALL",
    "LIKELIHOODS",
    "FactorizationELBO",
    "NegativeBinomial",
    "PoissonFactorization",
    "PoissonFactors",
]
