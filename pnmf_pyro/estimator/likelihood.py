"""Which of the named likelihoods a table of counts needs."""

from __future__ import annotations

import logging

import numpy as np
import scipy.sparse as sp
import torch

from pnmf_pyro.data.counts import Counts, SparseCounts, as_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.parameters import AUTO, Settings
from pnmf_pyro.initialization import start_values
from pnmf_pyro.models import LIKELIHOODS, PoissonFactorization
from pnmf_pyro.models.factorization import Likelihood
from pnmf_pyro.training.given_one_side import conditional_model

logger = logging.getLogger("pnmf_pyro")

# Share of the entries that are hidden, samples that are looked at, and steps of each trial.
HIDDEN, SAMPLES, STEPS = 0.1, 2000, 60


def chosen_likelihood(settings: Settings, data: Data) -> Likelihood | str:
    """Return the likelihood of a fit: as it is named or passed, or chosen for 'auto'."""
    if settings.likelihood != AUTO:
        return settings.likelihood or "poisson"
    return ""
