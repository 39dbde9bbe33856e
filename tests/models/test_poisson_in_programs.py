"""The model and PoissonFactors under Pyro's own tools, with dense and with sparse counts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    JitTrace_ELBO,
    Predictive,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.inspect import get_dependencies, get_model_relations
from scipy import stats

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.models.poisson import PoissonFactors
from tests.support import dense as ref
from tests.support.models import PRIOR_SCALE, SIGMAS, counts_of, double, model_of
from tests.support.state import drawing

N, D, L = 20, 5, 2


@pytest.fixture
def problem() -> ref.Problem:
    return ref.simulate_problem(3, N=N, D=D, L=L)


@pytest.fixture
def model(problem, dtype):
    return model_of(problem, dtype=dtype)


@pytest.fixture
def batch(problem, layout, dtype) -> Batch:
    return Batch(counts_of(problem.X, layout, dtype))


def log_joint(problem, F: np.ndarray) -> float:
    log_prior = stats.norm.logpdf(F, 0, PRIOR_SCALE).sum()
    return stats.poisson.logpmf(problem.X, ref.rates(F, problem.W)).sum() + log_prior


# --- the model under Pyro's tools


@pytest.mark.parametrize("relations", [get_model_relations, get_dependencies])
def test_picture_of_the_model(model, batch, relations):
    """Which is what `pyro.render_model` draws."""
    expected = {"observed": [], "sample_sample": {"F": [], "X": ["F"]}}
    for args in ((), (batch,)):
        found = relations(model.model, model_args=args)
        if relations is get_dependencies:
            assert found["prior_dependencies"]["X"] == {"F": set(), "X": set()}
            continue
        assert found["sample_sample"] == expected["sample_sample"]
        assert found["sample_dist"]["X"] == "PoissonFactors"
        assert found["observed"] == (["X"] if args else [])
        assert found["plate_sample"] == {"samples": ["F", "X"], "components": ["F"]}


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
def test_predictive_with_data_returns_them(model, batch, problem, parallel):
    predictive = Predictive(model.model, guide=model.guide, num_samples=5, parallel=parallel)
    with drawing(0):
        samples = predictive(batch)
    assert samples["F"].shape == (5, L, N)
    X = samples["X"]
    assert X.shape == (5, 1, N, D)
    assert X.dtype == batch.counts.dtype
    assert np.array_equal(X.numpy(), np.broadcast_to(problem.X, X.shape))


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
def test_one_predictive_draw(model, batch, problem, parallel):
    with drawing(0):
        samples = Predictive(model.model, num_samples=1, parallel=parallel)(batch)
    assert np.array_equal(samples["X"].numpy()[0, 0], problem.X)


def test_predictive_without_data_draws_them(model):
    with drawing(0):
        samples = Predictive(model.model, num_samples=5)()
    assert samples["F"].shape == (5, L, N)
    assert samples["X"].shape == (5, 1, N, D)
    assert len(np.unique(samples["X"].numpy().reshape(5, -1), axis=0)) == 5


def test_predictive_weighed_by_trace(model, batch):
    with drawing(0):
        trace = Predictive(model.model, guide=model.guide, num_samples=5).get_vectorized_trace(
            batch
        )
    assert trace.nodes["X"]["value"] is batch.counts


def test_trace_formats_and_sums(model, batch, problem, dtype):
    with drawing(0):
        trace = poutine.trace(model.model).get_trace(batch)
    value = trace.log_prob_sum()
    assert value.dtype == dtype
    expected = log_joint(problem, trace.nodes["F"]["value"].double().numpy())
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    lines = [line.split() for line in trace.format_shapes().splitlines()]
    assert ["X", "dist", str(N), "|", str(D)] in lines
    assert ["value", str(N), "|", str(D)] in lines
    trace.detach_()
    assert trace.nodes["X"]["value"] is batch.counts
    assert trace.copy().nodes["X"]["value"] is batch.counts


def test_condition_on_the_factors(model, batch, problem, dtype):
    F = torch.zeros(L, N, dtype=dtype)
    trace = poutine.trace(poutine.condition(model.model, {"F": F})).get_trace(batch)
    expected = log_joint(problem, np.zeros((L, N)))
    assert float(trace.log_prob_sum().detach()) == pytest.approx(expected, rel=1e-5)


def test_importance_weights(model, batch, problem):
    with drawing(0):
        posterior = Importance(model.model, model.guide, num_samples=10).run(batch)
    expected = []
    for trace in posterior.exec_traces:
        F = trace.nodes["F"]["value"].detach().double().numpy()
        q = stats.norm.logpdf(F, problem.mean, problem.scale).sum()
        expected.append(log_joint(problem, F) - q)
    weights = np.array([float(w) for w in posterior.log_weights])
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    assert torch.isfinite(posterior.get_log_normalizer())


def test_nuts(model, batch, dtype):
    """In the type of the model throughout, and up the posterior density."""
    with drawing(0):
        mcmc = MCMC(NUTS(model.model), num_samples=5, warmup_steps=5, disable_progbar=True)
        mcmc.run(batch)
    F = mcmc.get_samples()["F"]
    assert F.shape == (5, L, N)
    assert F.dtype == dtype
    densities = [
        poutine.trace(poutine.condition(model.model, {"F": field})).get_trace(batch).log_prob_sum()
        for field in (torch.zeros_like(F[0]), F[-1])
    ]
    assert densities[1] > densities[0]


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.int64])
def test_nuts_given_a_tensor_of_any_type(problem, given):
    model = model_of(problem, dtype=torch.float32)
    conditioned = poutine.condition(model.model, {"X": torch.tensor(problem.X).to(given)})
    with drawing(0):
        mcmc = MCMC(NUTS(conditioned), num_samples=2, warmup_steps=2, disable_progbar=True)
        mcmc.run()
    assert mcmc.get_samples()["F"].dtype == torch.float32


@pytest.mark.parametrize(
    "objective", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, ReweightedWakeSleep]
)
def test_objectives_of_pyro(model, batch, problem, objective):
    """Of one q(F) all but certain: each is then the density at its mean."""
    model.prior.assign(double(problem.mean), torch.full((L, N), 1e-4).double())
    with drawing(0):
        loss = objective(max_plate_nesting=2).loss(model.model, model.guide, batch)
    loss = loss[0] if isinstance(loss, tuple) else loss
    entropy = L * N * stats.norm(scale=1e-4).entropy()
    expected = -log_joint(problem, problem.mean) - entropy
    # The entropy at draws has a standard deviation of sqrt(1 / 2) for each F_il.
    assert abs(float(loss) - expected) < SIGMAS * np.sqrt(L * N / 2) + 0.5


def test_vectorised_particles(model, batch, dtype):
    objective = Trace_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=2)
    with drawing(0):
        together = objective.loss(model.model, model.guide, batch)
        alone = [Trace_ELBO().loss(model.model, model.guide, batch) for _ in range(300)]
    error = np.std(alone) * np.sqrt(2 / 300)
    assert abs(together - np.mean(alone)) < SIGMAS * error


# --- programs of one's own


def gamma_loadings(X, n_components=L):
    """Loadings with a gamma prior, as one event."""
    n, d = X.shape
    W = pyro.sample("W", dist.Gamma(2.0, 1.0).expand([d, n_components]).to_event(2))
    samples = pyro.plate("samples", n, dim=-1)
    with pyro.plate("components", n_components, dim=-2), samples:
        F = pyro.sample("F", dist.Normal(0.0, 1.0))
    with samples:
        return pyro.sample("X", PoissonFactors(F, W), obs=X)


def gamma_loadings_in_plates(X, n_components=L):
    """The same, drawn in the plates of features and components; sized, with latent totals."""
    n, d = X.shape
    with pyro.plate("features", d, dim=-2), pyro.plate("loadings", n_components, dim=-1):
        W = pyro.sample("W", dist.Gamma(2.0, 1.0))
    samples = pyro.plate("samples", n, dim=-1)
    with samples:
        s = pyro.sample("s", dist.LogNormal(0.0, 0.1))
    with pyro.plate("components", n_components, dim=-2), samples:
        F = pyro.sample("F", dist.Normal(0.0, 1.0))
    with samples:
        return pyro.sample("X", PoissonFactors(F, W, s), obs=X)


PROGRAMS = pytest.mark.parametrize("program", [gamma_loadings, gamma_loadings_in_plates])


@PROGRAMS
def test_latent_loadings_with_vectorised_particles(program, problem, layout):
    """Density of each particle as that of its own values, by scipy."""
    counts, particles = counts_of(problem.X, layout, torch.float32), 4
    with drawing(0):
        vectorised = pyro.plate("particles", particles, dim=-3)(program)
        trace = poutine.trace(vectorised).get_trace(counts)
    trace.compute_log_prob()
    found = trace.nodes["X"]["log_prob"]
    assert found.shape == (particles, 1, N)
    values = {name: trace.nodes[name]["value"].numpy().astype(float) for name in ("F", "W")}
    W = values["W"].reshape(particles, D, L)
    s = trace.nodes["s"]["value"].numpy().astype(float) if "s" in trace else np.ones((4, 1, N))
    for e in range(particles):
        rate = ref.rates(values["F"][e], W[e], s[e, 0])
        expected = stats.poisson.logpmf(problem.X, rate).sum(1)
        np.testing.assert_allclose(found[e, 0], expected, rtol=1e-4, atol=1e-4)


@PROGRAMS
def test_training_with_an_autoguide(program, problem, layout):
    """One particle and many at once give one objective at the same point; training lowers it."""
    counts = counts_of(problem.X, layout, torch.float32)
    with drawing(0):
        guide = AutoDelta(program)
        svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step(counts) for _ in range(60)]
        many = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
        one = Trace_ELBO().loss(program, guide, counts)
        assert many.loss(program, guide, counts) == pytest.approx(one, rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


@PROGRAMS
def test_pictures_and_predictions_of_own_programs(program, problem, layout):
    counts = counts_of(problem.X, layout, torch.float32)
    relations = get_model_relations(program, model_args=(counts,))
    assert set(relations["sample_sample"]["X"]) == set(relations["sample_sample"]) - {"X"}
    assert relations["observed"] == ["X"]
    with drawing(0):
        guide = AutoNormal(program)
        guide(counts)
        samples = Predictive(program, guide=guide, num_samples=3)(counts)
    assert np.array_equal(samples["X"][0].numpy().reshape(N, D), problem.X)


def test_nuts_over_factors_and_loadings(problem, layout):
    with drawing(0):
        kernel = NUTS(gamma_loadings, max_tree_depth=4)
        mcmc = MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
        mcmc.run(counts_of(problem.X, layout, torch.float32))
    samples = mcmc.get_samples()
    assert samples["W"].shape == (5, D, L)
    assert (samples["W"] > 0).all()


def test_loadings_chosen_by_an_enumerated_number(problem, layout):
    """The loss is the exact marginal log-likelihood of two loadings, equally likely before."""
    counts, F = counts_of(problem.X, layout), double(problem.mean)
    choices = torch.stack([double(problem.W), 2 * double(problem.W)])

    def program():
        equal = dist.Categorical(torch.ones(2).double())
        number = pyro.sample("number", equal, infer={"enumerate": "parallel"})
        with pyro.plate("samples", N, dim=-1):
            pyro.sample("X", PoissonFactors(F, choices[number]), obs=counts)

    rates = [ref.rates(problem.mean, W.numpy()) for W in choices]
    expected = [stats.poisson.logpmf(problem.X, rate).sum() + np.log(0.5) for rate in rates]
    loss = TraceEnum_ELBO(max_plate_nesting=2).loss(program, lambda: None)
    assert -loss == pytest.approx(np.logaddexp(*expected))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_refused(problem, layout):
    program = partial(gamma_loadings, counts_of(problem.X, layout, torch.float32))
    with drawing(0):
        guide = AutoNormal(program)
        guide()
        svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.05}), JitTrace_ELBO())
        with pytest.raises(NotImplementedError, match="take Trace_ELBO in place of JitTrace_ELBO"):
            svi.step()
        mcmc = MCMC(NUTS(program, jit_compile=True), num_samples=1, disable_progbar=True)
        with pytest.raises(NotImplementedError, match="jit_compile=False"):
            mcmc.run()
