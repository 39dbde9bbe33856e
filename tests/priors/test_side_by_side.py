"""Priors side by side: their bound, posterior and predictions against those of each alone."""

import copy
import itertools
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import stats

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import FactorizationELBO, PoissonFactorization
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior, Prior, SideBySide
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant
from tests.support import dense_fields
from tests.support.data import tissue
from tests.support.state import drawing

N, D = 30, 12
SCALE = 1.25


@pytest.fixture(scope="module")
def counts():
    return tissue(N, D, 3)[0].astype(float)


@pytest.fixture(scope="module")
def places():
    return Places(torch.from_numpy(tissue(N, D, 3)[1]))


def parts_of(places, natural=True, L=(2, 1), kind="inducing points"):
    """A field, and a prior that knows no places, in float64."""
    y = torch.empty(D, len(places), dtype=torch.float64, device="meta")
    settings = {"use_natural_gradients": natural, "dtype": torch.float64}
    field = (
        SVGP("Matern32", places, places[torch.arange(10)], L[0], **settings)
        if kind == "inducing points"
        else LCGP("Matern32", places, L[0], K=8, **settings)
    )
    return field, GaussianPrior(y, L[1], SCALE, natural)


def model_of(prior, seed=0):
    y = torch.empty(D, prior.N, dtype=torch.float64, device="meta")
    model = PoissonFactorization(prior, y, prior.L, "multiplicative", random_state=seed)
    random = np.random.default_rng(seed)
    exp_F = torch.from_numpy(np.exp(0.5 * random.normal(size=(prior.N, prior.L))))
    model.assign(torch.from_numpy(random.gamma(0.7, 2.0, (D, prior.L))) + 0.05, exp_F, scale=0.3)
    return model


def marginal_of(prior):
    with torch.no_grad():
        return prior.marginal()


def steps_of(model, counts, n=20, batch_size=None):
    steps = [(SiteSteps(part), Constant()) for part in model.prior.parts]
    objective = FactorizationELBO("lower-bound", newton=True)
    batches = Batches(as_counts(counts), batch_size)
    return train(
        model, batches, objective, steps, torch_generator(0), max_iter=n, warn=False
    ).history


@pytest.mark.parametrize("kind", ["inducing points", "neighbours"])
def test_of_one_prior_is_that_prior(counts, places, kind):
    alone, _ = parts_of(places, kind=kind)
    models = model_of(copy.deepcopy(alone)), model_of(SideBySide(copy.deepcopy(alone)))
    histories = [steps_of(model, counts) for model in models]
    assert histories[0] == histories[1]
    one, other = (marginal_of(model.prior) for model in models)
    assert torch.equal(one.loc, other.loc)
    assert torch.equal(one.scale, other.scale)
    new = Places(places.coordinates[:5] + 0.1)
    one, other = (model.prior.at(new).marginal() for model in models)
    assert torch.equal(one.loc, other.loc)


@pytest.mark.parametrize("kind", ["inducing points", "neighbours"])
@pytest.mark.parametrize("mode", ["lower-bound", "expanded"])
def test_divergence_is_the_sum_and_likelihood_that_of_all_components(counts, places, kind, mode):
    prior = SideBySide(*parts_of(places, kind=kind))
    model = model_of(prior)
    steps_of(model, counts, 5)
    batch = Batch(as_counts(counts))
    objective = FactorizationELBO(mode, "fixed" if mode == "expanded" else 3)
    with torch.no_grad():
        terms = objective.terms(model.model, model.guide, batch)
    kl = sum(float(_divergence(part, len(counts))) for part in prior.parts)
    assert float(terms["kl"]) == pytest.approx(kl, rel=1e-9)
    q = marginal_of(prior)
    assert q.loc.shape == (3, N)
    if mode == "lower-bound":
        m, s, W = q.loc.numpy(), q.scale.numpy(), model.W.numpy()
        log_rate = np.log(np.exp(m).T @ W.T)
        rate = np.exp(m + s**2 / 2).T @ W.T
        expected = stats.poisson.logpmf(counts, 1).sum() + counts.size
        expected += (counts * log_rate - rate).sum()
        assert float(terms["log_likelihood"]) == pytest.approx(expected, rel=1e-9)


def _divergence(part: Prior, n: int) -> torch.Tensor:
    """KL(q || p) of a part alone, from its own programs."""
    model = model_of(copy.deepcopy(part))
    model.prior.load_state_dict(part.state_dict())
    with torch.no_grad():
        batch = Batch(as_counts(np.ones((n, D))))
        return FactorizationELBO("lower-bound").terms(model.model, model.guide, batch)["kl"]


