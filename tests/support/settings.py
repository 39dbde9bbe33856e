"""Settings of fits that take a fraction of a second."""

import pytest

from pnmf_pyro import PNMF

# Steps without a learning rate.
NATURAL = {
    "mode": "lower-bound",
    "training_mode": "natural",
    "loadings_mode": "multiplicative",
    "scheduler": None,
}

# A fit in space by inducing points, and by neighbours.
STEPS = {
    "mode": "lower-bound",
    "training_mode": "natural",
    "loadings_mode": "multiplicative",
    "spatial": True,
    "init": "nndsvda",
    "random_state": 0,
    "max_iter": 40,
    "tol": 1e-3,
    "lengthscale": 0.4,
}
LOCAL = {**STEPS, "local": True, "K": 12}

# Fits are stopped as soon as they show what is tested.
unconverged = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def quick(**parameters) -> PNMF:
    """An estimator that converges on small tables."""
    return PNMF(**{"n_components": 3, "tol": 0.05, "random_state": 0, **parameters})


def fitted_in_space(data, **settings) -> PNMF:
    """A fit of a table and its places in few steps."""
    return PNMF(2, **{**STEPS, **settings}).fit(data[0], coordinates=data[1])
