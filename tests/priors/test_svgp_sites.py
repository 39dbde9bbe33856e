"""q(u) in sites: over samples and over inducing points, against dense matrices, and its steps."""

import numpy as np
import pytest
import torch
from torch.distributions import kl_divergence

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import svgp_posterior as families
from pnmf_pyro.priors.fields import WhitenedPrior
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.priors.svgp_posterior import (
    NormalOverInducing,
    NormalOverSamples,
    SpreadOverInducing,
    SpreadOverSamples,
)
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant
from tests.support import dense_fields
from tests.support.models import take_step
from tests.support.svgp import assigned, covariance_of, factorization

FORMS = ("over samples", "over inducing points")


def sites_and_dense(form):
    """A of 7 samples at 4 inducing points, q(u) from sites, and its mean and covariance."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    b = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    w = torch.rand(2, 7, dtype=torch.float64, generator=generator) + 0.1
    precision = np.eye(4) + np.einsum("lmn,ln,lkn->lmk", A, w, A)
    S = np.linalg.inv(precision)
    m = np.einsum("lmk,lkn,ln->lm", S, A, b)
    if form == "over samples":
        return A, NormalOverSamples(b, SpreadOverSamples(w, A, A.mT @ A)), m, S
    spread = SpreadOverInducing(torch.from_numpy(precision), A)
    return A, NormalOverInducing((A @ b[..., None])[..., 0], spread), m, S


@pytest.mark.parametrize("form", FORMS)
def test_moments_densities_and_divergence_are_those_of_the_dense_normal(form):
    A, q, m, S = sites_and_dense(form)
    np.testing.assert_allclose(q.mean, m, rtol=1e-10)
    np.testing.assert_allclose(covariance_of(q), S, rtol=1e-8, atol=1e-10)
    elsewhere = torch.randn(
        2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for places, found in ((A, q.at_samples()), (elsewhere, q.marginals(elsewhere))):
        np.testing.assert_allclose(found[0], np.einsum("lmn,lm->ln", places, m), rtol=1e-9)
        variance = np.einsum("lmn,lmk,lkn->ln", places, S, places)
        np.testing.assert_allclose(found[1], variance, rtol=1e-9)
    u = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = torch.distributions.MultivariateNormal(torch.from_numpy(m), torch.from_numpy(S))
    torch.testing.assert_close(q.log_prob(u), exact.log_prob(u).sum(-1))
    divergence = sum(dense_fields.kl_joint(m[l], S[l], np.eye(4)) for l in range(2))
    assert float(kl_divergence(q, WhitenedPrior(2, 4))) == pytest.approx(divergence, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_draws_have_the_mean_and_covariance(form):
    """5 standard errors of 40,000 draws."""
    _, q, m, S = sites_and_dense(form)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = q.sample((40_000,)).numpy()
    assert draws.shape == (40_000, 2, 4)
    for l in range(2):
        own = np.diag(S[l])
        np.testing.assert_array_less(np.abs(draws[:, l].mean(0) - m[l]), 5 * np.sqrt(own / 40_000))
        error = np.sqrt((S[l] ** 2 + np.outer(own, own)) / 40_000)
        np.testing.assert_array_less(np.abs(np.cov(draws[:, l].T) - S[l]), 5 * error)


def dense_loss(model, batch, m, S):
    """Negative expected log-likelihood of the samples of a batch, from dense m and S of u."""
    prior = model.prior
    A, rest = prior._design(batch.samples)
    mean = prior.mean[:, None] + torch.einsum("lmn,lm->ln", A, m)
    variance = torch.einsum("lmn,lmk,lkn->ln", A, S, A) + rest
    W, X = model.W.data.detach(), batch.counts.to_dense()
    log_rate = (X * (W @ mean.exp()).mT.log()).sum()
    total = (W @ (mean + variance / 2).exp()).sum()
    return total - log_rate


@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize("kl_weight", [1.0, 0.4])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("M", [8, 4])  # over samples, and over inducing points
def test_a_step_is_the_one_in_expectation_parameters(M, batched, kl_weight, lr):
    """By autograd in (m, S): d/dm1 = d/dm - 2 (d/dS) m and d/dm2 = d/dS.

    A batch moves the sites of its samples as a whole pass would, and leaves what others say.
    """
    prior = assigned(N=10, M=M)
    model, counts = factorization(prior)
    index = torch.tensor([7, 2, 3]) if batched else None
    batch = Batches(counts).batch(index, None)
    q = prior._posterior()
    m = q.mean.clone().requires_grad_()
    S = covariance_of(q).requires_grad_()
    before = torch.linalg.inv(S.detach()), q.mean.clone()
    A, _ = prior._design(index)
    w, b = (t[:, slice(None) if index is None else index] for t in prior.sites()[:2])
    level = prior.mean[:, None]
    own = torch.einsum("lmn,ln,lkn->lmk", A, w, A)
    own_shift = torch.einsum("lmn,ln->lm", A, b - w * level)
    dm, dS = torch.autograd.grad(dense_loss(model, batch, m, S) / kl_weight, (m, S))
    dS = (dS + dS.mT) / 2
    told_shift = -(dm - 2 * torch.einsum("lmk,lk->lm", dS, m.detach()))
    precision = before[0] + lr * (2 * dS - own)
    shift = torch.einsum("lmk,lk->lm", *before) + lr * (told_shift - own_shift)
    steps = SiteSteps(prior, kl_weight)
    steps.lr = lr
    take_step(model, batch, steps)
    q = prior._posterior()
    torch.testing.assert_close(covariance_of(q), torch.linalg.inv(precision))
    torch.testing.assert_close(
        q.mean, torch.linalg.solve(precision, shift[..., None])[..., 0], rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("M", [8, 4])  # over samples, and over inducing points
def test_a_step_with_the_covariance_given_is_newtons(M):
    """m - S dL/dm with the loss and its slope in m alone, by autograd."""
    prior = assigned(N=10, M=M)
    model, counts = factorization(prior)
    q = prior._posterior()
    S, m = covariance_of(q), q.mean.clone().requires_grad_()
    loss = dense_loss(model, Batch(counts), m, S) + m.square().sum() / 2
    (slope,) = torch.autograd.grad(loss, m)
    steps = SiteSteps(prior, every=10)
    steps.turn = 1
    take_step(model, Batch(counts), steps)
    after = prior._posterior()
    torch.testing.assert_close(covariance_of(after), S)
    expected = m.detach() - torch.einsum("lmk,lk->lm", S, slope)
    torch.testing.assert_close(after.mean, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("M", [8, 4])
def test_a_batch_leaves_the_sites_of_others(M):
    prior = assigned(N=10, M=M)
    model, counts = factorization(prior)
    before = [t.clone() for t in prior.sites()[:2]]
    take_step(model, Batches(counts).batch(torch.tensor([7, 2, 3]), None), SiteSteps(prior))
    inside = np.isin(np.arange(10), [7, 2, 3])
    for old, new in zip(before, prior.sites(), strict=False):
        np.testing.assert_array_equal((old != new).all(0), inside)
        np.testing.assert_array_equal((old != new).any(0), inside)


def test_a_precision_moved_batch_by_batch_is_the_one_made_anew():
    prior = assigned(N=40, M=6)
    model, counts = factorization(prior)
    objective = FactorizationELBO("lower-bound", newton=True)
    batches = Batches(counts, 7, shuffle=True, generator=torch_generator(1))
    steps = [(SiteSteps(prior), Constant())]
    train(model, batches, objective, steps, torch_generator(0), max_iter=200, warn=False)
    A, _ = prior._design(None)
    moved = prior.q._precision(A)
    made = torch.eye(6, dtype=torch.float64) + (A * prior.q.site_precision[:, None]) @ A.mT
    torch.testing.assert_close(moved, made, rtol=1e-11, atol=1e-11)
    prior.q.load_state_dict(prior.q.state_dict())  # changed in place: it is made anew
    assert prior.q._precision(A) is not moved
    torch.testing.assert_close(prior.q._precision(A), made, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_training_over_samples_is_training_over_inducing_points(batch_size, monkeypatch):
    ends = []
    for most in (0, 100):
        monkeypatch.setattr("pnmf_pyro.priors.svgp_posterior.SITES", most)
        prior = assigned(N=10, M=8)
        assert isinstance(prior.q, families.SiteInducing)
        model, counts = factorization(prior)
        objective = FactorizationELBO("lower-bound", newton=True, kl_weight=0.5)
        history = train(
            model,
            Batches(counts, batch_size, generator=torch_generator(1)),
            objective,
            [(SiteSteps(prior, 0.5), Constant())],
            torch_generator(0),
            max_iter=6,
            warn=False,
        ).history
        ends.append((torch.tensor(history), *prior.marginal().loc, *prior.marginal().scale))
        assert isinstance(prior._posterior(), NormalOverSamples if most else NormalOverInducing)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)
