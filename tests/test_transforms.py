"""Accessors of a fitted model, and inference with one side fixed against optimisation by scipy."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import fsolve, minimize
from sklearn.exceptions import NotFittedError

from pnmf_pyro import PNMF
from pnmf_pyro import transforms as T
from tests.support.calibration import separated_loadings
from tests.support.data import simulate
from tests.support.settings import unconverged
from tests.support.state import global_state


def poisson_maximum(x, W, s=1.0):
    """exp F that maximises sum_j x_j log(s W_j exp F) - s W_j exp F, by a quasi-Newton method."""

    def loss(h):
        rate = s * W @ h + 1e-12
        return rate.sum() - x @ np.log(rate), s * W.T @ (1 - x / rate)

    start = np.full(W.shape[1], x.sum() / W.sum() / s)
    return minimize(loss, start, jac=True, bounds=[(0, None)] * W.shape[1], tol=1e-12)


def test_accessors_agree_with_q(fitted):
    q = T.get_prior(fitted).marginal()
    mean, sigma = q.loc.detach().numpy().T, q.scale.detach().numpy().T
    of_q = {"posterior": "factorised"}
    np.testing.assert_array_equal(T.log_factors(fitted, **of_q), mean)
    np.testing.assert_array_equal(T.factor_uncertainty(fitted, **of_q), sigma)
    variance = T.factor_uncertainty(fitted, return_variance=True, **of_q)
    np.testing.assert_allclose(variance, sigma**2, 1e-6)
    np.testing.assert_allclose(T.get_factors(fitted), np.exp(mean + sigma**2 / 2), 1e-5)
    np.testing.assert_allclose(T.get_factors(fitted, use_mgf=False, **of_q), np.exp(mean), 1e-6)
    np.testing.assert_array_equal(T.get_loadings(fitted), fitted.components_.T)
    prior = T.get_prior(fitted)
    np.testing.assert_array_equal(T.log_factors_from_prior(prior), T.log_factors(fitted))
    np.testing.assert_array_equal(T.factors_from_prior(prior), T.get_factors(fitted))
    np.testing.assert_array_equal(T.uncertainty_from_prior(prior), T.factor_uncertainty(fitted))


@pytest.mark.parametrize(
    "function", [T.log_factors, T.factor_uncertainty, T.get_factors, T.get_loadings]
)
def test_tensors_on_request_and_errors_before_fit(function, fitted):
    tensor = function(fitted, return_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    np.testing.assert_array_equal(tensor.numpy(), function(fitted))
    np.testing.assert_array_equal(function(fitted.model_), function(fitted))
    with pytest.raises(NotFittedError, match="Call fit"):
        function(PNMF())


def test_coordinates_are_for_spatial_models(fitted):
    with pytest.raises(ValueError, match="spatial models only"):
        T.log_factors(fitted, coordinates=np.zeros((80, 2)))


def test_samples_have_the_moments_of_q(fitted):
    draws = T.factor_samples(fitted, 4000, random_state=0)
    assert draws.shape == (4000, 80, 3)
    sigma = T.factor_uncertainty(fitted)
    # 240 means at 5 standard errors: a false alarm in 1e4 seeds; the seed is fixed
    assert (np.abs(draws.mean(0) - T.log_factors(fitted)) < 5 * sigma / 4000**0.5).all()
    np.testing.assert_allclose(draws.std(0), sigma, rtol=0.07)
    exp_draws = T.factor_samples(fitted, 5, return_exp=True, random_state=1)
    np.testing.assert_allclose(np.log(exp_draws), T.factor_samples(fitted, 5, random_state=1), 1e-4)
    assert not np.array_equal(T.factor_samples(fitted, 2), T.factor_samples(fitted, 2))


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_transform_maximises_the_likelihood(form, fitted, counts):
    X, s = counts[:6].astype(np.float64), np.linspace(0.5, 3, 6)
    found = fitted.set_params(max_iter=20000, tol=1e-4).transform(form(X), size_factors=s)
    for i in range(6):
        best = poisson_maximum(X[i], fitted.components_.T.astype(float), s[i])
        rate = s[i] * fitted.components_.T @ found[i] + 1e-12
        assert rate.sum() - X[i] @ np.log(rate) == pytest.approx(best.fun, abs=0.02)


def test_transform_of_an_empty_sample_is_zero(fitted):
    assert (fitted.transform(np.zeros((1, 25))) == 0).all()


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_transform_W_finds_the_loadings(form):
    X, F, W = simulate(2, 400, 30, 3)
    found = T.transform_W(form(X), np.exp(F), max_iter=1000)
    assert found.shape == (30, 3)
    for j in range(4):
        best = poisson_maximum(X[:, j].astype(float), np.exp(F))
        rate = np.exp(F) @ found[j] + 1e-12
        assert rate.sum() - X[:, j] @ np.log(rate) == pytest.approx(best.fun, abs=0.5)
    assert np.corrcoef(found.ravel(), W.ravel())[0, 1] > 0.99


def test_transform_W_by_least_squares_is_the_printed_rule():
    X, F, _ = simulate(2, 50, 8, 2)
    H, start = np.exp(F), np.ones((8, 2))
    expected = start.copy()
    for _ in range(7):
        expected = expected * (X.T @ H) / (expected @ (H.T @ H))
    found = T.transform_W(X.astype(float), H, W_init=start, max_iter=7, tol=0, loss="frobenius")
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_transform_W_takes_size_factors_and_shows_progress(capsys):
    X, F, _ = simulate(2, 80, 10, 2)
    s = np.linspace(1, 3, 80)
    found = T.transform_W(X, np.exp(F), size_factors=s, verbose=True)
    expected = T.transform_W(X, np.exp(F) * s[:, None])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert "log-likelihood" in capsys.readouterr().err


@pytest.mark.slow
def test_transform_F_recovers_the_factors_with_uncertainty():
    X, F, W = simulate(4, 100, 60, 2, mean=10)
    prior = T.transform_F(X, W, return_prior=True)
    z = (T.log_factors_from_prior(prior) - F) / T.uncertainty_from_prior(prior)
    assert 0.7 < np.sqrt(np.mean(z**2)) < 1.5
    factors = T.transform_F(sp.csr_matrix(X), W)
    np.testing.assert_allclose(factors, T.factors_from_prior(prior), rtol=0.05)
    np.testing.assert_array_equal(factors, T.transform_F(sp.csr_matrix(X), W))


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (np.ones((3, 2)), "W must have one row for each of the 25 features"),
        (-np.ones((25, 2)), "not negative"),
        (np.full((25, 2), np.nan), "finite"),
    ],
)
def test_loadings_that_do_not_fit(W, message, counts):
    with pytest.raises(ValueError, match=message):
        T.transform_F(counts, W)


def test_n_components_must_agree(counts):
    with pytest.raises(ValueError, match="n_components=4"):
        T.transform_F(counts, np.ones((25, 2)), n_components=4)


def test_what_is_returned_is_a_copy(counts):
    """With one component the transposed mean is contiguous as it stands in the model."""
    model = PNMF(1, tol=0.05, random_state=0).fit(counts)
    before = T.log_factors(model).copy()
    for tensor in (False, True):
        T.log_factors(model, return_tensor=tensor)[:] = 9
    np.testing.assert_array_equal(T.log_factors(model), before)


# --- every parameter of every function


ACCESSORS = {
    "log_factors": T.log_factors,
    "factor_uncertainty": T.factor_uncertainty,
    "factor_samples": lambda m, return_tensor: T.factor_samples(
        m, 5, return_tensor=return_tensor, random_state=0
    ),
    "exp samples": lambda m, return_tensor: T.factor_samples(
        m, 5, True, return_tensor=return_tensor, random_state=0
    ),
    "get_factors": T.get_factors,
    "get_loadings": T.get_loadings,
    "log_factors_from_prior": lambda m, return_tensor: T.log_factors_from_prior(
        T.get_prior(m), return_tensor
    ),
    "factors_from_prior": lambda m, return_tensor: T.factors_from_prior(
        T.get_prior(m), return_tensor=return_tensor
    ),
    "uncertainty_from_prior": lambda m, return_tensor: T.uncertainty_from_prior(
        T.get_prior(m), return_tensor=return_tensor
    ),
}


@pytest.mark.parametrize("name", ACCESSORS)
def test_return_tensor_everywhere(name, fitted):
    array = ACCESSORS[name](fitted, return_tensor=False)
    tensor = ACCESSORS[name](fitted, return_tensor=True)
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    assert tensor.dtype == torch.float32
    assert array.dtype == np.float32
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(array, tensor.numpy())


def test_use_mgf_of_factors_from_prior(fitted):
    prior = T.get_prior(fitted)
    mean, sigma = T.log_factors(fitted), T.factor_uncertainty(fitted)
    np.testing.assert_allclose(T.factors_from_prior(prior), np.exp(mean + sigma**2 / 2), 1e-5)
    np.testing.assert_allclose(T.factors_from_prior(prior, use_mgf=False), np.exp(mean), 1e-5)


def test_return_variance_of_uncertainty_from_prior(fitted):
    prior = T.get_prior(fitted)
    sigma, variance = (T.uncertainty_from_prior(prior, flag) for flag in (False, True))
    np.testing.assert_allclose(variance, sigma**2, rtol=1e-5)
    assert (variance != sigma).all()


def test_single_and_empty_samples(fitted, counts):
    """transform treats samples one by one, whatever the form, and leaves global seeds alone."""
    rows = np.vstack([counts[:4], np.zeros((2, 25), np.float32)])
    before = global_state()
    dense, sparse = fitted.transform(rows), fitted.transform(sp.csr_matrix(rows))
    assert global_state() == before
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(dense[4:], 0)
    for i in range(5):
        np.testing.assert_allclose(fitted.transform(rows[i : i + 1])[0], dense[i], 1e-4, 1e-6)
    np.testing.assert_array_equal(fitted.transform(sp.csr_matrix((1, 25))), 0)


@pytest.fixture(scope="module")
def conditional():
    """Counts from known loadings that overlap little."""
    rng = np.random.default_rng(1)
    W = separated_loadings(60, 3, 0.05, 5.0, rng)
    return rng.poisson(np.exp(rng.normal(size=(40, 3))) @ W.T).astype(np.float64), W


def q_of(prior):
    """Mean and standard deviation of q(F), each (N, L)."""
    q = prior.marginal()
    return q.loc.detach().numpy().T, q.scale.detach().numpy().T


def test_transform_F_of_sparse_single_and_empty_samples(conditional):
    """For a sample without counts the best q solves two equations in mean and variance."""
    X, W = conditional
    rows = np.vstack([X, np.zeros((1, 60))])
    settings = {"mode": "lower-bound", "return_prior": True, "tol": 0}
    settings |= {"learning_rate": 1e-3, "max_iter": 60}
    before = global_state()
    priors = [T.transform_F(form(rows), W, **settings) for form in (np.asarray, sp.csr_matrix)]
    single = T.transform_F(rows[:1], W, **settings)
    assert global_state() == before
    dense, sparse = (q_of(prior)[0] for prior in priors)
    np.testing.assert_allclose(sparse, dense, atol=1e-3)
    np.testing.assert_allclose(q_of(single)[0][0], dense[0], atol=1e-3)

    def stationary(q, total):
        mean, log_variance = q
        expected = total * np.exp(mean + np.exp(log_variance) / 2)
        return [expected + mean, np.exp(-log_variance) - 1 - expected]

    sigma = q_of(priors[0])[1]
    for l, total in enumerate(W.sum(0)):
        mean, log_variance = fsolve(stationary, [-2.0, -0.5], args=(total,))
        assert dense[-1, l] == pytest.approx(mean, abs=1e-3)
        assert sigma[-1, l] == pytest.approx(np.exp(log_variance / 2), rel=1e-3)


@pytest.mark.slow
def test_mode_and_E_of_transform_F(conditional):
    """Without draws the seed does not matter; with nine times as many a third as much.

    Adam moves by its learning rate whatever the noise; a small one leaves that of the draws.
    """
    X, W = conditional[0][:15], conditional[1]
    settings = {"learning_rate": 1e-4, "tol": 1e9}

    def spread(**parameters) -> float:
        found = [T.transform_F(X, W, random_state=s, **settings, **parameters) for s in (0, 1)]
        return float(np.abs(np.log(found[0] / found[1])).mean())

    assert spread(mode="lower-bound") == 0
    for mode in ("simple", "expanded"):
        assert spread(mode=mode, E=1) > 1.5 * spread(mode=mode, E=9) > 0


def test_tol_and_max_iter_of_transform_F(conditional):
    """A tol that any step meets stops after forty, the least that can be judged."""
    X, W = conditional
    early = T.transform_F(X, W, tol=1e9)
    np.testing.assert_array_equal(early, T.transform_F(X, W, tol=0, max_iter=40))
    assert (early != T.transform_F(X, W, tol=0, max_iter=41)).any()


@unconverged
def test_learning_rate_of_transform_F(conditional):
    """The first step of Adam is the learning rate, from a start that does not depend on it."""
    X, W = conditional
    settings = {"mode": "expanded", "max_iter": 1, "tol": 0, "return_prior": True}
    first, second = (
        q_of(T.transform_F(X, W, learning_rate=rate, **settings))[0] for rate in (1e-3, 3e-3)
    )
    np.testing.assert_allclose(np.abs(second - first), 2e-3, rtol=1e-3)


def test_scale_pf_of_transform_F(conditional):
    """A tight prior draws the log-factors to zero."""
    X, W = conditional
    loose, tight = (
        T.log_factors_from_prior(T.transform_F(X, W, scale_pf=s, return_prior=True))
        for s in (1.0, np.float32(0.1))
    )
    assert np.abs(tight).mean() < 0.5 * np.abs(loose).mean()


def test_progress_of_transform_F(conditional, capsys):
    X, W = conditional
    T.transform_F(X, W)
    assert capsys.readouterr().err == ""
    T.transform_F(X, W, verbose=True)
    assert "ELBO" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_device_of_the_transforms(conditional):
    X, W = conditional
    for call in (lambda **k: T.transform_F(X, W, **k), lambda **k: T.transform_W(X, X[:, :3], **k)):
        np.testing.assert_array_equal(call(device="cpu"), call(device="auto"))
        with pytest.raises(ValueError, match="device='cuda'"):
            call(device="cuda")
        with pytest.raises(ValueError, match="device must be one of"):
            call(device="gpu")


def test_transform_W_of_sparse_single_and_empty_samples(conditional):
    X, _ = conditional
    F = np.exp(np.random.default_rng(0).normal(size=(40, 3)))
    before = global_state()
    dense, sparse = T.transform_W(X, F), T.transform_W(sp.csr_matrix(X), F)
    assert global_state() == before
    np.testing.assert_allclose(sparse, dense, rtol=1e-6, atol=1e-9)
    # Samples without counts add to the exposure and to nothing else.
    padded = T.transform_W(np.vstack([X, 0 * X]), np.vstack([F, F]), tol=0)
    np.testing.assert_allclose(padded, T.transform_W(X, F, tol=0) / 2, rtol=1e-6, atol=1e-9)
    # From one sample of one component the loadings are its counts over its factor.
    single = T.transform_W(X[:1], np.full((1, 1), 2.0))
    np.testing.assert_allclose(single[:, 0], X[0] / 2)
    np.testing.assert_array_equal(T.transform_W(0 * X, F), 0)


def test_W_init_and_max_iter_of_transform_W(conditional):
    """The problem is convex: after enough updates the start is forgotten, after one it is not."""
    X, _ = conditional
    F = np.exp(np.random.default_rng(0).normal(size=(40, 3)))
    start = np.random.default_rng(1).gamma(1.0, 1.0, size=(60, 3)) + 0.1
    first = [T.transform_W(X, F, W_init=w, max_iter=1) for w in (None, start)]
    last = [T.transform_W(X, F, W_init=w, max_iter=3000, tol=0) for w in (None, start)]
    assert np.abs(first[0] - first[1]).max() > 0.1
    np.testing.assert_allclose(last[0], last[1], atol=2e-2)
    loss = [(F @ w.T - X * np.log(F @ w.T)).sum() for w in (first[0], last[0])]
    assert loss[1] < loss[0]


def test_tol_of_transform_W(conditional):
    X, _ = conditional
    F = np.exp(np.random.default_rng(0).normal(size=(40, 3)))
    once = T.transform_W(X, F, max_iter=1)
    np.testing.assert_array_equal(T.transform_W(X, F, tol=1e9), once)
    assert (T.transform_W(X, F, tol=1e-4) != once).any()


@pytest.mark.parametrize(
    "form",
    [torch.tensor, sp.csr_matrix, lambda a: torch.tensor(a, requires_grad=True), np.ndarray.tolist],
)
def test_factors_and_loadings_are_taken_in_any_form(form, fitted, counts):
    factors, W = T.get_factors(fitted), T.get_loadings(fitted)
    expected = fitted.inverse_transform(factors)
    np.testing.assert_allclose(fitted.inverse_transform(form(factors)), expected, rtol=1e-5)
    settings = {"mode": "lower-bound", "tol": 1.0}
    found = T.transform_F(counts, form(W), **settings)
    np.testing.assert_allclose(found, T.transform_F(counts, W, **settings), rtol=1e-4)
    assert found.dtype == np.float32


def test_a_side_without_entries_above_zero_is_refused():
    X = np.ones((4, 3))
    with pytest.raises(ValueError, match="F must have entries above 0"):
        T.transform_W(X, np.zeros((4, 2)))
    with pytest.raises(ValueError, match="W must have entries above 0"):
        T.transform_F(X, np.zeros((3, 2)))
