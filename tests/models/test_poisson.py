"""PoissonFactors as a distribution, and its expectations under q."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from pnmf_pyro.data.counts import Counts, as_counts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.poisson import PoissonFactors
from tests.support import dense as ref
from tests.support.models import (
    PRIOR_SCALE,
    as_value,
    assert_all_close,
    assert_within_error,
    counts_of,
    double,
)
from tests.support.state import drawing

# --- PoissonFactors as a distribution


@pytest.mark.parametrize(
    "kind",
    [
        "counts",
        "tensor",
        "csr",
        "coo",
        "torch csr",
        # The type of the counts need not be that of the parameters: neither for dense nor sparse.
        "int tensor",
        "float32 tensor",
        "int csr",
        "float32 csr",
        "int torch csr",
    ],
)
def test_log_prob_equals_scipy(problem, kind):
    s = None if problem.s is None else double(problem.s)
    F = double(problem.mean)
    value = PoissonFactors(F, double(problem.W), s).log_prob(as_value(problem.X, kind))
    rate = ref.rates(problem.mean, problem.W, problem.s)
    expected = stats.poisson.logpmf(problem.X, rate).sum(1)
    assert value.dtype == torch.float64
    # log X! of float32 counts is taken in float32
    tolerance = 1e-10 if kind in ("counts", "tensor", "csr", "coo", "torch csr") else 1e-6
    np.testing.assert_allclose(value.numpy(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ref.poisson_log_prob(problem.X, rate), expected, rtol=1e-10)


def test_log_prob_of_leading_dimensions(problem, layout):
    """One row for each draw of F, as in Predictive and Trace_ELBO with vectorised particles."""
    F = np.random.default_rng(12).normal(size=(2, 4, *problem.mean.shape))
    likelihood = PoissonFactors(double(F), double(problem.W))
    N, D, _ = problem.shape
    value = likelihood.log_prob(counts_of(problem.X, layout))
    assert value.shape == likelihood.batch_shape == (2, 4, 1, N)
    assert likelihood.event_shape == (D,)
    for e in np.ndindex(2, 4):
        expected = stats.poisson.logpmf(problem.X, ref.rates(F[e], problem.W)).sum(1)
        np.testing.assert_allclose(value[e][0].numpy(), expected, rtol=1e-10)


def test_gradient_of_log_prob_in_the_log_factors(problem, layout):
    F = double(problem.mean).requires_grad_()
    W = double(problem.W).requires_grad_()
    s = None if problem.s is None else double(problem.s)
    PoissonFactors(F, W, s).log_prob(counts_of(problem.X, layout)).sum().backward()
    G, V = F.detach().clone().requires_grad_(), W.detach().clone().requires_grad_()
    zero = torch.zeros_like(G)
    ref.elbo_terms(double(problem.X), G, zero, V, s, 1.0, "simple", zero[None])[0].sum().backward()
    assert_all_close([F.grad, W.grad], [G.grad, V.grad])


def test_log_prob_adds_up_repeated_entries_of_a_sparse_matrix():
    """Entry (0, 0) is 1 + 2: a CSR matrix may hold the parts, and log 3! is not log 1! + log 2!."""
    parts = sp.csr_matrix((np.array([1.0, 2.0]), np.array([0, 0]), np.array([0, 2])), shape=(1, 1))
    value = PoissonFactors(double(np.zeros((1, 1))), double(np.ones((1, 1)))).log_prob(parts)
    assert float(value) == pytest.approx(stats.poisson.logpmf(3, 1.0))


def test_mean_and_variance_are_the_rates(problem):
    s = None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(double(problem.mean), double(problem.W), s)
    for moment in (likelihood.rate, likelihood.mean, likelihood.variance):
        np.testing.assert_allclose(
            moment.numpy(), ref.rates(problem.mean, problem.W, problem.s), rtol=1e-12
        )


def test_draws_have_the_mean_and_the_variance_of_a_poisson(sized):
    """20,000 draws of 6 entries, each moment within SIGMAS exact standard errors."""
    problem, times = ref.simulate_problem(14, N=3, D=2, L=2, sized=sized), 20_000
    s = None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(double(problem.mean), double(problem.W), s)
    with drawing(4):
        draws = likelihood.sample((times,)).numpy()
    assert draws.shape == (times, 3, 2)
    rate = ref.rates(problem.mean, problem.W, problem.s)
    for entry in np.ndindex(3, 2):
        x, r = draws[(slice(None), *entry)], rate[entry]
        assert_within_error(x.mean(), r, np.sqrt(r / times))
        assert_within_error(x.var(), r, np.sqrt((r + 2 * r**2) / times))


@pytest.mark.parametrize("shape", [(9,), (5, 1, 9), (2, 5, 1, 9), (5, 9)])
def test_expand_gives_the_batch_shape_asked_for(problem, shape):
    """Or says that it cannot, but does not return another distribution.

    The dimension before samples is that of components, so F leaves room for 1 there.
    """
    likelihood = PoissonFactors(double(problem.mean), double(problem.W))
    counts = as_counts(problem.X)
    try:
        expanded = likelihood.expand(shape)
    except (ValueError, NotImplementedError):
        assert shape == (5, 9)
        return
    assert expanded.batch_shape == shape
    assert expanded.event_shape == likelihood.event_shape
    expected = likelihood.log_prob(counts).expand(shape)
    assert_all_close([expanded.log_prob(counts)], [expected])
    with drawing(5):
        assert expanded.sample().shape == (*shape, problem.shape[1])


def test_expand_twice(problem):
    """As nested plates of a user's model do, one after another."""
    likelihood = PoissonFactors(double(problem.mean), double(problem.W))
    twice = likelihood.expand((5, 1, 9)).expand((2, 5, 1, 9))
    assert twice.batch_shape == (2, 5, 1, 9)
    counts = as_counts(problem.X)
    assert_all_close([twice.log_prob(counts)], [likelihood.log_prob(counts).expand(2, 5, 1, 9)])
    with drawing(5):
        assert twice.sample().shape == (2, 5, 1, 9, problem.shape[1])
        outer, inner = pyro.plate("outer", 2, dim=-3), pyro.plate("inner", 5, dim=-2)
        with outer, inner, pyro.plate("samples", 9, dim=-1):
            draw = pyro.sample("X", likelihood)
    assert draw.shape == (2, 5, 9, problem.shape[1])


