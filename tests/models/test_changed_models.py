"""Models that are changed in a few lines: another likelihood, parameters of one's own."""

from __future__ import annotations

import copy
import logging

import anndata
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from pyro.distributions import constraints
from pyro.infer import Predictive
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from sklearn.exceptions import ConvergenceWarning

from pnmf_pyro import fit_model, posterior_predictive_check
from pnmf_pyro.analysis.replicates import replicated_counts
from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import FactorizationELBO, PoissonFactorization
from pnmf_pyro.training.loop import evaluate_elbo
from tests.support.data import tissue
from tests.support.programs import D, L, N, by_svi, make, small_tissue
from tests.support.settings import unconverged
from tests.support.state import drawing

pytestmark = unconverged


@pytest.fixture(scope="module")
def data():
    return small_tissue()


@pytest.fixture(scope="module")
def spread():
    """Negative binomial counts of r = 2, and their places."""
    _, x, _, F, W = tissue(N, D, L)
    X = np.random.default_rng(0).negative_binomial(2, 2 / (2 + np.exp(F) @ W.T))
    return torch.from_numpy(X).float(), Places(torch.from_numpy(x))


class NegativeBinomial(PoissonFactorization):
    def likelihood(self, F, batch=Batch()):  # noqa: B008 - frozen
        mean = super().likelihood(F, batch).mean
        return dist.GammaPoisson(torch.tensor(2.0), 2 / mean).to_event(1)


def gamma_poisson(poisson, batch):
    return dist.GammaPoisson(torch.tensor(2.0), 2 / poisson.mean).to_event(1)


class Dispersed(PoissonFactorization):
    """With a dispersion that `pyro.param` holds, as a tutorial of Pyro would have it."""

    def likelihood(self, F, batch=Batch()):  # noqa: B008
        r = pyro.param("r", torch.tensor(1.0), constraint=constraints.positive)
        return dist.GammaPoisson(r, r / super().likelihood(F, batch).mean).to_event(1)


