"""Fixed points in the place of draws: moments, orders, and the ELBO that they give."""

import itertools

import numpy as np
import pytest
import torch

from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models import FactorizationELBO
from pnmf_pyro.models.points import FIXED, standard_normals, two_level_points
from pnmf_pyro.models.poisson import PoissonFactors


@pytest.mark.parametrize("L", [1, 2, 3, 4, 7, 8, 15, 16, 33])
def test_moments_are_those_of_standard_normals_up_to_the_second(L):
    z = two_level_points(L).double()
    assert L < len(z) <= 2 * L
    torch.testing.assert_close(z.mean(0), torch.zeros(L).double())
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(L).double())


def test_points_are_shared_by_all_samples_and_draws_are_not():
    mean = torch.zeros(3, 5)
    assert all(point.shape == (3, 1) for point in standard_normals(mean, FIXED))
    assert [draw.shape for draw in standard_normals(mean, 2)] == [(3, 5)] * 2


def expected_log_rate(F, scale, W, x):
    """E sum_j x_j log sum_l W_jl exp F_l, by Gauss and Hermite in each of two components."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    value = 0.0
    for (a, p), (b, q) in itertools.product(zip(nodes, weights, strict=True), repeat=2):
        rates = W @ np.exp(F + scale * np.array([a, b]))
        value += p * q * (x * np.log(rates)).sum()
    return value


def test_the_error_is_of_a_higher_order_in_the_standard_deviation():
    random = np.random.default_rng(0)
    F, W, x = random.normal(size=2), random.gamma(1, 1, (6, 2)), random.poisson(5, 6).astype(float)
    errors = []
    for scale in (0.4, 0.2, 0.1):
        q = torch.distributions.Normal(
            torch.tensor(F)[:, None], torch.full((2, 1), scale, dtype=torch.float64)
        )
        poisson = PoissonFactors(q.mean, torch.tensor(W))
        found = poisson.expected_log_prob(as_counts(x[None]), q, "expanded", FIXED)
        total = W.sum(0) @ np.exp(F + scale**2 / 2)
        seen = float(found) + total + float(torch.lgamma(torch.tensor(x) + 1).sum())
        errors.append(abs(seen - expected_log_rate(F, scale, W, x)))
    assert errors[1] < errors[0] / 6
    assert errors[2] < errors[1] / 6


def test_gradients_are_those_of_the_value_and_have_no_noise():
    """So that natural-gradient steps raise what is evaluated: newton changes nothing."""
    torch.manual_seed(0)
    W, X = torch.rand(8, 3).double(), as_counts(torch.poisson(torch.ones(5, 8).double()))

    def value(loc, scale, newton):
        q = torch.distributions.Normal(loc, scale)
        poisson = PoissonFactors(loc, W, validate_args=False)
        return poisson.expected_log_prob(X, q, "expanded", FIXED, newton=newton).sum()

    loc = torch.randn(3, 5).double().requires_grad_()
    scale = (torch.rand(3, 5).double() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: value(a, b, True), (loc, scale), atol=1e-5)
    assert value(loc, scale, True) == value(loc, scale, False)


@pytest.mark.parametrize(("mode", "draws"), [("simple", FIXED), ("expanded", "few")])
def test_what_has_no_points_is_refused(mode, draws):
    with pytest.raises(ValueError, match="'fixed' unless mode is 'simple'"):
        FactorizationELBO(mode, draws)
