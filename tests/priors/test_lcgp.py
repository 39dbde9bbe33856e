"""Locally conditioned fields against dense matrices."""

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import kl_divergence

from pnmf_pyro import PNMF
from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP
from pnmf_pyro.priors.natural import SiteSteps
from tests.support import dense_fields
from tests.support.data import tissue
from tests.support.models import take_step
from tests.support.settings import LOCAL, unconverged
from tests.support.svgp import drawn_from

pytestmark = unconverged

LENGTHSCALES, SIGMAS, LEVELS = (0.3, 0.5), (1.0, 1.4), (0.4, -0.3)


def kernel_of(name="Matern32"):
    kernel = SpatialKernel(name, n_sets=2)
    kernel.lengthscale.copy_(torch.tensor(LENGTHSCALES, dtype=torch.float64))
    kernel.sigma.copy_(torch.tensor(SIGMAS, dtype=torch.float64))
    return kernel


def prior_of(x, K, natural=True, **settings):
    settings = {"dtype": torch.float64, **settings}
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
    found = drawn_from(prior.model, prior)["F"].log_prob(torch.tensor(F)).sum(1)
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
    found = kl_divergence(prior.marginal(), drawn_from(prior.model, prior)["F"])
    assert found.shape == (2, 200)
    expected = [
        dense_fields.kl_joint(m - level, S, C)
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


def test_predictions_of_all_places_are_exact():
    """Given all places, prediction is p(f* | f) averaged over q(f)."""
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
    """With all known and earlier new places as neighbours; P(false alarm) below 1e-3 (5 sd)."""
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


@pytest.mark.slow
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


def test_some_places_have_no_density_of_their_own():
    prior = prior_of(np.random.default_rng(0).uniform(size=(12, 2)), 5)
    field = drawn_from(prior.model, prior, torch.tensor([1, 4]))["F"]
    assert field.sample().shape == (2, 2)
    with pytest.raises(ValueError, match="density of some places"):
        field.log_prob(torch.zeros(2, 2))
    assert field.expand((3, 2, 2)).sample().shape == (3, 2, 2)


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
    steps = SiteSteps(prior, kl_weight=2)
    steps.lr = 0.6
    take_step(model, batch, steps)
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
    prior = prior_of(x, 59)
    prior.assign(torch.tensor(y), torch.tensor(scale * weight**0.5))
    mean = prior.q.loc.detach().clone()
    prior.restore_spread(weight)
    prior.correlate(2000)
    assert torch.equal(prior.q.loc, mean)
    for l, K in enumerate(exact(x, x)):
        A = np.linalg.inv(K) + np.diag(scale[l] ** -2)
        np.testing.assert_allclose(prior.q.diagonal[l].detach(), 1 / np.diag(A), rtol=1e-8)
        pull = A @ (mean[l].numpy() - LEVELS[l]) + LEVELS[l] * scale[l] ** -2
        deviation = np.linalg.solve(A, prior.q.pull[l].numpy() - pull)
        assert np.sqrt(deviation @ A @ deviation / 60) < 0.03  # that of the solve before
        variance = prior.marginal().variance[l].detach()
        np.testing.assert_allclose(variance, np.diag(np.linalg.inv(A)), rtol=0.2)
    with pytest.raises(ValueError, match="use_natural_gradients=True"):
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
    take_step(model, batch, SiteSteps(prior))
    changed = (prior.q.curvature != before).all(0)
    np.testing.assert_array_equal(changed, np.arange(60) < 10)


def test_the_bound_never_falls(data):
    """Within each of the two stages: without V, and with it."""
    fit = PNMF(2, **{**LOCAL, "tol": 0, "max_iter": 30}).fit(data[0], coordinates=data[1])
    assert len(fit.history_.stages) == 2
    for _, first, last in fit.history_.stages:
        stage = fit.history_[first:last]
        assert len(stage) > 5
        assert np.diff(stage).min() > -1e-6 * abs(stage[-1])


def test_natural_gradients_need_their_parameters():
    prior = prior_of(np.random.default_rng(0).uniform(size=(12, 2)), 5, natural=False)
    with pytest.raises(ValueError, match="use_natural_gradients=True"):
        SiteSteps(prior)


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
    prior = prior_of(x, 30, seed=1)
    y = random.normal(size=(2, N))
    noise = np.full((2, N), 1.0)
    prior.assign(torch.tensor(y), torch.tensor(noise))
    prior.correlate(rank)
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


def test_a_kernel_that_is_no_covariance_names_the_places():
    """A group that is near to two others, which are far apart: a negative eigenvalue."""
    distances = np.array([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    kernel = SpatialKernel("RBF", 1.0, 1.0, group_diff_param=1.0, group_distances=distances)
    x = torch.tensor(np.random.default_rng(0).uniform(size=(30, 2)))
    prior = LCGP(kernel, Places(x, torch.arange(30) % 3), 1, K=10)
    with pytest.raises(ValueError, match=r"neighbours of places \d+.*not positive definite"):
        prior.assign(torch.zeros(1, 30), torch.ones(1, 30))


@pytest.mark.slow
def test_draws_at_many_places_are_as_smooth_as_the_posterior():
    found, expected = smoothness_of_draws(5000, 20, 60)
    np.testing.assert_allclose(found, expected, rtol=0.15)
