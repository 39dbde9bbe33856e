"""Locally conditioned fields, prior and estimator, against dense matrices and SVGP."""

import pickle

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import kl_divergence

from pnmf_pyro import PNMF
from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import MultiGroupKernel, SpatialKernel
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP
from pnmf_pyro.transforms import factor_samples, factor_uncertainty, get_factors, log_factors
from tests import dense_fields
from tests.test_spatial import STEPS, tissue

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

LOCAL = {**STEPS, "local": True, "K": 12}
LENGTHSCALES, SIGMAS, LEVELS = (0.3, 0.5), (1.0, 1.4), (0.4, -0.3)


def kernel_of(name="Matern32"):
    kernel = SpatialKernel(name, n_sets=2)
    kernel.lengthscale.copy_(torch.tensor(LENGTHSCALES, dtype=torch.float64))
    kernel.sigma.copy_(torch.tensor(SIGMAS, dtype=torch.float64))
    return kernel


def prior_of(x, K, natural=True, **settings):
    settings = {"rank": 3, "dtype": torch.float64, **settings}
    prior = LCGP(
        kernel_of(), Places(torch.tensor(x)), 2, K=K, use_natural_gradients=natural, **settings
    )
    prior.mean.copy_(torch.tensor(LEVELS, dtype=torch.float64))
    return prior


def exact(x, z):
    return [
        dense_fields.covariance("Matern32", x, z, *pair)
        for pair in zip(LENGTHSCALES, SIGMAS, strict=True)
    ]


def observed(N, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(2, N)), random.uniform(0.3, 2.0, size=(2, N))


def set_q(prior, seed=3):
    """A q with means, diagonals and a low-rank part of no special form; returns (m, S) of each."""
    random = np.random.default_rng(seed)
    m, V = random.normal(size=(2, prior.N)), random.normal(size=(2, prior.N, 3))
    d = random.gamma(2.0, 0.2, size=(2, prior.N))
    zero = torch.zeros(2, prior.N, dtype=torch.float64)
    prior.q.assign(torch.tensor(m), torch.tensor(d), zero, zero)
    prior.low_rank = torch.tensor(V)
    return [(m[l], V[l] @ V[l].T + np.diag(d[l])) for l in range(2)]


@pytest.fixture(scope="module")
def data():
    return tissue(groups=2)


@pytest.fixture(scope="module")
def model(data):
    return PNMF(2, **LOCAL).fit(data[0], coordinates=data[1])


# --- all others as neighbours: the exact Gaussian process


@pytest.fixture(scope="module")
def complete():
    x = np.random.default_rng(0).uniform(size=(200, 2))
    return x, prior_of(x, 199), exact(x, x)


def test_density_of_all_neighbours_is_exact(complete):
    _, prior, K = complete
    F = np.random.default_rng(1).normal(size=(2, 200))
    found = prior.distributions(None, None, None, True)[1].log_prob(torch.tensor(F)).sum(1)
    for l in range(2):
        deviation = F[l] - LEVELS[l]
        log_det = np.linalg.slogdet(2 * np.pi * K[l])[1]
        expected = -0.5 * (deviation @ np.linalg.solve(K[l], deviation) + log_det)
        np.testing.assert_allclose(found[l], expected, rtol=1e-8)


@pytest.mark.parametrize("kept", [True, False])
def test_divergence_of_all_neighbours_is_exact(complete, kept):
    x, _, K = complete
    prior = prior_of(x, 199, precompute_knn=kept)
    q = set_q(prior)
    found = kl_divergence(prior.marginal(), prior.distributions(None, None, None, True)[1])
    assert found.shape == (2, 200)
    expected = [
        dense_fields.kl_normal(m - level, S, C)
        for (m, S), level, C in zip(q, LEVELS, K, strict=True)
    ]
    np.testing.assert_allclose(found.sum(1), expected, rtol=1e-8)


