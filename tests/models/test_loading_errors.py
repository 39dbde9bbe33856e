"""Standard errors of loadings, against a dense system over factors and loadings together."""

import numpy as np
import pytest
import torch

import pnmf_pyro
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models import loading_errors
from pnmf_pyro.models.joint import find_uncertainty
from pnmf_pyro.transforms import errors_of_loadings, loading_uncertainty
from tests.support.calibration import separated_loadings


def table(seed, overlap, N=150, D=40, L=3, mean=1.0):
    W = separated_loadings(D, L, overlap, mean, np.random.default_rng(0))
    rng = np.random.default_rng([seed, 1])
    return W, rng.poisson(np.exp(rng.normal(size=(N, L))) @ W.T).astype(np.float64)


@pytest.fixture(scope="module", params=[0.0, 0.2, 0.5])
def fitted(request):
    W, X = table(0, request.param)
    return W, X, pnmf_pyro.fit(X, n_components=3)


def whole_system(X, W, F, c, prior_sd):
    """Covariance of all errors, first those of F and then those of W."""
    (N, D), L = X.shape, W.shape[1]
    A = np.exp(F)
    psi = A[:, None, :] / (A @ W.T)[..., None]
    J = np.zeros((N, D, N * L + D * L))
    for i in range(N):
        for j in range(D):
            J[i, j, i * L : (i + 1) * L] = psi[i, j] * W[j]
            J[i, j, (N + j) * L : (N + j + 1) * L] = psi[i, j]
    J = J.reshape(N * D, -1)
    precision = (J * X.reshape(-1, 1)).T @ J
    precision += np.diag(np.concatenate([np.full(N * L, c), 1 / prior_sd.ravel() ** 2]))
    return np.linalg.inv(precision)


def blocks_of(V, L):
    """The block (L, L) of each sample or feature."""
    return np.stack([V[j : j + L, j : j + L] for j in range(0, len(V), L)])


@pytest.mark.parametrize("profiles", [False, True])
def test_they_are_those_of_the_whole_system(profiles, fitted):
    _, X, model = fitted
    module = model.model_
    F = module.prior.marginal().loc.detach().numpy().T
    W = model.components_.T.astype(np.float64)
    prior_sd = np.maximum(3 * W, 1 / module.levels().numpy())
    V = whole_system(X, W, F, 1 / float(module.prior.scale_pf) ** 2, prior_sd)
    V = V[-W.size :, -W.size :]
    if profiles:  # W_jl / sum_j W_jl times its sum, linearised
        share = (W / W.sum(0)).T[..., None]
        away = np.eye(W.size).reshape(*W.shape, *W.shape)
        for l in range(3):
            away[:, l, :, l] -= share[l]
        V = away.reshape(W.size, -1) @ V @ away.reshape(W.size, -1).T
    exact = blocks_of(V, 3)
    found = errors_of_loadings(module).covariances(module.W.data, profiles=profiles).numpy()
    sd, exact_sd = (np.sqrt(np.einsum("jll->jl", V)) for V in (found, exact))
    ratio = sd / exact_sd
    assert 0.85 < ratio.min() <= ratio.max() < 1.1
    assert np.median(ratio) == pytest.approx(1, abs=0.04)
    correlation, exact_correlation = (
        V / s[:, :, None] / s[:, None, :] for V, s in ((found, sd), (exact, exact_sd))
    )
    assert np.abs(correlation - exact_correlation).mean() < 0.05


def test_blocks_alone_are_those_of_a_feature_with_all_factors_uncertain(monkeypatch):
    """D_j is the whole system with the loadings of all other features held."""
    _, X = table(0, 0.3, N=60, D=8)
    model = pnmf_pyro.fit(X, n_components=2)
    module = model.model_
    F = module.prior.marginal().loc.detach().numpy().T
    W = model.components_.T.astype(np.float64)
    held = np.full(W.shape, 1e-9)
    L = W.shape[1]
    A, c = torch.from_numpy(np.exp(F)), 1 / float(module.prior.scale_pf) ** 2
    P = gauss_newton(X, W, F) + c * np.eye(L)
    rows, columns = np.tril_indices(L)
    C = torch.from_numpy(np.linalg.inv(P)[:, rows, columns])
    counts = as_counts(X)
    _, alone = loading_errors._blocks(counts, A, torch.from_numpy(W), C)
    for j in (0, 5):
        sd = held.copy()
        sd[j] = 10.0
        V = whole_system(X, W, F, c, sd)[-W.size :, -W.size :]
        exact = np.linalg.inv(blocks_of(V, L)[j]) - np.eye(L) / 100
        np.testing.assert_allclose(alone[j], exact, rtol=1e-5, atol=1e-8)


