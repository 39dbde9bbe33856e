"""When a fit stops, and what it does then."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import ThreadpoolController

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP, GaussianPrior, svgp_posterior
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training import loop as training
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.loop import evaluate_elbo, train
from pnmf_pyro.training.schedules import Constant
from tests.support.data import tissue
from tests.support.models import by_adam, take_step
from tests.support.svgp import assigned, factorization, make_prior, scattered


def steps_until_reached(convergence, values):
    history = []
    for value in values:
        history.append(value)
        if convergence.reached(history):
            return len(history)
    return None


def test_one_quiet_or_noisy_step_decides_nothing():
    rising = -1e4 + 50.0 * np.arange(60)
    rising[30:32] = rising[30]  # one step without a rise
    assert steps_until_reached(Convergence(1e-4), rising) is None


def test_flat_noise_converges_after_patience():
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    assert steps_until_reached(Convergence(1e-4), -1e4 + noise) == 40


def test_steps_before_start_are_not_judged():
    assert steps_until_reached(Convergence(1e-4, start=50), np.full(200, -1e4)) == 90


def test_a_larger_tol_stops_earlier_and_zero_never():
    values = -1e4 - 1e4 * np.exp(-np.arange(400) / 40)
    stops = [steps_until_reached(Convergence(tol), values) for tol in (1e-2, 1e-3, 1e-4)]
    assert stops == sorted(stops)
    assert len(set(stops)) == 3
    assert steps_until_reached(Convergence(0), np.full(400, -1.0)) is None


def test_still_rising_knows_a_trend_from_noise():
    random = np.random.default_rng(0)
    assert Convergence(1e-4).still_rising(-1e4 + 10.0 * np.arange(40))
    assert not Convergence(1e-4).still_rising(-1e4 + random.normal(0, 1e2, 40))
    assert not Convergence(1e-4).still_rising(np.full(40, -1e4))
    assert Convergence(1e-4).still_rising([-1.0])


def test_small_steps_work_in_one_thread_of_those_there_are(counts, monkeypatch):
    """By the limit of OpenMP: after torch.set_num_threads batched inverses of torch can fail."""

    def refuse(threads):
        raise AssertionError("torch.set_num_threads was called")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    seen = []
    model = PNMF(2, max_iter=3, random_state=0)
    objective = training.FactorizationELBO.loss_and_grads

    def watch(*args):
        seen.append(torch.get_num_threads())
        return objective(*args)

    monkeypatch.setattr(training.FactorizationELBO, "loss_and_grads", watch)
    with ThreadpoolController().limit(limits=2, user_api="openmp"):
        before = torch.get_num_threads()
        model.fit(counts)
        assert torch.get_num_threads() == before == 2
    assert seen == [1, 1, 1]


@pytest.fixture
def problem(counts):
    data = as_counts(counts)
    y = torch.from_numpy(counts.T)
    model = PoissonFactorization(GaussianPrior(y, 3), y, 3, random_state=0)
    return model, Batches(data), FactorizationELBO("expanded", 2)


def test_a_covariance_that_cannot_be_factorised_ends_a_fit_without_loss():
    """Sites of negative precision, so that S^-1 is not positive definite."""
    random = np.random.default_rng(0)
    X, x = random.poisson(3, size=(30, 8)), random.uniform(size=(30, 2))

    def break_it(model, iteration, elbo):
        if iteration == 5:
            with torch.no_grad():
                model.model_.prior.q.site_precision.fill_(-1.0)

    model = PNMF(
        2,
        spatial=True,
        num_inducing=10,
        mode="lower-bound",
        training_mode="natural",
        max_iter=20,
        random_state=0,
    )
    with pytest.warns(ConvergenceWarning, match="iteration 6 the covariance of q"):
        model.fit(X, coordinates=x, callback=break_it, callback_interval=1)
    assert model.n_iter_ == 5
    assert np.isfinite(model.components_).all()


def test_a_fit_from_nan_says_what_is_not_finite(problem):
    model, batches, objective = problem
    with torch.no_grad():
        model.prior.mean[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"prior\.q\.mean is the first"):
        train(model, batches, objective, by_adam(model), torch_generator(0), max_iter=3)


def test_the_last_finite_state_is_restored(problem):
    model, batches, _ = problem
    objective = FactorizationELBO("lower-bound")

    seen = []

    def poison(elbo):
        seen.append(elbo)
        if len(seen) == 5:
            with torch.no_grad():
                model.W.raw[2, 1] = torch.inf
                model.prior.scale_pf.fill_(9.0)

    with pytest.warns(ConvergenceWarning, match=r"iteration 6 the ELBO is nan; W\._raw is"):
        result = train(
            model,
            batches,
            objective,
            by_adam(model),
            torch_generator(0),
            max_iter=20,
            on_step=poison,
        )
    assert len(result.history) == 5
    assert result.failure
    restored = evaluate_elbo(model, batches, objective, torch_generator(0))
    assert restored == pytest.approx(result.history[-1], rel=1e-9)
    assert float(model.prior.scale_pf) == 1.0


def test_elbo_of_all_data_is_the_same_in_one_batch_or_many(problem):
    model, batches, _ = problem
    objective = FactorizationELBO("lower-bound")
    whole = evaluate_elbo(model, batches, objective, torch_generator(0))
    parts = evaluate_elbo(model, Batches(batches.counts, 17), objective, torch_generator(0))
    assert parts == pytest.approx(whole, rel=1e-6)


def of_two_kinds():
    """An SVGP, whose mean moves at little cost, and an LCGP, whose mean costs a solve."""
    places = scattered(12)
    local = LCGP(
        make_prior(places=places).kernel, places, 2, K=8, use_natural_gradients=True,
        dtype=torch.float64,
    )  # fmt: skip
    return [(assigned(M=5), True), (local, False)]


@pytest.mark.parametrize(("prior", "mean_moves"), of_two_kinds(), ids=["SVGP", "LCGP"])
def test_the_covariance_moves_at_the_first_of_every_few_steps(prior, mean_moves):
    model, counts = factorization(prior)
    batch = Batches(counts).batch(None, None)
    steps, moved = SiteSteps(prior, every=3), []
    for _ in range(7):
        before = [t.clone() for t in prior.sites()[:2]]
        steps.lr = 0.5
        take_step(model, batch, steps)
        moved.append([not torch.equal(*pair) for pair in zip(before, prior.sites(), strict=False)])
    assert [precision for precision, _ in moved] == [True, False, False] * 2 + [True]
    assert [shift for _, shift in moved] == [n % 3 == 0 or mean_moves for n in range(7)]


def test_a_step_in_between_has_the_size_of_its_schedule():
    """With the covariance given, steps of size 1/2 go half of the way of whole ones."""
    ends = []
    for size in (0.5, 1.0):
        prior = assigned(M=5)
        model, counts = factorization(prior)
        steps = SiteSteps(prior, every=3)
        steps.turn, steps.lr = 1, size
        before = prior._posterior().mean.clone()
        take_step(model, Batches(counts).batch(None, None), steps)
        ends.append(prior._posterior().mean - before)
    torch.testing.assert_close(ends[0], ends[1] / 2)
    assert float(ends[0].abs().max()) > 1e-3


def test_a_spatial_fit_moves_the_covariance_seldom_and_leaves_nothing_under_way(monkeypatch):
    X, x, *_ = tissue()
    made = []
    gram = svgp_posterior.weighted_gram
    monkeypatch.setattr(svgp_posterior, "weighted_gram", lambda *a: (made.append(1), gram(*a))[1])
    settings = {"num_inducing": 20, "train_lengthscale": False, "local": False}
    model = pnmf_pyro.fit(X, x, n_components=2, **settings)
    assert 0 < len(made) < model.n_iter_ / 2
    prior = model.model_.prior
    assert not prior.attended
    assert prior.watched is None
    assert all(parameter.grad is None for parameter in model.model_.parameters())


def test_site_steps_need_the_gradients_of_the_likelihood_alone(counts):
    y = torch.from_numpy(counts.T)
    prior = GaussianPrior(y, 3, use_natural_gradients=True)
    model = PoissonFactorization(prior, y, 3, random_state=0)
    batches, steps = Batches(as_counts(counts)), [(SiteSteps(prior), Constant())]
    with pytest.raises(ValueError, match="newton=True"):
        train(model, batches, FactorizationELBO(), steps, torch_generator(0), max_iter=1)


def test_closed_forms_do_not_wait_for_the_compiler_of_torch():
    code = """if True:
        import sys, numpy as np, pnmf_pyro
        random = np.random.default_rng(0)
        X, x = random.poisson(3, size=(30, 6)), random.uniform(size=(30, 2))
        pnmf_pyro.fit(X, x, n_components=2, tol=1e-2)
        sys.exit("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
