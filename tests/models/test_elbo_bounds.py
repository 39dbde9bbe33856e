"""lower-bound <= expanded = simple = quadrature, and the ELBO is below log p(X | W)."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.loop import evaluate_elbo, train
from pnmf_pyro.training.schedules import Constant
from tests.support import dense as ref
from tests.support.models import (
    PRIOR_SCALE,
    SIGMAS,
    assert_within_error,
    counts_of,
    double,
    model_of,
    terms_of,
)
from tests.support.state import drawing

# --- the twins themselves


def test_the_twin_of_the_evidence_agrees_with_adaptive_integration():
    problem = ref.simulate_problem(1, N=3, D=4, L=1, sized=True)
    for i, value in enumerate(ref.log_evidence(problem, PRIOR_SCALE)):

        def joint(f: float, i: int = i) -> float:
            rate = problem.s[i] * problem.W[:, 0] * np.exp(f)
            likelihood = stats.poisson.pmf(problem.X[i], rate).prod()
            return likelihood * stats.norm.pdf(f, scale=PRIOR_SCALE)

        evidence, _ = integrate.quad(joint, -15, 15, limit=500, epsabs=0, points=[0.0])
        assert value == pytest.approx(np.log(evidence), rel=1e-7)


# --- identity 2: lower-bound <= expanded = simple = quadrature


@pytest.mark.parametrize("seed", range(5))
def test_lower_bound_is_below_the_expectation(seed, sized):
    problem = ref.simulate_problem(seed, N=4, D=5, L=2, sized=sized)
    q = dist.Normal(double(problem.mean), double(problem.scale))
    s = None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(q.mean, double(problem.W), s)
    value = likelihood.expected_log_prob(as_counts(problem.X), q, "lower-bound").numpy()
    exact, _ = ref.expected_log_likelihood(problem)
    has_counts = problem.X.sum(1) > 0
    assert (value[has_counts] < exact[has_counts]).all()
    # Without counts there is no log rate to bound, and both are the same number.
    np.testing.assert_allclose(value[~has_counts], exact[~has_counts], rtol=1e-10)


def test_lower_bound_is_exact_for_one_component(sized):
    problem = ref.simulate_problem(6, N=4, D=5, L=1, sized=sized)
    terms = terms_of(model_of(problem), Batch(as_counts(problem.X)))
    exact, _ = ref.expected_log_likelihood(problem)
    assert terms["log_likelihood"].item() == pytest.approx(exact.sum(), rel=1e-10)


@pytest.mark.parametrize("mode", ["simple", "expanded"])
@pytest.mark.parametrize("n_draws", [1, 3])
def test_monte_carlo_modes_are_unbiased(sized, layout, mode, n_draws):
    """Each sample's mean over 8,000 independent estimates is the quadrature value.

    Failure probability under a new seed: 6e-7 for each of the 4 samples. The standard errors are
    exact too, so the spread of the estimates is checked as well, to a tenth.
    """
    problem, times = ref.simulate_problem(7, N=4, D=5, L=2, sized=sized, empty=False), 8000
    problem.scale[:] *= 0.5  # draws of exp F have heavy tails, in which a spread converges slowly
    exact, variance = ref.expected_log_likelihood(problem)
    if mode == "expanded":
        variance = ref.expected_log_rate_variance(problem)
    tiled = problem.tiled(times)
    q = dist.Normal(double(tiled.mean), double(tiled.scale))
    s = None if tiled.s is None else double(tiled.s)
    likelihood = PoissonFactors(q.mean, double(tiled.W), s)
    with drawing(2):
        value = likelihood.expected_log_prob(counts_of(tiled.X, layout), q, mode, n_draws)
    estimates = value.numpy().reshape(times, 4)
    for i in range(4):
        assert_within_error(
            estimates[:, i].mean(), exact[i], np.sqrt(variance[i] / (times * n_draws))
        )
    np.testing.assert_allclose(estimates.var(0), variance / n_draws, rtol=0.1)


# --- identity 3: the ELBO is a lower bound on log p(X | W)


@pytest.mark.parametrize("seed", range(4))
def test_elbo_is_below_the_evidence(seed, sized, mode):
    """Deterministic for lower-bound; for the others failure probability 6e-7 or less, see above."""
    problem, times = ref.simulate_problem(seed, N=4, D=3, L=1, sized=sized), 4000
    problem.scale[:] *= 0.5
    evidence = ref.log_evidence(problem, PRIOR_SCALE).sum()
    tiled = problem.tiled(1 if mode == "lower-bound" else times)
    terms = terms_of(model_of(tiled, mode), Batch(as_counts(tiled.X)), n_draws=1)
    elbo = (terms["log_likelihood"] - terms["kl"]).item() * len(problem.X) / len(tiled.X)
    variance = {
        "lower-bound": 0.0,
        "expanded": ref.expected_log_rate_variance(problem).sum() / times,
        "simple": ref.expected_log_likelihood(problem)[1].sum() / times,
    }[mode]
    assert elbo - SIGMAS * np.sqrt(variance) <= evidence
    assert SIGMAS * np.sqrt(variance) < 1.0, "an error bar this wide would prove nothing"


def test_optimised_elbo_is_close_to_the_evidence(sized):
    """So every constant is there: the gap left is that of a normal to a slightly skewed posterior.

    For one component and samples with h >= 5 expected counts it is about 1 / (12 h) at most.
    """
    problem = ref.simulate_problem(8, N=5, D=6, L=1, sized=sized, empty=False)
    problem.W[:] *= 3
    X = np.random.default_rng(8).poisson(ref.rates(problem.mean, problem.W, problem.s)) + 1.0
    problem = ref.Problem(X, problem.W, problem.mean, problem.scale, problem.s)
    model, batches = model_of(problem, natural=True), Batches(as_counts(X))
    model.W.freeze()
    steps = [(SiteSteps(model.prior), Constant())]
    objective = FactorizationELBO("lower-bound", newton=True)
    train(model, batches, objective, steps, torch.Generator(), max_iter=60)
    elbo = evaluate_elbo(model, batches, objective, torch.Generator())
    gap = ref.log_evidence(problem, PRIOR_SCALE).sum() - elbo
    assert 0 < gap < 5 * 1 / 60
