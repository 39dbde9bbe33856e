"""Replicated counts: of the right distribution, in blocks, sparse where asked."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from sklearn.exceptions import NotFittedError

from pnmf_pyro import PNMF
from pnmf_pyro.analysis import replicates
from pnmf_pyro.analysis.replicates import draw_latents, replicated_counts
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models import poisson as poisson_factors
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors import GaussianPrior
from tests.support.state import global_state


@pytest.fixture
def small():
    """A model of 7 samples, 5 features and 2 components with a known q(F), and size factors."""
    random = np.random.default_rng(0)
    y = torch.empty(5, 7, device="meta")
    s = torch.tensor(random.uniform(0.5, 2, 7))
    model = PoissonFactorization(GaussianPrior(y, 2, 0.7), y, 2, size_factors=s)
    model.prior.assign(torch.tensor(random.normal(size=(2, 7))), torch.full((2, 7), 0.3))
    model.W.assign(torch.tensor(random.gamma(1.0, size=(5, 2))))
    return model


def expected(model) -> np.ndarray:
    """E X = s E exp F W^T under q."""
    mean, scale = model.prior.mean.detach().double(), model.prior.scale.detach().double()
    factors = torch.exp(mean + scale**2 / 2).T * model.size_factors[:, None]
    return (factors @ model.W.data.double().T).detach().numpy()


def test_events_have_the_distribution_of_poisson_counts(monkeypatch):
    """Moments of 20,000 tables, in standard errors: 5 and more in one seed of 10^4; it is fixed."""
    monkeypatch.setattr(poisson_factors, "SPARSE_RATE", float("inf"))
    random = np.random.default_rng(1)
    F = torch.tensor(random.normal(size=(3, 4)))
    W = torch.tensor(random.gamma(0.4, size=(6, 3)))
    W[0] = 0
    s = torch.tensor([0.3, 1.0, 2.0, 0.7])
    rate = ((F.exp() * s).T @ W.T).numpy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = PoissonFactors(F, W, s).sample((20_000,)).numpy()
    assert draws.shape == (20_000, 4, 6)
    assert (draws == draws.round()).all()
    assert (draws[:, :, 0] == 0).all()
    n = len(draws)
    assert (np.abs(draws.mean(0) - rate) <= 5 * np.sqrt(rate / n)).all()
    # the fourth central moment of a Poisson is mu + 3 mu^2
    error = np.sqrt((rate + 2 * rate**2) / n)
    assert (np.abs(draws.var(0) - rate) <= 5 * error).all()
    flat = draws.reshape(n, -1)[:, (rate > 0).ravel()]
    correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(n)


def test_leading_dimensions_of_events(monkeypatch):
    """Draws of many fields keep their places."""
    monkeypatch.setattr(poisson_factors, "SPARSE_RATE", float("inf"))
    F = torch.full((2, 1, 3, 4), -20.0)
    F[1, 0, 1, 2] = 5.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = PoissonFactors(F, torch.ones(6, 3)).sample((10,))
    assert draws.shape == (10, 2, 1, 1, 4, 6)
    total = draws.reshape(10, 2, 4, 6).sum((0, 3))
    assert total[1, 2] > 1000
    total[1, 2] = 0
    assert total.sum() == 0


@pytest.mark.slow
def test_mean_of_posterior_tables(small):
    draws = np.stack(list(replicated_counts(small, 4000, random_state=0)))
    assert draws.shape == (4000, 7, 5)
    error = draws.std(0) / 4000**0.5
    assert (np.abs(draws.mean(0) - expected(small)) < 5 * error).all()


@pytest.mark.slow
def test_mean_and_variance_of_prior_tables(small):
    """E X = s m a and Var X = E X + s^2 (v - m^2) sum_l W_l^2, with m, v moments of exp F."""
    draws = np.stack(list(replicated_counts(small, 6000, prior=True, random_state=0)))
    W = small.W.data.detach().double().numpy()
    s = small.size_factors.double().numpy()[:, None]
    variance = 0.7**2
    m, v = np.exp(variance / 2), np.exp(2 * variance)
    mean = s * m * W.sum(1)
    assert (np.abs(draws.mean(0) - mean) < 5 * draws.std(0) / 6000**0.5).all()
    spread = mean + s**2 * (v - m**2) * (W**2).sum(1)
    np.testing.assert_allclose(draws.var(0).mean(), spread.mean(), rtol=0.05)


def test_sparse_tables_are_the_dense_ones(small):
    dense = list(replicated_counts(small, 12, random_state=3))
    sparse = list(replicated_counts(small, 12, sparse=True, random_state=3))
    assert len(dense) == len(sparse) == 12
    for one, other in zip(dense, sparse, strict=True):
        assert isinstance(other, sp.csr_array)
        assert (other.data > 0).all()
        assert other.has_canonical_format
        np.testing.assert_array_equal(one, other.toarray())


@pytest.mark.parametrize("sparse", [False, True])
def test_blocks_share_one_draw_of_the_latents(small, monkeypatch, sparse):
    """With a q(F) that moves all samples together, tables made in blocks move together too."""

    class Together(GaussianPrior):
        def guide(self, batch, samples):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            with self.local_plates(batch, samples):
                return pyro.sample("F", dist.Normal(shift + 4.0, 1e-3).expand([self.L, self.N]))

    y = torch.empty(5, 7, device="meta")
    model = PoissonFactorization(Together(y, 2), y, 2)
    monkeypatch.setattr(replicates, "BLOCK", 10)
    tables = list(replicated_counts(model, 40, sparse=sparse, random_state=0))
    totals = np.array([np.asarray(table.sum(1)) for table in tables])
    assert totals.shape == (40, 7)
    assert np.corrcoef(np.log(totals).T).min() > 0.95
    latents = draw_latents(model.guide, 3)
    assert latents.dims == {"F": -1}
    chosen = latents.of(torch.tensor([4, 2]))
    assert torch.equal(chosen["F"], latents.values["F"][..., [4, 2]])
    assert chosen["shift"] is latents.values["shift"]


@pytest.mark.slow
def test_a_likelihood_of_ones_own(small):
    class NegativeBinomial(PoissonFactorization):
        def model(self, batch=Batch()):  # noqa: B008 - a batch cannot be changed
            samples = batch.plate(self.N)
            rate = self.prior.model(batch, samples).exp().mT @ self.W.data.T
            with samples:
                return pyro.sample("X", dist.GammaPoisson(1.0, 1.0 / rate).to_event(1))

    y = torch.empty(5, 7, device="meta")
    model = NegativeBinomial(GaussianPrior(y, 2), y, 2)
    model.prior.assign(torch.ones(2, 7), torch.full((2, 7), 1e-3))
    draws = np.stack(list(replicated_counts(model, 3000, random_state=0)))
    mean = np.e * model.W.data.detach().sum(1).numpy()
    np.testing.assert_allclose(draws.mean((0, 1)), mean, rtol=0.1)
    np.testing.assert_allclose(draws.var(0).mean(0), mean + mean**2, rtol=0.2)


def test_seeds_decide_and_global_ones_stay(fitted):
    before = global_state()
    first = list(replicated_counts(fitted, 5, random_state=1))
    again = list(replicated_counts(fitted, 5, random_state=1))
    other = list(replicated_counts(fitted, 5, random_state=2))
    assert global_state() == before
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_spatial_model_makes_smooth_tables():
    random = np.random.default_rng(0)
    places = random.uniform(size=(60, 1))
    X = random.poisson(30 * np.exp(np.sin(6 * places)) * np.ones(4))
    model = PNMF(
        1, spatial=True, mode="lower-bound", lengthscale=0.3, max_iter=60, tol=1e-2, random_state=0,
        training_mode="natural", loadings_mode="multiplicative", scheduler=None,
    ).fit(X, coordinates=places)  # fmt: skip
    order = np.argsort(places[:, 0])
    for prior in (False, True):
        tables = np.stack(list(replicated_counts(model, 30, prior=prior, random_state=0)))
        smooth = tables.sum(2)[:, order]
        near = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in smooth]
        assert np.median(near) > 0.8, prior


def test_bad_input():
    with pytest.raises(NotFittedError):
        next(replicated_counts(PNMF(2), 3))
    y = torch.empty(5, 7, device="meta")
    with pytest.raises(ValueError, match="n_draws must be a whole number"):
        next(replicated_counts(PoissonFactorization(GaussianPrior(y, 2), y, 2), 0))
