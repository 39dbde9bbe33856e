"""Pyro's own training and objectives, on every prior, as a user who knows only Pyro writes them."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Importance, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pnmf_pyro
from pnmf_pyro import fit_model
from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import FactorizationELBO
from pnmf_pyro.training.loop import evaluate_elbo
from tests.support.models import SIGMAS
from tests.support.programs import PRIORS, D, L, N, by_svi, make, settled, small_tissue
from tests.support.settings import unconverged
from tests.support.state import drawing

pytestmark = unconverged


@pytest.fixture(scope="module")
def data():
    return small_tissue()


# --- training


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(
    "objective",
    [FactorizationELBO, Trace_ELBO, TraceMeanField_ELBO],
    ids=lambda kind: kind.__name__,
)
def test_svi_reaches_what_fit_model_reaches(data, prior, objective):
    reached = -fit_model(make(data, prior), data[0], max_iter=300).elbo
    model, batch = make(data, prior), Batch(as_counts(data[0]))
    if prior == "neighbours":  # whose q starts far wider than the prior
        model.assign(torch.rand(D, L, generator=torch_generator(0)) + 0.5, torch.ones(N, L))
    W, q = model.W.numpy(), copy.deepcopy(model).prior.marginal()
    losses = by_svi(model.model, model.guide, objective(), batch, steps=800)
    final = FactorizationELBO("simple", 200).loss(model.model, model.guide, batch)
    assert final < 1.03 * reached
    assert np.mean(losses[-50:]) < 1.05 * reached < losses[0]
    after = model.prior.marginal()
    assert np.abs(model.W.numpy() - W).min() > 1e-3
    for before, now in ((q.loc, after.loc), (q.scale, after.scale)):
        assert float((now - before).detach().abs().max()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "highest"),
    [
        ("independent", lambda reached, first: 1.05 * reached),
        # Independent normals are far from F and u, which depend on each other closely.
        ("inducing points", lambda reached, first: first / 4),
    ],
)
def test_an_autoguide_trains_the_loadings_too(data, prior, highest):
    reached = -fit_model(make(data, prior), data[0], max_iter=300).elbo
    model, batch = make(data, prior), Batch(as_counts(data[0]))
    W = model.W.numpy()
    guide = AutoNormal(model.model, init_scale=0.1)
    losses = by_svi(model.model, guide, Trace_ELBO(), batch, steps=800)
    assert np.mean(losses[-100:]) < highest(reached, losses[0])
    assert np.abs(model.W.numpy() - W).min() > 1e-3


@pytest.mark.parametrize("form", ["tensor", "integers", "array", "sparse"])
def test_all_counts_may_be_given_as_they_are(data, form):
    X = data[0]
    given = {
        "tensor": X,
        "integers": X.long(),
        "array": X.numpy(),
        "sparse": X.to_sparse(),
    }[form]
    model = make(data)
    with drawing(0):
        expected = Trace_ELBO().loss(model.model, model.guide, Batch(as_counts(X)))
    with drawing(0):
        assert Trace_ELBO().loss(model.model, model.guide, given) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "lr", "steps"), [("independent", 0.1, 300), ("inducing points", 0.05, 500)]
)
def test_svi_by_minibatches(data, prior, lr, steps):
    model, counts = make(data, prior), as_counts(data[0])
    batches = iter(Batches(counts, 20, shuffle=True, generator=torch_generator(0)))
    with drawing(0):
        svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
        losses = [svi.step(next(batches)) for _ in range(steps)]
    reached = -fit_model(make(data, prior), data[0], max_iter=150).elbo
    assert np.mean(losses[-60:]) < 1.05 * reached


def test_sites_are_not_trained_by_svi_and_say_so(data, caplog):
    model = make(data, "inducing points", natural=True)
    with caplog.at_level(logging.WARNING, "pnmf_pyro"):
        by_svi(model.model, model.guide, FactorizationELBO(), data[0], steps=3)
    (record,) = (r for r in caplog.records if "held in sites" in r.message)
    assert "use_natural_gradients=False" in record.message


# --- several models, and copies, in one store


def test_two_models_in_one_store_train_as_if_alone(data):
    alone = make(data)
    expected = by_svi(alone.model, alone.guide, FactorizationELBO("lower-bound"), data[0], steps=30)
    first, second = make(data), make(data, "inducing points")
    found = by_svi(first.model, first.guide, FactorizationELBO("lower-bound"), data[0], steps=30)
    W = first.W.numpy()
    by_svi(second.model, second.guide, FactorizationELBO("lower-bound"), data[0], steps=30)
    assert found == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(first.W.numpy(), W)
    assert {name.split("$$$")[0] for name in pyro.get_param_store()} == {
        alone.name,
        first.name,
        second.name,
    }


def test_a_copy_in_the_same_store_is_trained_by_itself(data):
    model = make(data)
    by_svi(model.model, model.guide, FactorizationELBO(), data[0], steps=5)
    other, W = copy.deepcopy(model), model.W.numpy()
    assert other.name != model.name
    assert np.array_equal(other.W.numpy(), W)
    losses = by_svi(other.model, other.guide, FactorizationELBO(), data[0], steps=100)
    assert losses[-1] < 0.9 * losses[0]
    assert np.array_equal(model.W.numpy(), W)
    assert np.abs(other.W.numpy() - W).max() > 0.1


def test_frozen_loadings_stay_without_a_word(data):
    model = make(data)
    model.W.freeze()
    W = model.W.numpy()
    by_svi(model.model, model.guide, Trace_ELBO(), data[0], steps=5)
    assert np.array_equal(model.W.numpy(), W)


# --- Pyro's objectives are bounds, and the same one


FITTED = [
    ("inducing points", True, 0),
    ("inducing points", False, 0),
    ("neighbours", True, 5),
    ("neighbours", False, 0),
]


@pytest.mark.parametrize(("prior", "natural", "rank"), FITTED)
def test_objectives_of_pyro_are_the_same_bound(data, prior, natural, rank):
    """One-particle estimates, like ours of mode `simple`, have one mean: within 5 errors."""
    model = make(data, prior, natural, torch.float64, mode="simple")
    if natural:
        settled(model, data, rank)
    else:
        fit_model(model, data[0].double(), max_iter=100)
    batch = Batch(as_counts(data[0].double()))
    with drawing(1):
        ours, *others = (
            [one.loss(model.model, model.guide, batch) for _ in range(280)]
            for one in (FactorizationELBO("simple", 1), Trace_ELBO(), TraceMeanField_ELBO())
        )
    for theirs in others:
        error = np.sqrt((np.var(ours) + np.var(theirs)) / 280)
        assert abs(np.mean(theirs) - np.mean(ours)) < SIGMAS * error
        assert error < 2.0, "an error bar this wide would prove nothing"


def test_the_bound_of_a_fitted_estimator(data):
    """Its model is in `simple` mode what Pyro's own objectives say of it."""
    X, places = data
    fit = pnmf_pyro.fit(X.numpy(), places.coordinates.numpy(), n_components=L, max_iter=60)
    batch, simple = Batch(as_counts(X)), FactorizationELBO("simple", 1000)
    elbo = evaluate_elbo(fit.model_, Batches(as_counts(X)), simple, torch_generator(0))
    with drawing(0):
        for objective in (Trace_ELBO, TraceMeanField_ELBO):
            losses = [
                objective().loss(fit.model_.model, fit.model_.guide, batch) for _ in range(100)
            ]
            error = np.std(losses) / 100**0.5
            assert abs(np.mean(losses) + elbo) < SIGMAS * error + 0.5


@pytest.mark.parametrize(("prior", "natural", "rank"), FITTED[:1] + FITTED[2:3])
def test_importance_weights_are_those_of_the_bound(data, prior, natural, rank):
    """Their mean is the bound, and log p(X | W) by them is above it."""
    model = settled(make(data, prior, natural, torch.float64, mode="simple"), data, rank)
    batch = Batch(as_counts(data[0].double()))
    with drawing(2):
        posterior = Importance(model.model, model.guide, num_samples=200).run(batch)
        elbo = -FactorizationELBO("simple", 1000).loss(model.model, model.guide, batch)
    weights = np.array([float(weight) for weight in posterior.log_weights])
    assert abs(weights.mean() - elbo) < SIGMAS * weights.std() / 200**0.5 + 0.5
    assert posterior.get_log_normalizer() > weights.mean()
