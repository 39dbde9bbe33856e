"""The Vecchia normal and its divergence against dense normals, and in programs of one's own."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pnmf_pyro.priors.lcgp_distributions import LocalPosterior, VecchiaNormal
from tests.support import dense_fields
from tests.support.vecchia import (
    SPARSE,
    VERY_CLOSE,
    all_before,
    dense_log_density,
    dense_q,
    few_neighbours,
    make,
    matern32,
    points_of,
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


def small(means=(1.0, -2.0), **settings):
    factor = make(points_of(60), 6)
    return VecchiaNormal(factor, torch.tensor(means), **settings)


# --- densities


def test_all_neighbours_give_the_exact_density(complete):
    _, factor, exact = complete
    mean = torch.tensor([0.7, -0.2], dtype=torch.float64)
    x = np.random.default_rng(0).normal(size=(3, 2, 200))
    density = VecchiaNormal(factor, mean).log_prob(torch.tensor(x))
    assert density.shape == (3, 2, 200)
    expected = [
        [dense_log_density(a, c, C) for a, c, C in zip(one, mean.numpy(), exact, strict=True)]
        for one in x
    ]
    np.testing.assert_allclose(density.sum(-1), expected, rtol=1e-8)


def test_density_of_each_place_given_those_before(sparse):
    _, factor, covariance = sparse
    x = np.random.default_rng(0).normal(size=(2, 60))
    density = VecchiaNormal(factor, 0.3).log_prob(torch.tensor(x)).numpy()
    order = factor.graph.order
    for l, C in enumerate(covariance):
        first = [
            dense_log_density(x[l, order[:n]], 0.3, C[np.ix_(order[:n], order[:n])])
            for n in range(61)
        ]
        np.testing.assert_allclose(density[l, order], np.diff(first), rtol=1e-7, atol=1e-8)


def test_density_is_differentiable_in_value_and_mean(sparse):
    _, factor, covariance = sparse
    x = variational(60)[0]
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    density = VecchiaNormal(factor, mean).log_prob(x).sum()
    by_x, by_mean = torch.autograd.grad(density, [x, mean])
    expected = -np.linalg.solve(covariance, x.detach().numpy()[..., None])[..., 0]
    np.testing.assert_allclose(by_x, expected, **VERY_CLOSE)
    np.testing.assert_allclose(by_mean, -expected.sum(1), **VERY_CLOSE)


def test_a_batch_has_no_density_of_its_own():
    with pytest.raises(ValueError, match="density of some places"):
        small(index=torch.tensor([1, 4])).log_prob(torch.zeros(2, 2))


# --- draws


def test_draws_have_the_covariance():
    """Largest error of 1,830 covariances in sds of an estimate; P(false alarm) < 1e-6."""
    p = small()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = p.rsample((20_000,))
    assert draws.shape == (20_000, 2, 60)
    np.testing.assert_allclose(draws.mean((0, 2)), [1.0, -2.0], atol=0.05)
    for l, C in enumerate(vecchia_covariance(points_of(60), p.factor.graph)):
        sampled = np.cov(draws[:, l].numpy().T)
        deviation = np.sqrt(np.diag(C))
        error = (sampled - C) / np.outer(deviation, deviation)
        assert np.abs(error).max() < 6.5 * np.sqrt(2 / 20_000)


def drawn(p, *shape, sample="sample"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(p, sample)(shape)


def test_draws_of_a_batch_are_those_of_its_places():
    index = torch.tensor([41, 7, 59])
    batch = small(index=index, dtype=torch.float32)
    assert (batch.batch_shape, batch.event_shape) == ((2, 3), ())
    assert batch.mean.shape == (2, 3)
    assert torch.equal(drawn(batch, 4), drawn(small(), 4)[..., index].float())


def test_draws_are_differentiable_in_the_mean():
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    p = VecchiaNormal(make(points_of(60), 6), mean)
    (slope,) = torch.autograd.grad(drawn(p, 3, sample="rsample").sum(), mean)
    np.testing.assert_array_equal(slope, [180, 180])
    assert not drawn(p).requires_grad


def test_repetitions_are_independent_draws():
    p = small()
    repeated = p.expand((5, 2, 60))
    assert repeated.batch_shape == (5, 2, 60)
    assert torch.equal(drawn(repeated, 3), drawn(p, 3, 5))
    np.testing.assert_allclose(
        repeated.log_prob(drawn(repeated, 3)), p.log_prob(drawn(repeated, 3))
    )
    assert repeated.mean.shape == (5, 2, 60)
    assert repeated.expand((4, 2, 60)).sample().shape == (4, 2, 60)
    with pytest.raises(ValueError, match=r"batch shape \(2, 60\).*got \(5, 2, 1\)"):
        p.expand((5, 2, 1))


# --- the posterior


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("index", [None, [7, 2, 11]])
def test_density_of_the_posterior_is_that_of_the_dense_normal(index, rank):
    """Joint over the places present, values and gradients."""
    chosen = None if index is None else torch.tensor(index)
    m, d, V = variational(12, rank)
    q = LocalPosterior(m, d, V, chosen)
    i = slice(None) if index is None else index
    S = V.detach() @ V.detach().mT + torch.diag_embed(d)
    exact = torch.distributions.MultivariateNormal(m[:, i], S[:, i][..., i])
    value = torch.tensor(np.random.default_rng(0).normal(size=(4, *q.batch_shape)))
    value.requires_grad_()
    found, expected = q.log_prob(value), exact.log_prob(value)
    assert found.shape == value.shape
    torch.testing.assert_close(found.sum(-1), expected)
    slopes = [torch.autograd.grad(density.sum(), (value, m, d)) for density in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
    alone = LocalPosterior(m, d, V, chosen, torch.float32).log_prob(value.float())
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-4)


def test_draws_of_the_posterior_and_their_gradients():
    """E (sum_i F_i - m_i)^2 is the sum of S, whose slope in each d is 1: within 5 errors."""
    m, d, V = variational(6)
    S = dense_q(m, d, V)[1]
    q = LocalPosterior(m, d, V)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = q.rsample((20_000,))
    assert draws.shape == (20_000, 2, 6)
    for l in range(2):
        error = np.sqrt((S[l] ** 2 + np.outer(np.diag(S[l]), np.diag(S[l]))) / 20_000)
        covariance = np.cov(draws[:, l].detach().numpy().T)
        np.testing.assert_array_less(np.abs(covariance - S[l]), 5 * error)
    squares = (draws - m.detach()).sum(-1).square()
    slope = torch.autograd.grad(squares.mean(0).sum(), d)[0].numpy()
    # The slope of one draw is (sum_j F_j) e_i / sqrt(d_i), of variance below S / d_i + 2.
    error = np.sqrt((S.sum((1, 2))[:, None] / d.detach().numpy() + 2) / 20_000)
    np.testing.assert_array_less(np.abs(slope - 1), 5 * error)


# --- divergences


def posterior(m, d, V, rank=None, **settings):
    return LocalPosterior(m, d, V[..., :rank].detach(), **settings)


@pytest.mark.parametrize("rank", [0, 3])
def test_all_neighbours_give_the_exact_divergence(complete, rank):
    _, factor, exact = complete
    m, d, V = variational(200)
    terms = kl_divergence(posterior(m, d, V, rank), VecchiaNormal(factor, 0.3))
    means, S = dense_q(m, d, V[..., :rank])
    expected = [
        dense_fields.kl_joint(a - 0.3, b, C) for a, b, C in zip(means, S, exact, strict=True)
    ]
    np.testing.assert_allclose(terms.sum(1).detach(), expected, rtol=1e-8)


@pytest.mark.parametrize("rank", [0, 3])
def test_divergence_and_its_gradients(sparse, rank):
    _, factor, covariance = sparse
    m, d, V = variational(60)
    V = V[..., :rank].detach()
    mean = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    divergence = kl_divergence(posterior(m, d, V), VecchiaNormal(factor, mean)).sum(1)
    means, S = dense_q(m, d, V)
    parts = zip(means, S, mean.detach().numpy(), covariance, strict=True)
    twin = [dense_fields.kl_joint(m - c, S, C) for m, S, c, C in parts]
    np.testing.assert_allclose(divergence.detach(), twin, rtol=1e-9)
    got = torch.autograd.grad(divergence.sum(), [m, d, mean])
    dense = dist.MultivariateNormal(m, torch.diag_embed(d) + V @ V.mT)
    exact = dist.MultivariateNormal(mean[:, None].expand(2, 60), torch.tensor(covariance))
    expected = torch.autograd.grad(kl_divergence(dense, exact).sum(), [m, d, mean])
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, **VERY_CLOSE)


def test_terms_of_minibatches_add_up(sparse):
    _, factor, _ = sparse
    m, d, V = variational(60)

    def terms(index=None):
        return kl_divergence(
            posterior(m, d, V, index=index), VecchiaNormal(factor, 0.2, index=index)
        )

    every = terms()
    batches = torch.from_numpy(np.random.default_rng(0).permutation(60).reshape(6, 10))
    parts = [terms(batch) for batch in batches]
    for batch, part in zip(batches, parts, strict=True):
        np.testing.assert_allclose(part.detach(), every[:, batch].detach(), rtol=1e-10)
    estimates = torch.stack([60 / 10 * part.sum(1) for part in parts])
    whole = torch.autograd.grad(every.sum(), [m, d])
    mean = torch.autograd.grad(estimates.mean(0).sum(), [m, d])
    for one, other in zip(mean, whole, strict=True):
        np.testing.assert_allclose(one, other, **VERY_CLOSE)


def test_float32_parameters_get_float32_gradients():
    m, d, V = (x.detach().float().requires_grad_() for x in variational(60))
    divergence = kl_divergence(posterior(m, d, V), small()).sum()
    assert divergence.dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(divergence, [m, d]))


# --- programs of one's own


def tables(p):
    """Five tables of counts that share the law of their fields, two components at 60 places."""
    with (
        pyro.plate("tables", 5, dim=-3),
        pyro.plate("components", 2, dim=-2),
        pyro.plate("places", 60, dim=-1),
    ):
        field = pyro.sample("field", p)
        return pyro.sample("X", dist.Poisson(field.exp()))


def test_plates_repeat_the_field_and_the_trace_has_its_density():
    p = small()
    with torch.random.fork_rng():
        trace = pyro.poutine.trace(tables).get_trace(p)
    trace.compute_log_prob()
    field = trace.nodes["field"]
    assert field["value"].shape == field["log_prob"].shape == (5, 2, 60)
    np.testing.assert_allclose(field["log_prob"], p.log_prob(field["value"]))


def test_a_program_is_trained_by_reparameterised_draws():
    """The mean of one component is found from a noisy field, to which Pyro's own ELBO leads."""
    factor = make(points_of(60), 6, [matern32(0.05)])
    truth = drawn(VecchiaNormal(factor, 2.0))

    def model():
        mean = pyro.param("mean", torch.zeros(1, dtype=torch.float64))
        with pyro.plate("components", 1, dim=-2), pyro.plate("places", 60, dim=-1):
            field = pyro.sample("field", VecchiaNormal(factor, mean))
            pyro.sample("y", dist.Normal(field, 0.5), obs=truth)

    def guide():
        loc = pyro.param("loc", torch.zeros(1, 60, dtype=torch.float64))
        with pyro.plate("components", 1, dim=-2), pyro.plate("places", 60, dim=-1):
            pyro.sample("field", dist.Normal(loc, 0.3))

    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        losses = [svi.step() for _ in range(150)]
        found = pyro.param("mean").item()
    assert np.mean(losses[-20:]) < 0.5 * losses[0]
    assert abs(found - truth.mean().item()) < 0.3


# --- hard cases


@pytest.mark.parametrize("kernel", [matern32(0.2), rbf(0.5)])
def test_repeated_places(kernel):
    points = np.repeat(points_of(30), 2, 0)
    factor = make(points, 10, [kernel])
    assert factor.variances.min() >= 1e-8
    draw = drawn(VecchiaNormal(factor))
    assert torch.isfinite(draw).all()
    twins = draw[0].reshape(30, 2)
    assert (twins[:, 0] - twins[:, 1]).abs().max() < 0.02
    assert torch.isfinite(VecchiaNormal(factor).log_prob(draw)).all()
