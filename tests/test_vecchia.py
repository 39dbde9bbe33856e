"""The Vecchia normal against dense matrices, and against the exact process where K = N - 1."""

import copy
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import Independent, Laplace, kl_divergence

from pnmf_pyro.gp.neighbors import build_graph, nearest, neighbors_of_batch
from pnmf_pyro.gp.vecchia import VecchiaFactor, conditional_weights, on_components
from pnmf_pyro.gp.vecchia_solver import VecchiaPosterior
from pnmf_pyro.priors.vecchia_normal import VecchiaNormal, kl_terms, kl_terms_given_weights, predict

LENGTHSCALES = (0.15, 0.4)
SCALES = (1.0, 2.5)  # k(x, x)
VERY_CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def matern32(lengthscale, variance=1.0):
    def covariance(A, B):
        r = torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist")
        scaled = np.sqrt(3) * r / lengthscale
        return variance * (1 + scaled) * torch.exp(-scaled)

    return covariance


def rbf(lengthscale, variance=1.0):
    return lambda A, B: variance * torch.exp(-0.5 * (torch.cdist(A, B) / lengthscale) ** 2)


KERNELS = [matern32(*pair) for pair in zip(LENGTHSCALES, SCALES, strict=True)]


def places(N=60, p=2, seed=0):
    random = np.random.default_rng(seed).random((N, p))
    if p == 1:  # no two so close that jitter is called for
        return (np.arange(N)[:, None] + 0.5 * random) / N
    return random


def make(points, K, kernels=KERNELS, variances=SCALES):
    graph = build_graph(points, K)
    return VecchiaFactor.from_kernels(graph, points, kernels, variances)


def exact_covariance(points, kernels=KERNELS):
    rows = torch.tensor(points)
    return np.stack([k(rows, rows).numpy() for k in kernels])


def vecchia_covariance(points, graph, kernels=KERNELS):
    """Entry by entry, from the conditionals: Cov(f_i, f_j) = sum_k B_ik Cov(f_k, f_j) for j < i."""
    result = []
    for exact in exact_covariance(points, kernels):
        C = np.zeros_like(exact)
        done = []
        for position, i in enumerate(graph.order):
            near = [graph.order[j] for j in graph.predecessors[position] if j >= 0]
            B = np.linalg.solve(exact[np.ix_(near, near)], exact[near, i])
            v = exact[i, i] - B @ exact[near, i]
            C[i, done] = C[done, i] = B @ C[np.ix_(near, done)]
            C[i, i] = v + B @ C[np.ix_(near, near)] @ B
            done.append(i)
        result.append(C)
    return np.stack(result)


def dense_log_density(x, mean, covariance):
    deviation = x - mean
    _, determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (deviation @ np.linalg.solve(covariance, deviation) + determinant)


def dense_kl(m, S, mean, covariance):
    deviation = m - mean
    trace = np.trace(np.linalg.solve(covariance, S))
    quadratic = deviation @ np.linalg.solve(covariance, deviation)
    difference = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(S)[1]
    return 0.5 * (trace + quadratic - len(m) + difference)


def variational(N, R=3, seed=1, L=2):
    """Means, diagonals and low-rank parts of a q."""
    random = np.random.default_rng(seed)
    m, V = random.normal(size=(L, N)), random.normal(size=(L, N, R))
    d = random.gamma(2.0, 0.2, size=(L, N))
    return [torch.tensor(x, requires_grad=True) for x in (m, d, V)]


def dense_q(m, d, V=None):
    m, d = m.detach().numpy(), d.detach().numpy()
    S = np.stack([np.diag(one) for one in d])
    return m, S if V is None else S + (V @ V.mT).detach().numpy()


# K = N - 1: the exact Gaussian process


@pytest.fixture(scope="module")
def complete():
    """200 places, a factor in which each is conditioned on all before, and the exact covariance."""
    points = places(200)
    return points, make(points, 199), exact_covariance(points)


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
    expected = [dense_kl(a, b, 0.3, C) for a, b, C in zip(means, S, exact, strict=True)]
    np.testing.assert_allclose(terms.detach(), expected, rtol=1e-8)


def test_all_neighbours_give_the_exact_precision(complete):
    _, factor, exact = complete
    x = np.random.default_rng(0).normal(size=(2, 200))
    product = factor.precision(exact @ x[..., None])[..., 0]
    np.testing.assert_allclose(product, x, **VERY_CLOSE)
    precision = np.linalg.inv(exact)
    np.testing.assert_allclose(
        factor.precision_diagonal, precision.diagonal(axis1=1, axis2=2), rtol=1e-8
    )
    np.testing.assert_allclose(factor.log_determinant, np.linalg.slogdet(exact)[1], rtol=1e-8)


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


