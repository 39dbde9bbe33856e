"""Inducing-point fields and their natural steps against dense matrices."""

import numpy as np
import pyro
import pytest
import torch
from pyro.contrib.gp import kernels as pyro_kernels
from pyro.contrib.gp.models import VariationalSparseGP

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import svgp_posterior as families
from pnmf_pyro.priors.fields import weighted_gram
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.loadings import ClosedFormLoadings
from pnmf_pyro.training.loop import evaluate_elbo
from pnmf_pyro.training.schedules import GradientSteps
from tests.support import dense_fields
from tests.support.models import take_step
from tests.support.svgp import (
    TIGHT,
    as_numpy,
    assigned,
    covariance_of,
    dense_prior,
    drawn_from,
    factorization,
    make_prior,
    observations,
    scattered,
    trained,
)


@pytest.mark.parametrize("natural", [True, False])
def test_all_inducing_is_the_exact_gp(natural):
    prior = assigned(natural=natural)
    y, scale = observations(prior)
    new = scattered(6, seed=3)
    with torch.no_grad():
        at_samples, at_new = prior.marginal(), prior.at(new).marginal()
    x, z = as_numpy(prior.places)[0], as_numpy(new)[0]
    for l in range(prior.L):
        K, K_star, K_new = (dense_prior(prior, l, *pair) for pair in ((x, x), (x, z), (z, z)))
        level = float(prior.mean[l])
        for q, args in ((at_samples, (K, K, K)), (at_new, (K, K_star, K_new))):
            mean, cov = dense_fields.regression(*args, level, y[l], scale[l] ** 2)
            np.testing.assert_allclose(q.loc[l], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(q.variance[l], np.diag(cov), rtol=1e-5, atol=1e-6)


def test_marginals_and_divergence_are_those_of_pyros_sparse_gp():
    """`VariationalSparseGP`, whitened, with the same q(u)."""
    prior = assigned(M=5, jitter=1e-6)
    q = drawn_from(prior.guide, prior)["u"]
    covariance = covariance_of(q)
    new = scattered(6, seed=3)
    with torch.no_grad():
        found = prior.at(new).marginal()
    for l in range(prior.L):
        with pyro.get_param_store().scope():
            kernel = pyro_kernels.Matern32(2).double()
            kernel.lengthscale = prior.kernel.lengthscale[l].clone()
            kernel.variance = prior.kernel.sigma[l].square().clone()
            gp = VariationalSparseGP(
                prior.places.coordinates,
                torch.zeros(prior.N, dtype=torch.float64),
                kernel,
                prior.inducing.coordinates.clone(),
                pyro.contrib.gp.likelihoods.Gaussian(),
                whiten=True,
                jitter=1e-6 * float(prior.kernel.sigma[l].square()),
            )
            gp.u_loc = torch.nn.Parameter(q.mean[l].clone())
            gp.u_scale_tril = torch.linalg.cholesky(covariance[l])
            with torch.no_grad():
                loc, variance = gp(new.coordinates)
        np.testing.assert_allclose(found.loc[l], loc + prior.mean[l], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found.variance[l], variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    [{"natural": True, "M": 5}, {"natural": True}, {"natural": False}, {"diagonal_only": True}],
)
@pytest.mark.parametrize("cholesky_mode", ["exp", "softplus"])
def test_divergence_of_each_family(family, cholesky_mode):
    prior = assigned(**{"M": 7, "cholesky_mode": cholesky_mode, **family})
    q, p = drawn_from(prior.guide, prior)["u"], drawn_from(prior.model, prior)["u"]
    with torch.no_grad():
        found = float(torch.distributions.kl_divergence(q, p))
    expected = 0.0
    for l in range(prior.L):
        if isinstance(q, families.SiteNormal):
            m, S = q.mean[l], covariance_of(q)[l]
        elif isinstance(prior.q, families.DiagonalInducing):
            m, S = q.mean[l], torch.diag(q.variance[l])
        else:
            m, S = q.mean[l], q.base_dist.covariance_matrix[l]
        m, S = m.detach().numpy(), S.detach().numpy()
        expected += dense_fields.kl_joint(m, S, np.eye(len(m)))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_a_natural_step_of_size_one_is_the_closed_form():
    """precision_u = I + A diag(h) A^T, h = s (sum_j W_jl) E exp F."""
    prior = assigned(N=12, M=6)
    model, counts = factorization(prior)
    with torch.no_grad():
        q = prior.marginal()
    h = (q.loc + q.variance / 2).exp() * model.W.data.sum(0)[:, None]
    A, _ = prior._design(None)
    expected = torch.eye(6, dtype=torch.float64) + (A * h[:, None].detach()) @ A.mT
    take_step(model, Batch(counts), SiteSteps(prior))
    found = torch.linalg.inv(covariance_of(prior._posterior()))
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.slow
@pytest.mark.parametrize("M", [30, 10])  # over samples, and over inducing points
def test_steps_of_the_mean_between_those_of_the_covariance_lead_to_the_same_optimum(M):
    ends = []
    for apart in (1, 10):
        prior = assigned(N=30, M=M)
        model, counts = factorization(prior)
        steps = SiteSteps(prior, every=apart)
        objective = FactorizationELBO("lower-bound", newton=True)
        history = trained(model, counts, objective, [steps], 600, monotone=True).history
        assert (np.diff(history) >= -1e-6 * abs(history[0])).all()
        ends.append(history[-1])
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)


