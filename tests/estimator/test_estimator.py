"""PNMF: signature, attributes, reproducibility, callbacks, minibatches, use as a Pyro program."""

import copy
import inspect

import numpy as np
import pyro
import pytest
import scipy.sparse as sp
import torch
from pyro.infer import Predictive, Trace_ELBO
from sklearn.exceptions import ConvergenceWarning

from pnmf_pyro import PNMF
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.estimator.stages import Settle, SettleLoadings
from pnmf_pyro.transforms import get_factors, log_factors
from tests.support.data import simulate
from tests.support.settings import NATURAL, quick, unconverged
from tests.support.state import global_state

# From the API reference, in its order.
SIGNATURE = {
    "n_components": 10,
    "loadings_mode": "projected",
    "mode": "expanded",
    "training_mode": "standard",
    "E": 3,
    "max_iter": 200,
    "tol": 0.0001,
    "learning_rate": 0.01,
    "optimizer": "Adam",
    "random_state": None,
    "verbose": False,
    "device": "auto",
    "init": "random",
    "scheduler": "one_cycle",
    "scheduler_patience": 200,
    "scheduler_factor": 0.8,
    "scheduler_pct_start": 0.3,
    "scheduler_div_factor": 25.0,
    "scheduler_final_div_factor": 10000.0,
    "min_lr": 1e-05,
    "batch_size": None,
    "y_batch_size": None,
    "shuffle": True,
    "spatial": False,
    "local": False,
    "kernel": "Matern32",
    "multigroup": False,
    "num_inducing": 3000,
    "lengthscale": 1.0,
    "sigma": 1.0,
    "group_diff_param": 10.0,
    "jitter": 1e-05,
    "train_lengthscale": False,
    "cholesky_mode": "exp",
    "diagonal_only": False,
    "inducing_allocation": "proportional",
    "K": 50,
    "precompute_knn": True,
    "neighbors": "knn",
    "scale_ll_D": True,
    "scale_kl_NM": True,
}


def test_signature_is_that_of_the_reference():
    parameters = inspect.signature(PNMF).parameters
    assert list(parameters)[: len(SIGNATURE)] == list(SIGNATURE)
    assert {name: p.default for name, p in parameters.items() if name in SIGNATURE} == SIGNATURE
    fit = list(inspect.signature(PNMF.fit).parameters)
    assert fit[1:8] == [
        "X", "y", "coordinates", "groups", "return_history", "callback", "callback_interval",
    ]  # fmt: skip


def test_attributes(fitted, counts):
    assert fitted.components_.shape == (3, 25)
    assert (fitted.n_components_, fitted.n_features_in_) == (3, 25)
    assert fitted.n_iter_ == len(fitted.history_)
    assert isinstance(fitted.elbo_, float)
    assert fitted.components_.dtype == np.float32
    np.testing.assert_allclose(
        fitted.inverse_transform(get_factors(fitted)), get_factors(fitted) @ fitted.components_
    )


def test_return_history(counts):
    history, model = quick().fit(counts, return_history=True)
    assert history is model.history_
    assert all(isinstance(value, float) for value in history)


@unconverged
@pytest.mark.parametrize("parameters", [{}, NATURAL, {"batch_size": 20, "y_batch_size": 10}])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_one_seed_gives_the_same_bits(parameters, form, counts):
    parameters = {"max_iter": 15, **parameters}
    first, second = (quick(**parameters).fit(form(counts)) for _ in range(2))
    assert first.history_ == second.history_
    assert first.elbo_ == second.elbo_
    np.testing.assert_array_equal(first.components_, second.components_)
    other = quick(**parameters, random_state=1).fit(form(counts))
    assert not np.array_equal(other.components_, first.components_)


@unconverged
def test_random_states(counts):
    same = [
        quick(random_state=r, max_iter=15).fit(counts).elbo_ for r in (5, np.random.RandomState(5))
    ]
    assert same[0] == same[1]
    different = [quick(random_state=None, max_iter=15).fit(counts).elbo_ for _ in range(2)]
    assert different[0] != different[1]


@unconverged
@pytest.mark.parametrize("random_state", [0, None])
def test_no_global_state_is_read_or_moved(random_state, counts):
    with pyro.get_param_store().scope():
        pyro.param("mine", torch.ones(2))
        before = global_state()
        model = quick(random_state=random_state, max_iter=15).fit(counts)
        model.transform(counts)
        model.score(counts)
        assert global_state() == before
    torch.random.manual_seed(1)
    first = quick(max_iter=15).fit(counts).elbo_
    torch.random.manual_seed(2)
    assert quick(max_iter=15).fit(counts).elbo_ == first


