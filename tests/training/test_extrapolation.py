"""Extrapolated steps: the bound never falls, and all priors are extrapolated by one rule."""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from sklearn.exceptions import ConvergenceWarning

import pnmf_pyro
from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.gp import neighborhoods
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training import extrapolation
from pnmf_pyro.training.loadings import ClosedFormLoadings, ClosedFormScale
from pnmf_pyro.training.loop import evaluate_elbo, train
from pnmf_pyro.training.schedules import Constant
from tests.support.svgp import scattered

N, D, L = 40, 25, 3
DTYPE = torch.float64
PRIORS = {
    "independent": lambda y, x: GaussianPrior(y, L, 1.3, use_natural_gradients=True),
    "over samples": lambda y, x: spatial(SVGP, x, x),
    "over inducing points": lambda y, x: spatial(SVGP, x, x[torch.arange(12)]),
    "neighbours": lambda y, x: spatial(LCGP, x, K=12),
}


def spatial(kind, *args, **settings):
    prior = kind("Matern32", *args, L, use_natural_gradients=True, dtype=DTYPE, **settings)
    prior.mean.copy_(torch.linspace(-0.5, 0.5, L))
    return prior


def simulated(seed=0):
    random = np.random.default_rng(seed)
    F, W = random.normal(size=(N, L)), random.gamma(0.3, 3.0, size=(D, L))
    return random.poisson(np.exp(F) @ W.T).astype(float)


def problem(name, seed=0):
    """A model away from its optimum, its counts, and the steps that settle it."""
    X, random = simulated(seed), np.random.default_rng(seed + 100)
    y = torch.empty(D, N, dtype=DTYPE, device="meta")
    prior = PRIORS[name](y, scattered(N, seed=seed))
    model = PoissonFactorization(prior, y, L, "multiplicative", "lower-bound", random_state=0)
    start = torch.from_numpy(random.uniform(0.5, 1.5, size=(D, L)))
    model.assign(start, torch.from_numpy(random.gamma(2.0, 0.5, size=(N, L))))
    steps = [SiteSteps(prior), ClosedFormLoadings(model.W, model.expected_totals, model.levels)]
    if name == "independent":
        steps.append(ClosedFormScale(prior))
    return model, as_counts(X), steps


def settle(model, counts, steps, max_iter):
    objective = FactorizationELBO("lower-bound", newton=True)
    return train(
        model,
        Batches(counts),
        objective,
        [(step, Constant()) for step in steps],
        torch_generator(0),
        max_iter=max_iter,
        monotone=True,
        warn=False,
    ).history


