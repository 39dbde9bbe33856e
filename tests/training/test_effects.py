"""Effects of batches and covariates under a likelihood of the user's, without closed forms."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pnmf_pyro
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.training.effects import EffectSteps
from tests.support.settings import unconverged

pytestmark = unconverged


def presence(poisson, batch):
    """Whether there is a count at all."""
    return dist.Bernoulli(-torch.expm1(-poisson.mean)).to_event(1)


class ZeroInflated(torch.nn.Module):
    """A share of the counts is lost."""

    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.zeros(()))

    def forward(self, poisson, batch):
        return dist.ZeroInflatedPoisson(poisson.mean, gate_logits=self.logit).to_event(1)


def plain_poisson(poisson, batch):
    return dist.Poisson(poisson.mean).to_event(1)


def seen_of(rate, likelihood, random):
    if likelihood is presence:
        return (random.uniform(size=rate.shape) < -np.expm1(-rate)).astype(np.float32)
    return (random.poisson(3 * rate) * (random.uniform(size=rate.shape) > 0.3)).astype(np.float32)


def simulated(likelihood, N=250, D=40):
    """A table with two batches and a covariate; it, what is told of it, and the effects."""
    random = np.random.default_rng(0)
    F, W = np.exp(random.normal(size=(N, 2))), random.gamma(0.6, 0.5, (D, 2)) + 0.1
    labels, z = np.arange(N) % 2, random.normal(size=N)
    of_batch, of_z = random.normal(0, 0.5, D), random.normal(0, 0.4, D)
    sign = np.where(labels == 0, 1, -1)[:, None]
    X = seen_of(F @ W.T * np.exp(sign * of_batch + z[:, None] * of_z), likelihood, random)
    return X, {"batches": labels, "covariates": z}, of_batch, of_z


@pytest.mark.parametrize(
    ("observation", "latent"),
    [
        (presence, lambda x, m: np.where(x > 0, m / -np.expm1(-m), 0)),
        (plain_poisson, lambda x, m: x),
        (ZeroInflated(), lambda x, m: np.where(x > 0, x, m / (1 + np.exp(-m)))),  # half are lost
    ],
)
@pytest.mark.parametrize("part", [None, torch.tensor([4, 0, 7])])
def test_counts_are_those_expected_given_what_is_seen(observation, latent, part):
    """By a dense table: the slope in effects is sum_i z_i (E[count | seen] - m)."""
    random = np.random.default_rng(1)
    N, D, x = 9, 5, random.poisson(0.7, (9, 5)).astype(np.float64)
    x = np.minimum(x, 1) if observation is presence else x
    design, effects = torch.eye(2).double(), torch.from_numpy(random.normal(0, 0.3, (D, 2)))
    codes = torch.arange(N) % 2
    s = torch.from_numpy(random.uniform(0.5, 2, N))
    exposure = Exposure(s, design, codes, effects, None, 2, learned=True)
    y = torch.from_numpy(x.T.copy())
    prior = GaussianPrior(y, 2)
    model = PoissonFactorization(prior, y, 2, size_factors=exposure, likelihood=observation)
    steps, counts = EffectSteps(model), as_counts(x)
    rows = slice(None) if part is None else part
    steps.prepare(Batch(counts if part is None else counts.rows(part), samples=part))
    F = torch.from_numpy(random.normal(size=(2, N)))[:, rows]
    found = steps._slope(F)
    W, z = model.W.numpy(), np.eye(2)[codes[rows]]
    m = np.exp(F.numpy()).T @ W.T * np.exp(z @ effects.numpy().T) * s.numpy()[rows, None]
    expected = (latent(x[rows], m) - m).T @ z
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert not model.exposure.effects.requires_grad
    assert torch.equal(model.exposure.effects, effects)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [presence, ZeroInflated()])
@pytest.mark.parametrize("how", [{}, {"batch_size": 60}])
def test_effects_are_found_under_a_likelihood_of_ones_own(likelihood, how):
    X, given, of_batch, of_z = simulated(likelihood)
    how = {"n_components": 2, "likelihood": likelihood, "random_state": 0, "max_iter": 400, **how}
    fit = pnmf_pyro.fit(X, **given, **how)
    for found, true in ((fit.batch_effects_, of_batch), (fit.covariate_effects_, of_z)):
        assert np.corrcoef(found[:, 0], true)[0, 1] > 0.9
        assert 0.8 < np.polyfit(true, found[:, 0], 1)[0] < 1.25
    assert fit.elbo_ > pnmf_pyro.fit(X, **how).elbo_ + 200