def test_callback_sees_the_fit_as_it_stands(counts):
    seen = []

    def means(model):
        return log_factors(model, posterior="factorised")

    def callback(model, iteration, elbo):
        seen.append((iteration, elbo, model.components_.copy(), means(model)))

    model = PNMF(3, max_iter=50, tol=0.0, random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(counts, callback=callback, callback_interval=20)
    assert [entry[0] for entry in seen] == [20, 40]
    assert [entry[1] for entry in seen] == [model.history_[19], model.history_[39]]
    assert not np.array_equal(seen[0][2], seen[1][2])
    assert not np.array_equal(seen[1][3], means(model))


@pytest.mark.parametrize("loadings_mode", ["softplus", "exp", "projected", "multiplicative"])
@pytest.mark.parametrize("mode", ["simple", "expanded", "lower-bound"])
def test_every_mode_raises_the_elbo(mode, loadings_mode, counts):
    model = quick(mode=mode, loadings_mode=loadings_mode, learning_rate=0.05, tol=1e-2)
    model.fit(counts)
    assert model.elbo_ > model.history_[0] + 500
    assert (model.components_ >= 0).all()


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "NAdam", "SGD", "RMSprop"])
def test_every_optimizer_raises_the_elbo(optimizer, counts):
    rate = 1e-4 if optimizer == "SGD" else 0.03
    model = quick(optimizer=optimizer, learning_rate=rate, tol=0.02).fit(counts)
    assert model.elbo_ > model.history_[0] + 100


def test_natural_steps_never_lower_the_bound(fitted):
    assert (np.diff(fitted.history_) > -1e-6 * abs(fitted.elbo_)).all()
    assert fitted.elbo_ >= fitted.history_[-1] - 1e-6 * abs(fitted.elbo_)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "expanded"},
        {"training_mode": "standard", "learning_rate": 0.1},
        {"batch_size": 40},
    ],
)
def test_shrunk_loadings_come_last_and_leave_the_factors(settings, counts):
    settings = {**NATURAL, "tol": 1e-4, **settings}
    plain = quick(**settings, max_iter=50).fit(counts)
    stages = [Settle(), SettleLoadings(shrink=True)]
    shrunk = quick(**settings, max_iter=100, stages=stages).fit(counts)
    means = (log_factors(one, posterior="factorised") for one in (shrunk, plain))
    np.testing.assert_array_equal(*means)
    assert shrunk.history_[: plain.n_iter_] == plain.history_
    assert shrunk.n_iter_ > plain.n_iter_
    margins = counts.sum(0) / counts.sum()

    def unlike(model):
        profiles = model.components_ / model.components_.sum(1, keepdims=True)
        return np.abs(profiles - margins).mean()

    assert unlike(shrunk) < unlike(plain)


def test_shrunk_loadings_are_nearer_the_truth_where_counts_are_few():
    """Drawn from their prior: posterior means have the least squared error."""
    random = np.random.default_rng(0)
    margins = random.gamma(1.0, 1.0, 300)
    W = margins[:, None] * random.exponential(size=(300, 2))
    factors = np.exp(random.normal(0, 1, (60, 2)))
    X = random.poisson(0.3 * factors @ W.T)
    seen = X.sum(0) > 0
    truth = (W / W.sum(0))[seen]

    def error(model):
        found = model.components_.T / model.components_.sum(1)
        away = (found[:, None] - truth[:, :, None]) / margins[seen, None, None]
        squares = (away**2).sum(0)
        return min(squares.trace(), squares[::-1].trace())

    settings = {**NATURAL, "init": "nndsvda", "scale_pf": "auto", "tol": 1e-4, "random_state": 0}
    settings |= {"max_iter": 400}
    shrinking = [Settle(), SettleLoadings(shrink=True)]
    plain, shrunk = (PNMF(2, **settings, stages=a).fit(X[:, seen]) for a in (None, shrinking))
    assert error(shrunk) < 0.8 * error(plain)


def test_a_fit_that_has_not_converged_warns_although_its_loadings_have(counts):
    stages = [Settle(), SettleLoadings(shrink=True)]
    with pytest.warns(ConvergenceWarning, match="rising after 20 iterations") as caught:
        quick(**NATURAL, max_iter=40, tol=1e-7, stages=stages).fit(counts)
    assert len(caught) == 1


@pytest.mark.slow
def test_minibatches_reach_the_same_bound(counts):
    settings = {"mode": "lower-bound", "loadings_mode": "softplus", "learning_rate": 0.05}
    full = quick(**settings, max_iter=600, tol=0).fit(counts)
    batched = quick(**settings, max_iter=1500, tol=0, batch_size=20, y_batch_size=13)
    assert batched.fit(counts).elbo_ > full.elbo_ - 5e-3 * abs(full.elbo_)


