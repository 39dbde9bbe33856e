"""The negative binomial: density, bound, slopes, dispersions, against numbers of scipy."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import nbinom

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import SparseCounts, as_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.models import FactorizationELBO, NegativeBinomial, PoissonFactorization
from pnmf_pyro.models.dispersion import log_density, slopes
from pnmf_pyro.models.negative_binomial import NegativeBinomialFactors
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors import GaussianPrior

N, D, L = 6, 4, 2
R = np.array([0.7, np.inf, 3.0, 20.0])
KINDS = [np.asarray, sp.csr_matrix]


@pytest.fixture
def numbers():
    random = np.random.default_rng(1)
    mean, scale = random.normal(size=(L, N)), random.uniform(0.1, 0.6, (L, N))
    W, s = random.gamma(1.0, 1.0, (D, L)), random.uniform(0.5, 2, N)
    X = random.negative_binomial(1, 0.3, (N, D)).astype(float)
    hidden = random.random((N, D)) < 0.2
    return mean, scale, W, s, np.where(hidden, 0, X), hidden


def made(numbers, F=None, r=R, hides=True):
    """The distribution given F, with size factors and hidden entries."""
    mean, _, W, s, _, hidden = numbers
    pattern = SparseCounts.from_scipy(sp.csr_matrix(hidden.astype(float))) if hides else None
    exposure = Exposure(torch.from_numpy(s), hidden=pattern)
    F = torch.from_numpy(mean) if F is None else F
    poisson = PoissonFactors(F, torch.from_numpy(W), exposure)
    return NegativeBinomialFactors(poisson, torch.from_numpy(1 / r))


def dense_log_prob(X, rate, hidden):
    r = np.where(np.isfinite(R), R, 1e9)
    return np.where(hidden, 0, nbinom.logpmf(X, r, r / (r + rate)))


@pytest.mark.parametrize("kind", KINDS)
def test_log_density_is_that_of_scipy(numbers, kind):
    mean, _, W, s, X, hidden = numbers
    rate = s[:, None] * (np.exp(mean).T @ W.T)
    expected = dense_log_prob(X, rate, hidden).sum(1)
    found = made(numbers).log_prob(as_counts(kind(X)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_log_density_of_entries():
    X, rate, r = np.array([0.0, 3, 3]), np.array([0.5, 2.0, 2.0]), np.array([2.0, 5.0, np.inf])
    found = log_density(*map(torch.from_numpy, (X, rate, r)))
    size = np.where(np.isfinite(r), r, 1e9)
    np.testing.assert_allclose(found, nbinom.logpmf(X, size, size / (size + rate)), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_its_formula(numbers, kind):
    """sum X log rho(mu) - (X + r) log(1 + E x / r) and constants, written out entry by entry."""
    mean, scale, W, s, X, hidden = numbers
    typical = s[:, None] * (np.exp(mean).T @ W.T)
    expected = np.where(hidden, 0, s[:, None] * (np.exp(mean + scale**2 / 2).T @ W.T))
    r = np.where(np.isfinite(R), R, 1e9)
    at_typical = dense_log_prob(X, typical, hidden)
    shift = (X + r) * (np.log1p(np.where(hidden, 0, typical) / r) - np.log1p(expected / r))
    q = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(scale))
    found = made(numbers).expected_log_prob(as_counts(kind(X)), q, "lower-bound")
    np.testing.assert_allclose(found, (at_typical + shift).sum(1), rtol=1e-5)


@pytest.mark.parametrize("mode", ["lower-bound", "expanded", "simple"])
def test_it_is_below_the_expected_log_density(numbers, mode):
    """E_q log p by 20,000 draws; no mode is above it but for Monte Carlo error."""
    mean, scale, W, s, X, hidden = numbers
    torch.manual_seed(0)
    q = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(scale))
    F = q.sample((20_000,)).numpy()
    rates = s[:, None] * (np.exp(F).transpose(0, 2, 1) @ W.T)
    draws = dense_log_prob(X, rates, hidden).sum((1, 2))
    error = draws.std() / np.sqrt(len(draws))
    found = made(numbers).expected_log_prob(as_counts(X), q, mode, 2000).sum()
    assert float(found) < draws.mean() + 5 * error


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(numbers, kind):
    counts, W = as_counts(kind(numbers[4])), torch.from_numpy(numbers[2])

    def value(A, W):
        poisson = PoissonFactors(A.log(), W, made(numbers).exposure, validate_args=False)
        found = NegativeBinomialFactors(poisson, torch.from_numpy(1 / R))
        return found.total_rate(counts, A) * torch.arange(1.0, N + 1)

    A = torch.from_numpy(numbers[0]).exp()
    assert torch.autograd.gradcheck(value, [A.requires_grad_(), W.requires_grad_()])


def test_rates_and_totals_are_the_slopes_of_the_total(numbers):
    counts, X = as_counts(numbers[4]), made(numbers)
    A = torch.from_numpy(numbers[0]).exp().requires_grad_()
    W = X.loadings = X.loadings.clone().requires_grad_()
    of_A, of_W = torch.autograd.grad(X.total_rate(counts, A).sum(), (A, W))
    np.testing.assert_allclose(X.rates(counts, A.detach()).expand(N, L), of_A.mT)
    np.testing.assert_allclose(X.totals(counts, A.detach()).expand(D, L), of_W)


@pytest.mark.parametrize("mode", ["lower-bound", "expanded"])
def test_infinite_dispersion_is_the_poisson(numbers, mode):
    mean, scale, *_, X, _ = numbers
    q = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(scale))
    given = as_counts(sp.csr_matrix(X)), q, mode, "fixed"
    poisson = PoissonFactors(
        torch.from_numpy(mean), torch.from_numpy(numbers[2]), made(numbers).exposure
    ).expected_log_prob(*given)
    none = made(numbers, r=np.full(D, np.inf)).expected_log_prob(*given)
    far = made(numbers, r=np.full(D, 9999.0)).expected_log_prob(*given)
    np.testing.assert_allclose(none, poisson, rtol=1e-12)
    np.testing.assert_allclose(far, poisson, rtol=1e-3)


def test_the_elbo_is_below_the_evidence():
    """log p(X | W) of one sample and one component, by quadrature over F."""
    W, r, x = np.array([2.0, 0.5]), np.array([1.5, 4.0]), np.array([[3.0, 1.0]])
    F = np.linspace(-8, 8, 4001)
    rate = np.exp(F)[:, None] * W
    prior = np.exp(-(F**2) / 2) / np.sqrt(2 * np.pi)
    evidence = np.log(
        np.sum(prior * np.exp(nbinom.logpmf(x, r, r / (r + rate)).sum(1))) * (F[1] - F[0])
    )
    y = torch.empty(2, 1, dtype=torch.float64, device="meta")
    part = NegativeBinomial(2, torch.from_numpy(r))
    model = PoissonFactorization(
        GaussianPrior(y, 1), y, 1, "projected", "lower-bound", likelihood=part
    )
    model.W.assign(torch.from_numpy(W)[:, None])
    bounds = []
    for mean, scale in [(0.0, 1.0), (0.3, 0.5), (0.5, 0.45), (-2.0, 0.2)]:
        model.prior.assign(torch.full((1, 1), mean), torch.full((1, 1), scale))
        loss = FactorizationELBO("lower-bound").loss(model.model, model.guide, as_counts(x))
        bounds.append(-loss)
    assert max(bounds) < evidence
    assert max(bounds) > evidence - 0.5  # what Jensen costs, twice


def test_variance_and_draws(numbers):
    X = made(numbers)
    torch.manual_seed(0)
    drawn = X.sample((20_000,)).numpy()
    np.testing.assert_allclose(drawn.mean(0), X.mean, rtol=0.1, atol=0.02)
    np.testing.assert_allclose(drawn.var(0), X.variance, rtol=0.3, atol=0.05)
    assert (drawn[:, numbers[5]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_of_a_dispersion(numbers, kind):
    """First and second derivatives of the log density in r, and the gain on the Poisson."""
    _, _, W, s, X, _ = numbers
    r = np.array([0.7, 30.0, 3.0, 20.0])
    A = np.exp(numbers[0]).T
    rate = s[:, None] * (A @ W.T)
    given = map(torch.from_numpy, (A, W, 1 / r))
    found = slopes(as_counts(kind(X)), *given, Exposure(torch.from_numpy(s)))

    def Q(r):
        return nbinom.logpmf(X, r, r / (r + rate)).sum(0)

    h = 1e-3 * r
    np.testing.assert_allclose(found.first, (Q(r + h) - Q(r - h)) / (2 * h), rtol=1e-3)
    bend = (Q(r + h) - 2 * Q(r) + Q(r - h)) / h**2
    np.testing.assert_allclose(found.second, bend, rtol=1e-2)
    np.testing.assert_allclose(found.gain, Q(r) - Q(np.full(D, 1e9)), rtol=1e-3, atol=1e-5)


def test_a_part_of_given_dispersions():
    part = NegativeBinomial(3, 2.0)
    np.testing.assert_allclose(part.dispersion, 2.0)
    assert part.steps(None) == []
    with pytest.raises(ValueError, match="dispersion must be positive"):
        NegativeBinomial(3, -1.0)
    poisson = PoissonFactors(torch.zeros(1, 2), torch.ones(3, 1))
    some = part(poisson, Batch(features=torch.tensor([2])))
    assert some.inverse.shape == (1,)


def test_a_count_tells_less_of_its_rate_than_that_of_a_poisson(numbers):
    """Its expectation is the Fisher information of log x: E[-d^2 log p / d(log x)^2]."""
    mean, _, W, s, X, _ = numbers
    x = s[:, None] * (np.exp(mean).T @ W.T)
    for kind in KINDS:
        told = made(numbers, hides=False).informative(as_counts(kind(X))).to_dense()
        share = 1 / (1 + x / R)
        np.testing.assert_allclose(told, X * share, rtol=1e-9)
    r, u, h = 3.0, np.log(x[0, 2]), 1e-3
    counts = np.arange(2000)
    below, at, above = (nbinom.logpmf(counts, r, r / (r + np.exp(u + d))) for d in (-h, 0, h))
    information = -(np.exp(at) * (above - 2 * at + below)).sum() / h**2
    assert (np.exp(at) * counts * r / (r + x[0, 2])).sum() == pytest.approx(information, rel=1e-4)