class OfModule(PyroModule[PoissonFactorization]):
    """The same with a parameter of a module of Pyro."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.r = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def likelihood(self, F, batch=Batch()):  # noqa: B008
        return dist.GammaPoisson(self.r, self.r / super().likelihood(F, batch).mean).to_event(1)


# --- another likelihood


@pytest.mark.parametrize("form", ["method", "function"])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix], ids=["dense", "sparse"])
def test_the_likelihood_alone_is_changed(data, layout, form):
    """By the density of scipy, for dense and sparse counts and a batch of them, and its draws."""
    X = layout(data[0].numpy())
    by = {"kind": NegativeBinomial} if form == "method" else {"likelihood": gamma_poisson}
    model = make(data, **by)
    batch = Batches(as_counts(X)).batch(torch.arange(30), torch.tensor([4, 1]))
    F = torch.zeros(L, 30)
    conditioned = pyro.condition(model.model, {"F": F})
    found = pyro.poutine.trace(conditioned).get_trace(batch)
    found.compute_log_prob()
    rate = model.W.numpy()[[4, 1]].sum(1)
    expected = stats.nbinom.logpmf(data[0][:30, [4, 1]], 2, 2 / (2 + rate)).sum(1)
    np.testing.assert_allclose(found.nodes["X"]["unscaled_log_prob"].detach(), expected, rtol=1e-4)
    assert found.nodes["X"]["scale"] == pytest.approx(N / 30 * D / 2)
    losses = by_svi(model.model, model.guide, FactorizationELBO(), X, steps=60)
    assert losses[-1] < losses[0]
    with drawing(0):
        drawn = Predictive(model.model, guide=model.guide, num_samples=2)()
    assert drawn["X"].shape == (2, 1, N, D)


def test_what_has_no_closed_form_is_said_once(data, caplog):
    objective, model = FactorizationELBO(n_draws=4), make(data, kind=NegativeBinomial)
    batch = Batch(as_counts(data[0]))
    with caplog.at_level(logging.WARNING, "pnmf_pyro"):
        for _ in range(3):
            objective.loss_and_grads(model.model, model.guide, batch)
        objective.loss(model.model, model.guide, batch)
    (record,) = caplog.records
    assert record.message.startswith("X: averaged over 4 draws; its type is Independent")


def test_nothing_is_said_where_all_is_in_closed_form(data, caplog):
    with caplog.at_level(logging.WARNING, "pnmf_pyro"):
        for prior in ("independent", "inducing points", "neighbours"):
            model = make(data, prior)
            by_svi(model.model, model.guide, FactorizationELBO(), data[0], steps=2)
    assert not caplog.records


def test_lower_bound_mode_refuses_what_has_no_closed_form(data):
    model, objective = make(data, kind=NegativeBinomial), FactorizationELBO("lower-bound")
    with pytest.raises(ValueError, match=r"mode='lower-bound' has no draws, and X needs them"):
        objective.loss(model.model, model.guide, Batch(as_counts(data[0])))

    class Shifted(PoissonFactorization):
        """With log-factors that are no longer those of the guide."""

        def likelihood(self, F, batch=Batch()):  # noqa: B008
            return super().likelihood(F + 0.1, batch)

    shifted = make(data, kind=Shifted)
    with pytest.raises(ValueError, match="log-factors are not themselves a value that the guide"):
        objective.loss(shifted.model, shifted.guide, Batch(as_counts(data[0])))


class LatentLoadings(PoissonFactorization):
    """With a log-normal q(W), and its loadings for a median."""

    def model(self, batch=Batch()):  # noqa: B008
        self.drawn = pyro.sample("W", dist.Gamma(1.0, 1.0).expand([D, L]).to_event(2))
        return super().model(batch)

    def guide(self, batch=Batch()):  # noqa: B008
        pyro.sample("W", dist.LogNormal(self.W.data.log(), 0.1).to_event(2))
        return super().guide(batch)

    def likelihood(self, F, batch=Batch()):  # noqa: B008
        poisson = super().likelihood(F, batch)
        return type(poisson)(F, self.drawn, poisson.size_factors)


@pytest.mark.parametrize("prior", ["independent", "inducing points"])
def test_random_loadings(data, prior):
    """In closed form given W, which is drawn: `lower-bound` mode is another number."""
    model = make(data, prior, kind=LatentLoadings)
    losses = by_svi(model.model, model.guide, FactorizationELBO(), data[0], steps=150)
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    values = {}
    for mode in ("expanded", "lower-bound"):
        with drawing(0):
            values[mode] = FactorizationELBO(mode, 50).loss(model.model, model.guide, data[0])
    assert values["lower-bound"] > values["expanded"] + 1


# --- parameters of one's own


def learned_dispersion(model):
    with model.apart():
        return float(pyro.param("r").detach())


@pytest.mark.slow
def test_fit_model_learns_a_parameter_of_a_statement(spread):
    """And leaves the user's store as it is, where the same name may mean something else."""
    X = spread[0]
    pyro.param("r", torch.tensor(7.0))
    model = make(spread, kind=Dispersed)
    result = fit_model(model, X, max_iter=400)
    r = learned_dispersion(model)
    assert r == pytest.approx(2, rel=0.35)
    assert float(pyro.param("r").detach()) == 7.0
    assert list(pyro.get_param_store()) == ["r"]
    assert result.elbo > fit_model(make(spread), X, max_iter=400).elbo + 100
    objective = FactorizationELBO("expanded", 300)
    again = evaluate_elbo(model, Batches(as_counts(X)), objective, torch_generator(1))
    assert again == pytest.approx(result.elbo, rel=5e-3)


@pytest.mark.slow
def test_a_learned_parameter_is_used_afterwards(spread):
    """By checks, which leave the store alone, and by programs that the user runs."""
    model = make(spread, kind=Dispersed)
    fit_model(model, spread[0], max_iter=400)
    r = learned_dispersion(model)
    drawn = np.stack([*replicated_counts(model, 200, random_state=0)])
    q = model.prior.marginal()
    F = q.loc + q.scale * torch.randn(200, L, N, generator=torch_generator(0))
    rate = (F.exp().mT @ model.W.data.T).detach().double().numpy()
    expected = (rate + rate**2 / r).mean() + rate.var(0).mean()
    assert drawn.var(0).mean() == pytest.approx(expected, rel=0.05)
    check = posterior_predictive_check(
        model, spread[0], statistics=["variance_to_mean"], n_draws=50, random_state=0
    )
    assert check.results[0].p_value > 0.01
    assert not list(pyro.get_param_store())
    for one in (model, copy.deepcopy(model)):
        with pyro.get_param_store().scope(), drawing(0):
            Predictive(one.model, guide=one.guide, num_samples=2)()
            assert float(pyro.param("r").detach()) == pytest.approx(r)


