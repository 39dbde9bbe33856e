"""Changed models: the parts they are written against, and their training."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from torch import nn

import pnmf_pyro
from pnmf_pyro import PNMF, fit_model, match_factors, posterior_predictive_check, transforms
from pnmf_pyro.data.batches import Batch, Batches, take
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.initialization import initialize_factors, start_values
from pnmf_pyro.models import ALL, PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.training.loop import evaluate_elbo
from tests.support.data import simulate
from tests.support.settings import NATURAL
from tests.support.state import global_state


class NegativeBinomial(PoissonFactorization):
    """With one dispersion, learned."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_r = nn.Parameter(torch.zeros(()))

    def model(self, batch=ALL):
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        mean, r = self.likelihood(F, batch).mean, self.log_r.exp()
        with samples, pyro.poutine.scale(scale=batch.likelihood_scale):
            counts = dist.GammaPoisson(r, r / mean).to_event(1)
            return pyro.sample("X", counts, obs=batch.dense_counts)


class HeavyTailed(GaussianPrior):
    """F_il from a Student t distribution, with the same normal q."""

    def model(self, batch, samples):
        with self.local_plates(batch, samples):
            return pyro.sample("F", dist.StudentT(4.0, torch.zeros_like(self.scale_pf), 1.0))


def made(X, L=3, kind=PoissonFactorization, prior=GaussianPrior, **options):
    y = torch.empty(X.shape[::-1], device="meta")
    return kind(prior(y, L), y, L, **options)


def test_the_likelihood_of_a_batch():
    random = np.random.default_rng(0)
    s = random.uniform(0.5, 2, size=7)
    model = made(np.empty((7, 5)), size_factors=torch.from_numpy(s)).double()
    F = random.normal(size=(2, 3, 7))
    W = model.W.numpy()
    dense = s[:, None] * np.einsum("elij->eij", np.exp(F)[..., None] * W.T[None, :, None, :])
    whole = model.likelihood(torch.from_numpy(F[0])).mean
    np.testing.assert_allclose(whole.detach(), dense[0], rtol=1e-6)
    rows, columns = torch.tensor([4, 0, 6]), torch.tensor([3, 1])
    part = model.likelihood(torch.from_numpy(F[..., rows]), Batch(None, rows, columns))
    # Leading draws stand before the dimension of components, as plates have it.
    assert part.batch_shape == (2, 1, 3)
    np.testing.assert_allclose(part.mean.detach()[:, 0], dense[:, rows][..., columns], rtol=1e-6)


def test_counts_of_a_batch_as_a_dense_table(counts):
    assert ALL.dense_counts is None
    for table in (counts, sp.csr_matrix(counts)):
        batch = Batches(as_counts(table)).batch(torch.tensor([3, 1]), torch.tensor([5, 0, 2]))
        np.testing.assert_array_equal(batch.dense_counts, counts[[3, 1]][:, [5, 0, 2]])