def test_all_neighbours_give_the_exact_posterior_mean(complete):
    _, factor, exact = complete
    random = np.random.default_rng(0)
    h, y = random.gamma(1.0, 3.0, size=(2, 200)), random.normal(size=(2, 200))
    x = VecchiaPosterior(factor).solve(h, h * y, tolerance=1e-11).x
    for l in range(2):
        gain = exact[l] @ np.linalg.inv(exact[l] + np.diag(1 / h[l]))
        np.testing.assert_allclose(x[l], gain @ y[l], **VERY_CLOSE)


# few neighbours: the same as dense matrices made from the conditionals


@pytest.fixture(scope="module", params=["plane", "line", "space", "one neighbour", "shared"])
def sparse(request):
    """Places, a factor with few neighbours, and its covariance by dense recursion."""
    points = places(60, {"line": 1, "space": 3}.get(request.param, 2))
    if request.param == "shared":  # one set of weights, variances that differ
        factor = make(points, 6, KERNELS[:1], SCALES[:1]).rescaled([1.0, 2.5])
        covariance = vecchia_covariance(points, factor.graph, KERNELS[:1])
        return points, factor, np.concatenate([covariance, 2.5 * covariance])
    factor = make(points, 1 if request.param == "one neighbour" else 6)
    return points, factor, vecchia_covariance(points, factor.graph)


def test_density(sparse):
    _, factor, covariance = sparse
    x = np.random.default_rng(0).normal(size=(2, 60))
    density = VecchiaNormal(factor).log_prob(torch.tensor(x))
    expected = [dense_log_density(a, 0.0, C) for a, C in zip(x, covariance, strict=True)]
    np.testing.assert_allclose(density, expected, rtol=1e-10)


def test_products_and_solves(sparse):
    _, factor, covariance = sparse
    x = np.random.default_rng(0).normal(size=(2, 60, 3))
    precision = np.linalg.inv(covariance)
    expected = precision @ x  # its entries cancel: 1e-10 of the largest is what the inverse has
    close = {"rtol": 1e-8, "atol": 1e-10 * np.abs(expected).max()}
    np.testing.assert_allclose(factor.precision(x), expected, **close)
    np.testing.assert_allclose(factor.precision(x[..., 0]), expected[..., 0], **close)
    scaled = factor.variances[..., None] * factor.solve_transposed(x)
    np.testing.assert_allclose(factor.solve(scaled), covariance @ x, **VERY_CLOSE)
    np.testing.assert_allclose(factor.multiply(factor.solve(x)), x, **VERY_CLOSE)
    np.testing.assert_allclose(
        factor.multiply_transposed(factor.solve_transposed(x)), x, **VERY_CLOSE
    )
    diagonal = precision.diagonal(axis1=1, axis2=2)
    np.testing.assert_allclose(factor.precision_diagonal, diagonal, rtol=1e-9)
    np.testing.assert_allclose(factor.log_determinant, np.linalg.slogdet(covariance)[1], rtol=1e-10)


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
    twin = [dense_kl(*part) for part in parts]
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


def test_more_neighbours_come_closer():
    points = places(150)
    exact = exact_covariance(points)

    def divergence(K):
        factor = make(points, K)
        precision = np.stack(
            [factor.precision(np.tile(np.eye(150), (2, 1, 1)))[l] for l in range(2)]
        )
        trace = np.einsum("lij,lji->l", precision, exact)
        return (trace - 150 + factor.log_determinant - np.linalg.slogdet(exact)[1]) / 2

    values = np.stack([divergence(K) for K in (1, 3, 10, 30)])
    assert (values >= -1e-9).all()
    assert (values[1:] < 0.5 * values[:-1]).all()


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


def test_copies_solve_like_the_original(sparse):
    _, factor, _ = sparse
    x = np.random.default_rng(0).normal(size=(2, 60))
    expected = factor.solve(x)
    for other in (
        copy.deepcopy(factor),
        pickle.loads(pickle.dumps(factor)),
        factor.rescaled([3, 4]),
    ):
        np.testing.assert_array_equal(other.solve(x), expected)
    np.testing.assert_allclose(
        factor.rescaled([3, 4]).precision(x).T, factor.precision(x).T / [3, 4]
    )


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


def test_all_places_identical():
    factor = make(np.zeros((20, 2)), 5, [matern32(0.2)], [1.0])
    draws = factor.solve(np.ones((1, 20)) * np.sqrt(factor.variances))
    assert np.ptp(draws) < 0.05


