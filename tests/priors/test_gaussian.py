"""The Gaussian prior: its two forms, its divergence and its parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import kl_divergence

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.priors import GaussianPrior
from tests.support import dense as ref
from tests.support.models import PRIOR_SCALE, double, model_like, prior_of


def test_both_forms_hold_what_was_assigned(problem, natural):
    prior = prior_of(problem, natural)
    qF, pF = prior()
    mean, scale = double(problem.mean), double(problem.scale)
    for q in (qF, prior.marginal(), prior.forward_batched(None)[0]):
        torch.testing.assert_close(q.loc.detach(), mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(q.scale.detach(), scale, rtol=1e-12, atol=1e-12)
    held = prior.scale.data.detach()
    torch.testing.assert_close(prior.mean.detach(), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(held, scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.theta1.detach(), mean / scale**2, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prior.theta2.detach(), -0.5 / scale**2, rtol=1e-11, atol=1e-11)
    assert pF.loc.shape == (3, 8)
    assert bool((pF.loc == 0).all())
    assert bool((pF.scale == PRIOR_SCALE).all())


def test_forward_batched_is_forward_at_these_samples(problem, natural):
    prior, idx = prior_of(problem, natural), torch.tensor([6, 0, 3])
    (qF, pF), (q, p) = prior(), prior.forward_batched(idx)
    assert torch.equal(q.loc, qF.loc[:, idx])
    assert torch.equal(q.scale, qF.scale[:, idx])
    assert p.batch_shape == (3, 3)
    assert torch.equal(p.loc, pF.loc[:, idx])
    assert torch.equal(prior.marginal(idx).loc, q.loc)


def test_trained_parameters_leave_out_that_of_the_prior(problem, natural):
    prior = prior_of(problem, natural)
    names = {name.split(".")[1] for name, _ in prior.named_parameters()}
    assert names == ({"theta1", "theta2"} if natural else {"mean", "scale"})
    assert "scale_pf" not in dict(prior.named_parameters())
    assert not prior.scale_pf.requires_grad
    assert all(p.shape == (3, 8) and p.requires_grad for p in prior.parameters())


def test_natural_parameters_are_for_natural_gradients(problem):
    prior = prior_of(problem, natural=True)
    theta1, theta2 = prior.natural_parameters()
    assert theta1 is prior.theta1
    assert theta2 is prior.theta2
    with pytest.raises(ValueError, match="use_natural_gradients=True"):
        prior_of(problem, natural=False).natural_parameters()


@pytest.mark.parametrize("scale_pf", [0.5, 1.0, 1.3, 3.0])
def test_divergence_equals_the_closed_form(natural, scale_pf):
    """Also for a prior scale that float32 cannot hold, such as 1.3."""
    problem = ref.simulate_problem(13)
    qF, pF = prior_of(problem, natural, scale_pf)()
    expected = ref.kl_independent(problem.mean, problem.scale, scale_pf)
    np.testing.assert_allclose(kl_divergence(qF, pF).detach(), expected, rtol=1e-10)


def test_the_twin_of_the_divergence_is_right():
    """E_q[log q - log p], whose integrand is quadratic and so exact by quadrature."""
    mean, scale, prior_scale = 0.7, 0.4, 1.3

    def log_ratio(F: np.ndarray) -> np.ndarray:
        z = (F[:, 0] - mean) / scale
        return np.log(prior_scale / scale) - z**2 / 2 + F[:, 0] ** 2 / (2 * prior_scale**2)

    value, _ = ref.moments(log_ratio, np.array([mean]), np.array([scale]))
    assert ref.kl_independent(mean, scale, prior_scale) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("scale_pf", [0, -1.0, float("nan"), float("inf"), "wide"])
def test_bad_prior_scales_are_refused(scale_pf):
    with pytest.raises(ValueError, match=r"scale_pf must be a number from 1e-15 to 1e[+]15; got"):
        GaussianPrior(torch.ones(3, 4), 2, scale_pf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_prior_takes_the_type_of_the_data(natural, dtype):
    prior = GaussianPrior(torch.ones(3, 4, dtype=dtype), L=2, use_natural_gradients=natural)
    expected = torch.float32 if dtype == torch.int64 else dtype
    assert {p.dtype for p in prior.parameters()} | {prior.scale_pf.dtype} == {expected}
    assert (prior.L, prior.N) == (2, 4)
    qF, _ = prior()
    assert qF.rsample((5,)).shape == (5, 2, 4)


def test_state_dict_round_trip_of_a_prior(problem, natural):
    prior, other = (
        prior_of(problem, natural),
        prior_of(ref.simulate_problem(5, N=8, D=6), natural, 2.0),
    )
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.marginal().loc, prior.marginal().loc)
    assert float(other.scale_pf) == PRIOR_SCALE


def test_slices_and_masks_select_as_well(X):
    prior = model_like(torch.from_numpy(X.T)).prior
    mask = np.arange(80) < 10
    for index in (slice(0, 10), mask, torch.from_numpy(mask)):
        q, _ = prior.forward_batched(index)
        torch.testing.assert_close(q.loc, prior.mean[:, :10])


def test_attributes_of_a_prior():
    for natural in (False, True):
        prior = GaussianPrior(torch.ones(6, 8), 2, use_natural_gradients=natural)
        assert prior.use_natural_gradients is natural
    assert isinstance(GaussianPrior(torch.ones(6, 8), 2).scale, PositiveParameter)
