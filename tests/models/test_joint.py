"""The joint posterior of the components of a sample, against dense matrices and autograd."""

import numpy as np
import pytest
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.analysis.replicates import replicated_counts
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models.joint import find_uncertainty, information
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors import LCGP, SVGP, lcgp
from pnmf_pyro.priors.joint import joint_covariance, posterior_of, unpacked
from pnmf_pyro.transforms import (
    factor_samples,
    factor_uncertainty,
    get_factors,
    log_factors,
    transform_F,
)
from tests.support import dense, dense_fields
from tests.support.models import PRIOR_SCALE, counts_of, double, prior_of


def packed(matrices):
    rows, columns = torch.tril_indices(*matrices.shape[1:])
    return matrices[:, rows, columns]


def gauss_newton(problem):
    """sum_j X_ij J_ij J_ij^T with J the gradient of log rho_ij in F_i, by autograd."""
    W, found = double(problem.W), []
    for x, f in zip(double(problem.X), double(problem.mean).T, strict=True):
        J = torch.autograd.functional.jacobian(lambda F: (W @ F.exp()).log(), f)
        found.append((J * x[:, None]).T @ J)
    return torch.stack(found)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_what_counts_say_is_the_gauss_newton_matrix_by_autograd(layout):
    problem = dense.simulate_problem(sized=True)
    likelihood = PoissonFactors(double(problem.mean), double(problem.W), double(problem.s))
    factors = double(problem.mean + problem.scale**2 / 2).exp()
    found = information(likelihood, counts_of(problem.X, layout), factors)
    torch.testing.assert_close(unpacked(found.shared), gauss_newton(problem))
    expected = double(problem.s) * factors * double(problem.W.sum(0))[:, None]
    torch.testing.assert_close(found.expected, expected)


def test_covariance_is_the_inverse_gauss_newton_matrix_where_counts_are_as_expected():
    problem = dense.simulate_problem(empty=False)
    H = gauss_newton(problem)
    h = H.sum(-1)
    found = unpacked(joint_covariance(prior_of(problem, False), packed(H), h.T))
    c = 1 / PRIOR_SCALE**2
    r = (1 + h**2 / (2 * (c + h) ** 3)).sqrt()
    exact = torch.linalg.inv(H + c * torch.eye(3)) * r[:, :, None] * r[:, None, :]
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)


def test_without_overlap_it_is_the_factorised_posterior():
    """Also in samples whose counts are not as expected, such as those without any."""
    rng = np.random.default_rng(0)
    W = np.kron(np.eye(3), rng.gamma(2.0, 1.0, (4, 1)))
    X = rng.poisson(np.exp(rng.normal(size=(50, 3))) @ W.T).astype(float)
    X[7] = 0
    prior = transform_F(X, W, mode="lower-bound", tol=1e-9, max_iter=2000, return_prior=True)
    covariance, v = posterior_of(prior).covariance(), prior.marginal().variance.T.double()
    h = 1 / v - 1
    skew = 1 + h**2 * v**3 / 2
    ratio = covariance.diagonal(dim1=-2, dim2=-1) / (v * skew)
    np.testing.assert_allclose(ratio.detach(), 1, rtol=2e-3)
    assert (covariance - torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-6


@pytest.mark.parametrize("n", [0, 1, 3, 10])
@pytest.mark.parametrize("total", [0.5, 2.0, 10.0])
def test_variance_of_one_component_is_that_of_the_posterior_by_quadrature(n, total):
    f = np.linspace(-12, 8, 20001)
    log_p = -(f**2) / 2 + n * f - total * np.exp(f)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    exact = p @ (f - p @ f) ** 2
    q = transform_F([[float(n)]], [[total]], mode="lower-bound", tol=1e-9, return_prior=True)
    found = float(posterior_of(q).covariance())
    assert found == pytest.approx(exact, rel=0.015)
    assert found - exact < 0.6 * abs(float(q.marginal().variance.detach()) - exact)


def field(kind, N=30, L=2):
    x = torch.from_numpy(np.random.default_rng(1).uniform(size=(N, 2)))
    kernel = SpatialKernel("Matern32", 0.3, 1.2)
    if kind == "svgp":
        return SVGP(kernel, Places(x), Places(x), L, use_natural_gradients=True, jitter=1e-9)
    return LCGP(kernel, Places(x), L, K=N - 1, use_natural_gradients=True, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "tolerance"), [("svgp", 1e-5), ("lcgp", 0.3)])