@pytest.mark.slow
@pytest.mark.parametrize("natural", [True, False])
def test_pyros_own_bounds_agree(counts, places, natural):
    """By draws, within five standard errors; without warnings of programs that do not match."""
    model = model_of(SideBySide(*parts_of(places, natural)))
    batch = Batch(as_counts(counts))
    with torch.no_grad():
        exact = -FactorizationELBO("expanded", 4000).loss(model.model, model.guide, batch)
    for objective in (Trace_ELBO(), TraceMeanField_ELBO()):
        with drawing(1), torch.no_grad(), pyro.validation_enabled(True):
            draws = [-objective.loss(model.model, model.guide, batch) for _ in range(300)]
        assert abs(np.mean(draws) - exact) < 5 * np.std(draws) / 300**0.5


def test_bound_is_below_the_evidence():
    """By brute force, over a grid of the two log-factors of each sample."""
    X = np.random.default_rng(0).poisson(3.0, (4, D)).astype(float)
    y = torch.empty(D, 4, dtype=torch.float64, device="meta")
    scales = 0.8, 1.4
    prior = SideBySide(*(GaussianPrior(y, 1, s, use_natural_gradients=True) for s in scales))
    model = model_of(prior)
    lower = steps_of(model, X, 60)[-1]
    with drawing(0):
        bound = -FactorizationELBO("expanded", 4000).loss(
            model.model, model.guide, Batch(as_counts(X))
        )
    grid = np.arange(-6.0, 5.0, 0.02)
    F = np.array(list(itertools.product(grid, grid)))
    log_prior = sum(stats.norm.logpdf(F[:, k], 0, s) for k, s in enumerate(scales))
    rate = np.exp(F) @ model.W.numpy().T
    evidence = 0.0
    for x in X:
        log_joint = stats.poisson.logpmf(x, rate).sum(1) + log_prior
        evidence += np.logaddexp.reduce(log_joint) + 2 * np.log(0.02)
    assert lower < bound < evidence < bound + 3