def test_jitter_is_added_only_where_it_is_needed():
    points = np.concatenate([places(40), places(40)[:1]])
    kernel = matern32(0.2)
    neighbors = build_graph(points, 5).neighbors_of()
    rows = torch.tensor(points)
    _, variances = conditional_weights(rows, rows, neighbors, kernel, 1.0)
    exact = exact_covariance(points, [kernel])[0]
    for i in range(40):
        near = neighbors[i][neighbors[i] >= 0]
        v = exact[i, i] - exact[i, near] @ np.linalg.solve(
            exact[np.ix_(near, near)], exact[near, i]
        )
        if {0, 40} & {i, *near} != {0, 40}:
            assert variances[i] == pytest.approx(v, rel=1e-10)


def test_weights_in_small_blocks_are_the_same(monkeypatch):
    points = places(50)
    whole = make(points, 6)
    monkeypatch.setattr("pnmf_pyro.gp.vecchia.BLOCK", 500)
    parts = make(points, 6)
    np.testing.assert_array_equal(whole.matrices[1].data, parts.matrices[1].data)


def test_a_kernel_that_is_not_positive_definite_names_the_spots():
    def covariance(A, B):
        return torch.where(torch.cdist(A, B) < 1e-9, 1.0, -0.9)

    with pytest.raises(
        ValueError, match=r"spots \[.*and their neighbours is not positive definite"
    ):
        make(places(20), 4, [covariance], [1.0])


def test_a_covariance_that_is_not_finite_names_the_spots():
    def covariance(A, B):
        bad = (A[..., :, None, 0] == points[7, 0]) & (B[..., None, :, 0] == points[7, 0])
        return torch.where(bad, torch.nan, matern32(0.2)(A, B))

    points = places(20)
    with pytest.raises(ValueError, match=r"spots \[.*\b7\b.*is not finite"):
        make(points, 3, [covariance], [1.0])


def test_weights_of_another_shape():
    graph = build_graph(places(20), 3)
    with pytest.raises(ValueError, match=r"weights must have shape \(L or 1, 20, 3\)"):
        VecchiaFactor(graph, np.zeros((2, 20, 4)), np.ones((2, 20)))
    with pytest.raises(ValueError, match=r"spots \[\d+\].*no positive variance"):
        VecchiaFactor(graph, np.zeros((1, 20, 3)), np.r_[np.ones(19), 0.0][None])


# the posterior


@pytest.mark.parametrize("columns", [(), (3,)])
def test_posterior_solve(sparse, columns):
    _, factor, covariance = sparse
    random = np.random.default_rng(0)
    h, b = random.gamma(1.0, 3.0, size=(2, 60)), random.normal(size=(2, 60, *columns))
    h[:, :5] = 0
    posterior = VecchiaPosterior(factor)
    dense = np.linalg.inv(covariance) + np.stack([np.diag(one) for one in h])
    expected = np.linalg.solve(dense, b.reshape(2, 60, -1)).reshape(b.shape)
    exact = posterior.solve(h, b, tolerance=1e-11)
    np.testing.assert_allclose(exact.x, expected, **VERY_CLOSE)
    assert exact.error.shape == (2, *columns)
    again = posterior.solve(h, b, exact.x, tolerance=1e-6)
    assert again.iterations == 0
    objective = [
        posterior.solve(h, b, tolerance=1e-12, max_iterations=n).x for n in range(exact.iterations)
    ]
    values = [(x * (_times(dense, x) / 2 - b)).sum() for x in objective]
    assert (np.diff(values) <= 1e-12).all()


def _times(matrices, x):
    return (matrices @ x.reshape(*x.shape[:2], -1)).reshape(x.shape)