def test_a_field_knows_of_a_sample_what_all_others_say(kind, tolerance, monkeypatch):
    """In an LCGP from draws, by solves that are rough: 3% of a variance, several times as much of
    what is left of its inverse.
    """
    monkeypatch.setattr(lcgp, "APART_DRAWS", 2000)
    prior = field(kind)
    h = np.random.default_rng(2).uniform(0.2, 8.0, (2, 30))
    x = prior.place_coordinates.numpy()
    K = dense_fields.covariance("Matern32", x, x, 0.3, 1.2)
    found = prior.apart_from_own(torch.from_numpy(h)).numpy()
    exact = np.empty_like(h)
    for l, i in np.ndindex(*h.shape):
        others = np.arange(30) != i
        k = K[others, i]
        known = k @ np.linalg.solve(K[np.ix_(others, others)] + np.diag(1 / h[l, others]), k)
        exact[l, i] = 1 / (K[i, i] - known)
    assert np.abs(found / exact - 1).max() < tolerance
    assert np.median(found / exact) == pytest.approx(1, rel=tolerance / 5)
    alone = prior.apart_from_own(torch.zeros(2, 30)).numpy()
    np.testing.assert_allclose(alone, 1 / 1.2**2, rtol=1e-6)


def test_in_a_field_variances_are_near_those_of_the_whole_joint_system():
    """Which sees that components are confused alike at neighbours, and so is wider still."""
    rng = np.random.default_rng(0)
    prior = field("svgp")
    x = prior.place_coordinates.numpy()
    K = dense_fields.covariance("Matern32", x, x, 0.3, 1.2)
    W = 0.6 * np.eye(2)[np.arange(12) % 2] + 0.4 * rng.dirichlet(np.ones(2), 12)
    F = np.linalg.cholesky(K + 1e-9 * np.eye(30)) @ rng.normal(size=(30, 2))
    phi = np.exp(F)[:, None, :] * W / (np.exp(F) @ W.T)[..., None]
    H = np.einsum("ij,ijl,ijm->ilm", 2.0 * (np.exp(F) @ W.T), phi, phi)
    precision = np.kron(np.eye(2), np.linalg.inv(K + 1e-9 * np.eye(30)))
    for i in range(30):
        precision[i::30, i::30] += H[i]
    exact = np.diag(np.linalg.inv(precision)).reshape(2, 30)
    h = torch.from_numpy(H.sum(-1).T)
    found = unpacked(joint_covariance(prior, packed(torch.from_numpy(H)), h))
    found = found.diagonal(dim1=-2, dim2=-1).T.numpy()
    factorised = np.stack(
        [np.diag(np.linalg.inv(np.linalg.inv(K) + np.diag(one))) for one in h.numpy()]
    )
    assert (factorised < found).all()
    assert np.median(factorised / exact) < 0.75
    assert 0.8 < np.median(found / exact) < 1.05


@pytest.fixture(scope="module")
def overlapping():
    rng = np.random.default_rng(3)
    W = 0.5 * np.eye(3)[np.arange(30) % 3] + 0.5 * rng.dirichlet(np.ones(3), 30)
    F = rng.normal(size=(200, 3))
    X = rng.poisson(np.exp(F) @ W.T)
    return X, pnmf_pyro.fit(X, n_components=3)


