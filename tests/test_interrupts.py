"""Ctrl-C: what torch and Pyro share, and the estimator, are as they were."""

import time

import numpy as np
import pyro
import pytest
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data import isolation
from pnmf_pyro.data.isolation import isolated
from tests.support.interrupts import interrupted, same_attributes, shared_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

random = np.random.default_rng(0)
X, PLACES = random.poisson(3.0, (40, 12)), random.uniform(size=(40, 2))


def test_an_interrupt_leaves_no_half(users_parameter):
    model = PNMF(3, max_iter=20, random_state=0).fit(X)
    held, before = vars(model.set_params(max_iter=4000, tol=0)).copy(), shared_state()
    for seconds in np.random.default_rng(1).uniform(0, 0.2, 20):
        assert interrupted(lambda: model.fit(X[:20]), seconds)
        assert shared_state() == before
        assert same_attributes(model, held)


def test_an_interrupted_fit_in_space_leaves_no_half():
    before = shared_state()
    expected = pnmf_pyro.fit(X, PLACES, n_components=2, max_iter=20)
    for seconds in np.random.default_rng(2).uniform(0, 0.4, 8):
        interrupted(lambda: pnmf_pyro.fit(X, PLACES, n_components=2, max_iter=4000), seconds)
        assert shared_state() == before
    again = pnmf_pyro.fit(X, PLACES, n_components=2, max_iter=20)
    np.testing.assert_array_equal(again.components_, expected.components_)


def test_an_interrupt_while_the_state_is_put_back_comes_after_it(monkeypatch):
    put_back, calls = isolation._Found.put_back, []

    def cut_short(found):
        calls.append(found)
        if len(calls) == 1:
            raise KeyboardInterrupt
        put_back(found)

    monkeypatch.setattr(isolation._Found, "put_back", cut_short)
    before = shared_state()

    @isolated
    def damage() -> None:
        torch.set_grad_enabled(False)
        torch.manual_seed(1)
        pyro.param("left", torch.zeros(1))
        pyro.poutine.scale(scale=2.0).__enter__()
        pyro.plate("left", 3).__enter__()

    with pytest.raises(KeyboardInterrupt):
        damage()
    assert len(calls) == 2
    assert shared_state() == before


def test_a_fit_that_fails_leaves_the_estimator_as_it_was(counts):
    model = PNMF(3, max_iter=5, random_state=0).fit(counts)
    held = vars(model).copy()

    def fail(*_: object) -> None:
        raise RuntimeError("mine")

    for call in (
        lambda: model.fit(counts[:, :4], callback=fail, callback_interval=2),
        lambda: model.fit(-counts),
        lambda: model.fit(counts[:, :5], coordinates=np.ones((len(counts), 2))),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()
        assert same_attributes(model, held)


def test_an_interrupted_step_leaves_a_model_of_ones_own_at_the_step_before():
    from pnmf_pyro.models import PoissonFactorization
    from pnmf_pyro.priors import GaussianPrior

    y = torch.from_numpy(X.T.astype("f4"))
    model = PoissonFactorization(GaussianPrior(y, L=2), y, L=2)
    began = time.perf_counter()
    assert interrupted(lambda: pnmf_pyro.fit_model(model, X, max_iter=100_000), 0.5)
    assert time.perf_counter() - began < 20
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert pnmf_pyro.fit_model(model, X, max_iter=5).elbo < 0
