"""Locally conditioned fields through the estimator, against inducing points."""

import pickle

import numpy as np
import pytest
import torch

from pnmf_pyro import PNMF
from pnmf_pyro import transforms as T
from pnmf_pyro.estimator.stages import Correlate, LearnHyperparameters, Settle, WarmUp
from pnmf_pyro.gp import neighborhoods
from pnmf_pyro.gp.neighbors import build_graph
from pnmf_pyro.priors import LCGP
from pnmf_pyro.transforms import factor_samples, factor_uncertainty, get_factors, log_factors
from tests.support.data import tissue
from tests.support.settings import LOCAL, unconverged
from tests.support.vecchia import neighbors_of

pytestmark = unconverged


@pytest.fixture(scope="module")
def data():
    return tissue(groups=2)


@pytest.fixture(scope="module")
def model(data):
    return PNMF(2, **LOCAL).fit(data[0], coordinates=data[1])


def test_rank_says_how_many_columns_and_none_means_independent(data, model):
    assert model.model_.prior.low_rank.shape == (2, 60, 30)
    flat = PNMF(2, stages=[Settle()], **LOCAL).fit(data[0], coordinates=data[1])
    assert flat.model_.prior.low_rank.shape == (2, 60, 0)
    near = np.linalg.norm(data[1][:, None] - data[1], axis=-1) + 9 * np.eye(60)
    pairs = near.argmin(1)
    correlations = []
    for fit in (model, flat):
        F = factor_samples(fit, 400, random_state=0, posterior="factorised")[..., 0]
        F = (F - F.mean(0)) / F.std(0)
        correlations.append((F * F[:, pairs]).mean())
    assert correlations[0] > 0.3
    assert abs(correlations[1]) < 0.05


@pytest.mark.slow
def test_uncertainty_is_that_of_the_exact_process(data):
    """With V, q(F) is as wide as that of SVGP at all places; without, too narrow."""
    X, x, *_ = data
    settings = {**LOCAL, "K": 30, "tol": 0, "max_iter": 120}
    inducing = PNMF(2, **{**settings, "local": False}).fit(X, coordinates=x)
    truth = factor_uncertainty(inducing, posterior="factorised")
    ratio = {}
    for rank in (0, 50):
        fit = PNMF(2, stages=[Settle(), Correlate(rank), Settle()], **settings)
        found = factor_uncertainty(fit.fit(X, None, x), posterior="factorised")
        ratio[rank] = (found / truth).mean()
    assert abs(ratio[50] - 1) < 0.1
    assert ratio[0] < 0.8


# --- through the estimator


@pytest.mark.slow
def test_all_neighbours_fit_as_all_inducing_points_do(data):
    X, x, *_ = data
    settings = {**LOCAL, "K": 59, "tol": 0, "max_iter": 300}
    local = PNMF(2, **settings).fit(X, coordinates=x)
    inducing = PNMF(2, **{**settings, "local": False}).fit(X, coordinates=x)
    assert abs(local.elbo_ - inducing.elbo_) < 0.01 * abs(inducing.elbo_)
    new = np.random.default_rng(1).uniform(size=(30, 2))
    a, b = (np.log(fit.transform(None, new)) for fit in (local, inducing))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98
    assert local.score(X, coordinates=x) == pytest.approx(
        inducing.score(X, coordinates=x), rel=0.01
    )


def test_local_fields_are_right(model, data):
    correlation = np.corrcoef(log_factors(model).T, data[3].T)[:2, 2:]
    assert correlation.max(1).min() > 0.9
    assert isinstance(model.model_.prior, LCGP)


def test_prediction_at_the_samples_is_the_fit(model, data):
    for function in (log_factors, factor_uncertainty, get_factors):
        there = function(model, coordinates=data[1], posterior="factorised")
        here = function(model, posterior="factorised")
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        model.transform(None, data[1]), get_factors(model, coordinates=data[1])
    )


def test_far_away_the_prior_returns(model):
    np.testing.assert_allclose(factor_uncertainty(model, coordinates=[[1e3, 1e3]]), 1.0, rtol=1e-3)
    assert np.isfinite(model.transform(None, [[0.5, 0.5]])).all()  # a single place


