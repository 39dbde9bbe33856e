"""Fields whose components are coupled at each place, against dense matrices."""

from functools import partial

import numpy as np
import pytest
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp import vecchia_solver
from pnmf_pyro.gp.coupled import conjugate_gradients
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models import joint_fields
from pnmf_pyro.priors import LCGP, SVGP, svgp
from pnmf_pyro.priors.joint import posterior_of
from pnmf_pyro.transforms import factor_samples, factor_uncertainty, get_factors
from tests.support import dense_fields
from tests.support.calibration import separated_loadings

N, L, LENGTHSCALE = 24, 3, 0.4


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Solves to the end."""
    solve = partial(conjugate_gradients, tolerance=1e-9, most=2000)
    monkeypatch.setattr(svgp, "conjugate_gradients", solve)
    monkeypatch.setattr(vecchia_solver, "conjugate_gradients", solve)


def places(n=N, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, 2))


def prior_of(kind, x):
    kernel = SpatialKernel("Matern32", LENGTHSCALE, 1.0)
    own = Places(torch.from_numpy(x))
    if kind == "LCGP":
        return LCGP(kernel, own, L, K=len(x) - 1, dtype=torch.float64)
    return SVGP(kernel, own, own if kind == "all" else Places(own.coordinates[:8]), L)


def prior_covariance(kind, x):
    """Of the values of one component at the samples."""
    K = dense_fields.covariance("Matern32", x, x, LENGTHSCALE, 1.0)
    if kind != "few":
        return K
    part = K[:8] @ np.eye(N)
    smooth = part.T @ np.linalg.solve(K[:8, :8], part)
    return smooth + np.diag(np.diag(K - smooth))


def blocks(seed=1, n=N):
    root = np.random.default_rng(seed).normal(size=(n, L, L))
    return root @ root.transpose(0, 2, 1)


def dense_precision(K, H):
    """Of all values, component by component."""
    P = np.kron(np.eye(L), np.linalg.inv(K))
    n = len(K)
    for l in range(L):
        for k in range(L):
            P[np.arange(l * n, (l + 1) * n), np.arange(k * n, (k + 1) * n)] += H[:, l, k]
    return P


@pytest.mark.parametrize("kind", ["all", "few", "LCGP"])
def test_solves_are_those_of_dense_matrices(kind):
    x, H = places(), blocks()
    told = np.random.default_rng(2).normal(size=(L, N, 2))
    held, found = prior_of(kind, x).coupled(torch.from_numpy(H), torch.from_numpy(told), None)
    P = dense_precision(prior_covariance(kind, x), H)
    exact = np.linalg.solve(P, told.reshape(L * N, 2)).reshape(L, N, 2)
    np.testing.assert_allclose(found, exact, atol=2e-4)
    assert held.shape == (L, 8 if kind == "few" else N, 2)


@pytest.mark.parametrize("kind", ["all", "few", "LCGP"])
def test_draws_have_the_covariance_of_dense_matrices(kind):
    """20,000 draws: correlations have a standard error of 0.007 at most."""
    x, H, R = places(), blocks(), 20_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N, L, R, generator=generator, dtype=torch.float64)
    told = torch.einsum("nlk,nkr->lnr", torch.linalg.cholesky(torch.from_numpy(H)), noise)
    found = prior_of(kind, x).coupled(torch.from_numpy(H), told, generator)[1]
    draws = found.reshape(L * N, R).numpy()
    exact = np.linalg.inv(dense_precision(prior_covariance(kind, x), H))
    sd = np.sqrt(np.diag(exact))
    np.testing.assert_allclose(
        draws @ draws.T / R / np.outer(sd, sd), exact / np.outer(sd, sd), atol=0.04
    )


@pytest.mark.parametrize("kind", ["all", "LCGP"])
def test_what_is_carried_to_other_places_is_the_regression(kind):
    x, new = places(), places(5, 3)
    prior = prior_of(kind, x)
    values = torch.from_numpy(np.random.default_rng(4).normal(size=(L, N, 2)))
    K = dense_fields.covariance("Matern32", x, x, LENGTHSCALE, 1.0)
    across = dense_fields.covariance("Matern32", x, new, LENGTHSCALE, 1.0)
    held = values
    if kind == "all":  # in whitened values at the inducing points
        held = torch.from_numpy(np.linalg.solve(np.linalg.cholesky(K), values.numpy()))
    carried, rest = prior.carry(Places(torch.from_numpy(new)), held)
    weights = np.linalg.solve(K, across)
    exact = np.einsum("nm,lnr->lmr", weights, values.numpy())
    np.testing.assert_allclose(carried, exact, atol=0.06)  # jitter, and one neighbour fewer
    left = 1 - np.einsum("nm,nm->m", weights, across)
    np.testing.assert_allclose(rest, np.broadcast_to(left, (L, 5)), atol=1e-3)


@pytest.fixture(scope="module", params=[False, True])
def fitted(request):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(120, 2))
    K = dense_fields.covariance("Matern32", x, x, 0.3, 1.0) + 1e-8 * np.eye(120)
    F = np.linalg.cholesky(K) @ rng.normal(size=(120, 2))
    W = separated_loadings(25, 2, 0.4, 2.0, rng)
    X = rng.poisson(np.exp(F) @ W.T)
    return x, X, pnmf_pyro.fit(X, x, n_components=2, local=request.param)


def test_spreads_are_those_of_the_whole_system_of_fields_and_loadings(fitted, monkeypatch):
    """About the means of components; blocks of loadings are near those of the whole system."""
    x, X, model = fitted
    module, n = model.model_, len(x)
    prior, W = module.prior, model.components_.T.astype(float) + 1e-9
    q = prior.marginal()
    A = np.exp(q.loc.detach().double().numpy().T)
    psi = A[:, None, :] / (A @ W.T)[..., None]
    J = np.zeros((n, 25, 2, n + 25))
    for i in range(n):
        J[i, :, :, i] = psi[i] * W
        for j in range(25):
            J[i, j, :, n + j] = psi[i, j]
    J = J.reshape(n * 25, -1)
    P = (J * X.reshape(-1, 1)).T @ J
    places = prior.places
    spread = np.maximum(3 * W, 1 / module.levels().numpy())
    for l in range(2):
        K = prior.kernel.select(l if len(prior.kernel.sigma) > 1 else 0)(places, places)[0].numpy()
        own = slice(l * (n + 25), l * (n + 25) + n)
        P[own, own] += np.linalg.inv(K + 1e-6 * np.eye(n))
        rest = np.arange(own.stop, own.stop + 25)
        P[rest, rest] += 1 / spread[:, l] ** 2
    V = np.linalg.inv(P)
    centre = np.eye(n) - 1 / n
    exact = []
    for l in range(2):
        own = slice(l * (n + 25), l * (n + 25) + n)
        exact.append(np.sqrt(np.diag(centre @ V[own, own] @ centre.T)))
    found = factor_uncertainty(model).T
    ratio = np.sqrt(np.mean(found**2, 1) / np.mean(np.square(exact), 1))
    np.testing.assert_allclose(ratio, 1, atol=0.2)


def test_draws_spread_as_intervals_say_and_go_together(fitted):
    _, _, model = fitted
    draws = factor_samples(model, 2000, random_state=0)
    np.testing.assert_allclose(draws.std(0), factor_uncertainty(model), rtol=0.12)
    assert posterior_of(model.model_.prior).draws(3)(torch.tensor([4])).shape == (3, 2, 1)
    z = (draws - draws.mean(0)) / draws.std(0)
    together = np.mean(z[:, :, 0] * z[:, :, 1])
    assert together < -0.05  # what one component gains the other loses


def test_new_places_are_no_surer_than_components_apart(fitted):
    x, _, model = fitted
    new = {"coordinates": x[:7] + 0.01}
    joint, apart = (factor_uncertainty(model, posterior=p, **new) for p in ("joint", "factorised"))
    assert np.mean(joint) > 1.02 * np.mean(apart)
    same = [get_factors(model, posterior=p, **new) for p in ("joint", "factorised")]
    np.testing.assert_allclose(*same, rtol=1e-5)
    draws = factor_samples(model, 3000, random_state=0, **new)
    np.testing.assert_allclose(draws.std(0), joint, rtol=0.12)


def test_a_file_keeps_them(fitted, tmp_path):
    x, _, model = fitted
    model.save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    new = {"coordinates": x[:7] + 0.01}
    np.testing.assert_array_equal(
        factor_uncertainty(again, **new), factor_uncertainty(model, **new)
    )


def test_a_field_that_is_too_large_takes_places_one_by_one(fitted, monkeypatch):
    model = fitted[2].model_
    shared = torch.rand(model.N, 3)
    assert joint_fields.taken_by_field(model, shared).shape == (4, 4)
    monkeypatch.setattr(joint_fields, "MOST_DIRECTIONS", 10)
    assert joint_fields.taken_by_field(model, shared) is None
