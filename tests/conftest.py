"""Fixtures that several rooms share, and hooks of pytest."""

import os
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

import pnmf_pyro.data.blocks
import pnmf_pyro.data.counts
from pnmf_pyro import PNMF
from tests.support import dense as ref
from tests.support.data import simulate
from tests.support.models import ELBO_MODES, LAYOUTS, PARAMETER_MODES, TOLERANCE
from tests.support.settings import NATURAL

DATA = Path(os.environ.get("PNMF_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_configure(config):
    """Give each worker of pytest-xdist one thread: more of them than cores only wait."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


# --- data and fits


@pytest.fixture(scope="session")
def data_file():
    """Return a function from the name of a real data set to its path; skips where it is absent."""

    def path(name: str) -> Path:
        file = DATA / f"{name}.h5ad"
        if not file.is_file():
            pytest.skip(f"real data: there is no {file}; set PNMF_DATA to its folder")
        return file

    return path


@pytest.fixture(scope="session")
def counts():
    """A small table from the model: 80 samples, 25 features, none empty."""
    return simulate(0, 80, 25, 3)[0].astype(np.float32)


@pytest.fixture(scope="session")
def X(counts) -> np.ndarray:
    """The first 24 features of `counts` in float64, so that tiny steps are seen."""
    return counts[:, :24].astype(np.float64)


@pytest.fixture(scope="session")
def fitted(counts):
    """A converged fit of `counts`."""
    return PNMF(n_components=3, random_state=0, max_iter=500, tol=1e-4, **NATURAL).fit(counts)


@pytest.fixture
def problem(sized) -> ref.Problem:
    """Counts, loadings and a q(F): 8 samples, 6 features, 3 components."""
    return ref.simulate_problem(1, N=8, D=6, L=3, sized=sized)


# --- every case of a choice


@pytest.fixture(params=ELBO_MODES)
def mode(request) -> str:
    return request.param


@pytest.fixture(params=PARAMETER_MODES)
def parameter_mode(request) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture(params=list(TOLERANCE), ids=["float64", "float32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "sized"])
def sized(request) -> bool:
    return request.param


@pytest.fixture(params=[False, True], ids=["standard", "natural"])
def natural(request) -> bool:
    return request.param


@pytest.fixture(params=["one block", "blocks", "portable"])
def kernel(request, monkeypatch) -> str:
    """The ways through the kernel: whole, cut into blocks, and without torch's sampled product."""
    if request.param != "one block":
        monkeypatch.setattr(pnmf_pyro.data.blocks, "BLOCK_ENTRIES", 10)
    if request.param == "portable":
        monkeypatch.setattr(pnmf_pyro.data.counts, "has_sampled_addmm", lambda device, dtype: False)
    return request.param


# --- global state


@pytest.fixture(autouse=True)
def own_store():
    """A parameter store for each test."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture(autouse=True)
def no_figures():
    """No figure of a test is open in the next one."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture
def users_parameter():
    """A parameter in Pyro's store whose name is one that a careless fit would take for its own."""
    with pyro.get_param_store().scope():
        pyro.param("factorization$$$W._raw", torch.ones(3))
        pyro.param("users", torch.zeros(2))
        yield
