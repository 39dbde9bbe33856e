"""q(u) by sites is q(u) by natural parameters in another form."""

import pytest
import torch

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import svgp_posterior as families
from pnmf_pyro.priors.fields import NaturalNormal, WhitenedPrior
from pnmf_pyro.priors.svgp_sites import SiteNormal, SiteSpread
from pnmf_pyro.training.loop import train
from tests.support.svgp import assigned, factorization


def by_sites_and_densely():
    """The same q(u), in sites and in natural parameters."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    shift = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    w = torch.rand(2, 7, dtype=torch.float64, generator=generator) + 0.1
    precision = torch.eye(4, dtype=torch.float64) + (A * w[:, None]) @ A.mT
    dense = NaturalNormal((A @ shift[..., None])[..., 0].requires_grad_(), -precision / 2)
    dense.theta2.requires_grad_()
    return SiteNormal(shift.requires_grad_(), w.requires_grad_(), SiteSpread(w, A, A.mT @ A)), dense


def test_sites_are_another_form_of_natural_parameters():
    q, dense = by_sites_and_densely()
    torch.testing.assert_close(q.mean, dense.mean)
    torch.testing.assert_close(q.covariance_matrix, dense.covariance_matrix)
    u = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.log_prob(u), dense.log_prob(u))
    elsewhere = torch.randn(2, 4, 5, dtype=torch.float64)
    for found, expected in zip(
        (*q.at_sites(), *q.marginals(elsewhere)),
        (*dense.marginals(q.A), *dense.marginals(elsewhere)),
        strict=True,
    ):
        torch.testing.assert_close(found.detach(), expected.detach())


def test_gradients_of_sites_are_those_of_natural_parameters():
    """theta1 = A b and theta2 = -(I + A diag(w) A^T) / 2: their steps follow from those of b, w."""
    q, dense = by_sites_and_densely()
    prior = WhitenedPrior(2, 4)
    values = []
    for one, (mean, variance) in ((q, q.at_sites()), (dense, dense.marginals(q.A))):
        loss = (mean.exp() * variance + 0.3 * variance.square() - 2 * mean).sum()
        values.append(loss + torch.distributions.kl_divergence(one, prior))
        values[-1].backward()
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close((q.A @ q.shift.grad[..., None])[..., 0], dense.theta1.grad)
    step = (q.A * q.precision.grad[:, None]) @ q.A.mT
    torch.testing.assert_close(-step / 2, dense.theta2.grad)


def test_gradients_with_the_covariance_given_are_those_in_the_mean():
    """With S given, theta1 = S^-1 m moves by the slope in m: against autograd in m."""
    q, dense = by_sites_and_densely()
    S = dense.covariance_matrix
    m = dense.mean.clone().requires_grad_()
    variance = torch.einsum("lmn,lmk,lkn->ln", q.A, S, q.A)
    prior = WhitenedPrior(2, 4)

    def loss(mean, variance):
        return (mean.exp() * variance + 0.3 * variance.square() - 2 * mean).sum()

    expected = loss((q.A.mT @ m[..., None])[..., 0], variance) + m.square().sum() / 2
    (slope,) = torch.autograd.grad(expected, m)
    for one, marginals in ((q, q.at_sites), (dense, lambda: dense.marginals(q.A))):
        second = one.precision if one is q else one.theta2
        second.requires_grad_(False)
        value = loss(*marginals()) + torch.distributions.kl_divergence(one, prior)
        value.backward()
        assert second.grad is None
    torch.testing.assert_close(dense.theta1.grad, slope)
    torch.testing.assert_close((q.A @ q.shift.grad[..., None])[..., 0], slope)


def test_draws_of_sites_have_their_moments():
    q, _ = by_sites_and_densely()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u = q.sample((40_000,))
    torch.testing.assert_close(u.mean(0), q.mean, atol=0.03, rtol=0)
    for component in range(2):
        covariance = torch.cov(u[:, component].T)
        torch.testing.assert_close(covariance, q.covariance_matrix[component], atol=0.03, rtol=0)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_training_by_sites_is_training_in_natural_parameters(batch_size, monkeypatch):
    fields = []
    for sites in (0, 100):
        monkeypatch.setattr("pnmf_pyro.priors.svgp_posterior.SITES", sites)
        prior = assigned(N=10, M=8)
        model, counts = factorization(prior)
        batches = Batches(counts, batch_size, generator=torch_generator(1))
        objective = FactorizationELBO("lower-bound")
        train(
            model,
            batches,
            objective,
            [prior.natural_optimizer(0.5)],
            torch_generator(0),
            max_iter=6,
            warn=False,
        )
        fields.append(prior.marginal())
    assert isinstance(prior.q, families.SiteInducing)
    torch.testing.assert_close(fields[0].loc, fields[1].loc)
    torch.testing.assert_close(fields[0].scale, fields[1].scale)
