"""Data that several test files share."""

import os
from pathlib import Path

import numpy as np
import pytest

from pnmf_pyro import PNMF

DATA = Path(os.environ.get("PNMF_DATA", Path(__file__).parents[2] / "shared" / "data"))

# Steps without a learning rate: a fit of a small table takes a fraction of a second.
NATURAL = {
    "mode": "lower-bound",
    "training_mode": "natural",
    "loadings_mode": "multiplicative",
    "scheduler": None,
}


def pytest_configure(config):
    """Give each worker of pytest-xdist one thread: more of them than cores only wait."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_file():
    """Return a function from the name of a real data set to its path; skips where it is absent."""

    def path(name: str) -> Path:
        file = DATA / f"{name}.h5ad"
        if not file.is_file():
            pytest.skip(f"real data: there is no {file}; set PNMF_DATA to its folder")
        return file

    return path


def simulate(seed: int, N: int, D: int, L: int, mean: float = 5.0):
    """Counts from the model with sparse loadings; returns X, F (N, L) and W (D, L)."""
    random = np.random.default_rng(seed)
    F = random.normal(size=(N, L))
    W = random.gamma(0.3, 1.0, size=(D, L))
    W *= mean / (W.sum(1).mean() * np.exp(0.5))
    return random.poisson(np.exp(F) @ W.T), F, W


@pytest.fixture(scope="session")
def counts():
    """A small table from the model: 80 samples, 25 features, none empty."""
    return simulate(0, 80, 25, 3)[0].astype(np.float32)


@pytest.fixture(scope="session")
def fitted(counts):
    """A converged fit of `counts`."""
    return PNMF(n_components=3, random_state=0, max_iter=500, tol=1e-4, **NATURAL).fit(counts)