def test_draws_have_mean_and_covariance_of_the_posterior(overlapping):
    _, model = overlapping
    draws = factor_samples(model, 20000, random_state=0)
    C = posterior_of(model.model_.prior).covariance().numpy()
    mean, sd = log_factors(model), factor_uncertainty(model)
    np.testing.assert_allclose(sd, np.sqrt(np.einsum("ill->il", C)), rtol=1e-6)
    assert np.abs((draws.mean(0) - mean) / sd).max() < 5 / np.sqrt(20000) + 1e-4
    centred = (draws - mean) / sd
    found = np.einsum("eil,eim->ilm", centred, centred) / 20000
    assert np.abs(found - C / sd[:, :, None] / sd[:, None, :]).max() < 0.06


def test_expected_factors_are_those_of_q_and_spreads_are_wider(overlapping):
    _, model = overlapping
    np.testing.assert_allclose(
        get_factors(model), get_factors(model, posterior="factorised"), rtol=1e-5
    )
    ratio = factor_uncertainty(model) / factor_uncertainty(model, posterior="factorised")
    assert np.median(ratio) > 1.05
    q = model.model_.prior.marginal()
    np.testing.assert_array_equal(
        log_factors(model, posterior="factorised"), q.loc.detach().numpy().T
    )
    with pytest.raises(ValueError, match="posterior must be one of"):
        log_factors(model, posterior="q")


def test_replicated_tables_have_the_totals_of_the_data(overlapping):
    X, model = overlapping
    tables = np.stack(list(replicated_counts(model, 200, random_state=0)))
    assert tables.sum((1, 2)).mean() == pytest.approx(X.sum(), rel=0.02)


def test_draws_of_a_field_keep_how_samples_go_together():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(60, 2))
    K = dense_fields.covariance("Matern32", x, x, 0.5, 1.0)
    F = np.linalg.cholesky(K + 1e-9 * np.eye(60)) @ rng.normal(size=(60, 2))
    W = 0.5 * np.eye(2)[np.arange(20) % 2] + 0.5 * rng.dirichlet(np.ones(2), 20)
    model = PNMF(2, spatial=True, training_mode="natural", random_state=0, lengthscale=0.5)
    model.fit(rng.poisson(np.exp(F) @ W.T), coordinates=x)
    joint, alone = (
        factor_samples(model, 3000, posterior=posterior, random_state=1)
        for posterior in ("joint", "factorised")
    )
    near = np.linalg.norm(x[:, None] - x, axis=-1) + np.eye(60)
    pairs = np.arange(60), near.argmin(1)

    def correlation(draws):
        z = (draws - draws.mean(0)) / draws.std(0)
        return np.mean((z[:, pairs[0]] * z[:, pairs[1]]).mean(0))

    assert correlation(joint) == pytest.approx(correlation(alone), abs=0.05)


def test_a_saved_model_holds_it_and_a_file_without_it_has_the_factorised_one(overlapping, tmp_path):
    _, model = overlapping
    model.save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(factor_uncertainty(again), factor_uncertainty(model))
    held = dict(np.load(tmp_path / "model.npz"))
    for name in (
        *("factors/joint_covariance", "loadings/errors/blocks"),
        "loadings/errors/coupling",
    ):
        del held[name]
    np.savez_compressed(tmp_path / "older.npz", **held)
    older = PNMF.load(tmp_path / "older.npz")
    np.testing.assert_array_equal(
        factor_uncertainty(older), factor_uncertainty(model, posterior="factorised")
    )
    held["factors/joint_covariance"] = np.zeros((3, 6), dtype=np.float32)
    np.savez_compressed(tmp_path / "bad.npz", **held)
    with pytest.raises(ValueError, match="not a saved PNMF model, or is damaged"):
        PNMF.load(tmp_path / "bad.npz")


def test_another_likelihood_has_the_factorised_one(overlapping):
    X, model = overlapping
    module = model.model_
    shifted = type("Shifted", (type(module),), {"likelihood": lambda self, F, batch=None: None})
    module.__class__ = shifted
    try:
        find_uncertainty(module, as_counts(X.astype("float32")))
        assert posterior_of(module.prior) is module.prior
    finally:
        module.__class__ = shifted.__base__
        find_uncertainty(module, as_counts(X.astype("float32")))
    assert posterior_of(module.prior) is not module.prior