def test_draws_at_new_places_are_joint(model):
    near = np.array([[0.5, 0.5], [0.5, 0.5 + 1e-4]])
    draws = factor_samples(model, 200, coordinates=near, random_state=0)
    assert np.abs(draws[:, 0] - draws[:, 1]).mean() < 0.2 * draws[:, 0].std(0).mean()
    again = factor_samples(model, 200, coordinates=near, random_state=0)
    np.testing.assert_array_equal(draws, again)


def test_a_saved_model_predicts_the_same(data, tmp_path):
    X, x, labels, *_ = data
    settings = {**LOCAL, "multigroup": True, "neighbors": "probabilistic"}
    fit = PNMF(2, **settings).fit(X, coordinates=x, groups=labels)
    fit.save(tmp_path / "model.npz")
    loaded = PNMF.load(tmp_path / "model.npz")
    for arguments in ((), (x[:9] + 0.01, labels[:9])):
        for function in (log_factors, factor_uncertainty):
            one, other = (
                function(m, coordinates=None, groups=None)
                if not arguments
                else function(m, coordinates=arguments[0], groups=arguments[1])
                for m in (fit, loaded)
            )
            np.testing.assert_array_equal(one, other)
    one, other = (factor_samples(m, 3, random_state=1) for m in (fit, loaded))
    np.testing.assert_array_equal(one, other)


def test_a_model_can_be_pickled_and_called(model, data):
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(None, data[1]), model.transform(None, data[1]))
    terms, q, p = model.model_(E=2, X=torch.tensor(data[0].T), spatial=True)
    assert terms["log_likelihood"].shape == (60,)
    assert q.batch_shape == p.batch_shape == (2, 60)
    _, q, p = model.model_(E=2, coordinates=torch.tensor(data[1][:4]))
    assert q.batch_shape == p.batch_shape == (2, 4)
    np.testing.assert_allclose(p.scale, 1.0)


def test_groups(data):
    X, x, labels, *_ = data
    fit = PNMF(2, multigroup=True, **LOCAL).fit(X, coordinates=x, groups=labels)
    swapped = np.where(labels == "a", "b", "a")
    q = {"posterior": "factorised"}
    mine, other = (log_factors(fit, coordinates=x, groups=g, **q) for g in (labels, swapped))
    np.testing.assert_allclose(mine, log_factors(fit, posterior="factorised"), rtol=1e-4, atol=1e-5)
    assert np.abs(mine - other).max() > 0.1
    draws = factor_samples(fit, 3, coordinates=x, groups=labels, random_state=0)
    assert draws.shape == (3, 60, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["expanded", "lower-bound"])
def test_standard_training_comes_near_natural_steps(data, model, mode):
    settings = {
        **LOCAL,
        "training_mode": "standard",
        "loadings_mode": "projected",
        "learning_rate": 0.05,
        "max_iter": 150,
        "mode": mode,
        "tol": 0,
    }
    fit = PNMF(2, **settings).fit(data[0], coordinates=data[1])
    assert abs(fit.elbo_ - model.elbo_) < 0.02 * abs(model.elbo_)
    softplus = PNMF(2, cholesky_mode="softplus", **settings).fit(data[0], coordinates=data[1])
    assert softplus.elbo_ == pytest.approx(fit.elbo_, rel=0.01)
    assert softplus.elbo_ != fit.elbo_


@pytest.mark.slow
@pytest.mark.parametrize("training_mode", ["natural", "standard"])
def test_minibatches_come_near_the_whole(data, model, training_mode):
    settings = {**LOCAL, "batch_size": 20, "tol": 0, "max_iter": 600}
    if training_mode == "standard":
        settings |= {"training_mode": "standard", "learning_rate": 0.05}
    fit = PNMF(2, **settings).fit(data[0], coordinates=data[1])
    assert abs(fit.elbo_ - model.elbo_) < 0.01 * abs(model.elbo_)


@pytest.mark.parametrize("neighbors", ["knn", "probabilistic"])
@pytest.mark.parametrize("training_mode", ["natural", "standard"])
def test_neighbours_found_at_each_step_are_those_of_before(data, neighbors, training_mode):
    settings = {**LOCAL, "neighbors": neighbors, "max_iter": 4, "training_mode": training_mode}
    kept, found = (
        PNMF(2, **settings, precompute_knn=one).fit(data[0], coordinates=data[1])
        for one in (True, False)
    )
    np.testing.assert_allclose(found.history_, kept.history_, rtol=1e-5)
    for fit, precomputed in ((kept, True), (found, False)):
        neighborhoods = fit.model_.prior.neighborhoods
        assert (neighborhoods.factor is neighborhoods.factor) == precomputed


