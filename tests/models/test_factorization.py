"""The model as a torch module: its terms, its start, its state."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import kl_divergence

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior
from tests.support import dense as ref
from tests.support.models import PRIOR_SCALE, double, model_like, model_of
from tests.support.state import drawing


@pytest.fixture
def problem(sized) -> ref.Problem:
    return ref.simulate_problem(1, N=8, D=6, L=3, sized=sized)


def test_rate_of_draws(problem):
    model, random = model_of(problem), np.random.default_rng(7)
    F, idy = random.normal(size=(4, 3, 8)), torch.tensor([5, 2])
    rate, part = model.get_rate(double(F)).detach(), model.get_rate(double(F), idy).detach()
    assert rate.shape == (4, 6, 8)
    for e in range(4):
        expected = ref.rates(F[e], problem.W).T
        np.testing.assert_allclose(rate[e], expected, rtol=1e-10)
        np.testing.assert_allclose(part[e], expected[idy], rtol=1e-10)


def batches_of_indices():
    return [(None, None), (torch.tensor([7, 2, 4]), None), (None, torch.tensor([3, 0])),
            (torch.tensor([1, 6]), torch.tensor([5, 1, 2]))]  # fmt: skip


@pytest.mark.parametrize(("idx", "idy"), batches_of_indices())
@pytest.mark.parametrize("kind", ["tensor", "counts", None])
def test_forward_gives_the_documented_terms(problem, mode, natural, idx, idy, kind):
    model = model_of(problem, mode, natural=natural)
    i = slice(None) if idx is None else idx
    j = slice(None) if idy is None else idy
    X, W = problem.X[i][:, j], problem.W[j]
    s = None if problem.s is None else problem.s[i]
    given = {"tensor": double(X.T), "counts": as_counts(sp.csr_matrix(X)), None: None}[kind]
    with drawing(0):
        terms, qF, pF = model(idx=idx, idy=idy, E=4, X=given)
    terms = {key: value.detach() for key, value in terms.items() if value is not None}
    mean, scale = problem.mean[:, i], problem.scale[:, i]
    (n, d), L = X.shape, 3
    np.testing.assert_allclose(qF.loc.detach(), mean, rtol=1e-12)
    np.testing.assert_allclose(qF.scale.detach(), scale, rtol=1e-12)
    assert qF.batch_shape == pF.batch_shape == (L, n)
    np.testing.assert_allclose(terms["exp_mu"], np.exp(mean), rtol=1e-12)
    np.testing.assert_allclose(terms["exp_mu_sigma"], np.exp(mean + scale**2 / 2), rtol=1e-12)
    assert ("exp_F_samples" in terms) == (mode != "lower-bound")
    if kind is None:
        key = "rate_mean" if mode == "lower-bound" else "rate_samples"
        assert set(terms) & {"rate_mean", "rate_samples", "log_rate", "log_likelihood"} == {key}
        fields = terms["exp_mu"][None] if mode == "lower-bound" else terms["exp_F_samples"]
        rates = np.stack([ref.rates(np.log(f), W).T for f in fields.numpy()])
        assert terms[key].shape == ((d, n) if mode == "lower-bound" else (4, d, n))
        np.testing.assert_allclose(terms[key].reshape(rates.shape), rates, rtol=1e-10)
        return
    noise = double(np.zeros((1, L, n)))
    if mode != "lower-bound":
        assert terms["exp_F_samples"].shape == (4, L, n)
        noise = (terms["exp_F_samples"].log() - qF.loc.detach()) / qF.scale.detach()
    assert not set(terms) & {"rate_mean", "rate_samples"}
    sizes = None if s is None else double(s)
    expected, _ = ref.elbo_terms(
        double(X), double(mean), double(scale), double(W), sizes, PRIOR_SCALE, mode, noise
    )
    for key in ("log_rate", "total_rate", "log_likelihood"):
        assert terms[key].shape == (n,)
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-10)
    # Terms (a) and (b); what is left of the likelihood is constant.
    fields = np.exp(mean + scale * noise.numpy())
    log_rate = [(X * np.log(ref.rates(np.log(f), W))).sum(1) for f in fields]
    np.testing.assert_allclose(terms["log_rate"], np.mean(log_rate, 0), rtol=1e-10, atol=1e-10)
    moment = fields.mean(0) if mode == "simple" else np.exp(mean + scale**2 / 2)
    total_rate = ref.rates(np.log(moment), W, s).sum(1)
    np.testing.assert_allclose(terms["total_rate"], total_rate, rtol=1e-10)


def test_terms_without_samples(problem, mode):
    model = model_of(problem, mode)
    qF, _ = model.prior()
    with drawing(1):
        terms = model.compute_log_likelihood_terms(qF, 2, double(problem.X.T))
        assert "exp_F_samples" not in terms
        terms = model.compute_log_likelihood_terms(qF, 2, double(problem.X.T), return_samples=True)
    assert ("exp_F_samples" in terms) == (mode != "lower-bound")


def test_forward_is_differentiable(problem, mode):
    model = model_of(problem, mode)
    with drawing(2):
        terms, qF, pF = model(E=2, X=double(problem.X.T))
    loss = kl_divergence(qF, pF).sum() - terms["log_likelihood"].sum()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())


def test_a_training_loop_of_the_users_own(problem):
    """As in the reference: multiplicative_update takes the terms that forward returns."""
    model = model_of(problem, "expanded", "multiplicative")
    X = double(problem.X.T)
    with drawing(3):
        terms, _, _ = model(E=3, X=X)
    model.W.multiplicative_update(X, terms)
    fields = list(terms["exp_F_samples"].detach().numpy())
    expected = terms["exp_mu_sigma"].detach().numpy()
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    np.testing.assert_allclose(model.W.numpy(), twin, rtol=1e-7)


@pytest.mark.parametrize(
    "arguments", [{"spatial": True}, {"coordinates": torch.ones(8, 2)}, {"groups": torch.ones(8)}]
)
def test_forward_refuses_what_needs_a_spatial_prior(problem, arguments):
    with pytest.raises(ValueError, match="need a spatial prior; this model has a GaussianPrior"):
        model_of(problem)(**arguments)


@pytest.mark.parametrize(
    ("shape", "L", "options", "message"),
    [
        ((6, 8), 2, {}, "prior must be over L=2 components and N=8 samples.*L=3 and N=8"),
        ((6, 9), 3, {}, "prior must be over L=3 components and N=9 samples.*L=3 and N=8"),
        ((6, 8), 3, {"loadings_mode": "free"}, "loadings_mode must be one of .*got 'free'"),
        ((6, 8), 3, {"mode": "exact"}, "mode must be one of .*got 'exact'"),
    ],
)
def test_a_model_refuses_what_does_not_fit(shape, L, options, message):
    prior = GaussianPrior(torch.ones(6, 8), 3)
    with pytest.raises(ValueError, match=message):
        PoissonFactorization(prior, torch.ones(shape), L, **options)


def test_a_model_describes_itself(parameter_mode, mode):
    y = torch.ones(6, 8, dtype=torch.float64)
    model = PoissonFactorization(GaussianPrior(y, 3), y, 3, parameter_mode, mode)
    assert (model.D, model.N, model.L) == (6, 8, 3)
    assert (model.loadings_mode, model.mode) == (parameter_mode, mode)
    assert isinstance(model.W, PositiveParameter)
    assert model.W.shape == (6, 3)
    assert model.W.elbo_mode == mode
    assert model.W.dtype == torch.float64
    assert bool((model.W.data > 0).all())


def test_first_loadings_come_from_the_random_state():
    y = torch.ones(6, 8)

    def loadings(seed) -> np.ndarray:
        return PoissonFactorization(GaussianPrior(y, 3), y, 3, random_state=seed).W.numpy()

    before = torch.random.get_rng_state()
    np.testing.assert_array_equal(loadings(0), loadings(0))
    assert (loadings(0) != loadings(1)).any()
    assert (loadings(None) != loadings(None)).any()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("empty_feature", [False, True])
def test_assign_starts_the_model(parameter_mode, natural, empty_feature):
    problem = ref.simulate_problem(8, N=8, D=6)
    model = model_of(problem, loadings_mode=parameter_mode, natural=natural)
    random = np.random.default_rng(8)
    W, exp_F = random.gamma(1, 1, (6, 3)), random.gamma(1, 1, (8, 3))
    if empty_feature:
        W[2] = 0
    model.assign(double(W), double(exp_F), scale=0.2)
    np.testing.assert_allclose(model.W.numpy(), W, rtol=1e-10, atol=1e-14)
    qF, _ = model.prior()
    np.testing.assert_allclose(qF.loc.detach(), np.log(exp_F).T, rtol=1e-10)
    np.testing.assert_allclose(qF.scale.detach(), np.full((3, 8), 0.2), rtol=1e-10)
    assert bool((model.W.unit > 0).all())
    assert bool(model.W.raw.isfinite().all())


def test_state_dict_round_trip_of_a_model(problem, parameter_mode, natural):
    model = model_of(problem, loadings_mode=parameter_mode, natural=natural)
    model.assign(double(2 * problem.W), double(np.exp(problem.mean.T)))
    other = model_of(problem, loadings_mode=parameter_mode, natural=natural)
    other.load_state_dict(model.state_dict())
    batch, objective = Batch(as_counts(problem.X)), FactorizationELBO("lower-bound")
    losses = [objective.loss(m.model, m.guide, batch) for m in (model, other)]
    assert losses[0] == losses[1]


def test_a_frozen_parameter_stays_in_training(X):
    """A frozen W is the same after steps that move everything else, and is saved like any other."""
    y = torch.from_numpy(X.T)
    model = model_like(y)
    model.W.freeze()
    before, saved = model.W.numpy(), model.state_dict()["W._raw"].clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    objective, batch = FactorizationELBO("lower-bound"), Batch(as_counts(X))
    mean = model.prior.mean.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        objective.loss_and_grads(model.model, model.guide, batch)
        optimizer.step()
    np.testing.assert_array_equal(model.W.numpy(), before)
    assert torch.equal(model.state_dict()["W._raw"], saved)
    assert bool((model.prior.mean != mean).all())
    model.W.unfreeze()
    objective.loss_and_grads(model.model, model.guide, batch)
    optimizer.step()
    assert (model.W.numpy() != before).all()


@pytest.mark.parametrize(
    "index", [[3, 0], (3, 0), np.array([3, 0]), torch.tensor([3, 0], dtype=torch.int32)]
)
def test_samples_and_features_are_selected_by_any_index(index, X):
    y = torch.from_numpy(X.T)
    model = model_like(y)
    terms, qF, _ = model(idx=index, idy=index, X=y[[3, 0]][:, [3, 0]], E=1)
    assert terms["log_likelihood"].shape == (2,)
    assert qF.batch_shape == (2, 2)
    draws = torch.zeros(1, 2, 5, dtype=y.dtype)
    torch.testing.assert_close(model.get_rate(draws, index), model.get_rate(draws)[:, [3, 0]])


def test_attributes_of_a_model(X):
    y = torch.from_numpy(X.T)
    prior = GaussianPrior(y, 2)
    assert PoissonFactorization(prior, y, 2).prior is prior