def test_posterior_means_of_all_neighbours_are_exact(complete, monkeypatch):
    _, prior, K = complete
    monkeypatch.setattr("pnmf_pyro.priors.lcgp.TOLERANCE", 1e-11)
    monkeypatch.setattr("pnmf_pyro.priors.lcgp.MOST_ITERATIONS", 500)
    y, noise = observed(200)
    prior.assign(torch.tensor(y), torch.tensor(noise))
    q = prior.marginal()
    for l in range(2):
        mean, _ = dense_fields.regression(K[l], K[l], K[l], LEVELS[l], y[l], noise[l] ** 2)
        np.testing.assert_allclose(q.loc[l].detach(), mean, rtol=1e-8, atol=1e-9)
        precision = np.linalg.inv(K[l]) + np.diag(noise[l] ** -2)
        np.testing.assert_allclose(q.variance[l].detach(), 1 / np.diag(precision), rtol=1e-8)


def test_predictions_of_all_spots_are_exact():
    """Given all spots, prediction is p(f* | f) averaged over q(f)."""
    x = np.random.default_rng(0).uniform(size=(60, 2))
    prior = prior_of(x, 59)
    prior.neighborhoods.K = 60
    q = set_q(prior)
    z = np.random.default_rng(2).uniform(-0.1, 1.1, size=(7, 2))
    found = prior.at(Places(torch.tensor(z))).marginal()
    for l, (m, S) in enumerate(q):
        A = np.linalg.solve(exact(x, x)[l], exact(x, z)[l])
        rest = exact(z, z)[l] - A.T @ exact(x, z)[l]
        np.testing.assert_allclose(found.loc[l], LEVELS[l] + A.T @ (m - LEVELS[l]), rtol=1e-8)
        np.testing.assert_allclose(found.variance[l], np.diag(rest + A.T @ S @ A), rtol=1e-8)