# --- expectations under q


def test_expected_log_prob_is_per_sample(problem, mode, layout, fields):
    q = dist.Normal(double(problem.mean), double(problem.scale))
    W, s = double(problem.W), None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(q.mean, W, s)
    with drawing(1):
        value = likelihood.expected_log_prob(counts_of(problem.X, layout), q, mode, n_draws=3)
    noise = (torch.stack(fields).log() - q.mean) / q.stddev
    expected, _ = ref.elbo_terms(
        double(problem.X), q.mean, q.stddev, W, s, PRIOR_SCALE, mode, noise
    )
    assert_all_close([value], [expected])


def test_expected_log_prob_refuses_unknown_modes(problem):
    q = dist.Normal(double(problem.mean), double(problem.scale))
    with pytest.raises(ValueError, match=r"mode must be one of .*'simple'.*got 'exact'"):
        PoissonFactors(q.mean, double(problem.W)).expected_log_prob(
            as_counts(problem.X), q, "exact"
        )
    with pytest.raises(ValueError, match="mode must be one of"):
        FactorizationELBO("exact")


def gradients_of(problem: ref.Problem, counts: Counts, mode: str, newton: bool):
    """Values for three draws, and gradients of their sum in the mean and variance of q and in W."""
    mean, W = (double(part).requires_grad_() for part in (problem.mean, problem.W))
    variance = double(problem.scale**2).requires_grad_()
    q = dist.Normal(mean, variance.sqrt())
    likelihood = PoissonFactors(mean, W, None if problem.s is None else double(problem.s))
    with drawing(11):
        value = likelihood.expected_log_prob(counts, q, mode, n_draws=3, newton=newton)
    return value.detach(), *torch.autograd.grad(value.sum(), [mean, variance, W])


def test_newton_changes_nothing_but_the_gradient_in_the_variance(problem, mode, layout):
    counts = counts_of(problem.X, layout)
    plain, newton = (gradients_of(problem, counts, mode, newton) for newton in (False, True))
    value, mean, variance, W = zip(plain, newton, strict=True)
    for one, other in (value, mean, W):
        assert_all_close([other], [one])
    # The lower bound is analytic: its gradient is exact already.
    assert torch.equal(*variance) == (mode == "lower-bound")


@pytest.mark.parametrize("mode", ["simple", "expanded"])
def test_newton_gradient_is_half_the_bounded_curvature(problem, layout, mode, fields):
    """Of each draw, by automatic second derivatives; at most -1/4 sum_j X_ij phi_ijl^2."""
    counts = counts_of(problem.X, layout)
    *_, gradient, _ = gradients_of(problem, counts, mode, newton=True)
    fields.clear()
    gradients_of(problem, counts, mode, newton=False)  # the same draws, as the values show
    draws = [field.log().numpy() for field in fields]
    assert len(draws) == 3
    curvature = np.mean([ref.log_rate_curvature(problem.X, F, problem.W) for F in draws], 0)
    second = np.mean([ref.allocation_moments(problem.X, F, problem.W)[1] for F in draws], 0)
    moment = np.exp(problem.mean + problem.scale**2 / 2)
    if mode == "simple":
        moment = np.exp(draws).mean(0)
    s = 1.0 if problem.s is None else problem.s
    h = (s * moment).T * problem.W.sum(0)
    expected = np.minimum((curvature - h) / 2, -second / 4)
    bounded = -second / 4 < (curvature - h) / 2
    assert bounded.any() or problem.s is not None  # the sized problem has no such entry
    assert not bounded.all()
    assert_all_close([gradient], [double(expected.T)])
