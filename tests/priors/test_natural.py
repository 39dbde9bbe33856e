"""Natural gradients on independent log-factors: the textbook step, its brakes, where it leads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import Normal

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps
from tests.support import dense as ref
from tests.support.models import PRIOR_SCALE, double, model_of, prior_of, take_step


def bound_terms(problem: ref.Problem, mean: torch.Tensor, variance: torch.Tensor):
    """Negative expected log-likelihood, and divergence."""
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
    return -log_likelihood.sum(), kl.sum()


def textbook_step(problem: ref.Problem, lr: float = 1.0, kl_weight: float = 1.0):
    """Mean and variance after a natural-gradient step on likelihood / weight + divergence."""

    def loss(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        likelihood, kl = bound_terms(problem, mean, variance)
        return likelihood / kl_weight + kl

    return ref.natural_step(loss, double(problem.mean), double(problem.scale) ** 2, lr)


def step_on(prior: GaussianPrior, loss: Callable[[Normal], torch.Tensor], step: SiteSteps) -> None:
    """Take a step from the gradients of a loss of q(F), which leaves out the divergence."""
    step.start()
    loss(prior.watch(prior.marginal())).backward()
    step.step()
    step.close()


@pytest.mark.parametrize("kl_weight", [1.0, 0.4])
@pytest.mark.parametrize("lr", [1.0, 0.5])
@pytest.mark.parametrize("shift", [-1.5, 0.0, 1.5])
def test_a_step_is_the_textbook_step(problem, lr, shift, kl_weight):
    """With two brakes on the way up: the variance rises by at most LARGEST_RISE, and the mean by
    log(1 + delta) where it would rise by delta.
    """
    problem.mean[:] += shift
    prior = prior_of(problem, natural=True)
    steps = SiteSteps(prior, kl_weight)
    steps.lr = lr
    step_on(prior, lambda q: bound_terms(problem, q.loc, q.scale**2)[0], steps)
    mean, variance = double(problem.mean), double(problem.scale) ** 2
    new_mean, new_variance = textbook_step(problem, lr, kl_weight)
    assert bool((new_mean < mean).any()) or shift < 0
    assert bool((new_mean > mean).any()) or shift > 0
    braked = torch.minimum(new_variance, variance + GaussianPrior.LARGEST_RISE)
    # The change of the mean is a slope over the precision, so it is shortened likewise.
    change = (new_mean - mean) * braked / new_variance
    damped = mean + torch.where(change > 0, torch.log1p(change), change)
    q = prior.marginal()
    torch.testing.assert_close(q.variance.detach(), braked, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.loc.detach(), damped, rtol=1e-10, atol=1e-10)


def test_a_step_through_the_whole_model_is_the_textbook_step(problem):
    """The same step when the gradient comes from Pyro's traces and the sparse kernel."""
    model = model_of(problem, "lower-bound", "projected", natural=True)
    take_step(model, Batch(as_counts(sp.csr_matrix(problem.X))), SiteSteps(model.prior))
    mean, variance = double(problem.mean), double(problem.scale) ** 2
    new_mean, new_variance = textbook_step(problem)
    falls = (new_mean < mean) & (new_variance < variance + GaussianPrior.LARGEST_RISE)
    assert falls.sum() > 8
    q = model.prior.marginal()
    torch.testing.assert_close(
        q.variance[falls].detach(), new_variance[falls], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(q.loc[falls].detach(), new_mean[falls], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale_kl_NM", [True, False])
def test_a_step_of_a_batch_is_the_step_of_its_samples(problem, scale_kl_NM):
    """Each sample has its own q: a batch moves that of its samples as a whole pass would.

    Where the divergence of a batch is not scaled by N/n, it weighs n/N of that.
    """
    counts, inside = as_counts(problem.X), np.isin(np.arange(8), [6, 2, 3])
    results = []
    for index, weight in ((None, 1.0 if scale_kl_NM else 3 / 8), (torch.tensor([6, 2, 3]), 1.0)):
        model = model_of(problem, "lower-bound", "projected", natural=True)
        batch = Batches(counts, scale_kl_NM=scale_kl_NM).batch(index, None)
        take_step(model, batch, SiteSteps(model.prior, weight))
        results.append(model.prior.marginal())
    whole, part = results
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
    step_on(prior, lambda q: (((q.loc - y) ** 2 + q.variance) / (2 * t**2)).sum(), SiteSteps(prior))
    q = prior.marginal()
    torch.testing.assert_close(q.loc.detach(), posterior_mean)
    torch.testing.assert_close(q.variance.detach(), torch.full_like(y, 1 / precision))
    sites = prior.sites()
    torch.testing.assert_close(sites.precision.detach(), torch.full_like(y, 1 / t**2))
    torch.testing.assert_close(sites.shift.detach(), y / t**2)


def test_a_fixed_point_is_left_alone():
    """Nothing is observed, and q is the prior."""
    prior = GaussianPrior(torch.empty(3, 5, dtype=torch.float64), 2, use_natural_gradients=True)
    step_on(prior, lambda q: 0 * (q.loc + q.scale).sum(), SiteSteps(prior))
    assert torch.equal(prior.marginal().loc, torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(prior.marginal().scale, torch.ones(2, 5, dtype=torch.float64))


def test_steps_never_lower_the_bound_and_converge(problem):
    model = model_of(problem, "lower-bound", "projected", natural=True)
    model.W.freeze()
    batch, steps = Batch(as_counts(problem.X)), SiteSteps(model.prior)
    losses = [take_step(model, batch, steps) for _ in range(100)]
    assert (np.diff(losses) < 1e-9).all()
    # The closed form of DESIGN.md, section 4: 1 / sigma^2 = 1 / scale_pf^2 + h.
    q = model.prior.marginal()
    s = 1.0 if problem.s is None else problem.s
    h = s * problem.W.sum(0)[:, None] * (q.loc + q.variance / 2).exp().detach().numpy()
    precision = 1 / q.variance.detach().numpy()
    np.testing.assert_allclose(precision, 1 / PRIOR_SCALE**2 + h, rtol=1e-4)


@pytest.mark.parametrize("natural", [True, False])
def test_sites_come_back_as_they_were_given(problem, natural):
    prior = prior_of(problem, natural=True)
    random = np.random.default_rng(0)
    h, b = double(random.gamma(1.0, size=(3, 8))), double(random.normal(size=(3, 8)))
    prior.posterior_from_sites(h, b)
    sites = prior.sites()
    for found, expected in zip(sites, (h, b, b / (h + PRIOR_SCALE**-2)), strict=True):
        torch.testing.assert_close(found.detach(), expected)
    index = torch.tensor([5, 0])
    prior.posterior_from_sites(None, 2 * b[:, index], index)
    again = prior.sites()
    torch.testing.assert_close(again.precision, sites.precision, rtol=1e-12, atol=0)
    moved = (again.shift != b).all(0)
    assert moved.nonzero().ravel().tolist() == [0, 5]


def test_restoring_the_spread_keeps_means_and_takes_sites_at_their_weight(problem):
    prior = prior_of(problem, natural=True)
    problem.scale[:] = 0.3
    prior.assign(double(problem.mean), double(problem.scale))
    prior.restore_spread(0.4)
    q = prior.marginal()
    precision = PRIOR_SCALE**-2 + 0.4 * (0.3**-2 - PRIOR_SCALE**-2)
    torch.testing.assert_close(q.loc.detach(), double(problem.mean))
    torch.testing.assert_close(q.variance.detach(), torch.full_like(q.loc, 1 / precision))


def test_steps_need_the_gradients_of_a_loss(problem):
    prior = prior_of(problem, natural=True)
    with pytest.raises(RuntimeError, match="needs the gradients of a loss"):
        SiteSteps(prior).step()
    steps = SiteSteps(prior)
    steps.start()
    prior.watch(prior.marginal())
    with pytest.raises(RuntimeError, match="needs the gradients of a loss"):
        steps.step()


def test_sites_are_for_natural_gradients(problem):
    prior = prior_of(problem, natural=False)
    sites = double(np.ones((3, 8)))
    for refused in (
        lambda: SiteSteps(prior),
        prior.sites,
        lambda: prior.posterior_from_sites(sites, sites),
        lambda: prior.restore_spread(0.5),
    ):
        with pytest.raises(ValueError, match="use_natural_gradients=True"):
            refused()


def test_the_guide_keeps_gradients_only_while_steps_are_under_way(problem):
    model = model_of(problem, natural=True)
    batch, steps = Batch(as_counts(problem.X)), SiteSteps(model.prior)
    model.guide(batch)
    assert model.prior.watched is None
    steps.start()
    model.guide(batch)
    assert model.prior.watched is not None
    steps.close()
    assert model.prior.watched is None
    assert not model.prior.attended
