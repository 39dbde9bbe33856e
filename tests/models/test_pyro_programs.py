"""The model as a Pyro program: drawn, conditioned, part of another program, and changed."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from scipy import stats

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import FactorizationELBO, PoissonFactorization
from pnmf_pyro.priors import GaussianPrior
from tests.support import dense_fields
from tests.support.models import SIGMAS
from tests.support.programs import PRIORS, D, L, N, by_svi, make, settled, small_tissue
from tests.support.settings import unconverged
from tests.support.state import drawing

pytestmark = unconverged


@pytest.fixture(scope="module")
def data():
    return small_tissue()


@pytest.fixture
def batch(data) -> Batch:
    return Batch(as_counts(data[0]))


IN_SPACE = pytest.mark.parametrize("prior", PRIORS[1:])
ONE_FIELD = pytest.mark.parametrize("prior", PRIORS[1:3])

# --- drawn and conditioned


@IN_SPACE
@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
@pytest.mark.parametrize("natural", [False, True])
def test_predictions_in_space(data, prior, parallel, natural):
    """Prior draws have the variance of the kernel, posterior ones that of q, X the rates of F.

    Each within SIGMAS standard errors; squares of the fields of one draw depend on one another, so
    the error of their mean is taken over draws.
    """
    model = settled(make(data, prior, True), data, 5 * (prior == "neighbours"))
    if not natural:
        other, q = make(data, prior), model.prior.marginal()
        other.assign(model.W.data.detach(), q.loc.T.exp())
        model = other
    q = model.prior.marginal()
    W = model.W.numpy().astype(float)
    for guide, mean, variance in ((None, 0.0, 1.0), (model.guide, q.loc, q.variance)):
        with drawing(3):
            drawn = Predictive(model.model, guide=guide, num_samples=200, parallel=parallel)()
        F, X = drawn["F"].detach().double(), drawn["X"].double().numpy()
        assert (F.shape, X.shape) == ((200, L, N), (200, 1, N, D))
        squares = ((F - mean).square() / variance).detach().mean((1, 2)).numpy()
        assert abs(squares.mean() - 1) < SIGMAS * squares.std() / 200**0.5
        rate = (F.exp().mT.numpy() @ W.T)[:, None]
        residual = (X - rate) / np.sqrt(rate)
        assert abs(residual.mean()) < SIGMAS * residual.size**-0.5


@ONE_FIELD
def test_picture_and_shapes_in_space(data, batch, prior):
    """What `pyro.render_model` draws, and what `format_shapes` prints."""
    model = make(data, prior)
    chain = ["u", "F", "X"] if prior == "inducing points" else ["F", "X"]
    for args, observed in (((), []), ((batch,), ["X"])):
        found = get_model_relations(model.model, model_args=args)
        assert found["sample_sample"] == {
            name: chain[max(0, i - 1) : i] for i, name in enumerate(chain)
        }
        assert found["observed"] == observed
        assert found["plate_sample"] == {"samples": ["F", "X"], "components": ["F"]}
    with drawing(0):
        shapes = poutine.trace(model.model).get_trace(batch).format_shapes()
    lines = [line.split() for line in shapes.splitlines()]
    assert ["F", "dist", str(L), str(N), "|"] in lines
    assert ["X", "dist", str(N), "|", str(D)] in lines
    assert (["u", "dist", "|", str(L), "25"] in lines) == (len(chain) == 3)


@ONE_FIELD
def test_joint_density_given_the_latent_values(data, prior):
    """By dense matrices: of F with all others as neighbours, of u and of F given u."""
    X, places = data[0][:14].double(), data[1][torch.arange(14)]
    model = make((X, places), prior, dtype=torch.float64, M=6, K=13)
    x, F = places.coordinates.numpy(), np.random.default_rng(0).normal(size=(L, 14))
    known = {"F": torch.from_numpy(F)}
    K = dense_fields.covariance("Matern32", x, x, 1.0, 1.0)
    if prior == "inducing points":
        u = np.random.default_rng(1).normal(size=(L, 6))
        known["u"] = torch.from_numpy(u)
        Kzz = K[:6, :6] + 1e-5 * np.eye(6)  # with the jitter
        A = np.linalg.solve(np.linalg.cholesky(Kzz), K[:6])
        spread = np.sqrt((1 - (A**2).sum(0)).clip(1e-5))
        expected = stats.norm.logpdf(u).sum() + stats.norm.logpdf(F, u @ A, spread).sum()
    else:
        expected = stats.multivariate_normal(np.zeros(14), K).logpdf(F).sum()
    rate = np.exp(F).T @ model.W.numpy().T
    expected += stats.poisson.logpmf(X.numpy(), rate).sum()
    trace = poutine.trace(poutine.condition(model.model, known)).get_trace(X)
    assert float(trace.log_prob_sum().detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nuts_in_space(data, dtype):
    small = (data[0][:20, :5].to(dtype), data[1][torch.arange(20)])
    model = make(small, "inducing points", dtype=dtype)
    with drawing(0):
        kernel = NUTS(model.model, max_tree_depth=4)
        mcmc = MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
        mcmc.run(small[0])
    samples = mcmc.get_samples()
    assert samples["F"].shape == (5, L, 20)
    assert samples["u"].isfinite().all()
    assert samples["F"].std(0).min() > 0


# --- part of another program


class Outcome:
    """An outcome z of each sample, which the log-factors predict."""

    def __init__(self, model, z):
        self.m, self.z = model, z

    def model(self, batch):
        pyro.module("factorization", self.m)
        beta = pyro.sample("beta", dist.Normal(0.0, 3.0).expand([L]).to_event(1))
        samples = batch.plate(self.m.N)
        F = self.m.prior.model(batch, samples)
        with samples:
            pyro.sample("X", self.m.likelihood(F, batch), obs=batch.counts)
            return pyro.sample("z", dist.Normal(beta @ F, 0.3), obs=self.z)

    def guide(self, batch):
        pyro.module("factorization", self.m)
        loc = pyro.param("loc", torch.zeros(L))
        scale = pyro.param("scale", 0.1 * torch.ones(L), constraint=constraints.positive)
        pyro.sample("beta", dist.Normal(loc, scale).to_event(1))
        return self.m.prior.guide(batch, batch.plate(self.m.N))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "objective"),
    [
        *((prior, FactorizationELBO) for prior in PRIORS),
        ("inducing points", Trace_ELBO),
        ("independent", TraceMeanField_ELBO),
    ],
)
def test_factors_that_predict_an_outcome(data, batch, prior, objective):
    """Both slopes are found, a little shrunk for the uncertainty of factors."""
    reference = settled(make(data, prior, True), data)
    q = reference.prior.marginal().loc.detach()
    z = torch.tensor([1.0, -2.0]) @ q + 0.3 * torch.randn(N, generator=torch_generator(0))
    model = make(data, prior)
    model.assign(reference.W.data.detach(), q.T.exp())
    joint = Outcome(model, z)
    losses = by_svi(joint.model, joint.guide, objective(), batch, steps=250)
    assert np.mean(losses[-50:]) < np.mean(losses[:5])
    slopes = pyro.param("loc").detach()
    assert 0.4 < slopes[0] < 1.3
    assert -2.6 < slopes[1] < -0.8
    predicted = slopes @ model.prior.marginal().loc.detach()
    assert np.corrcoef(predicted, z)[0, 1] > 0.9


def test_the_whole_model_inside_a_program(data, batch):
    """Its own statements stand in the trace, and F is read from it."""
    model = make(data)

    def program(batch):
        with poutine.trace() as inner:
            model.model(batch)
        F = inner.trace.nodes["F"]["value"]
        with pyro.plate("outcomes", N, dim=-1):
            return pyro.sample("z", dist.Normal(F.sum(-2), 1.0))

    with drawing(0):
        trace = poutine.trace(program).get_trace(batch)
        drawn = Predictive(program, guide=model.guide, num_samples=3)(batch)
    assert [name for name in trace.nodes if name in "FXz"] == ["F", "X", "z"]
    assert trace.nodes["z"]["value"].shape == (N,)
    assert drawn["z"].shape == (3, 1, N)


def test_two_models_under_scopes(data):
    """Their statements have names of their own, and both are trained."""
    X = data[0]
    parts = {"first": make(data), "second": make(data, "inducing points")}

    def program(which):
        def run(X):
            for name, model in parts.items():
                with scope(prefix=name):
                    getattr(model, which)(X)

        return run

    before = [model.W.numpy() for model in parts.values()]
    with drawing(0):
        trace = poutine.trace(program("model")).get_trace(X)
    assert {"first/F", "first/X", "second/u", "second/F", "second/X"} <= set(trace.nodes)
    losses = by_svi(program("model"), program("guide"), Trace_ELBO(), X, steps=300)
    assert np.mean(losses[-20:]) < 0.6 * losses[0]
    for W, model in zip(before, parts.values(), strict=True):
        assert np.abs(model.W.numpy() - W).max() > 0.1


def test_a_program_is_needed_and_not_the_module(data, batch):
    """`pyro.render_model(m)` and `SVI(m, m.guide, ...)`, with or without data."""
    model = make(data)
    with pytest.raises(ValueError, match=r"Give Pyro its programs, model\.model and model\.guide"):
        get_model_relations(model)
    with pytest.raises(ValueError, match=r"model\.model and model\.guide"):
        by_svi(model, model.guide, Trace_ELBO(), batch, steps=1)
    with pytest.raises(ValueError, match=r"model\.model and model\.guide"):
        model(batch)
    terms, _, _ = model(E=2)
    assert terms["rate_samples"].shape == (2, D, N)


# --- as a module of Pyro


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("natural", [False, True])
def test_conversion_to_a_module_of_pyro(data, batch, prior, natural):
    model = make(data, prior, natural)
    with drawing(0):
        expected = Trace_ELBO().loss(model.model, model.guide, batch)
    to_pyro_module_(model)
    assert isinstance(model, PyroModule[PoissonFactorization])
    assert isinstance(model.prior, PyroModule)
    with drawing(0):
        assert Trace_ELBO().loss(model.model, model.guide, batch) == pytest.approx(expected)
    if not natural:
        W = model.W.numpy()
        losses = by_svi(model.model, model.guide, FactorizationELBO(), batch, steps=60)
        assert losses[-1] < losses[0]
        assert np.abs(model.W.numpy() - W).max() > 0.1
    for kind in (model, make(data)):
        with pytest.raises(ValueError, match=r"W cannot be a PyroSample; write W = pyro\.sample"):
            kind.W = PyroSample(dist.Gamma(1.0, 1.0).expand([D, L]).to_event(2))


def test_a_prior_in_plain_plates_has_the_same_bound(data, batch):
    """Pyro says that its plates are fewer than the guide's, which stand in `local_plates`."""

    class Plain(GaussianPrior):
        def model(self, batch, samples):
            with samples:
                shape = (L, batch.counts.shape[0])
                return pyro.sample("F", dist.Normal(torch.zeros(shape), 1.0))

    y, objective = data[0].T, FactorizationELBO("lower-bound")
    model = PoissonFactorization(Plain(y, L), y, L, random_state=0)
    with pytest.warns(UserWarning, match="Found plate statements in guide but not model"):
        loss = objective.loss(model.model, model.guide, batch)
    assert loss == pytest.approx(objective.loss(make(data).model, make(data).guide, batch))
