"""Accessors of a fitted model, and inference with one side fixed against optimisation by scipy."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import minimize
from sklearn.exceptions import NotFittedError

from pnmf_pyro import PNMF
from pnmf_pyro import transforms as T
from tests.conftest import simulate


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
    np.testing.assert_array_equal(T.log_factors(fitted), mean)
    np.testing.assert_array_equal(T.factor_uncertainty(fitted), sigma)
    np.testing.assert_allclose(T.factor_uncertainty(fitted, return_variance=True), sigma**2, 1e-6)
    np.testing.assert_allclose(T.get_factors(fitted), np.exp(mean + sigma**2 / 2), 1e-6)
    np.testing.assert_allclose(T.get_factors(fitted, use_mgf=False), np.exp(mean), 1e-6)
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