def test_svi_goes_on_from_what_fit_model_learned(spread):
    """And what it learns then is that of the model from then on, even when the store is cleared."""
    model = make(spread, kind=Dispersed)
    fit_model(model, spread[0], max_iter=50)
    r = learned_dispersion(model)
    losses = by_svi(model.model, model.guide, FactorizationELBO(), spread[0], steps=1, lr=0.3)
    assert np.isfinite(losses).all()
    moved = float(pyro.param("r").detach())
    assert abs(np.log(moved / r)) == pytest.approx(0.3, rel=0.01)
    pyro.clear_param_store()
    assert learned_dispersion(model) == pytest.approx(moved)


def test_a_statement_is_trained_by_svi(spread):
    model = make(spread, kind=Dispersed)
    by_svi(model.model, model.guide, FactorizationELBO(), spread[0], steps=400)
    assert float(pyro.param("r").detach()) == pytest.approx(2, rel=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["fit_model", "svi"])
def test_a_parameter_of_a_module_of_pyro_is_learned(spread, by):
    model = make(spread, kind=OfModule)
    if by == "svi":
        by_svi(model.model, model.guide, FactorizationELBO(), spread[0], steps=400)
    else:
        fit_model(model, spread[0], max_iter=400)
    assert float(model.r.detach()) == pytest.approx(2, rel=0.35)


def test_a_parameter_of_pyro_needs_a_module_of_pyro(data):
    with pytest.raises(ValueError, match=r"derive the class from PyroModule\[Poisson"):
        make(data).r = PyroParam(torch.tensor(1.0), constraint=constraints.positive)


@pytest.mark.slow
def test_minibatches_train_a_statement(spread):
    model = make(spread, kind=Dispersed)
    fit_model(model, spread[0], max_iter=400, batch_size=20)
    assert learned_dispersion(model) == pytest.approx(2, rel=0.5)


# --- fit_model


def test_a_fit_says_what_it_is_in_a_line(data):
    result = fit_model(make(data), data[0], max_iter=30)
    bound = f"elbo={result.elbo!r}, elbo_se={result.elbo_se!r}"
    assert repr(result) == f"ModelFit(converged=False, failure=None, {bound})"
    assert isinstance(result.model, PoissonFactorization)
    assert len(result.history) == 30


def test_the_counts_of_anndata_are_taken(data):
    X = data[0].numpy()
    given = anndata.AnnData(sp.csr_matrix(X))
    histories = [fit_model(make(data), one, max_iter=5).history for one in (X, given)]
    np.testing.assert_allclose(*histories, rtol=1e-5)


@pytest.mark.filterwarnings("default::sklearn.exceptions.ConvergenceWarning")
def test_advice_names_what_there_is(data):
    with pytest.warns(ConvergenceWarning, match=r"Increase max_iter or learning_rate\.$"):
        fit_model(make(data), data[0], max_iter=30, learning_rate=0.01)


@pytest.mark.parametrize("prior", ["inducing points", "neighbours"])
def test_hyperparameters_of_kernels_stay(data, prior):
    model = make(data, prior)
    before = {name: value.clone() for name, value in model.prior.kernel.state_dict().items()}
    fit_model(model, data[0], max_iter=20)
    assert before
    for name, value in model.prior.kernel.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("prior", ["independent", "inducing points", "neighbours"])
def test_sites_are_refused(data, prior):
    with pytest.raises(ValueError, match="use_natural_gradients=False"):
        fit_model(make(data, prior, natural=True), data[0])


def test_loadings_give_their_value(data):
    model = make(data)
    assert torch.equal(model.W(), model.W.data)
    assert model.W().requires_grad
