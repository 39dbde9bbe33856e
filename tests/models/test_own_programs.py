"""Draws of the model, and the objective of models and guides that a user writes."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal, init_to_value
from scipy import special, stats

from pnmf_pyro.data.batches import Batch, Batches, take
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.poisson import PoissonFactors
from tests.support import dense as ref
from tests.support.models import (
    PRIOR_SCALE,
    SIGMAS,
    assert_within_error,
    blocks_of,
    counts_of,
    double,
    elbo_and_gradients,
    model_of,
    terms_of,
)
from tests.support.state import drawing


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
@pytest.mark.parametrize("posterior", [False, True], ids=["prior", "posterior"])
def test_predictive_draws(sized, parallel, posterior):
    """F has its distribution, and each X is Poisson with the rates of the F beside it.

    Standardised residuals have mean 0 and mean square 1; each is checked within SIGMAS standard
    errors. A mismatch of dimensions anywhere would inflate the residuals many times over.
    """
    problem, draws = ref.simulate_problem(15, N=6, D=4, L=2, sized=sized), 300
    model = model_of(problem)
    guide = model.guide if posterior else None
    with drawing(6):
        predictive = Predictive(
            model.model, guide=guide, num_samples=draws, parallel=parallel, return_sites=("F", "X")
        )
        samples = predictive(Batch())
    F, X = samples["F"].detach().numpy(), samples["X"].numpy()
    assert F.shape == (draws, 2, 6)
    assert X.shape == (draws, 1, 6, 4)
    mean, scale = (problem.mean, problem.scale) if posterior else (0.0, PRIOR_SCALE)
    standard = (F - mean) / scale
    assert_within_error(standard.mean(), 0, F.size**-0.5)
    assert_within_error((standard**2).mean(), 1, (2 / F.size) ** 0.5)
    rate = np.stack([ref.rates(f, problem.W, problem.s) for f in F])[:, None]
    residual = (X - rate) / np.sqrt(rate)
    assert_within_error(residual.mean(), 0, X.size**-0.5)
    error = np.sqrt((2 + 1 / rate).mean() / X.size)
    assert_within_error((residual**2).mean(), 1, error)


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
def test_predictive_draws_of_some_samples_and_features(parallel):
    problem = ref.simulate_problem(16, N=6, D=4, L=2, sized=True)
    model = model_of(problem)
    batch = Batch(samples=torch.tensor([4, 1, 5]), features=torch.tensor([3, 0]))
    with drawing(7):
        predictive = Predictive(model.model, guide=model.guide, num_samples=200, parallel=parallel)
        samples = predictive(batch)
    F, X = samples["F"].detach().numpy(), samples["X"].numpy()
    assert F.shape == (200, 2, 3)
    assert X.shape == (200, 1, 3, 2)
    W, s = problem.W[[3, 0]], problem.s[[4, 1, 5]]
    rate = np.stack([ref.rates(f, W, s) for f in F])[:, None]
    assert_within_error(((X - rate) / np.sqrt(rate)).mean(), 0, X.size**-0.5)


# --- the user's own models and guides


def estimates(model, batch: Batch, mode: str = "expanded", times: int = 300) -> tuple[float, float]:
    """Mean of independent one-draw estimates of the ELBO, and its standard error."""
    objective = FactorizationELBO(mode, n_draws=1)
    with drawing(8), pyro.get_param_store().scope():
        values = [-objective.loss(model.model, model.guide, batch) for _ in range(times)]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(times))


class NegativeBinomial(PoissonFactorization):
    """Counts more variable than Poisson, as a user would write it."""

    concentration = 2.5

    def model(self, batch: Batch = Batch()):  # noqa: B008 - frozen, and the interface's own
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        rate = (take(self.W.data, batch.features, dim=0) @ F.exp()).mT
        counts = dist.GammaPoisson(torch.tensor(2.5).double(), 2.5 / rate).to_event(1)
        with samples, pyro.poutine.scale(scale=batch.likelihood_scale):
            return pyro.sample("X", counts, obs=batch.counts.to_dense())


def negative_binomial(x: np.ndarray, rate: np.ndarray) -> np.ndarray:
    return stats.nbinom.logpmf(x, 2.5, 2.5 / (2.5 + rate))


@pytest.mark.parametrize("n_draws", [1, 5])
def test_own_likelihood_is_averaged_over_draws(layout, n_draws):
    problem, times = ref.simulate_problem(18, N=4, D=3, L=2), 2000
    tiled = problem.tiled(times)
    model = model_of(tiled, "expanded", kind=NegativeBinomial)
    terms = terms_of(model, Batch(counts_of(tiled.X, layout)), n_draws)
    exact, variance = ref.expected_log_likelihood(problem, negative_binomial)
    error = np.sqrt(variance.sum() / (times * n_draws))
    assert_within_error(terms["log_likelihood"].item() / times, exact.sum(), error)
    kl = ref.kl_independent(problem.mean, problem.scale, PRIOR_SCALE).sum()
    assert terms["kl"].item() / times == pytest.approx(kl, rel=1e-10)
    # The first draw is the same for every number of draws; the others must not repeat it.
    first = terms_of(model, Batch(counts_of(tiled.X, layout)), 1)["log_likelihood"].item()
    assert (terms["log_likelihood"].item() == first) == (n_draws == 1)


def test_own_likelihood_in_batches_and_its_gradients(layout):
    """With a q as good as certain there is nothing to draw, and values are exact."""
    problem = ref.simulate_problem(19, N=6, D=4, L=2)
    problem.scale[:] = 1e-9
    counts = counts_of(problem.X, layout)
    model = model_of(problem, "expanded", kind=NegativeBinomial)
    parts = [(0.25, batch) for batch in blocks_of(Batches(counts), 3, 2)]
    value, (_, _, W_gradient) = elbo_and_gradients(model, parts)
    rate = ref.rates(problem.mean, problem.W)
    kl = ref.kl_independent(problem.mean, problem.scale, PRIOR_SCALE).sum()
    expected = negative_binomial(problem.X, rate).sum() - kl
    assert float(value) == pytest.approx(expected, rel=1e-7)
    # d log NB / d rate = x / rate - (x + r) / (r + rate)
    slope = problem.X / rate - (problem.X + 2.5) / (2.5 + rate)
    np.testing.assert_allclose(W_gradient, slope.T @ np.exp(problem.mean.T), rtol=1e-6, atol=1e-6)


class CommonDepth(PoissonFactorization):
    """A latent depth c of all samples; a log-normal q has no closed-form KL to a gamma prior."""

    def model(self, batch: Batch = Batch()):  # noqa: B008
        c = pyro.sample("c", dist.Gamma(torch.tensor(3.0).double(), torch.tensor(2.0).double()))
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        with samples:
            return pyro.sample("X", PoissonFactors(F, c * self.W.data), obs=batch.counts)

    def guide(self, batch: Batch = Batch()):  # noqa: B008
        pyro.sample("c", dist.LogNormal(torch.tensor(0.2).double(), torch.tensor(0.3).double()))
        return super().guide(batch)


def test_own_latent_site_without_a_closed_form(layout):
    """The divergence over 500 draws, and the likelihood over 300 runs, each with its exact error.

    Given c the likelihood of lower-bound mode is a number, so both are integrals over log c alone.
    """
    problem = ref.simulate_problem(20, N=4, D=3, L=2)
    model = model_of(problem, kind=CommonDepth)
    batch = Batch(counts_of(problem.X, layout))
    rate = ref.rates(problem.mean, problem.W)
    moment = ref.rates(problem.mean + problem.scale**2 / 2, problem.W)

    def log_ratio(log_c: np.ndarray) -> np.ndarray:
        q = stats.norm.logpdf(log_c, 0.2, 0.3) - log_c
        return (q - stats.gamma.logpdf(np.exp(log_c), 3, scale=1 / 2))[:, 0]

    def log_likelihood(log_c: np.ndarray) -> np.ndarray:
        jensen = special.xlogy(problem.X, rate).sum() - special.gammaln(problem.X + 1).sum()
        return (problem.X.sum() * log_c - np.exp(log_c) * moment.sum())[:, 0] + jensen

    q = np.array([0.2]), np.array([0.3])
    exact, variance = ref.moments(log_ratio, *q)
    terms = terms_of(model, batch, n_draws=500)
    exact += ref.kl_independent(problem.mean, problem.scale, PRIOR_SCALE).sum()
    assert_within_error(terms["kl"].item(), exact, np.sqrt(variance / 500))
    assert SIGMAS * np.sqrt(variance / 500) < 0.3, "less than the entropy of c, 0.4"
    exact, variance = ref.moments(log_likelihood, *q)
    objective = FactorizationELBO("lower-bound", n_draws=1)
    with drawing(9):
        runs = [
            objective.terms(model.model, model.guide, batch)["log_likelihood"].item()
            for _ in range(300)
        ]
    assert_within_error(np.mean(runs), exact, np.sqrt(variance / 300))


class UniformGuide(PoissonFactorization):
    """q(F) uniform within 2 of its mean: a guide that is not normal."""

    def guide(self, batch: Batch = Batch()):  # noqa: B008
        with self.prior.local_plates(batch, batch.plate(self.N)):
            mean = self.prior.marginal(batch.samples).mean
            return pyro.sample("F", dist.Uniform(mean - 2, mean + 2))


@pytest.mark.parametrize("mode", ["simple", "expanded"])
def test_own_guide_that_is_not_normal(mode):
    """One component, so every expectation is elementary: E log rho = log W + m, E e^F = e^m sh."""
    problem, h = ref.simulate_problem(21, N=4, D=3, L=1), 2.0
    tiled = problem.tiled(500)
    model = model_of(tiled, mode, kind=UniformGuide)
    value, error = estimates(model, Batch(as_counts(tiled.X)), mode, times=30)
    rate = ref.rates(problem.mean, problem.W)
    log_likelihood = special.xlogy(problem.X, rate) - rate * np.sinh(h) / h
    log_likelihood -= special.gammaln(problem.X + 1)
    log_prior = -0.5 * np.log(2 * np.pi * PRIOR_SCALE**2)
    log_prior = log_prior - (problem.mean**2 + h**2 / 3) / (2 * PRIOR_SCALE**2)
    exact = log_likelihood.sum() + log_prior.sum() + 4 * np.log(2 * h)
    assert_within_error(value / 500, exact, error / 500)


class AutoGuided(PoissonFactorization):
    """Pyro writes the guide: F is a function of an auxiliary site, which carries the entropy."""

    def make_guide(self, problem: ref.Problem, scale: float) -> None:
        start = init_to_value(values={"F": double(problem.mean)})
        self.auto = AutoNormal(super().model, init_loc_fn=start, init_scale=scale)

    def guide(self, batch: Batch = Batch()):  # noqa: B008
        return self.auto(batch)


def test_automatic_guide_has_its_entropy():
    problem, scale = ref.simulate_problem(22, N=4, D=3, L=2), 0.4
    problem.scale[:] = scale
    model = model_of(problem, "simple", kind=AutoGuided)
    model.make_guide(problem, scale)
    value, error = estimates(model, Batch(as_counts(problem.X)), "simple", times=400)
    exact = ref.expected_log_likelihood(problem)[0].sum()
    exact -= ref.kl_independent(problem.mean, np.full_like(problem.mean, scale), PRIOR_SCALE).sum()
    assert_within_error(value, exact, error)