def test_draws_at_new_places_have_the_exact_covariance():
    """With all spots and earlier places as neighbours; P(false alarm) below 1e-3 (5 sd)."""
    x = np.random.default_rng(0).uniform(size=(30, 2))
    prior = prior_of(x, 29)
    prior.neighborhoods.K = 33
    q = set_q(prior)
    z = np.array([[0.5, 0.5], [0.5, 0.52], [2.0, 2.0], [0.1, 0.8]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = prior.at(Places(torch.tensor(z))).draws(20_000)(None).numpy()
    assert draws.shape == (20_000, 2, 4)
    for l, (m, S) in enumerate(q):
        A = np.linalg.solve(exact(x, x)[l], exact(x, z)[l])
        C = exact(z, z)[l] - A.T @ exact(x, z)[l] + A.T @ S @ A
        mean = LEVELS[l] + A.T @ (m - LEVELS[l])
        error = np.sqrt(np.diag(C) / 20_000)
        np.testing.assert_array_less(np.abs(draws[:, l].mean(0) - mean), 5 * error)
        spread = np.sqrt((C**2 + np.outer(np.diag(C), np.diag(C))) / 20_000)
        np.testing.assert_array_less(np.abs(np.cov(draws[:, l].T) - C), 5 * spread)


# --- the prior in Pyro


def test_draws_of_the_prior_have_its_covariance():
    x = np.random.default_rng(0).uniform(size=(12, 2))
    prior = prior_of(x, 11)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        predictive = pyro.infer.Predictive(
            lambda: prior.model(Batch(), Batch().plate(12)), num_samples=4000
        )
        F = predictive()["F"].numpy().reshape(4000, 2, 12)
    for l, C in enumerate(exact(x, x)):
        error = np.sqrt((C**2 + np.outer(np.diag(C), np.diag(C))) / 4000)
        np.testing.assert_array_less(np.abs(np.cov(F[:, l].T) - C), 5 * error)
        np.testing.assert_array_less(np.abs(F[:, l].mean(0) - LEVELS[l]), 5 * SIGMAS[l] / 4000**0.5)


def test_some_spots_have_no_density_of_their_own():
    prior = prior_of(np.random.default_rng(0).uniform(size=(12, 2)), 5)
    field = prior.distributions(torch.tensor([1, 4]), None, None, True)[1]
    assert field.sample().shape == (2, 2)
    with pytest.raises(ValueError, match="density of some spots"):
        field.log_prob(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="cannot be expanded"):
        field.expand((3, 2, 2))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("natural", [True, False])
def test_batches_sum_to_the_whole(data, kept, natural):
    X, x, *_ = data
    prior = prior_of(x, 8, natural, precompute_knn=kept)
    set_q(prior)
    y = torch.empty(20, 60, dtype=torch.float64, device="meta")
    model = PoissonFactorization(prior, y, 2, mode="lower-bound")
    objective = FactorizationELBO("lower-bound")
    whole = objective.terms(model.model, model.guide, Batches(as_counts(X)).batch(None, None))
    parts = [
        {k: v.item() for k, v in objective.terms(model.model, model.guide, batch).items()}
        for batch in Batches(as_counts(X), 15).one_pass()
    ]
    for name, value in whole.items():
        np.testing.assert_allclose(np.mean([part[name] for part in parts]), value.item())


# --- natural steps


def test_a_natural_step_is_that_of_a_dense_gaussian(data):
    """Sites from finite differences of the expected log-likelihood, then dense regression."""
    X, x, *_ = data
    prior = prior_of(x, 59)
    y, noise = observed(60)
    prior.assign(torch.tensor(y), torch.tensor(noise))
    model = PoissonFactorization(
        prior,
        torch.empty(20, 60, dtype=torch.float64, device="meta"),
        2,
        mode="lower-bound",
        random_state=0,
    )
    batch = Batches(as_counts(X)).batch(None, None)
    m, s2 = (t.detach().numpy().copy() for t in (prior.q.loc, prior.q.diagonal))
    optimizer = prior.natural_optimizer(0.5)  # divergence of weight 2
    optimizer.prepare(batch)
    loss = FactorizationELBO("lower-bound").differentiable_loss(model.model, model.guide, batch)
    loss.backward()
    optimizer.param_groups[0]["lr"] *= 0.6
    optimizer.step()
    W = model.W.data.detach().numpy()
    for i in range(0, 60, 7):
        rate = W @ np.exp(m[:, i])
        g = (W * (X[i] / rate)[:, None]).sum(0) * np.exp(m[:, i])
        h = W.sum(0) * np.exp(m[:, i] + s2[:, i] / 2)
        old = noise[:, i] ** -2
        new = (1 - 0.6) * old + 0.6 * h / 2
        np.testing.assert_allclose(prior.q.curvature[:, i], new, rtol=1e-8)
        pull = (1 - 0.6) * old * y[:, i] + 0.6 * (g - h + h * m[:, i]) / 2
        np.testing.assert_allclose(prior.q.pull[:, i], pull, rtol=1e-8)
    for l, C in enumerate(exact(x, x)):
        h, b = (t[l].numpy() for t in (prior.q.curvature, prior.q.pull))
        A = np.linalg.inv(C) + np.diag(h)
        mean = LEVELS[l] + np.linalg.solve(A, b - h * LEVELS[l])
        deviation = prior.q.loc[l].detach().numpy() - mean
        assert np.sqrt(deviation @ A @ deviation / 60) < 0.03  # the tolerance, in posterior sd
        np.testing.assert_allclose(prior.q.diagonal[l].detach(), 1 / np.diag(A), rtol=1e-8)


def test_restoring_the_spread_keeps_means_and_takes_sites_at_their_weight():
    """As for inducing points, with d = 1 / (Q_ii + h); and V comes from the restored posterior."""
    weight, x = 0.4, np.random.default_rng(0).uniform(size=(60, 2))
    y, scale = observed(60)
    prior = prior_of(x, 59, rank=2000)
    prior.assign(torch.tensor(y), torch.tensor(scale * weight**0.5))
    mean = prior.q.loc.detach().clone()
    prior.restore_spread(weight)
    prior.correlate()
    assert torch.equal(prior.q.loc, mean)
    for l, K in enumerate(exact(x, x)):
        A = np.linalg.inv(K) + np.diag(scale[l] ** -2)
        np.testing.assert_allclose(prior.q.diagonal[l].detach(), 1 / np.diag(A), rtol=1e-8)
        pull = A @ (mean[l].numpy() - LEVELS[l]) + LEVELS[l] * scale[l] ** -2
        deviation = np.linalg.solve(A, prior.q.pull[l].numpy() - pull)
        assert np.sqrt(deviation @ A @ deviation / 60) < 0.03  # that of the solve before
        variance = prior.marginal().variance[l].detach()
        np.testing.assert_allclose(variance, np.diag(np.linalg.inv(A)), rtol=0.2)
    with pytest.raises(ValueError, match="restore_spread needs"):
        prior_of(x, 12, natural=False).restore_spread(0.5)


def test_a_batch_leaves_the_sites_of_others(data):
    X, x, *_ = data
    prior = prior_of(x, 8)
    y, noise = observed(60)
    prior.assign(torch.tensor(y), torch.tensor(noise))
    model = PoissonFactorization(
        prior, torch.empty(20, 60, dtype=torch.float64, device="meta"), 2, mode="lower-bound"
    )
    batch = Batches(as_counts(X)).batch(torch.arange(10), None)
    before = prior.q.curvature.clone()
    optimizer = prior.natural_optimizer()
    optimizer.prepare(batch)
    FactorizationELBO("lower-bound").differentiable_loss(model.model, model.guide, batch).backward()
    optimizer.step()
    changed = (prior.q.curvature != before).all(0)
    np.testing.assert_array_equal(changed, np.arange(60) < 10)


def test_the_bound_never_falls(data):
    """Within each of the two stages: without V, and with it."""
    fit = PNMF(2, **{**LOCAL, "tol": 0, "max_iter": 30}).fit(data[0], coordinates=data[1])
    for stage in (fit.history_[:30], fit.history_[30:]):
        assert np.diff(stage).min() > -1e-6 * abs(stage[-1])


def test_natural_gradients_need_their_parameters():
    prior = prior_of(np.random.default_rng(0).uniform(size=(12, 2)), 5, natural=False)
    with pytest.raises(ValueError, match="use_natural_gradients=True"):
        prior.natural_optimizer()


# --- the smooth part


def variogram(draws, x, bins):
    """Mean squared differences of draws (E, N) from the first 300 places to all, by distance."""
    i, j = np.divmod(np.arange(300 * len(x)), len(x))
    which = np.digitize(np.linalg.norm(x[i] - x[j], axis=1), bins) - 1
    keep = (which >= 0) & (which < len(bins) - 1) & (i != j)
    squares = sum((draw[i[keep]] - draw[j[keep]]) ** 2 for draw in draws) / len(draws)
    return np.bincount(which[keep], squares, len(bins) - 1) / np.bincount(which[keep])


def smoothness_of_draws(N, rank, n_draws):
    """Variograms around their mean: of draws from q, and of the exact posterior of its sites."""
    random = np.random.default_rng(0)
    x = random.uniform(size=(N, 2)) * np.sqrt(N / 100)
    prior = prior_of(x, 30, rank=rank, seed=1)
    y = random.normal(size=(2, N))
    noise = np.full((2, N), 1.0)
    prior.assign(torch.tensor(y), torch.tensor(noise))
    prior.correlate()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = prior.draws(n_draws)(None)[:, 0].numpy()
    r = np.linalg.norm(x[:, None] - x, axis=-1) / LENGTHSCALES[0]
    K = SIGMAS[0] ** 2 * dense_fields.kappa("Matern32", r)
    S = K - K @ np.linalg.solve(K + np.eye(N), K)
    exact_draws = np.linalg.cholesky(S + 1e-8 * np.eye(N)) @ random.normal(size=(N, n_draws))
    bins = np.linspace(0, 1.0, 9)
    centred = draws - prior.q.loc[0].detach().numpy()
    return [variogram(one, x, bins) for one in (centred, exact_draws.T)]


def test_draws_are_as_smooth_as_the_posterior():
    found, expected = smoothness_of_draws(400, 40, 200)
    np.testing.assert_allclose(found, expected, rtol=0.15)


def test_rank_says_how_many_columns_and_none_means_independent(data, model):
    assert model.model_.prior.low_rank.shape == (2, 60, 30)
    flat = PNMF(2, rank=0, **LOCAL).fit(data[0], coordinates=data[1])
    assert flat.model_.prior.low_rank.shape == (2, 60, 0)
    assert flat.n_iter_ < model.n_iter_
    near = np.linalg.norm(data[1][:, None] - data[1], axis=-1) + 9 * np.eye(60)
    pairs = near.argmin(1)
    correlations = []
    for fit in (model, flat):
        F = factor_samples(fit, 400, random_state=0)[..., 0]
        F = (F - F.mean(0)) / F.std(0)
        correlations.append((F * F[:, pairs]).mean())
    assert correlations[0] > 0.3
    assert abs(correlations[1]) < 0.05


def test_uncertainty_is_that_of_the_exact_process(data):
    """With V, marginal standard deviations are those of SVGP at all places; without, too small."""
    X, x, *_ = data
    settings = {**LOCAL, "K": 30, "tol": 0, "max_iter": 60}
    truth = factor_uncertainty(PNMF(2, **{**settings, "local": False}).fit(X, coordinates=x))
    ratio = {
        rank: (factor_uncertainty(PNMF(2, rank=rank, **settings).fit(X, None, x)) / truth).mean()
        for rank in (0, 50)
    }
    assert abs(ratio[50] - 1) < 0.1
    assert ratio[0] < 0.8


# --- through the estimator


def test_all_neighbours_fit_as_all_inducing_points_do(data):
    X, x, *_ = data
    settings = {**LOCAL, "K": 59, "tol": 0, "max_iter": 80}
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
        there = function(model, coordinates=data[1])
        np.testing.assert_allclose(there, function(model), rtol=1e-4, atol=1e-5)
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
    mine, other = (log_factors(fit, coordinates=x, groups=g) for g in (labels, swapped))
    np.testing.assert_allclose(mine, log_factors(fit), rtol=1e-4, atol=1e-5)
    assert np.abs(mine - other).max() > 0.1
    draws = factor_samples(fit, 3, coordinates=x, groups=labels, random_state=0)
    assert draws.shape == (3, 60, 2)


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


@pytest.mark.parametrize("training_mode", ["natural", "standard"])
def test_minibatches_come_near_the_whole(data, model, training_mode):
    settings = {**LOCAL, "batch_size": 20, "tol": 0, "max_iter": 300}
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
    assert not found.model_.prior.neighborhoods._once._known.keys() & {"factor", "graph"}
    assert kept.model_.prior.neighborhoods._once._known.keys() >= {"factor", "graph"}


def test_probabilistic_neighbours_are_others_and_seeded(data):
    settings = {**LOCAL, "K": 5, "neighbors": "probabilistic"}
    fits = [PNMF(2, **settings).fit(data[0], coordinates=data[1]) for _ in range(2)]
    np.testing.assert_array_equal(get_factors(fits[0]), get_factors(fits[1]))
    near = PNMF(2, **{**settings, "neighbors": "knn"}).fit(data[0], coordinates=data[1])
    graphs = [m.model_.prior.neighborhoods.factor.graph for m in (fits[0], near)]
    assert (graphs[0].predecessors != graphs[1].predecessors).any()


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
    settings = {**LOCAL, "train_lengthscale": True, "train_sigma": True, "criterion": criterion}
    fit = PNMF(2, warm_up=True, **settings).fit(data[0], coordinates=data[1])
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
    with pytest.raises(ValueError, match="rank"):
        PNMF(2, **{**LOCAL, "rank": -1}).fit(data[0], coordinates=data[1])


def test_a_group_of_fewer_than_k_borrows_from_others(data):
    X, x, labels, *_ = data
    lonely = labels.copy()
    lonely[0] = "c"
    fit = PNMF(2, multigroup=True, **LOCAL).fit(X, coordinates=x, groups=lonely)
    near = fit.model_.prior.neighborhoods.nearest_to(
        fit.model_.prior.places.take(torch.tensor([0]))
    )
    assert (near >= 0).sum() == 12
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


def test_a_kernel_that_is_no_covariance_names_the_spots():
    """A group that is near to two others, which are far apart: a negative eigenvalue."""
    distances = np.array([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    kernel = MultiGroupKernel("RBF", 1.0, 1.0, group_diff_param=1.0, group_distances=distances)
    x = torch.tensor(np.random.default_rng(0).uniform(size=(30, 2)))
    prior = LCGP(kernel, Places(x, torch.arange(30) % 3), 1, K=10)
    with pytest.raises(ValueError, match=r"covariance of spots \[.*not positive definite"):
        prior.assign(torch.zeros(1, 30), torch.ones(1, 30))


@pytest.mark.slow
def test_draws_at_many_spots_are_as_smooth_as_the_posterior():
    found, expected = smoothness_of_draws(5000, 20, 60)
    np.testing.assert_allclose(found, expected, rtol=0.15)