def test_probabilistic_neighbours_are_others_and_seeded(data):
    settings = {**LOCAL, "K": 5, "neighbors": "probabilistic"}
    fits = [PNMF(2, **settings).fit(data[0], coordinates=data[1]) for _ in range(2)]
    np.testing.assert_array_equal(get_factors(fits[0]), get_factors(fits[1]))
    near = PNMF(2, **{**settings, "neighbors": "knn"}).fit(data[0], coordinates=data[1])
    graphs = [m.model_.prior.neighborhoods.factor.graph for m in (fits[0], near)]
    assert (graphs[0].predecessors != graphs[1].predecessors).any()


@pytest.mark.slow
def test_more_neighbours_come_nearer_to_the_exact_process(data):
    X, x, *_ = data
    new = np.random.default_rng(1).uniform(size=(40, 2))
    reference = PNMF(2, **{**LOCAL, "local": False, "max_iter": 60}).fit(X, coordinates=x)
    error = {}
    for K in (1, 5, 30):
        fit = PNMF(2, **{**LOCAL, "K": K, "max_iter": 60}).fit(X, coordinates=x)
        assert fit.model_.prior.neighborhoods.K == K
        change = log_factors(fit, coordinates=new) - log_factors(reference, coordinates=new)
        error[K] = np.sqrt((change**2).mean())
    assert error[1] > error[5] > error[30]


@pytest.mark.parametrize("criterion", ["leave-one-out", "elbo"])
def test_hyperparameters_are_learned(data, criterion):
    stages = [WarmUp(), LearnHyperparameters(criterion), Settle()]
    learning = {"train_lengthscale": True, "learn": ("sigma",), "max_iter": 80}
    fit = PNMF(2, stages=stages, **{**LOCAL, **learning}).fit(data[0], coordinates=data[1])
    lengthscale = fit.model_.prior.kernel.lengthscale
    assert len(set(lengthscale.tolist())) == 2
    assert ((lengthscale > 0.1) & (lengthscale < 2)).all()
    assert np.corrcoef(log_factors(fit).T, data[3].T)[:2, 2:].max(1).min() > 0.85


def test_double_precision_and_a_line_and_space(data):
    X, x, *_ = data
    for points in (x[:, :1], np.column_stack([x, x[:, 0] ** 2])):
        fit = PNMF(2, **LOCAL).fit(X.astype(np.float64), coordinates=points)
        assert log_factors(fit).dtype == np.float64
        assert np.isfinite(get_factors(fit)).all()
    single = PNMF(2, **LOCAL).fit(X.astype(np.float32), coordinates=x)
    assert log_factors(single).dtype == np.float32


# --- input that is not as expected


def test_too_many_neighbours_are_all_with_a_warning(data):
    X, x, *_ = data
    with pytest.warns(UserWarning, match=r"K=100 .* 59 others; K=59 is used"):
        many = PNMF(2, **{**LOCAL, "K": 100}).fit(X, coordinates=x)
    exactly = PNMF(2, **{**LOCAL, "K": 59}).fit(X, coordinates=x)
    np.testing.assert_array_equal(get_factors(many), get_factors(exactly))
    new = x[:3] + 0.02
    np.testing.assert_array_equal(many.transform(None, new), exactly.transform(None, new))


def test_one_neighbour_is_enough(data):
    fit = PNMF(2, **{**LOCAL, "K": 1}).fit(data[0], coordinates=data[1])
    assert np.corrcoef(log_factors(fit).T, data[3].T)[:2, 2:].max(1).min() > 0.85
    with pytest.raises(ValueError, match="K"):
        PNMF(2, **{**LOCAL, "K": 0}).fit(data[0], coordinates=data[1])
    with pytest.raises(ValueError, match="neighbors"):
        PNMF(2, **{**LOCAL, "neighbors": "nearest"}).fit(data[0], coordinates=data[1])


