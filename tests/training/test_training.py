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
from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior, fields
from pnmf_pyro.priors.natural import ClosedForm, Descent, EveryNth, Still
from pnmf_pyro.training import loop as training
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.loop import evaluate_elbo, train


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
    """A precision of q(u) that loses its sign during a step, as too long steps can make it."""
    random = np.random.default_rng(0)
    X, x = random.poisson(3, size=(30, 8)), random.uniform(size=(30, 2))

    def break_it(model, iteration, elbo):
        if iteration == 5:
            with torch.no_grad():
                model.model_.prior.q.theta2.neg_()

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
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(FloatingPointError, match=r"prior\.q\.mean is the first"):
        train(model, batches, objective, [optimizer], torch_generator(0), max_iter=3)


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

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.warns(ConvergenceWarning, match=r"iteration 6 the ELBO is nan; W\._raw is"):
        result = train(
            model,
            batches,
            objective,
            [optimizer],
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


def test_every_nth_step_is_taken_at_the_learning_rate_of_its_schedule():
    x, y = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    steps = EveryNth(torch.optim.SGD([x, y], lr=1.0), 3, [x])
    seen = []
    for turn in range(7):
        steps.param_groups[0]["lr"] = 10.0**turn
        (-x - y).backward()
        steps.step()
        y.grad = None
        seen.append((float(x.detach()), float(y.detach())))
    assert [x for x, _ in seen] == [1, 1, 1, 1001, 1001, 1001, 1001001]
    assert [y for _, y in seen] == [1, 11, 111, 1111, 11111, 111111, 1111111]


def test_every_nth_takes_gradients_only_where_it_steps():
    x = torch.nn.Parameter(torch.zeros(1))
    steps = EveryNth(torch.optim.SGD([x], lr=1.0), 3, [x])
    seen = []
    for _ in range(7):
        seen.append(x.requires_grad)
        steps.step()
    assert seen == [True, False, False] * 2 + [True]
    steps.close()
    assert x.requires_grad


def test_a_spatial_fit_takes_gradients_of_q_at_its_steps_and_leaves_it_trainable(monkeypatch):
    random = np.random.default_rng(0)
    X, x = random.poisson(3, size=(60, 8)), random.uniform(size=(60, 2))
    made = []
    gram = fields.weighted_gram
    monkeypatch.setattr(fields, "weighted_gram", lambda *a: (made.append(1), gram(*a))[1])
    settings = {"num_inducing": 20, "train_lengthscale": False, "local": False}
    model = pnmf_pyro.fit(X, x, n_components=2, **settings)
    assert 0 < len(made) < model.n_iter_ / 2
    assert all(parameter.requires_grad for parameter in model.model_.prior.q.parameters())


def test_every_nth_tells_the_optimizer_of_the_batch():
    inner = ClosedForm([torch.nn.Parameter(torch.zeros(1))], {})
    batch = Batch(samples=torch.arange(2))
    EveryNth(inner, 2, []).prepare(batch)
    assert inner.batch is batch


def test_still_parameters_stay_and_can_be_trained_afterwards():
    x = torch.nn.Parameter(torch.ones(2))
    steps = Still([x])
    x.sum().backward()
    steps.step()
    assert torch.equal(x.detach(), torch.ones(2))
    assert x.grad is None
    assert not x.requires_grad
    steps.close()
    assert x.requires_grad


def test_descent_is_that_of_torch():
    x, y, z = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    for parameter, steps in ((x, Descent([x, z], lr=0.3)), (y, torch.optim.SGD([y], lr=0.3))):
        for _ in range(3):
            parameter.grad = None
            parameter.square().sum().backward()
            steps.step()
    torch.testing.assert_close(x, y)
    assert torch.equal(z.detach(), torch.ones(2))  # without a gradient


def test_closed_forms_do_not_wait_for_the_compiler_of_torch():
    code = """if True:
        import sys, numpy as np, pnmf_pyro
        random = np.random.default_rng(0)
        X, x = random.poisson(3, size=(30, 6)), random.uniform(size=(30, 2))
        pnmf_pyro.fit(X, x, n_components=2, tol=1e-2)
        sys.exit("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