@pytest.mark.parametrize("matrix", [np.asarray, sp.csr_matrix])
def test_a_start_takes_size_factors_out(counts, matrix):
    s = np.linspace(0.5, 3, len(counts)).astype(np.float32)
    W, exp_F = start_values(as_counts(matrix(counts)), 3, "nndsvda", 0, torch.from_numpy(s))
    expected = initialize_factors(counts / s[:, None], 3, "nndsvda", 0)
    np.testing.assert_allclose(W, expected[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(exp_F, expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_plain_model_gets_as_far_as_natural_steps(counts):
    model = made(counts)
    result = fit_model(model, counts, max_iter=600)
    steps = {**NATURAL, "mode": "expanded"}
    natural = PNMF(3, random_state=0, max_iter=300, E=3, **steps).fit(counts)
    assert result.elbo == pytest.approx(natural.elbo_, rel=0.01)
    assert match_factors(model, natural).similarity > 0.98
    objective = FactorizationELBO("simple", 400)
    again = evaluate_elbo(model, Batches(as_counts(counts)), objective, torch_generator(3))
    assert result.elbo == pytest.approx(again, rel=1e-3)
    assert len(result.history) == 600


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_one_seed_gives_the_same_bits(counts):
    before = global_state()
    first, second, other = (made(counts) for _ in range(3))
    results = [
        fit_model(model, counts, max_iter=20, init="random", random_state=seed).history
        for model, seed in ((first, 0), (second, 0), (other, 1))
    ]
    assert results[0] == results[1] != results[2]
    np.testing.assert_array_equal(transforms.log_factors(first), transforms.log_factors(second))
    assert global_state() == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("batch_size", [None, 50])
def test_a_likelihood_of_ones_own_is_learned(batch_size):
    _, F, W = simulate(3, 150, 30, 2, mean=8.0)
    rate = np.exp(F) @ W.T
    X = np.random.default_rng(0).negative_binomial(2, 2 / (2 + rate)).astype(np.float32)
    model, poisson = made(X, 2, NegativeBinomial), made(X, 2)
    result = fit_model(model, X, max_iter=400, batch_size=batch_size)
    assert float(model.log_r.detach().exp()) == pytest.approx(2, rel=0.2)
    assert result.elbo > fit_model(poisson, X, max_iter=400).elbo + 1000
    if batch_size is None:
        p_values = [
            posterior_predictive_check(
                one, X, statistics=["variance_to_mean"], n_draws=100, random_state=0
            )
            .results[0]
            .p_value
            for one in (model, poisson)
        ]
        assert p_values[0] > 0.05 > 0.011 > p_values[1]


@pytest.mark.slow
def test_a_prior_of_ones_own_has_its_divergence(counts):
    model = made(counts, prior=HeavyTailed)
    result = fit_model(model, counts, max_iter=300)
    objective = FactorizationELBO("lower-bound", n_draws=2000)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        terms = objective.terms(model.model, model.guide, Batch(as_counts(counts)))
    of_q = {"posterior": "factorised"}
    mean, sd = (f(model, **of_q) for f in (transforms.log_factors, transforms.factor_uncertainty))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    F = mean[..., None] + sd[..., None] * nodes
    integrand = stats.norm(mean[..., None], sd[..., None]).logpdf(F) - stats.t(4).logpdf(F)
    expected = (integrand @ weights / weights.sum()).sum()
    assert float(terms["kl"]) == pytest.approx(expected, rel=5e-3)
    assert result.elbo > result.history[0]


class Covariate(PoissonFactorization):
    """Rates times exp(z_i B_j)."""

    def __init__(self, *args, z, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("z", z)
        self.B = nn.Parameter(torch.zeros(1, self.D))

    def likelihood(self, F, batch=ALL):
        effect = take(self.z, batch.samples, dim=0) @ take(self.B, batch.features)
        return dist.Poisson(super().likelihood(F, batch).mean * effect.exp()).to_event(1)

    def model(self, batch=ALL):
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        with samples, pyro.poutine.scale(scale=batch.likelihood_scale):
            return pyro.sample("X", self.likelihood(F, batch), obs=batch.dense_counts)


@pytest.mark.slow
def test_a_covariate_is_learned():
    random = np.random.default_rng(2)
    z = np.tile([[-0.5], [0.5]], (80, 1)).astype(np.float32)
    B = random.normal(0, 0.8, size=(1, 30))
    F, W = random.normal(size=(160, 2)), random.gamma(0.5, 6.0, size=(2, 30))
    X = random.poisson(np.exp(F) @ W * np.exp(z @ B)).astype(np.float32)
    model = made(X, 2, Covariate, z=torch.from_numpy(z))
    fit_model(model, X, max_iter=400, init="random")
    found = model.B.detach().numpy()
    many = X.sum(0) > 200
    assert np.corrcoef(B[0, many], found[0, many])[0, 1] > 0.95


def test_what_does_not_fit_is_refused(counts):
    model = made(counts)
    with pytest.raises(ValueError, match=r"\(80, 25\) samples by features; got \(25, 80\)"):
        fit_model(model, counts.T)
    with pytest.raises(ValueError, match="multiplicative"):
        fit_model(made(counts, loadings_mode="multiplicative"), counts)
    with pytest.raises(ValueError, match="learning_rate"):
        fit_model(model, counts, learning_rate=0)
    with pytest.raises(ValueError, match="n_draws"):
        fit_model(model, counts, n_draws=0)
    assert pnmf_pyro.fit_model is fit_model