def test_natural_steps_are_those_of_each_part(counts, places):
    """Given sites: Gaussian-process regression of a field, independent normals of the rest."""
    field = SVGP("Matern32", places, places, 2, use_natural_gradients=True, dtype=torch.float64)
    prior = SideBySide(field, parts_of(places)[1])
    random = np.random.default_rng(2)
    h, y = random.gamma(2.0, size=(3, N)), random.normal(size=(3, N))
    prior.posterior_from_sites(*(torch.from_numpy(v) for v in (h, h * y)))
    assert prior.natural
    for found, wanted in zip(prior.sites()[:2], (h, h * y), strict=True):
        np.testing.assert_allclose(found.detach(), wanted, rtol=1e-9)
    x, q = places.coordinates.numpy(), marginal_of(prior)
    K = dense_fields.covariance("Matern32", x, x, 1.0, 1.0)
    for l in range(2):
        mean, cov = dense_fields.regression(K, K, K, 0.0, y[l], 1 / h[l])
        np.testing.assert_allclose(q.loc[l], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(q.variance[l], np.diag(cov), rtol=1e-3, atol=1e-4)
    precision = 1 / SCALE**2 + h[2]
    np.testing.assert_allclose(q.loc[2], h[2] * y[2] / precision, rtol=1e-9)
    np.testing.assert_allclose(q.variance[2], 1 / precision, rtol=1e-9)
    apart = prior.apart_from_own(torch.from_numpy(h))
    assert torch.equal(apart[:2], field.apart_from_own(torch.from_numpy(h[:2])))
    np.testing.assert_allclose(apart[2], 1 / SCALE**2)


def test_at_new_places_fields_go_on_and_the_rest_is_its_prior(counts, places):
    prior = SideBySide(*parts_of(places))
    model = model_of(prior)
    steps_of(model, counts)
    new = Places(places.coordinates[:6] + 0.2)
    at = prior.at(new)
    with torch.no_grad():
        q, of_field = at.marginal(), prior.parts[0].at(new).marginal()
    assert (at.L, at.N) == (3, 6)
    assert torch.equal(q.loc[:2], of_field.loc)
    assert torch.equal(q.loc[2], torch.zeros(6, dtype=torch.float64))
    np.testing.assert_allclose(q.scale[2], SCALE)
    with drawing(0):
        drawn = at.draws(4000)(None)
        some = at.draws(3)(torch.tensor([1, 4]))
    assert some.shape == (3, 3, 2)
    np.testing.assert_allclose(drawn.mean(0), q.loc, atol=5 * SCALE / 4000**0.5)
    np.testing.assert_allclose(drawn.std(0), q.scale, rtol=0.1)
    before = prior.before(new)
    np.testing.assert_allclose(before.scale[:, 0], [1, 1, SCALE])


def test_places_are_refused_where_no_part_knows_any(places):
    prior = SideBySide(parts_of(places)[1], parts_of(places)[1])
    assert prior.places is None
    with pytest.raises(ValueError, match="know nothing of places"):
        prior.at(places)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inducing points", "neighbours"])
def test_batches_settle_where_all_samples_do(counts, places, kind):
    """Part by part: a divergence by samples is scaled by the batch, that at inducing points not."""
    models = [model_of(SideBySide(*parts_of(places, kind=kind))) for _ in range(2)]
    steps_of(models[0], counts, 60)
    steps_of(models[1], counts, 400, batch_size=10)
    one, other = (marginal_of(model.prior) for model in models)
    torch.testing.assert_close(one.loc, other.loc, rtol=0, atol=0.05)
    torch.testing.assert_close(one.scale, other.scale, rtol=0.02, atol=0)


def test_draws_are_those_of_the_parts(counts, places):
    prior = SideBySide(*parts_of(places))
    steps_of(model_of(prior), counts)
    with drawing(0):
        draws = prior.draws(3000)(None)
    q, draws = marginal_of(prior), draws.detach()
    np.testing.assert_allclose(draws.mean(0), q.loc, atol=5 / 3000**0.5)
    assert abs(float(((draws - q.loc) / q.scale).square().mean()) - 1) < 0.1
    of_field = np.corrcoef(((draws - q.loc) / q.scale)[:, 0].T)
    assert np.abs(of_field - np.eye(N)).max() > 0.2  # joint over places


def test_statements_have_names_of_their_own(counts, places):
    field, rest = parts_of(places)
    prior = SideBySide(field, rest, copy.deepcopy(field))
    model = model_of(prior)
    with drawing(0):
        trace = poutine.trace(model.model).get_trace(Batch(as_counts(counts)))
    latent = {n for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    plates = {"samples", "part_0_components", "part_1_components", "part_2_components"}
    plates |= {"components"}
    assert latent - plates == {f"part_{k}_F" for k in range(3)} | {"part_0_u", "part_2_u"}
    together = torch.cat([trace.nodes[f"part_{k}_F"]["value"] for k in range(3)])
    assert torch.equal(trace.nodes["F"]["value"], together)
    frames = {frame.name for frame in trace.nodes["part_1_F"]["cond_indep_stack"]}
    assert frames == {"samples", "part_1_components"}


class Hierarchical(GaussianPrior):
    """A prior of a user's own, whose level is drawn."""

    def model(self, batch, samples):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with self.local_plates(batch, samples):
            return pyro.sample("F", dist.Normal(level.to(self.scale_pf), self.scale_pf))

    def guide(self, batch, samples):
        pyro.sample("level", dist.Normal(0.3, 0.1))
        return super().guide(batch, samples)


@pytest.mark.slow
def test_with_a_prior_of_ones_own(counts, places, caplog):
    """What closed forms do not integrate out is averaged over draws, as it is alone."""
    y = torch.empty(D, N, dtype=torch.float64, device="meta")
    prior = SideBySide(parts_of(places, natural=False)[0], Hierarchical(y, 1))
    model = model_of(prior)
    batch = Batch(as_counts(counts))
    with drawing(0), torch.no_grad():
        values = [
            -FactorizationELBO("lower-bound", 1).loss(model.model, model.guide, batch)
            for _ in range(200)
        ]
        exact = [-Trace_ELBO().loss(model.model, model.guide, batch) for _ in range(1500)]
        tight = [
            -FactorizationELBO("expanded", 20).loss(model.model, model.guide, batch)
            for _ in range(100)
        ]
    assert np.std(values) > 0
    error = (np.var(exact) / 1500 + np.var(tight) / 100) ** 0.5
    assert abs(np.mean(tight) - np.mean(exact)) < 5 * error


def test_a_prior_in_prior_counts_as_its_parts_and_copies_hold_all(counts, places):
    field, rest = parts_of(places)
    prior = SideBySide(SideBySide(field, rest), copy.deepcopy(rest))
    assert [part.L for part in prior.parts] == [2, 1, 1]
    assert prior.L == 4
    assert prior.fields == (field,)
    again = pickle.loads(pickle.dumps(prior))
    assert torch.equal(again.marginal().loc, prior.marginal().loc)
    again.load_state_dict(prior.state_dict())


def test_what_cannot_stand_side_by_side_is_refused(places):
    field, rest = parts_of(places)
    with pytest.raises(ValueError, match="not as a list"):
        SideBySide([field, rest])
    with pytest.raises(ValueError, match="one prior at least"):
        SideBySide()
    with pytest.raises(ValueError, match="same samples"):
        SideBySide(field, GaussianPrior(torch.empty(D, N + 1), 1, use_natural_gradients=True))
    with pytest.raises(ValueError, match="in sites or none"):
        SideBySide(field, parts_of(places, natural=False)[1])
    moved = parts_of(Places(places.coordinates + 1))[0]
    with pytest.raises(ValueError, match="same places"):
        SideBySide(field, moved)
    with pytest.raises(ValueError, match="SiteSteps\\(part\\)"):
        SiteSteps(SideBySide(field, rest))
