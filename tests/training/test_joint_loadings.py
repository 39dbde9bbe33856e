"""Loadings under the joint posterior of the components, against quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

import pnmf_pyro
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.estimator.stages import Settle, SettleJointly, WarmUp
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.training.joint_loadings import JointPosteriors, settle_jointly

AXIS = np.linspace(-6, 6, 81)
GRID = np.stack(np.meshgrid(AXIS, AXIS), -1).reshape(-1, 2)
MASS = np.exp(-(GRID**2).sum(1) / 2)
MASS /= MASS.sum()


def table(N: int = 60, D: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts (N, D) of two components that share all features, and their loadings."""
    rng = np.random.default_rng(seed)
    W = 2 * rng.dirichlet([1.5, 1.5], D)
    return rng.poisson(np.exp(rng.normal(size=(N, 2))) @ W.T).astype(float), W


def model_of(X: np.ndarray, W: np.ndarray, s: np.ndarray | None = None) -> PoissonFactorization:
    """A model in float64 with these loadings, q(F) = N(0, 0.3^2)."""
    y = torch.from_numpy(X.T)
    prior = GaussianPrior(y, 2, use_natural_gradients=True)
    sizes = None if s is None else torch.from_numpy(s)
    model = PoissonFactorization(prior, y, 2, "multiplicative", size_factors=sizes)
    model.W.assign(torch.from_numpy(W))
    prior.assign(torch.zeros_like(prior.mean), torch.full_like(prior.mean, 0.3))
    return model


def log_likelihood(X: np.ndarray, W: np.ndarray, scale: float) -> float:
    """Log likelihood by quadrature about the prior, without -log X!."""
    F = scale * GRID
    rates = np.exp(F) @ W.T
    of_points = X @ np.log(rates).T - rates.sum(1)
    return float(logsumexp(of_points + np.log(MASS), axis=1).sum())


def expectations(m: np.ndarray, S: np.ndarray, W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E phi, (D, L), and E phi phi^T, (D, L, L), for F ~ N(m, S) by quadrature."""
    parts = np.exp(m + GRID @ np.linalg.cholesky(S).T)[:, None, :] * W
    phi = parts / parts.sum(2, keepdims=True)
    return np.einsum("p,pjl->jl", MASS, phi), np.einsum("p,pjl,pjk->jlk", MASS, phi, phi)


def test_shares_and_precision_are_those_of_quadrature_to_second_order():
    X, W = table(N=1)
    X += 3
    posteriors = JointPosteriors(model_of(X, W, np.array([1.7])), torch.from_numpy(X))
    m, S = np.array([0.4, -0.3]), 0.06 * np.array([[1.0, -0.6], [-0.6, 0.8]])
    posteriors.m, posteriors.S = torch.from_numpy(m)[None], torch.from_numpy(S)[None]
    first, second = expectations(m, S, W)
    A = np.exp(m + np.diag(S) / 2)
    plain = A * W / (A * W).sum(1, keepdims=True)
    shares = posteriors.shares(torch.from_numpy(W))[0][0].T.numpy()
    error = np.abs(shares - first).max()
    assert error < 0.15 * np.abs(plain - first).max()
    counts = posteriors.update(torch.from_numpy(W), 1.3)
    np.testing.assert_allclose(counts, X.T * shares, rtol=1e-12)
    allocated, expected = X[0] @ first, 1.7 * A * W.sum(0)
    r = np.sqrt((expected + 0.1) / (allocated + 0.1))
    twin = np.einsum("j,jlk->lk", X[0], second) * np.outer(r, r) + np.eye(2) / 1.3**2
    naive = np.einsum("j,jl,jk->lk", X[0], plain, plain) * np.outer(r, r) + np.eye(2) / 1.3**2
    found = np.linalg.inv(posteriors.S[0].numpy())
    assert np.abs(found - twin).max() < 0.2 * np.abs(naive - twin).max()


def test_rounds_find_the_posterior_means_given_loadings():
    X, W = table(N=30)
    posteriors = JointPosteriors(model_of(X, W), torch.from_numpy(X))
    for _ in range(20):
        posteriors.update(torch.from_numpy(W), 1.0)
    log_weight = X @ np.log(np.exp(GRID) @ W.T).T - (np.exp(GRID) @ W.T).sum(1) + np.log(MASS)
    weight = np.exp(log_weight - logsumexp(log_weight, axis=1, keepdims=True))
    factors, means = weight @ np.exp(GRID), weight @ GRID
    spread = np.sqrt(weight @ GRID**2 - means**2)
    assert np.abs((posteriors.m.numpy() - means) / spread).max() < 0.25
    np.testing.assert_allclose(posteriors.factors.mean(0), factors.mean(0), rtol=0.01)


def test_evidence_is_the_log_likelihood_by_quadrature():
    X, W = table(N=40)
    posteriors = JointPosteriors(model_of(X, W), torch.from_numpy(X))
    for _ in range(20):
        posteriors.update(torch.from_numpy(W), 0.8)
    found = posteriors.evidence(torch.from_numpy(W), torch.tensor(0.8, dtype=torch.float64), 0)
    assert found == pytest.approx(log_likelihood(X, W, 0.8), abs=3)


def test_settling_raises_the_log_likelihood_or_leaves_the_model_as_it_was():
    X, W = table(N=200)
    distinct = 0.5 * W + 0.5 * np.where(W > 0.5, 0.95, 0.05)
    model = model_of(X, distinct)
    before = log_likelihood(X, distinct, 1.0)
    assert settle_jointly(model, as_counts(X), 100, learns_scale=True, seed=0)
    loadings, scale = model.W.data.detach().numpy(), float(model.prior.scale_pf)
    after = log_likelihood(X, loadings, scale)
    assert after > before + 5
    assert after > log_likelihood(X, W, 1.0) - 1
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert not settle_jointly(model, as_counts(X), 100, learns_scale=True, seed=0)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


STAGES = [WarmUp(), Settle(), SettleJointly()]


@pytest.mark.parametrize(
    "given", [{"likelihood": "negative-binomial"}, {"mode": "simple"}, {"batches": [0, 1] * 15}]
)
def test_the_stage_is_refused_where_it_has_no_steps(given):
    X, _ = table(N=30)
    with pytest.raises(ValueError, match=r"SettleJointly\(\) is for .* Leave it out"):
        pnmf_pyro.fit(X, n_components=2, stages=STAGES, **given)


def test_a_fit_that_settles_jointly_is_more_likely():
    X, _ = table(N=200)
    found = pnmf_pyro.fit(X, n_components=2, stages=STAGES)
    before = pnmf_pyro.fit(X, n_components=2)
    of = [
        log_likelihood(X, one.components_.T.astype(float), float(one.model_.prior.scale_pf))
        for one in (found, before)
    ]
    assert of[0] > of[1] + 1