def test_what_they_add_to_log_factors_is_that_of_the_whole_system(fitted):
    _, X, model = fitted
    module, N = model.model_, len(X)
    F = module.prior.marginal().loc.detach().numpy().T
    W = model.components_.T.astype(np.float64)
    prior_sd = np.maximum(3 * W, 1 / module.levels().numpy())
    c = 1 / float(module.prior.scale_pf) ** 2
    known = np.linalg.inv(H := gauss_newton(X, W, F) + c * np.eye(3))
    exact = blocks_of(whole_system(X, W, F, c, prior_sd)[: N * 3, : N * 3], 3) - known
    rows, columns = np.tril_indices(3)
    shared = torch.from_numpy((H - c * np.eye(3))[:, rows, columns]).float()
    covariance = torch.from_numpy(known[:, rows, columns]).float()
    added = loading_errors.covariance_from_loadings(
        module, as_counts(X.astype(np.float32)), shared, covariance, errors_of_loadings(module)
    )
    ratio = added[:, [0, 2, 5]].detach().numpy() / np.einsum("ill->il", exact)
    assert np.median(ratio) == pytest.approx(1, abs=0.05)
    assert np.quantile(ratio, 0.02) > 0.7
    assert np.quantile(ratio, 0.98) < 1.2


def gauss_newton(X, W, F):
    """sum_j X_ij phi_ij phi_ij^T of each sample."""
    phi = np.exp(F)[:, None] * W / (np.exp(F) @ W.T)[..., None]
    return np.einsum("ij,ijl,ijm->ilm", X, phi, phi)


def test_a_feature_of_one_component_with_known_factors_has_the_error_of_a_poisson_mean():
    """Where many others say what the factors are: W^2 over its counts."""
    rng = np.random.default_rng(0)
    X = rng.poisson(np.exp(rng.normal(size=(100, 1))) @ rng.gamma(3.0, 10.0, (1, 80)))
    X[:, 0] = rng.poisson(0.05 * X[:, 1:].mean(1))
    model = pnmf_pyro.fit(X.astype(float), n_components=1)
    level = 1 / np.sqrt(100)  # of the factor, which all loadings share
    relative = loading_uncertainty(model, return_log=True)[:, 0]
    assert relative[0] ** 2 == pytest.approx(1 / X[:, 0].sum() + level**2, rel=0.15)


def test_errors_of_logs_and_of_features_without_counts(fitted):
    _, X, model = fitted
    relative, absolute = (loading_uncertainty(model, return_log=one) for one in (True, False))
    np.testing.assert_allclose(relative * model.components_.T, absolute, rtol=1e-6)
    X = X.copy()
    X[:, 4] = 0
    with pytest.warns(UserWarning, match="no counts at all"):
        module = pnmf_pyro.fit(X, n_components=3).model_
    se = loading_uncertainty(module)[4]
    assert (se < 1.5 / module.levels().numpy()).all()
    assert (se > 0.5 / module.levels().numpy()).all()
    module.loading_blocks = None
    with pytest.raises(ValueError, match="Fit it again"):
        loading_uncertainty(module)
    find_uncertainty(module, as_counts(X))
    np.testing.assert_allclose(loading_uncertainty(module)[4], se, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 of 300 samples have no counts:UserWarning")
def test_they_are_the_spread_over_tables():
    """Of settled fits, and loadings with a quarter of their feature or more, over 20 tables; the
    standard deviation of a root mean square over 40 features is a few percent.
    """
    found, errors = [], []
    for seed in range(20):
        W, X = table(seed, 0.3, N=300)
        model = pnmf_pyro.fit(X, n_components=3, tol=1e-5, max_iter=2000)
        order = np.corrcoef(W.T, model.components_)[:3, 3:].argmax(1)
        found.append(model.components_.T[:, order])
        errors.append(loading_uncertainty(model)[:, order])
    large = W.sum(1, keepdims=True) / 4 < W
    spread = np.std(found, 0, ddof=1)[large]
    said = np.sqrt(np.mean(np.square(errors), 0))[large]
    assert np.median(said / spread) == pytest.approx(1, abs=0.15)