def elbo_of(model, counts):
    objective = FactorizationELBO("lower-bound")
    return evaluate_elbo(model, Batches(counts), objective, torch_generator(0))


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_the_bound_never_falls(name, beta, monkeypatch):
    monkeypatch.setattr(extrapolation, "FIRST", beta)
    model, counts, steps = problem(name, seed=1)
    history = settle(model, counts, steps, 80)
    assert (np.diff(history) >= -1e-7 * abs(history[0])).all()
    assert elbo_of(model, counts) >= history[-1] - 1e-7 * abs(history[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_extrapolated_steps_come_nearer_to_the_optimum(name, monkeypatch):
    model, counts, steps = problem(name)
    extrapolated = settle(model, counts, steps, 60)[-1]
    best = settle(model, counts, steps, 600)[-1]
    monkeypatch.setattr(extrapolation, "FIRST", 0.0)
    model, counts, steps = problem(name)
    plain = settle(model, counts, steps, 60)[-1]
    assert best - extrapolated < 0.5 * (best - plain)


@pytest.mark.parametrize("name", PRIORS)
def test_a_change_of_the_point_moves_the_mean_and_nothing_of_the_covariance(name):
    """Whatever the change is a step of, since r = Q (m - c) is linear in m for every prior."""
    model, counts, steps = problem(name)
    settle(model, counts, steps[:1], 3)
    prior, step = model.prior, steps[0]
    first = step.point()
    settle(model, counts, steps[:1], 2)
    second, before = step.point(), prior.marginal()
    loc, scale = before.loc.clone(), before.scale.clone()
    step.move(*(0.7 * (now - then) for now, then in zip(second, first, strict=True)))
    q = prior.marginal()
    expected = loc + 0.7 * (second[0] - first[0])
    torch.testing.assert_close(
        q.loc, expected, rtol=1e-6, atol=2e-2 if name == "neighbours" else 1e-8
    )
    torch.testing.assert_close(q.scale, scale, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(prior.sites().mean, q.loc)


@pytest.mark.parametrize("name", PRIORS)
def test_sites_that_are_extrapolated_have_the_posterior_that_they_say(name):
    """Solved anew from its sites, q is the same: what was moved is a state that steps reach."""
    model, counts, steps = problem(name)
    settle(model, counts, steps[:1], 30)
    step, prior = steps[0], model.prior
    first = step.point()
    settle(model, counts, steps[:1], 1)
    step.move(*(0.9 * (now - then) for now, then in zip(step.point(), first, strict=True)))
    h, b, mean = (part.clone() for part in prior.sites())
    prior.posterior_from_sites(h, b)
    torch.testing.assert_close(prior.marginal().loc, mean, rtol=0.0, atol=0.02)


def dense_history(X, mean, scale, prior_scale, W, n_steps):
    """ELBO at each step of the map of the Gaussian prior, extrapolated, written from its formulas.

    Every step has to be accepted; the caller makes sure of that.
    """
    beta, last, history = extrapolation.FIRST, None, []
    for step in range(n_steps):
        rate = np.exp(mean) @ W.T
        expected = np.exp(mean + scale**2 / 2)
        log_likelihood = (X * np.log(rate)).sum() - (expected @ W.T).sum() - gammaln(X + 1).sum()
        kl = (np.log(prior_scale / scale) + (scale**2 + mean**2) / (2 * prior_scale**2) - 0.5).sum()
        history.append(log_likelihood - kl)
        if step > 1:
            beta = min(extrapolation.MOST, beta * extrapolation.GROWTH)
        phi = np.exp(mean)[:, None] * W / rate[..., None]  # (N, D, L)
        told = (X[..., None] * phi).sum(1)
        R = (X[..., None] * phi).sum(0)
        h = expected * W.sum(0)
        precision = np.maximum(h + 1 / prior_scale**2, 1 / (scale**2 + 1))
        change = (told - h + h * mean - (h + 1 / prior_scale**2) * mean) / precision
        mean = mean + np.where(change > 0, np.log1p(np.abs(change)), change)
        scale = precision**-0.5
        W = R / np.exp(mean + scale**2 / 2).sum(0)
        prior_scale = np.sqrt((mean**2 + scale**2).mean())
        x = mean, np.log(W)
        if last is not None:
            mean, log_W = (now + beta * (now - then) for now, then in zip(x, last, strict=True))
            W = np.exp(log_W)
        last = x
    return history


def test_history_of_the_gaussian_prior_is_that_of_the_formulas():
    model, counts, steps = problem("independent", seed=2)
    q = model.prior.marginal()
    parts = (q.loc.T, q.scale.T)
    mean, scale = (part.detach().numpy().copy() for part in parts)
    W = model.W.data.detach().numpy().copy()
    found = settle(model, counts, steps, 12)
    expected = dense_history(simulated(2), mean, scale, 1.3, W, 12)
    assert (np.diff(expected) > 0).all()  # so that each step was accepted
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_step_that_lowers_the_bound_is_taken_back():
    model, counts, steps = problem("independent")
    point = extrapolation.Extrapolation(model, steps)
    objective = FactorizationELBO("lower-bound", newton=True)

    def take_steps():
        for step in steps:
            step.start()
        model.zero_grad()
        objective.loss_and_grads(model.model, model.guide, Batch(counts))
        for step in steps:
            step.prepare(Batch(counts))
        for step in steps:
            step.step()

    reached = []
    for loss in (10.0, 9.0):
        assert point.accept(loss)
        take_steps()
        reached.append((model.prior.marginal().loc.clone(), model.W.data.detach().clone()))
        point.go_on()
    assert not torch.equal(model.W.data, reached[1][1])
    beta = point.beta
    assert not point.accept(9.5)
    assert point.beta < beta
    torch.testing.assert_close(model.prior.marginal().loc, reached[1][0])
    torch.testing.assert_close(model.W.data.detach(), reached[1][1])
    assert point.values == [-10.0, -9.0]
    before = model.prior.marginal().loc.clone()
    saved = point.saved[0].clone()
    assert not point.accept(9.5)  # and half of it where that is too far as well
    half = (before - model.prior.marginal().loc).abs().max()
    assert half > 0
    assert torch.equal(point.saved[0], saved)


def test_training_ends_where_no_step_leads_higher():
    """As where rounding is all that is left; it would go on to `max_iter` otherwise."""
    model, counts, steps = problem("independent")
    settled = settle(model, counts, steps, max_iter=400)
    objective = FactorizationELBO("lower-bound", newton=True)
    exact, rise = objective.loss_and_grads, iter(range(10**6))
    objective.loss_and_grads = lambda *args: exact(*args) + next(rise)  # each is lower by 1
    taken = [(step, Constant()) for step in steps]
    args = model, Batches(counts), objective, taken, torch_generator(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(*args, max_iter=400, monotone=True)
    assert result.converged
    assert len(result.history) < 20
    elbo = evaluate_elbo(model, Batches(counts), objective, torch_generator(0))
    assert elbo == pytest.approx(settled[-1])


FITS = {
    "low_rank": ("coords", {"local": True, "K": 8}),
    "place_coordinates": ("coords", {"num_inducing": 12}),
    "codes": ("batches", {}),
    "hidden_columns": ("mask", {}),
}


@pytest.mark.parametrize("name", FITS)
def test_no_step_changes_a_buffer_that_is_called_given(name, monkeypatch):
    """So that none needs a copy: their values stay for as long as steps are taken."""
    starts, start, accept = {}, extrapolation.Accepted.__init__, extrapolation.Accepted.accept

    def given(model):
        copied = {tensor.data_ptr() for tensor in model.state_of_training()}
        buffers = model.named_buffers()
        return {n: b for n, b in buffers if b.numel() and b.data_ptr() not in copied}

    def starting(point, model, *args):
        start(point, model, *args)
        starts[point] = model, {n: b.clone() for n, b in given(model).items()}

    def accepting(point, loss):
        model, before = starts[point]
        now = given(model)
        assert now.keys() == before.keys()
        assert all(torch.equal(now[n], before[n]) for n in now)
        return accept(point, loss)

    monkeypatch.setattr(extrapolation.Accepted, "__init__", starting)
    monkeypatch.setattr(extrapolation.Accepted, "accept", accepting)
    random, X = np.random.default_rng(0), simulated()
    data = {
        "coords": random.uniform(size=(N, 2)),
        "batches": np.arange(N) % 2,
        "mask": random.uniform(size=X.shape) > 0.1,
    }
    what, settings = FITS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pnmf_pyro.fit(X, n_components=2, random_state=0, **{what: data[what]}, **settings)
    assert name in {n.rsplit(".", 1)[-1] for _, kept in starts.values() for n in kept}


def test_what_the_kernel_alone_decides_is_made_once(monkeypatch):
    """Going back to a saved point writes nothing that has not moved."""
    made, weights = [], neighborhoods.conditional_weights

    def counted(targets, *given):
        made.append(len(targets))
        return weights(targets, *given)

    monkeypatch.setattr(neighborhoods, "conditional_weights", counted)
    places = np.random.default_rng(0).uniform(size=(N, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pnmf_pyro.fit(simulated(), places, n_components=2, local=True, K=5)
    assert made == [N]
