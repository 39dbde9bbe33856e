"""Threads: the same bits as one after another. Processes run side by side."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.transforms import factor_samples, get_factors, transform_F
from tests.support.interrupts import shared_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

random = np.random.default_rng(0)
X, PLACES = random.poisson(3.0, (40, 10)), random.uniform(size=(40, 2))
MODEL = {"n_components": 2, "max_iter": 20, "random_state": 0}


def natural():
    return get_factors(pnmf_pyro.fit(X, n_components=2, max_iter=20, E=2, mode="expanded"))


WORK = {
    "PNMF": lambda: PNMF(**MODEL).fit(X).components_,
    "fit": natural,
    "in space": lambda: get_factors(pnmf_pyro.fit(X, PLACES, n_components=2, max_iter=8)),
    "local": lambda: get_factors(
        pnmf_pyro.fit(X, PLACES, n_components=2, max_iter=8, local=True, K=5)
    ),
    "transform_F": lambda: transform_F(X, np.ones((10, 2)), max_iter=20),
    "draws": lambda: factor_samples(PNMF(**MODEL).fit(X), 5, random_state=3),
    "score": lambda: np.array(PNMF(**MODEL).fit(X).score(X)),
    "check": lambda: np.array(
        pnmf_pyro.posterior_predictive_check(
            PNMF(**MODEL).fit(X), X, n_draws=9, random_state=0
        ).table()["replicated"]
    ),
}


@pytest.mark.slow
def test_two_threads_give_the_bits_of_one(users_parameter):
    alone = {name: work() for name, work in WORK.items()}
    before = shared_state()
    with ThreadPoolExecutor(2) as pool:
        jobs = [(name, pool.submit(work)) for name, work in [*WORK.items()] * 2]
        for name, job in jobs:
            np.testing.assert_array_equal(job.result(), alone[name], err_msg=name)
    assert shared_state() == before


def test_numbers_of_components_are_compared_in_threads():
    from joblib import parallel_backend

    how = {"n_seeds": 2, "random_state": 0, "max_iter": 10}
    alone = pnmf_pyro.select_n_components(X, [1, 2], **how)
    with parallel_backend("threading"):
        threads = pnmf_pyro.select_n_components(X, [1, 2], n_jobs=2, **how)
    np.testing.assert_array_equal(threads.deviance, alone.deviance)


def test_a_fit_in_a_callback_neither_waits_nor_disturbs():
    alone = PNMF(**MODEL).fit(X).components_
    inner = []

    def look(*_: object) -> None:
        inner.append(PNMF(**MODEL).fit(X).components_)

    outer = PNMF(**MODEL).fit(X, callback=look, callback_interval=10)
    np.testing.assert_array_equal(outer.components_, alone)
    assert len(inner) == 2
    np.testing.assert_array_equal(inner[0], alone)
