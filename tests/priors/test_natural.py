"""Natural gradients: the textbook step, its brakes and where it leads."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import kl_divergence

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.natural import NaturalGradient
from tests.support import dense as ref
from tests.support.models import PRIOR_SCALE, double, model_of, prior_of


def negative_bound(problem: ref.Problem, mean: torch.Tensor, variance: torch.Tensor):
    s = None if problem.s is None else double(problem.s)
    log_likelihood, kl = ref.elbo_terms(
        double(problem.X),
        mean,
        variance.sqrt(),
        double(problem.W),
        s,
        PRIOR_SCALE,
        "lower-bound",
        mean[None],
    )
    return kl.sum() - log_likelihood.sum()


@pytest.mark.parametrize("lr", [1.0, 0.5])
@pytest.mark.parametrize("shift", [-1.5, 0.0, 1.5])
def test_a_step_is_the_textbook_step(problem, lr, shift):
    """With two brakes on the way up: the variance rises by at most LARGEST_RISE, and the mean by
    log(1 + delta) where it would rise by delta.
    """
    problem.mean[:] += shift
    prior = prior_of(problem, natural=True)
    optimizer = NaturalGradient(prior.natural_parameters(), lr)
    q = prior.marginal()
    negative_bound(problem, q.loc, q.scale**2).backward()
    optimizer.step()
    mean, variance = double(problem.mean), double(problem.scale) ** 2
    new_mean, new_variance = ref.natural_step(
        lambda m, v: negative_bound(problem, m, v), mean, variance, lr
    )
    assert bool((new_mean < mean).any()) or shift < 0
    assert bool((new_mean > mean).any()) or shift > 0
    braked = torch.minimum(new_variance, variance + NaturalGradient.LARGEST_RISE)
    # The change of the mean is a slope over the precision, so it is shortened likewise.
    change = (new_mean - mean) * braked / new_variance
    damped = mean + torch.where(change > 0, torch.log1p(change), change)
    q = prior.marginal()
    torch.testing.assert_close(q.variance.detach(), braked, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.loc.detach(), damped, rtol=1e-10, atol=1e-10)


def test_a_step_through_the_whole_model_is_the_textbook_step(problem):
    """The same step when the gradient comes from Pyro's traces and the sparse kernel."""
    model = model_of(problem, "lower-bound", "projected", natural=True)
    batch = Batch(as_counts(sp.csr_matrix(problem.X)))
    objective = FactorizationELBO("lower-bound")
    objective.loss_and_grads(model.model, model.guide, batch)
    NaturalGradient(model.prior.natural_parameters()).step()
    mean, variance = double(problem.mean), double(problem.scale) ** 2
    new_mean, new_variance = ref.natural_step(
        lambda m, v: negative_bound(problem, m, v), mean, variance, 1.0
    )
    falls = (new_mean < mean) & (new_variance < variance + NaturalGradient.LARGEST_RISE)
    assert falls.sum() > 8
    q = model.prior.marginal()
    torch.testing.assert_close(
        q.variance[falls].detach(), new_variance[falls], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(q.loc[falls].detach(), new_mean[falls], rtol=1e-10, atol=1e-10)


def test_a_step_of_a_batch_is_the_step_of_its_samples(problem):
    """Each sample has its own q: a batch moves that of its samples as a whole pass would."""
    counts, objective = as_counts(problem.X), FactorizationELBO("lower-bound")
    results = []
    for index in (None, torch.tensor([6, 2, 3])):
        model = model_of(problem, "lower-bound", "projected", natural=True)
        batch = Batches(counts).batch(index, None)
        objective.loss_and_grads(model.model, model.guide, batch)
        optimizer = NaturalGradient(model.prior.natural_parameters())
        optimizer.prepare(batch)
        optimizer.step()
        results.append(model.prior.marginal())
    whole, part = results
    inside = np.isin(np.arange(8), [6, 2, 3])
    for name, start in (("loc", problem.mean), ("scale", problem.scale)):
        moved, of_all = (getattr(q, name).detach().numpy() for q in (part, whole))
        np.testing.assert_allclose(moved[:, inside], of_all[:, inside], rtol=1e-10)
        np.testing.assert_allclose(moved[:, ~inside], start[:, ~inside], rtol=1e-12)


def test_one_step_solves_a_conjugate_problem():
    """Observations y ~ N(F, t^2) and F ~ N(0, 1): exact from any q above the posterior."""
    random = np.random.default_rng(6)
    y, t = double(random.normal(size=(2, 5))), 0.6
    precision = 1 + 1 / t**2
    posterior_mean = y / t**2 / precision
    prior = GaussianPrior(torch.empty(3, 5, dtype=torch.float64), 2, use_natural_gradients=True)
    start = posterior_mean + double(random.uniform(0.1, 2, (2, 5)))
    prior.assign(start, double(random.uniform(0.2, 3, (2, 5))))
    qF, pF = prior()
    loss = (((qF.loc - y) ** 2 + qF.variance) / (2 * t**2)).sum() + kl_divergence(qF, pF).sum()
    loss.backward()
    NaturalGradient(prior.natural_parameters(), lr=1.0).step()
    q = prior.marginal()
    torch.testing.assert_close(q.loc.detach(), posterior_mean)
    torch.testing.assert_close(q.variance.detach(), torch.full_like(y, 1 / precision))


def test_a_fixed_point_is_left_alone():
    prior = GaussianPrior(torch.empty(3, 5, dtype=torch.float64), 2, use_natural_gradients=True)
    qF, pF = prior()
    kl_divergence(qF, pF).sum().backward()
    NaturalGradient(prior.natural_parameters()).step()
    assert torch.equal(prior.marginal().loc, torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(prior.marginal().scale, torch.ones(2, 5, dtype=torch.float64))


def test_steps_never_lower_the_bound_and_converge(problem):
    model = model_of(problem, "lower-bound", "projected", natural=True)
    model.W.freeze()
    batch, objective = Batch(as_counts(problem.X)), FactorizationELBO("lower-bound")
    optimizer = NaturalGradient(model.prior.natural_parameters())
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(objective.loss_and_grads(model.model, model.guide, batch))
        optimizer.step()
    assert (np.diff(losses) < 1e-9).all()
    # The closed form of DESIGN.md, section 4: 1 / sigma^2 = 1 / scale_pf^2 + h.
    q = model.prior.marginal()
    s = 1.0 if problem.s is None else problem.s
    h = s * problem.W.sum(0)[:, None] * (q.loc + q.variance / 2).exp().detach().numpy()
    precision = 1 / q.variance.detach().numpy()
    np.testing.assert_allclose(precision, 1 / PRIOR_SCALE**2 + h, rtol=1e-4)


def test_natural_gradient_without_gradients_does_nothing(problem):
    prior = prior_of(problem, natural=True)
    optimizer = NaturalGradient(prior.natural_parameters())
    before = prior.marginal().loc.clone()
    optimizer.step()
    assert torch.equal(prior.marginal().loc, before)