@pytest.mark.parametrize("h", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("lengthscale", [5.0, 20.0])
def test_steps_do_not_grow_with_the_lengthscale_or_the_data(h, lengthscale):
    """2,000 spots at unit distance; a preconditioner without the coarse grids takes 30 to 150."""
    points = places(2000) * np.sqrt(2000)
    factor = make(points, 12, [matern32(lengthscale)], [1.0])
    random = np.random.default_rng(0)
    field = factor.solve(np.sqrt(factor.variances) * random.normal(size=(1, 2000)))
    curvature = h * np.exp(0.5 * random.normal(size=(1, 2000)))
    noisy = field + random.normal(size=(1, 2000)) / np.sqrt(curvature)
    posterior = VecchiaPosterior(factor)
    found = posterior.solve(curvature, curvature * noisy, tolerance=0.01)
    assert found.iterations <= 25
    best = posterior.solve(curvature, curvature * noisy, tolerance=1e-9).x
    e = found.x - best
    true_error = np.sqrt((e * (factor.precision(e) + curvature * e)).sum() / 2000)
    assert found.error[0] / 5 < true_error < found.error[0]


def test_posterior_draws_have_the_covariance(sparse):
    """Largest error of 1,830 covariances in sds of an estimate; P(false alarm) < 1e-6."""
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    draws = VecchiaPosterior(factor).sample(h, 2000, random_state=0, tolerance=1e-3)
    for l in range(2):
        C = np.linalg.inv(np.linalg.inv(covariance[l]) + np.diag(h[l]))
        deviation = np.sqrt(np.diag(C))
        error = (draws[l] @ draws[l].T / 2000 - C) / np.outer(deviation, deviation)
        assert np.abs(error).max() < 6.5 * np.sqrt(2 / 2000)


def test_best_diagonal_of_a_diagonal_q(sparse):
    """Its divergence from the posterior rises wherever an entry is changed."""
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    A = np.linalg.inv(covariance[0]) + np.diag(h[0])
    d = VecchiaPosterior(factor).conditional_variances(h)[0]
    best = dense_kl(np.zeros(60), np.diag(d), 0.0, np.linalg.inv(A))
    for i in (0, 31):
        for factor_ in (0.9, 1.1):
            changed = d.copy()
            changed[i] *= factor_
            assert dense_kl(np.zeros(60), np.diag(changed), 0.0, np.linalg.inv(A)) > best


def test_marginal_variances(sparse):
    """120 relative errors of sd at most sqrt(2 / 2000); P(false alarm) < 1e-6."""
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    found = VecchiaPosterior(factor).marginal_variances(h, 2000, 0, tolerance=1e-3)
    A = np.linalg.inv(covariance) + np.stack([np.diag(one) for one in h])
    expected = np.linalg.inv(A).diagonal(axis1=1, axis2=2)
    np.testing.assert_allclose(found, expected, rtol=6 * np.sqrt(2 / 2000))


def test_smooth_part_and_diagonal_make_the_posterior_covariance(sparse):
    """In expectation A^-1 + diag(d) A diag(d) / 4; P(false alarm) < 1e-6 as above."""
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    V = VecchiaPosterior(factor).smooth_part(h, 2000, 0, tolerance=1e-3)
    for l in range(2):
        A = np.linalg.inv(covariance[l]) + np.diag(h[l])
        D = np.diag(1 / np.diag(A))
        expected = np.linalg.inv(A) - D + D @ A @ D / 4
        deviation = np.sqrt(np.diag(expected))
        error = (V[l] @ V[l].T - expected) / np.outer(deviation, deviation)
        assert np.abs(error).max() < 6.5 * np.sqrt(2 / 2000)


def test_best_part_raises_the_bound_most(sparse):
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    posterior = VecchiaPosterior(factor)
    d = posterior.conditional_variances(h)
    V, gain = posterior.best_part(h, 4, 0, sweeps=30)
    for l in range(2):
        C = np.linalg.inv(np.linalg.inv(covariance[l]) + np.diag(h[l]))
        zero = np.zeros(60)
        gap = dense_kl(zero, np.diag(d[l]), 0.0, C)
        gained = gap - dense_kl(zero, np.diag(d[l]) + V[l] @ V[l].T, 0.0, C)
        assert gain[l].sum() == pytest.approx(gained, rel=1e-6)
        root = np.sqrt(d[l])
        smallest = np.linalg.eigvalsh(np.linalg.inv(C) * np.outer(root, root))[:4]
        most = (smallest - 1 - np.log(smallest)).sum() / 2
        assert 0.98 * most < gained <= most * (1 + 1e-9)


@pytest.mark.parametrize(
    ("h", "b", "message"),
    [
        (np.ones((2, 5)), np.ones((2, 60)), r"curvature must have shape \(2, 60\)"),
        (np.ones((2, 60)), np.ones(60), r"b must have shape \(2, 60\)"),
        (-np.ones((2, 60)), np.ones((2, 60)), "curvature must not be negative; spot 0 has -1.0"),
        (np.full((2, 60), np.nan), np.ones((2, 60)), "component 0, spot 0 is nan"),
    ],
)
def test_bad_posteriors(h, b, message):
    posterior = VecchiaPosterior(make(places(60), 3))
    with pytest.raises(ValueError, match=message):
        posterior.solve(h, b)


def test_threads_over_components_change_nothing(monkeypatch):
    random = np.random.default_rng(0)
    matrices = [sp.random_array((30, 30), density=0.2, rng=random).tocsr() for _ in range(3)]
    for shape in ((3, 30), (3, 30, 4)):
        x = random.normal(size=shape)
        few = on_components(lambda A, x: A @ x, matrices, x)
        monkeypatch.setattr("pnmf_pyro.gp.vecchia.FEW_PRODUCTS", 0)
        monkeypatch.setattr("torch.get_num_threads", lambda: 2)
        many = on_components(lambda A, x: A @ x, matrices, x)
        monkeypatch.undo()
        expected = np.stack([A.toarray() @ one for A, one in zip(matrices, x, strict=True)])
        np.testing.assert_allclose(few, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(many, few)
