"""Closed forms of loadings and of the scale of the prior, by the gradient of the ELBO."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.training.loadings import ClosedFormLoadings, ClosedFormScale, ShrunkLoadings
from tests.support import dense as ref
from tests.support.models import PRIOR_SCALE, double, model_of, prior_of, update_terms


def closed_form(
    problem: ref.Problem, batch: Batch, lr: float = 1.0
) -> tuple[PoissonFactorization, ClosedFormLoadings]:
    """A model with the gradients of a batch, and a step that has taken note of them."""
    model = model_of(problem, "lower-bound", "multiplicative")
    # A unit that differs between features: the step must not depend on it.
    model.W.set_unit(double(np.linspace(0.1, 3, len(problem.W)))[:, None])
    step = ClosedFormLoadings(model.W, model.expected_totals, model.levels)
    step.lr = lr
    FactorizationELBO("lower-bound").loss_and_grads(model.model, model.guide, batch)
    step.prepare(batch)
    return model, step


@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_closed_form_loadings_are_the_multiplicative_update(problem, lr):
    model, step = closed_form(problem, Batch(as_counts(sp.csr_matrix(problem.X))), lr)
    step.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    new = (1 - lr) * problem.W + lr * twin
    np.testing.assert_allclose(model.W.numpy(), new, rtol=1e-9, atol=1e-12)


def test_closed_form_loadings_see_the_q_that_has_moved(problem):
    """Expected counts are those of the gradient, totals those of q as it is when W moves."""
    model, step = closed_form(problem, Batch(as_counts(problem.X)))
    model.prior.assign(double(problem.mean + 0.3), double(problem.scale))
    step.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    twin = ref.multiplicative_update(
        problem.X, problem.W, fields, expected * np.exp(0.3), problem.s
    )
    np.testing.assert_allclose(model.W.numpy(), twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale_ll_D", [True, False])
def test_closed_form_loadings_of_a_batch(problem, scale_ll_D):
    """Both sums are over the samples of the batch; other features stay."""
    i, j = torch.tensor([5, 1, 6, 4]), torch.tensor([2, 5])
    batch = Batches(as_counts(problem.X), scale_ll_D=scale_ll_D).batch(i, j)
    model, step = closed_form(problem, batch)
    step.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    s = None if problem.s is None else problem.s[i]
    twin = ref.multiplicative_update(
        problem.X[i], problem.W, [field[:, i] for field in fields], expected[:, i], s
    )
    new = problem.W.copy()
    new[j] = twin[j]
    np.testing.assert_allclose(model.W.numpy(), new, rtol=1e-9, atol=1e-12)


def test_shrunk_loadings_are_posterior_means(problem):
    counts = Batch(as_counts(sp.csr_matrix(problem.X)))
    model, _ = closed_form(problem, counts)
    step = ShrunkLoadings(model.W, model.expected_totals, model.levels)
    step.prepare(counts)
    step.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    R = ref.expected_counts(problem.X, problem.W, fields)
    assert step.shape == pytest.approx(ref.shape_by_moments(R), rel=1e-9)
    exposure = (expected if problem.s is None else problem.s * expected).sum(1)
    twin = ref.posterior_mean_loadings(R, exposure, step.shape)
    np.testing.assert_allclose(model.W.numpy(), twin, rtol=1e-4, atol=1e-12)


def test_the_shape_is_that_before_shrinking_and_finite_without_contrast(problem):
    counts = Batch(as_counts(problem.X))
    model, _ = closed_form(problem, counts)
    step = ShrunkLoadings(model.W, model.expected_totals, model.levels)
    step.prepare(counts)
    shape = step.shape
    step.step()
    FactorizationELBO("lower-bound").loss_and_grads(model.model, model.guide, counts)
    step.prepare(counts)
    assert step.shape == shape
    model.W.assign(torch.ones_like(model.W.data))
    model.zero_grad()
    FactorizationELBO("lower-bound").loss_and_grads(model.model, model.guide, counts)
    flat = ShrunkLoadings(model.W, model.expected_totals, model.levels)
    flat.prepare(counts)
    assert flat.shape == pytest.approx(flat.LARGEST_SHAPE)


@pytest.mark.parametrize("index", [None, [3, 0, 7]])
def test_expected_totals(problem, index):
    """sum_i s_i E exp F_il over all samples, which a batch estimates by N/n times its own."""
    samples = None if index is None else torch.tensor(index)
    i = slice(None) if index is None else index
    model = model_of(problem)
    moments = np.exp(problem.mean + problem.scale**2 / 2)[:, i]
    s = 1.0 if problem.s is None else problem.s[i]
    total = (s * moments).sum(1) * 8 / moments.shape[1]
    batch = Batch(samples=samples)
    totals, levels = model.expected_totals(batch)
    np.testing.assert_allclose(totals, total[None], rtol=1e-10)
    np.testing.assert_allclose(levels, total, rtol=1e-10)
    np.testing.assert_allclose(model.levels(batch), total, rtol=1e-10)


@pytest.mark.parametrize("index", [None, [6, 2, 3]])
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_closed_form_scale_minimises_the_divergence(problem, natural, index, lr):
    """scale^2 = mean of mu^2 + sigma^2 over the samples of the batch, or part of the way to it."""
    prior = prior_of(problem, natural)
    step = ClosedFormScale(prior)
    step.lr = lr
    step.prepare(Batch(samples=None if index is None else torch.tensor(index)))
    step.step()
    scale = float(prior.scale_pf)
    i = slice(None) if index is None else index
    mean, sigma = problem.mean[:, i], problem.scale[:, i]
    optimum = (mean**2 + sigma**2).mean()
    assert scale**2 == pytest.approx((1 - lr) * PRIOR_SCALE**2 + lr * optimum, rel=1e-10)
    if lr == 1.0:
        divergences = [ref.kl_independent(mean, sigma, scale * c).sum() for c in (0.99, 1, 1.01)]
        assert divergences[1] == min(divergences)
