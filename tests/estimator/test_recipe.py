"""pnmf_pyro.fit: the recommended settings, its overrides, and what they reach."""

import logging

import numpy as np
import pytest
import scipy.sparse as sp

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.estimator.recipe import CLOSER, NEIGHBORS, RECIPE
from pnmf_pyro.estimator.stages import WarmUp
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.training.loop import evaluate_elbo
from tests.support.data import simulate
from tests.support.settings import NATURAL, unconverged


def expanded_elbo(model, X):
    objective = FactorizationELBO("expanded", 100)
    return evaluate_elbo(model.model_, Batches(as_counts(X)), objective, torch_generator(0))


def test_fit_logs_its_choices_and_takes_overrides(counts, caplog):
    with caplog.at_level(logging.INFO, logger="pnmf_pyro"):
        model = pnmf_pyro.fit(sp.csr_matrix(counts), n_components=2, tol=1e-3, init="k-means")
    assert isinstance(model, PNMF)
    chosen = {**RECIPE, "n_components": 2, "tol": 1e-3, "init": "k-means"}
    assert {name: getattr(model, name) for name in chosen} == chosen
    assert "init='k-means'" in caplog.text
    assert "n_components=2" in caplog.text
    with pytest.raises(TypeError, match="colour"):
        pnmf_pyro.fit(counts, colour=3)
    with pytest.raises(ValueError, match="spatial"):
        pnmf_pyro.fit(counts, np.zeros((80, 2)))


@pytest.mark.parametrize(
    ("most", "parameters", "local"),
    [(100, {}, False), (70, {}, True), (70, {"local": False}, False), (100, {"local": True}, True)],
)
def test_fit_conditions_many_places_on_neighbours_and_says_so(
    counts, caplog, monkeypatch, most, parameters, local
):
    monkeypatch.setattr("pnmf_pyro.estimator.recipe.ALL_INDUCING", most)
    places = np.random.default_rng(0).uniform(size=(80, 2))
    with caplog.at_level(logging.INFO, logger="pnmf_pyro"):
        model = pnmf_pyro.fit(counts, places, n_components=2, tol=1e-2, **parameters)
    assert model.local is local
    assert ("80 places, each conditioned on its neighbours" in caplog.text) is local
    assert ("80 places, summarised by inducing points" in caplog.text) is not local
    assert f"kernel {model.kernel_}" in caplog.text
    assert hasattr(model.model_.prior, "neighborhoods") is local


@pytest.mark.parametrize(
    ("most", "parameters", "closer"),
    [
        (100, {}, True),
        (100, {"local": True}, False),
        (70, {}, False),
        (70, {"local": False}, False),
        (100, {"training_mode": "standard", "max_iter": 20}, False),
        (100, {"loadings_mode": "softplus", "max_iter": 20}, False),
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_fit_follows_samples_more_closely_with_an_inducing_point_at_each(
    counts, monkeypatch, most, parameters, closer
):
    monkeypatch.setattr("pnmf_pyro.estimator.recipe.ALL_INDUCING", most)
    places = np.random.default_rng(0).uniform(size=(80, 2))
    parameters = {"tol": 1e-2, "kernel": "Matern32", **parameters}
    model = pnmf_pyro.fit(counts, places, n_components=2, **parameters)
    assert (model.stages == CLOSER) is closer
    assert model.stages == CLOSER or all(stage in NEIGHBORS for stage in model.stages)


def test_fit_takes_size_factors(counts):
    s = np.linspace(0.5, 2, 80)
    model = pnmf_pyro.fit(counts, n_components=2, size_factors=s)
    np.testing.assert_allclose(model.model_.size_factors, s, rtol=1e-6)
    model = pnmf_pyro.fit(counts, n_components=2, size_factors="total")
    totals = counts.sum(1)
    np.testing.assert_allclose(model.model_.size_factors, totals / totals.mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="size_factors must be one of 'total'"):
        pnmf_pyro.fit(counts, size_factors="depth")


@pytest.mark.slow
def test_fit_reaches_a_higher_bound_than_adam(counts):
    slow = PNMF(3, max_iter=1000, tol=0, learning_rate=0.05, random_state=0).fit(counts)
    assert expanded_elbo(pnmf_pyro.fit(counts, n_components=3), counts) > expanded_elbo(
        slow, counts
    )


def test_the_warm_up_comes_before_the_tighter_bound(counts):
    model = pnmf_pyro.fit(counts, n_components=3)
    lower = PNMF(3, **{**RECIPE, "mode": "lower-bound"}).fit(counts)
    together = zip(model.history_, lower.history_, strict=False)
    assert next(i for i, (mine, its) in enumerate(together) if mine != its) >= 20
    assert model.elbo_ > lower.elbo_


@unconverged
def test_a_spatial_fit_begins_with_steps_of_one_without_space(counts, monkeypatch):
    """They are not extrapolated, and end before they settle."""
    places = np.random.default_rng(0).uniform(size=(80, 2))
    spatial = pnmf_pyro.fit(counts, places, n_components=2, init="nndsvda")
    _, _, last = spatial.history_.stages[0]
    shared = {"n_components": 2, "init": "nndsvda", "tol": 0.0, "max_iter": last}
    alone = {"mode": "lower-bound", "stages": [WarmUp(kl_weight=CLOSER[0].kl_weight)]}
    with monkeypatch.context() as patch:
        patch.setattr("pnmf_pyro.training.loop.MOST", 0.0)
        alone = PNMF(**{**RECIPE, **shared, **alone}).fit(counts)
    np.testing.assert_allclose(spatial.history_[: alone.n_iter_], alone.history_, rtol=1e-6)
    assert spatial.n_iter_ > alone.n_iter_
    assert abs(spatial.history_[alone.n_iter_] / alone.history_[-1] - 1) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [50, 100])
def test_closed_form_minibatches_reach_the_full_bound(batch_size):
    """Within 0.1%, from the same start."""
    X = simulate(0, 300, 40, 3)[0]
    settings = {**NATURAL, "n_components": 3, "random_state": 1, "scale_pf": "auto"}
    full = PNMF(max_iter=400, tol=0, **settings).fit(X)
    batched = PNMF(max_iter=1000, tol=0, batch_size=batch_size, **settings).fit(X)
    assert batched.elbo_ > full.elbo_ - 1e-3 * abs(full.elbo_)