def test_shuffle_changes_which_samples_stand_together(counts):
    """In lower-bound mode nothing else is random: the first step sees rows 0 to 39 or others."""
    first = {}
    for shuffle in (True, False):
        model = quick(mode="lower-bound", batch_size=40, shuffle=shuffle).fit(counts)
        first[shuffle] = model.history_[0]
    assert first[True] != pytest.approx(first[False], rel=1e-6)


def test_size_factors_move_depth_out_of_the_factors():
    X, _, _ = simulate(3, 60, 30, 2, mean=20)
    depth = np.linspace(1, 6, 60)
    deep = np.random.default_rng(0).poisson(X * depth[:, None])
    plain = PNMF(2, random_state=0, max_iter=300, **NATURAL).fit(X)
    model = PNMF(2, random_state=0, max_iter=300, **NATURAL).fit(deep, size_factors=depth)
    found, expected = (m.inverse_transform(get_factors(m)) for m in (model, plain))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.97
    assert found.mean() == pytest.approx(expected.mean(), rel=0.05)
    transformed = model.transform(deep, size_factors=depth) @ model.components_
    assert transformed.mean() == pytest.approx(X.mean(), rel=0.05)
    assert model.score(deep, size_factors=depth) > model.score(
        deep, size_factors=np.ones(len(deep))
    )


def test_convergence_warning_only_with_a_trend_left(counts):
    with pytest.warns(ConvergenceWarning, match="rising after 15 iterations"):
        quick(max_iter=15, tol=1e-4).fit(counts)
    quick(max_iter=400, learning_rate=0.05, tol=1e-9).fit(counts)  # settled: no warning


@unconverged
def test_verbose_shows_the_elbo(counts, capsys):
    quick(verbose=True, max_iter=15).fit(counts)
    assert "ELBO" in capsys.readouterr().err
    quick(max_iter=15).fit(counts)
    assert capsys.readouterr().err == ""


def test_the_fitted_model_is_a_pyro_program(fitted, counts):
    module = fitted.model_
    prior = Predictive(module.model, num_samples=4)()
    assert prior["X"].shape == (4, 1, *counts.shape)
    posterior = Predictive(module.model, guide=module.guide, num_samples=200)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        replicated = posterior()["X"].squeeze()
    assert replicated.mean() == pytest.approx(counts.mean(), rel=0.02)
    batch = Batch(as_counts(counts))
    loss = Trace_ELBO().loss(module.model, module.guide, batch)
    assert np.isfinite(loss)


def test_score_prefers_the_fitted_loadings(fitted, counts):
    wrong = copy.deepcopy(fitted)
    wrong.components_ = fitted.components_[:, ::-1].copy()
    assert fitted.score(counts) > wrong.score(counts) + 1


def test_score_is_close_to_the_elbo_of_the_training_data(fitted, counts):
    assert fitted.score(counts) == pytest.approx(fitted.elbo_ / len(counts), rel=1e-3)


def test_the_scale_of_the_prior_is_learned():
    """F is drawn with standard deviation 2; the learned scale raises the ELBO and the score."""
    random = np.random.default_rng(5)
    F = 2 * random.normal(size=(400, 3))
    X = random.poisson(np.exp(F) @ random.gamma(0.5, 1.0, size=(3, 40)))
    fixed = PNMF(3, random_state=0, max_iter=500, **NATURAL).fit(X)
    learned = PNMF(3, random_state=0, max_iter=500, scale_pf="auto", **NATURAL).fit(X)
    scale = float(learned.model_.prior.scale_pf)
    assert scale == pytest.approx(2, rel=0.15)
    assert learned.elbo_ > fixed.elbo_
    assert learned.score(X) > fixed.score(X)
    assert (np.diff(learned.history_) > -1e-6 * abs(learned.elbo_)).all()


def test_expected_counts_given_totals_are_shared_in_proportion_to_the_rates(fitted):
    factors = get_factors(fitted)[:4]
    totals = np.array([10.0, 0.0, 3.0, 200.0])
    found = fitted.inverse_transform(factors, totals=totals)
    np.testing.assert_allclose(found.sum(1), totals, rtol=1e-6)
    rates = fitted.inverse_transform(factors)
    np.testing.assert_allclose(found[0] / found[0, 0], rates[0] / rates[0, 0], rtol=1e-5)
    nothing = fitted.inverse_transform(np.zeros((1, fitted.n_components_)), totals=[5])
    assert np.array_equal(nothing, np.zeros((1, fitted.n_features_in_)))
    for bad in (totals[:3], -totals, totals[:, None]):
        with pytest.raises(ValueError, match="totals must be the total count of each of the 4"):
            fitted.inverse_transform(factors, totals=bad)