def test_a_step_of_the_mean_factorises_nothing(monkeypatch):
    prior = assigned(N=30, M=10)
    model, counts = factorization(prior)
    steps = SiteSteps(prior, every=1000)
    made = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda *a: (made.append(1), cholesky(*a))[1])
    trained(model, counts, FactorizationELBO("lower-bound", newton=True), [steps], 20)
    assert len(made) <= 2


def test_weighted_gram():
    A = torch.randn(1, 150, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("kn,ln,mn->lkm", A[0], w, A[0])
    torch.testing.assert_close(weighted_gram(A, w), expected, **TIGHT)


@pytest.mark.parametrize("M", [4, None])
def test_elbo_never_falls_in_monotone_training(M):
    prior = assigned(N=20, M=M)
    model, counts = factorization(prior)
    steps = [SiteSteps(prior), ClosedFormLoadings(model.W, model.expected_totals, model.levels)]
    objective = FactorizationELBO("lower-bound", newton=True)
    result = trained(model, counts, objective, steps, 40, monotone=True)
    rises = np.diff(result.history)
    assert (rises >= -1e-7 * abs(result.history[-1])).all()
    assert result.history[-1] > result.history[0] + 1
    assert rises[-5:].max() < 0.01 * (result.history[-1] - result.history[0])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"diagonal_only": True}, {"cholesky_mode": "softplus"}])
def test_standard_training_comes_near_natural_training(settings):
    objective = FactorizationELBO("lower-bound")
    best, counts = factorization(assigned(N=12, M=4))
    best.W.freeze()
    natural = FactorizationELBO("lower-bound", newton=True)
    trained(best, counts, natural, [SiteSteps(best.prior)], 200, monotone=True)
    model, _ = factorization(assigned(N=12, M=4, natural=False, **settings))
    model.W.assign(best.W.data.detach())
    model.W.freeze()
    adam = GradientSteps(torch.optim.Adam(model.prior.parameters(), lr=0.05))
    trained(model, counts, objective, [adam], 200)
    reached, optimum = (
        evaluate_elbo(one, Batches(counts), objective, torch_generator(0)) for one in (model, best)
    )
    assert reached < optimum + 1e-6
    assert reached > optimum - (6.0 if settings.get("diagonal_only") else 1.0)


@pytest.mark.parametrize("mode", ["simple", "expanded"])
def test_natural_steps_raise_the_bound_of_noisy_modes(mode):
    """Above what the optimum of `lower-bound` mode reaches in that mode, which is near."""
    final = FactorizationELBO(mode, 500)
    reached = {}
    for name in ("lower-bound", mode):
        model, counts = factorization(assigned(N=12, M=4), mode=name)
        model.W.freeze()
        objective = FactorizationELBO(name, 5, newton=True)
        steps = [SiteSteps(model.prior)]
        trained(model, counts, objective, steps, 150, monotone=name == "lower-bound")
        reached[name] = evaluate_elbo(model, Batches(counts), final, torch_generator(0))
    assert reached[mode] > reached["lower-bound"] + 0.5


def test_batches_add_up_to_the_whole():
    prior = assigned(N=12, M=5)
    model, counts = factorization(prior)
    objective = FactorizationELBO("lower-bound")
    with torch.no_grad():
        whole = objective.terms(model.model, model.guide, Batch(counts))
        parts = [
            objective.terms(model.model, model.guide, batch)
            for batch in Batches(counts, 3).one_pass()
        ]
    for name, value in whole.items():
        average = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(average, value)