def test_a_group_of_fewer_than_k_borrows_from_others(data):
    X, x, labels, *_ = data
    lonely = labels.copy()
    lonely[0] = "c"
    fit = PNMF(2, multigroup=True, **LOCAL).fit(X, coordinates=x, groups=lonely)
    graph = fit.model_.prior.neighborhoods.factor.graph
    found = (graph.predecessors[graph.position[0]] >= 0).sum()
    assert found == min(graph.position[0], 12) > 0
    assert np.isfinite(fit.transform(None, x[:2], ["c", "c"])).all()


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        (np.ones((60, 2)), "one single place"),
        (np.full((60, 2), np.nan), "coordinates must be finite"),
        (None, "coordinates must be given"),
    ],
)
def test_bad_coordinates(data, coordinates, message):
    with pytest.raises(ValueError, match=message):
        PNMF(2, **LOCAL).fit(data[0], coordinates=coordinates)


def test_bad_counts(data):
    X = data[0].copy()
    X[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        PNMF(2, **LOCAL).fit(X, coordinates=data[1])


def test_duplicate_places_share_the_field(data):
    X, x, *_ = data
    fit = PNMF(2, **LOCAL).fit(np.concatenate([X, X]), coordinates=np.concatenate([x, x]))
    F = log_factors(fit)
    np.testing.assert_allclose(F[:60], F[60:], atol=0.01)


# --- what each parameter does


SPACE = {
    "mode": "lower-bound",
    "training_mode": "natural",
    "loadings_mode": "multiplicative",
    "spatial": True,
    "init": "nndsvda",
    "random_state": 0,
    "max_iter": 15,
    "tol": 0,
    "lengthscale": 0.3,
}


@pytest.fixture(scope="module")
def stripes():
    """Two factors that alternate along a line of 150 places, of period 0.1."""
    x = np.sort(np.random.default_rng(0).uniform(size=(150, 1)), axis=0)
    wave = np.sin(2 * np.pi * x / 0.1)
    factors = np.exp(np.hstack([wave, -wave]))
    W = np.kron(np.eye(2), np.full((6, 1), 3.0))
    return np.random.default_rng(1).poisson(factors @ W.T) * 1.0, x, wave[:, 0]


def field_of(stripes, **parameters) -> PNMF:
    settings = {**SPACE, "local": True, "K": 10, **parameters}
    return PNMF(2, **settings).fit(stripes[0], coordinates=stripes[1])


def test_local_keeps_what_inducing_points_blur(stripes):
    fits = (field_of(stripes, lengthscale=0.05, num_inducing=8, local=one) for one in (True, False))
    right = [np.abs(np.corrcoef(T.log_factors(fit).T, stripes[2])[-1, :2]).min() for fit in fits]
    assert right[0] > 0.95
    assert right[1] < 0.6


@pytest.mark.parametrize("K", [1, 4])
def test_k_is_how_many_neighbours_a_place_has(stripes, K):
    graph = field_of(stripes, K=K, max_iter=1).model_.prior.neighborhoods.factor.graph
    assert graph.predecessors.shape == (150, K)
    np.testing.assert_array_equal((graph.predecessors >= 0).sum(1), np.minimum(np.arange(150), K))


def test_precompute_knn_searches_once(stripes, monkeypatch):
    searches = []

    def counted(*args):
        searches.append(args)
        return build_graph(*args)

    monkeypatch.setattr(neighborhoods, "build_graph", counted)
    standard = {"training_mode": "standard", "loadings_mode": "projected", "stages": [Settle()]}
    settings = {**standard, "batch_size": 50, "max_iter": 6}
    field_of(stripes, **settings)
    assert len(searches) == 1
    field_of(stripes, **settings, precompute_knn=False)
    assert len(searches) > 6


def test_neighbors_chooses_who_conditions_whom(stripes):
    x, spread = stripes[1][:, 0], {}
    for neighbors in ("knn", "probabilistic"):
        graph = field_of(stripes, K=4, neighbors=neighbors, max_iter=1)
        graph = graph.model_.prior.neighborhoods.factor.graph
        near = neighbors_of(graph)
        spread[neighbors] = np.where(near < 0, 0, np.abs(x[near] - x[:, None])).sum()
    assert spread["probabilistic"] > 1.2 * spread["knn"]


def test_rank_is_how_many_columns_q_has(stripes):
    uncertainty = {}
    for rank in (0, 5):
        fit = field_of(stripes, stages=[Settle(), Correlate(rank), Settle()], max_iter=30)
        assert fit.model_.prior.low_rank.shape == (2, 150, rank)
        uncertainty[rank] = T.factor_uncertainty(fit, posterior="factorised").mean()
    assert uncertainty[5] > 1.1 * uncertainty[0]
