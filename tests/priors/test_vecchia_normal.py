"""The Vecchia normal against dense normals: densities, divergences, draws and predictions."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Independent, Laplace, kl_divergence

from pnmf_pyro.gp.neighbors import build_graph, nearest, neighbors_of_batch
from pnmf_pyro.gp.vecchia import conditional_weights
from pnmf_pyro.priors.vecchia_normal import VecchiaNormal, kl_terms, kl_terms_given_weights, predict
from tests.support import dense_fields
from tests.support.vecchia import (
    KERNELS,
    SCALES,
    SPARSE,
    VERY_CLOSE,
    all_before,
    dense_log_density,
    dense_q,
    few_neighbours,
    make,
    matern32,
    places,
    rbf,
    variational,
    vecchia_covariance,
)


@pytest.fixture(scope="module")
def complete():
    return all_before()


@pytest.fixture(scope="module", params=SPARSE)
def sparse(request):
    return few_neighbours(request.param)


def test_all_neighbours_give_the_exact_density(complete):
    _, factor, exact = complete
    loc = torch.tensor([[0.7], [-0.2]])
    x = np.random.default_rng(0).normal(size=(3, 2, 200))
    density = VecchiaNormal(factor, loc).log_prob(torch.tensor(x))
    expected = [
        [dense_log_density(a, m, C) for a, m, C in zip(one, loc.numpy(), exact, strict=True)]
        for one in x
    ]
    np.testing.assert_allclose(density, expected, rtol=1e-8)


@pytest.mark.parametrize("rank", [None, 3])
def test_all_neighbours_give_the_exact_divergence(complete, rank):
    _, factor, exact = complete
    m, d, V = variational(200)
    V = V if rank else None
    terms = kl_terms(VecchiaNormal(factor, 0.3), m, d, V).sum(1)
    means, S = dense_q(m, d, V)
    expected = [
        dense_fields.kl_joint(a - 0.3, b, C) for a, b, C in zip(means, S, exact, strict=True)
    ]
    np.testing.assert_allclose(terms.detach(), expected, rtol=1e-8)


def test_all_neighbours_give_the_exact_prediction(complete):
    points, _, exact = complete
    new = places(15, seed=5)
    m, d, V = variational(200)
    near = nearest(points, new, 200)
    pairs = list(zip(KERNELS, SCALES, strict=True))
    loc = torch.tensor([0.4, -1.0])
    mean, variance = predict(pairs, points, new, near, m, d, V, loc)
    means, S = dense_q(m, d, V)
    for l, kernel in enumerate(KERNELS):
        cross = kernel(torch.tensor(new), torch.tensor(points)).numpy()
        weights = np.linalg.solve(exact[l], cross.T).T
        expected = loc[l].item() + weights @ (means[l] - loc[l].item())
        np.testing.assert_allclose(mean[l].detach(), expected, rtol=1e-8)
        spread = SCALES[l] - (weights * cross).sum(1) + ((weights @ S[l]) * weights).sum(1)
        np.testing.assert_allclose(variance[l].detach(), spread, rtol=1e-8)


def test_prediction_at_the_spots_themselves():
    points = places(60)
    m, d, V = variational(60)
    near = nearest(points, points, 5)
    pairs = list(zip(KERNELS, SCALES, strict=True))
    mean, variance = predict(pairs, points, points, near, m, d, V, 0.3)
    np.testing.assert_allclose(mean.detach(), m.detach(), atol=1e-5)
    own = d + V.square().sum(-1)
    np.testing.assert_allclose(variance.detach(), own.detach(), atol=1e-4)


def test_density(sparse):
    _, factor, covariance = sparse
    x = np.random.default_rng(0).normal(size=(2, 60))
    density = VecchiaNormal(factor).log_prob(torch.tensor(x))
    expected = [dense_log_density(a, 0.0, C) for a, C in zip(x, covariance, strict=True)]
    np.testing.assert_allclose(density, expected, rtol=1e-10)


@pytest.mark.parametrize("low_rank", [False, True])
def test_divergence_and_its_gradients(sparse, low_rank):
    _, factor, covariance = sparse
    m, d, V = variational(60)
    loc = torch.tensor([[0.5], [1.5]], dtype=torch.float64, requires_grad=True)
    p = VecchiaNormal(factor, loc)
    if low_rank:
        q = dist.LowRankMultivariateNormal(m, V, d)
        dense = dist.MultivariateNormal(m, torch.diag_embed(d) + V @ V.mT)
    else:
        q = dist.Normal(m, d.sqrt()).to_event(1)
        dense = dist.MultivariateNormal(m, torch.diag_embed(d))
    divergence = kl_divergence(q, p)
    means, S = dense_q(m, d, V if low_rank else None)
    parts = zip(means, S, loc.detach().numpy(), covariance, strict=True)
    twin = [dense_fields.kl_joint(m - mean, S, C) for m, S, mean, C in parts]
    np.testing.assert_allclose(divergence.detach(), twin, rtol=1e-9)
    places_of = [m, d, loc, *([V] if low_rank else [])]
    got = torch.autograd.grad(divergence.sum(), places_of)
    exact = dist.MultivariateNormal(loc.expand(2, 60), torch.tensor(covariance))
    expected = torch.autograd.grad(kl_divergence(dense, exact).sum(), places_of)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, **VERY_CLOSE)


def test_terms_of_minibatches_add_up(sparse):
    _, factor, _ = sparse
    m, d, V = variational(60)
    p = VecchiaNormal(factor, 0.2)
    every = kl_terms(p, m, d, V)
    batches = np.random.default_rng(0).permutation(60).reshape(6, 10)
    parts = [kl_terms(p, m, d, V, batch) for batch in batches]
    for batch, part in zip(batches, parts, strict=True):
        np.testing.assert_allclose(part.detach(), every[:, batch].detach(), rtol=1e-10)
    estimates = torch.stack([60 / 10 * part.sum(1) for part in parts])
    np.testing.assert_allclose(estimates.mean(0).detach(), every.sum(1).detach(), rtol=1e-10)
    whole = torch.autograd.grad(every.sum(), [m, d, V])
    mean = torch.autograd.grad(estimates.mean(0).sum(), [m, d, V])
    for one, other in zip(mean, whole, strict=True):
        np.testing.assert_allclose(one, other, **VERY_CLOSE)


@pytest.mark.parametrize("low_rank", [False, True])
def test_terms_of_a_batch_that_finds_its_own_weights(low_rank):
    points = places(60)
    factor = make(points, 6)
    m, d, V = variational(60)
    V = V if low_rank else None
    expected = kl_terms(VecchiaNormal(factor, 0.2), m, d, V).sum(1)
    rows = torch.tensor(points)
    total = 0.0
    for batch in np.random.default_rng(0).permutation(60).reshape(3, 20):
        near = neighbors_of_batch(factor.graph.order, batch, points, 6)
        parts = [
            conditional_weights(rows[batch], rows, near, *pair, names=batch)
            for pair in zip(KERNELS, SCALES, strict=True)
        ]
        weights, variances = (torch.stack(part) for part in zip(*parts, strict=True))
        total += kl_terms_given_weights(weights, variances, near, batch, m, d, V, 0.2).sum(1)
    np.testing.assert_allclose(total.detach(), expected.detach(), rtol=1e-10)


def test_divergence_is_differentiable_in_the_lengthscale():
    points = places(40)
    rows = torch.tensor(points)
    m, d, V = variational(40, L=1)
    lengthscale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kernel = matern32(lengthscale, 1.5)
    graph = build_graph(points, 39)
    near = graph.neighbors_of()
    weights, variances = conditional_weights(rows, rows, near, kernel, 1.5)
    terms = kl_terms_given_weights(
        weights[None], variances[None], near, np.arange(40), m, d, V, 0.1
    )
    (got,) = torch.autograd.grad(terms.sum(), lengthscale)
    exact = dist.MultivariateNormal(torch.full((40,), 0.1).double(), kernel(rows, rows))
    q = dist.MultivariateNormal(m[0], torch.diag(d[0]) + V[0] @ V[0].T)
    divergence = kl_divergence(q, exact)
    (expected,) = torch.autograd.grad(divergence, lengthscale)
    assert terms.sum().item() == pytest.approx(divergence.item(), rel=1e-8)
    assert got.item() == pytest.approx(expected.item(), rel=1e-7)


def test_density_is_differentiable_in_value_and_mean(sparse):
    _, factor, covariance = sparse
    x = variational(60)[0]
    loc = torch.zeros(2, 60, dtype=torch.float64, requires_grad=True)
    density = VecchiaNormal(factor, loc).log_prob(x).sum()
    by_x, by_loc = torch.autograd.grad(density, [x, loc])
    expected = -np.linalg.solve(covariance, x.detach().numpy()[..., None])[..., 0]
    np.testing.assert_allclose(by_x, expected, **VERY_CLOSE)
    np.testing.assert_allclose(by_loc, -expected, **VERY_CLOSE)


def test_float32_parameters_get_float32_gradients(sparse):
    m, d, V = (x.detach().float().requires_grad_() for x in variational(60))
    divergence = kl_terms(VecchiaNormal(sparse[1]), m, d, V).sum()
    assert divergence.dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(divergence, [m, d, V]))


def test_draws_have_the_covariance():
    """Largest error of 1,830 covariances in sds of an estimate; P(false alarm) < 1e-6."""
    points = places(60)
    factor = make(points, 6)
    torch.manual_seed(0)
    draws = VecchiaNormal(factor, torch.tensor([[1.0], [-2.0]])).rsample((20_000,))
    assert draws.shape == (20_000, 2, 60)
    np.testing.assert_allclose(draws.mean((0, 2)), [1.0, -2.0], atol=0.05)
    for l, C in enumerate(vecchia_covariance(points, factor.graph)):
        sampled = np.cov(draws[:, l].numpy().T)
        deviation = np.sqrt(np.diag(C))
        error = (sampled - C) / np.outer(deviation, deviation)
        assert np.abs(error).max() < 6.5 * np.sqrt(2 / 20_000)


def test_divergence_has_no_rule_for_other_shapes(sparse):
    with pytest.raises(NotImplementedError):
        kl_divergence(Independent(Laplace(torch.zeros(2, 60), 1.0), 1), VecchiaNormal(sparse[1]))


def test_repetitions(sparse):
    p = VecchiaNormal(sparse[1], torch.tensor([[1.0], [2.0]]))
    assert (p.batch_shape, p.event_shape) == ((2,), (60,))
    repeated = p.expand((5, 2))
    torch.manual_seed(0)
    draws = repeated.sample((3,))
    torch.manual_seed(0)
    assert torch.equal(draws, p.sample((3, 5)))
    np.testing.assert_allclose(repeated.log_prob(draws), p.log_prob(draws))
    assert repeated.mean.shape == (5, 2, 60)
    with pytest.raises(ValueError, match=r"batch shape \(2,\).*cannot take \(5, 1\)"):
        p.expand((5, 1))


# hard cases and errors


@pytest.mark.parametrize("kernel", [matern32(0.2), rbf(0.5)])
def test_repeated_places(kernel):
    points = np.repeat(places(30), 2, 0)
    factor = make(points, 10, [kernel], [1.0])
    assert factor.variances.min() >= 1e-8
    torch.manual_seed(0)
    draw = VecchiaNormal(factor).sample()
    assert torch.isfinite(draw).all()
    twins = draw[0].reshape(30, 2)
    assert (twins[:, 0] - twins[:, 1]).abs().max() < 0.02
    assert torch.isfinite(VecchiaNormal(factor).log_prob(draw)).all()