def test_draws_are_joint():
    """Covariance of draws at samples is that of the exact posterior."""
    prior = assigned(N=6, L=1)
    y, scale = observations(prior)
    x = as_numpy(prior.places)[0]
    K = dense_prior(prior, 0, x, x)
    _, expected = dense_fields.regression(K, K, K, float(prior.mean[0]), y[0], scale[0] ** 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = prior.draws(40_000)(None)[:, 0]
        from_marginal = prior.marginal().sample(torch.Size([40_000]))[:, 0]
        elsewhere = prior.at(prior.places).draws(40_000)(None)[:, 0]
    for one in (draws, from_marginal, elsewhere):
        # standard error of a covariance: at most 2 var / sqrt(n), so 5 of them
        np.testing.assert_allclose(np.cov(one.numpy().T), expected, atol=10 * expected.max() / 200)


def test_the_guide_draws_f_given_u():
    """Its F has the density of the model's F given the same u, and q(F) for its marginal."""
    prior = assigned(N=6, M=3)
    index = torch.tensor([4, 5, 3])  # none an inducing point
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        batch = Batch(samples=index)
        plate = batch.plate(6)
        guide = pyro.poutine.trace(prior.guide).get_trace(batch, plate)
        replayed = pyro.poutine.replay(prior.model, trace=guide)
        model = pyro.poutine.trace(replayed).get_trace(batch, plate)
    u, F = guide.nodes["u"]["value"], guide.nodes["F"]["value"]
    x, z = as_numpy(prior.places)[0][index], as_numpy(prior.inducing)[0]
    for l in range(2):
        Kzz, Kzx = dense_prior(prior, l, z, z), dense_prior(prior, l, z, x)
        A = np.linalg.solve(np.linalg.cholesky(Kzz), Kzx)
        mean = float(prior.mean[l]) + A.T @ u[l].numpy()
        variance = 1.3**2 - (A**2).sum(0)
        density = -0.5 * (np.log(2 * np.pi * variance) + (F[l].numpy() - mean) ** 2 / variance)
        for trace in (guide, model):
            found = trace.nodes["F"]["fn"].log_prob(F)[l]
            np.testing.assert_allclose(found, density, rtol=1e-7)
    marginal = guide.nodes["F"]["infer"]["marginal"]
    torch.testing.assert_close(marginal.loc, prior.marginal(index).loc)
    torch.testing.assert_close(marginal.scale, prior.marginal(index).scale)


@pytest.mark.slow
def test_prior_draws_have_the_kernels_covariance():
    prior = make_prior(N=5, L=1)
    model, _ = factorization(prior, D=2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        draws = torch.stack(
            [
                pyro.poutine.trace(model.model).get_trace().nodes["F"]["value"][0]
                for _ in range(3_000)
            ]
        )
    x = as_numpy(prior.places)[0]
    expected = dense_prior(prior, 0, x, x)
    np.testing.assert_allclose(np.cov(draws.numpy().T), expected, atol=10 * expected.max() / 54)


def test_float32_fields_are_near_float64_ones():
    exact, single = assigned(), assigned(dtype=torch.float32)
    with torch.no_grad():
        a, b = exact.marginal(), single.marginal()
    assert b.loc.dtype == torch.float32
    torch.testing.assert_close(b.loc.double(), a.loc, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M", [12, 5])  # over samples, and over inducing points
def test_restoring_the_spread_keeps_means_and_takes_sites_at_their_weight(M):
    """q after training with weight k is prior + w / k; then it is prior + w."""
    weight = 0.4
    prior = make_prior(M=M)
    y, scale = observations(prior)
    prior.assign(torch.from_numpy(y), torch.from_numpy(scale * weight**0.5))
    before = prior.marginal()
    prior.restore_spread(weight)
    after = prior.marginal()
    torch.testing.assert_close(after.loc, before.loc, **TIGHT)
    x, z = (as_numpy(places)[0] for places in (prior.places, prior.inducing))
    for l in range(2):
        Kzz, Kzx = dense_prior(prior, l, z, z), dense_prior(prior, l, z, x)
        B = np.linalg.solve(Kzz, Kzx)  # E[F | u] = B^T u
        S = np.linalg.inv(np.linalg.inv(Kzz) + (B / scale[l] ** 2) @ B.T)
        variance = 1.3**2 - (Kzx * B).sum(0) + (B * (S @ B)).sum(0)
        np.testing.assert_allclose(after.variance[l].detach(), variance, rtol=1e-6)


def test_only_sites_have_a_spread_to_restore():
    for prior in (make_prior(natural=False), make_prior(diagonal_only=True)):
        with pytest.raises(ValueError, match="use_natural_gradients=True"):
            prior.restore_spread(0.5)
