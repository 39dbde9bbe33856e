"""What each parameter does, seen from outside, as the user of the reference expects it.

Parameters whose effect other files test are not here: docs/api_parity.json says where they are.
"""

import numpy as np
import pytest
import torch

from pnmf_pyro import PNMF
from pnmf_pyro import transforms as T
from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import drawing_from
from pnmf_pyro.initialization import INITS, initialize_factors
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior
from tests.support.models import model_like
from tests.support.settings import unconverged

# A step so short that every step of a fit is taken from the same place, to all intents.
TINY = 1e-5


def still(**parameters) -> PNMF:
    """A fit that goes on to `max_iter` at one place, without noise unless `mode` brings it."""
    settings = {"mode": "lower-bound", "learning_rate": 1e-12, "scheduler": None, "tol": 0}
    return PNMF(3, **{**settings, "max_iter": 1, "random_state": 0, **parameters})


def start_of(X: np.ndarray, init: str | None = "random") -> tuple[np.ndarray, np.ndarray]:
    """Loadings (D, L) and log-factors (N, L) where a fit with random_state=0 begins."""
    W, exp_F = initialize_factors(X, 3, init, 0)
    return W, np.log(exp_F)


def means(model: PNMF) -> np.ndarray:
    """Means of q(F), which the steps of a fit move."""
    return T.log_factors(model, posterior="factorised")


def steps_of(X: np.ndarray, **parameters) -> np.ndarray:
    """Length of each step of the log-factors, relative to the learning rate.

    Where the gradient stays the same, a step of Adam is its learning rate.
    """
    seen = [start_of(X)[1]]
    model = still(**{"learning_rate": TINY, "max_iter": 20, **parameters})
    model.fit(X, callback=lambda m, *_: seen.append(means(m)), callback_interval=1)
    return np.abs(np.diff(seen, axis=0)).max((1, 2)) / TINY


# --- the objective


@pytest.mark.slow
@unconverged
def test_mode_decides_the_noise_of_the_elbo(X):
    """From one place: none without draws; with them one expectation, above the lower bound.

    Which of the two is noisier depends on the place: for a narrow q near the maximum of the
    likelihood the noise of its two terms cancels in `simple`.
    """
    history = {
        mode: np.array(still(mode=mode, max_iter=300).fit(X).history_)
        for mode in ("simple", "expanded", "lower-bound")
    }
    assert np.ptp(history["lower-bound"]) < 1e-6 * history["expanded"].std()
    noise = {mode: values.std() for mode, values in history.items()}
    assert 1 < noise["simple"] < 0.9 * noise["expanded"]
    error = np.hypot(noise["simple"], noise["expanded"]) / 300**0.5
    assert abs(history["simple"].mean() - history["expanded"].mean()) < 4 * error
    assert history["expanded"].mean() - 4 * error > history["lower-bound"].mean()


@pytest.mark.slow
@unconverged
def test_E_makes_a_fit_less_noisy(X):
    """The standard deviation of a mean of E draws falls as 1 / sqrt(E).

    That of 100 values is known to 7%, so the ratio of two to 10%: 30% is three standard errors.
    """
    for mode in ("simple", "expanded"):
        few, many = (np.std(still(mode=mode, E=E, max_iter=100).fit(X).history_) for E in (1, 16))
        assert few / many == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("mode", ["simple", "expanded"])
def test_E_lowers_the_variance_of_the_gradient(mode, X):
    """By 1 / E; variances of 120 gradients at 240 places give the ratio within a few percent."""
    y = torch.from_numpy(X.T)
    model = PoissonFactorization(GaussianPrior(y, 3), y, 3, random_state=0)
    model.prior.assign(torch.zeros(3, 80), torch.full((3, 80), 0.3))
    batch, generator = Batch(as_counts(X)), torch.Generator().manual_seed(0)

    def variance(E: int) -> float:
        gradients = []
        for _ in range(120):
            model.zero_grad()
            with drawing_from(generator, y.device):
                objective = FactorizationELBO(mode, E)
                objective.loss_and_grads(model.model, model.guide, batch)
            gradients.append(model.prior.mean.grad.clone())
        return float(torch.stack(gradients).var(0).mean())

    assert variance(1) / variance(9) == pytest.approx(9, rel=0.2)


@unconverged
def test_scale_ll_D_weighs_the_likelihood_of_a_batch_of_features(X):
    """Two halves of the features: scaled, each estimates the whole; unscaled, each is its own."""
    whole = still().fit(X).history_[0]
    log_F = start_of(X)[1]
    kl = 0.5 * (log_F**2 + 0.01 - 1 - np.log(0.01)).sum()  # q starts with scale 0.1
    halves = {
        scaled: still(y_batch_size=12, max_iter=2, scale_ll_D=scaled).fit(X).history_
        for scaled in (True, False)
    }
    assert np.mean(halves[True]) == pytest.approx(whole, rel=1e-8)
    assert halves[True][0] != pytest.approx(halves[True][1], rel=1e-3)
    assert np.sum(halves[False]) == pytest.approx(whole - kl, rel=1e-8)


@unconverged
def test_scale_kl_NM_weighs_the_divergence_of_a_batch_of_samples(X):
    """Unscaled, the divergence is that of the batch, here half of the whole on average."""
    whole = still().fit(X).history_[0]
    log_F = start_of(X)[1]
    kl = 0.5 * (log_F**2 + 0.01 - 1 - np.log(0.01)).sum()
    halves = {
        scaled: still(batch_size=40, max_iter=2, scale_kl_NM=scaled).fit(X).history_
        for scaled in (True, False)
    }
    assert np.mean(halves[True]) == pytest.approx(whole, rel=1e-8)
    assert np.mean(halves[False]) == pytest.approx(whole + kl / 2, rel=1e-8)


# --- the steps


@unconverged
def test_max_iter_is_the_number_of_steps(X):
    for max_iter in (1, 7):
        model = still(max_iter=max_iter).fit(X)
        assert model.n_iter_ == len(model.history_) == max_iter


def test_tol_stops_earlier(X):
    settings = {"mode": "lower-bound", "learning_rate": 0.1, "scheduler": None, "max_iter": 2000}
    taken = [PNMF(3, tol=t, random_state=0, **settings).fit(X).n_iter_ for t in (3e-2, 3e-3, 5e-4)]
    assert taken[0] < taken[1] < taken[2] < 2000


@unconverged
def test_learning_rate_is_the_size_of_a_step(X):
    """The first step of Adam is the learning rate in every coordinate."""
    before = start_of(X)[1]
    for rate in (1e-4, 1e-2):
        moved = np.abs(means(still(learning_rate=rate).fit(X)) - before)
        np.testing.assert_allclose(moved, rate, rtol=1e-4)


@unconverged
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "SGD", "RMSprop"])
def test_optimizer_is_the_one_named(name, X):
    """Plain steps of SGD show the gradient; the named optimiser makes the same step of it."""
    before, rate = start_of(X)[1], 1e-4
    slope = (means(still(optimizer="SGD", learning_rate=rate).fit(X)) - before) / rate
    assert np.abs(slope).max() > 1
    expected = torch.nn.Parameter(torch.tensor(before))
    expected.grad = torch.tensor(-slope)
    getattr(torch.optim, name)([expected], lr=rate).step()
    found = means(still(optimizer=name, learning_rate=rate).fit(X))
    np.testing.assert_allclose(found, expected.detach(), rtol=0, atol=1e-3 * rate)


@unconverged
def test_a_schedule_moves_the_steps(X):
    np.testing.assert_allclose(steps_of(X), 1, rtol=1e-3)
    one_cycle = steps_of(X, scheduler="one_cycle")
    assert one_cycle[0] < 0.1 < 0.9 < one_cycle.max()


@unconverged
@pytest.mark.parametrize("pct_start", [0.2, 0.5, 0.8])
def test_scheduler_pct_start_moves_the_peak(pct_start, X):
    steps = steps_of(X, scheduler="one_cycle", max_iter=41, scheduler_pct_start=pct_start)
    assert steps.argmax() == round(40 * pct_start)
    assert steps.max() == pytest.approx(1, rel=1e-3)


@unconverged
def test_div_factors_set_the_first_and_the_last_step(X):
    steps = steps_of(
        X, scheduler="one_cycle", scheduler_div_factor=4.0, scheduler_final_div_factor=10.0
    )
    assert steps[0] == pytest.approx(1 / 4, rel=1e-3)
    assert steps[-1] == pytest.approx(1 / 40, rel=0.05)
    assert steps_of(X, scheduler="one_cycle")[0] == pytest.approx(1 / 25, rel=1e-3)


@unconverged
@pytest.mark.parametrize("patience", [1, 4])
def test_plateau_waits_reduces_and_stops_at_its_floor(patience, X):
    """The ELBO rises by less than one part in 10^4, which is no rise."""
    steps = steps_of(
        X,
        scheduler="plateau",
        scheduler_patience=patience,
        scheduler_factor=0.5,
        min_lr=0.3 * TINY,
        max_iter=30,
    )
    wait = patience + 1
    expected = [1.0] * (1 + wait) + [0.5] * wait + [0.3] * 30
    np.testing.assert_allclose(steps, expected[:30], rtol=0.02)


@unconverged
def test_a_batch_moves_its_own_samples_and_features(X):
    """In their first step samples and features outside the batch stay where they are."""
    W, log_F = start_of(X)
    for batch_size, y_batch_size in ((20, None), (None, 7), (20, 7)):
        model = still(learning_rate=0.01, batch_size=batch_size, y_batch_size=y_batch_size).fit(X)
        samples = (np.abs(means(model) - log_F) > 1e-4).any(1)
        features = (np.abs(model.components_.T - W) > 1e-6 * W.max()).any(1)
        assert samples.sum() == (batch_size or 80)
        assert features.sum() == (y_batch_size or 24)


@unconverged
def test_natural_training_climbs_further_in_as_many_steps(X):
    """In fifty steps natural gradients pass every learning rate of Adam."""
    settings = {"mode": "lower-bound", "scheduler": None, "max_iter": 50, "random_state": 0}
    adam = [PNMF(3, learning_rate=r, **settings).fit(X).elbo_ for r in (0.01, 0.03, 0.1, 0.3)]
    settings |= {"training_mode": "natural", "loadings_mode": "multiplicative"}
    natural = PNMF(3, **settings).fit(X)
    assert natural.elbo_ > max(adam)
    assert len(T.get_prior(natural).natural_parameters()) == 2


# --- the start, the loadings, the device


@unconverged
@pytest.mark.parametrize("init", [*INITS, None])
def test_init_is_where_a_fit_starts(init, X):
    W, log_F = start_of(X, init)
    model = still(init=init).fit(X)
    np.testing.assert_allclose(model.components_.T, W, atol=1e-8 * W.max())
    np.testing.assert_allclose(means(model), log_F, atol=1e-8)
    np.testing.assert_allclose(T.factor_uncertainty(model, posterior="factorised"), 0.1, rtol=1e-8)


def test_of_several_starts_the_one_is_taken_that_leads_highest(X):
    settings = {"mode": "lower-bound", "training_mode": "natural", "random_state": 0}
    settings |= {"loadings_mode": "multiplicative"}
    starts = ["nndsvda", "biwhitened", "k-means"]
    alone = [PNMF(3, init=init, **settings).fit(X) for init in starts]
    of_all = PNMF(3, init=starts, **settings).fit(X)
    after = [model.history_[19] for model in alone]
    assert len(set(after)) == 3
    assert of_all.history_[19] == pytest.approx(max(after), rel=1e-6)
    assert of_all.elbo_ == pytest.approx(alone[np.argmax(after)].elbo_, rel=1e-4)


def test_no_start_at_all_is_an_error(X):
    with pytest.raises(ValueError, match="init must name at least one start"):
        PNMF(3, init=()).fit(X)


@unconverged
def test_starts_are_tried_no_longer_than_max_iter(X):
    for max_iter in (1, 3, 20, 21):
        model = PNMF(3, init=("random", None), mode="lower-bound", max_iter=max_iter, tol=0).fit(X)
        assert model.n_iter_ == len(model.history_) == max_iter


@unconverged
@pytest.mark.parametrize("loadings_mode", ["softplus", "exp", "projected"])
def test_loadings_at_zero(loadings_mode, X):
    """A feature of one component: the loading of the other ends at zero where it can be."""
    model = PNMF(
        3, loadings_mode=loadings_mode, mode="lower-bound", learning_rate=0.1, random_state=0
    ).fit(X)
    assert (model.components_ >= 0).all()
    assert (model.components_ == 0).any() == (loadings_mode == "projected")


@unconverged
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_device_is_where_a_model_lives(device, X):
    assert still(device=device).fit(X).model_.W.device == torch.device("cpu")


def test_mps_is_refused_with_a_reason(X):
    with pytest.raises(ValueError, match=r"device='mps'.*float64.*device='cpu'"):
        still(device="mps").fit(X)


@unconverged
def test_fit_transform_returns_the_factors_of_the_fit(X):
    model = still()
    factors = model.fit_transform(X, None, size_factors=np.full(80, 2.0), return_history=True)
    np.testing.assert_array_equal(factors, T.get_factors(model))
    np.testing.assert_array_equal(model.model_.size_factors, 2.0)


@pytest.mark.parametrize("init", ["random", "nndsvda", "k-means"])
def test_scale_log_mu_and_target_std_set_the_spread_of_log_factors(init, X):
    spread = {
        std: np.log(initialize_factors(X, 3, init, 0, target_std=std)[1]).std(0) for std in (0.5, 2)
    }
    np.testing.assert_allclose(spread[0.5], 0.5)
    np.testing.assert_allclose(spread[2], 2)
    unscaled = initialize_factors(X, 3, init, 0, scale_log_mu=False, target_std=2)[1]
    assert (np.abs(np.log(unscaled).std(0) - 2) > 0.1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: T.factor_samples(m, 0), "n_samples must be a whole number of at least 1; got 0"),
        (lambda m: T.factor_samples(m, 2.5), r"n_samples must be .*got 2\.5"),
        (lambda m: T.transform_F(np.eye(3), np.ones((3, 2)), E=0), "E must be a whole number"),
        (lambda m: T.transform_F(np.eye(3), np.ones((3, 2)), max_iter=0), "max_iter must be"),
        (lambda m: T.transform_F(np.eye(3), np.ones((3, 2)), tol=-1), "tol must be .*got -1"),
        (
            lambda m: T.transform_F(np.eye(3), np.ones((3, 2)), learning_rate=0),
            "learning_rate must be a positive",
        ),
        (lambda m: T.transform_F(np.eye(3), np.ones((3, 2)), mode="exact"), "mode must be one of"),
        (lambda m: T.transform_F(np.eye(3), np.ones((3, 2)), scale_pf=0), "scale_pf must be"),
        (lambda m: T.transform_W(np.eye(3), np.ones((3, 2)), max_iter=0), "max_iter must be"),
        (lambda m: T.transform_W(np.eye(3), np.ones((4, 2))), "F must have one row for each"),
        (lambda m: T.transform_W(np.eye(3), -np.ones((3, 2))), "F must be .*not negative"),
        (lambda m: T.transform_W(np.eye(3), np.ones((3, 2)), n_components=3), "n_components=3"),
        (lambda m: T.transform_W(np.eye(3), np.ones((3, 2)), np.ones((2, 2))), "W_init must have"),
        (lambda m: T.transform_W(np.eye(3), np.ones((3, 2)), loss="l1"), "loss must be one of"),
        (lambda m: initialize_factors(np.eye(3), 0), "n_components must be a whole number"),
        (lambda m: initialize_factors(np.eye(3), "two"), "n_components must be .*got 'two'"),
        (lambda m: initialize_factors(-np.eye(3), 2), "Negative values"),
        (lambda m: initialize_factors(np.eye(3) * np.nan, 2), "X must be finite"),
        (lambda m: initialize_factors([["a"]], 1), "X must hold numbers"),
        (lambda m: GaussianPrior(torch.ones(3, 4), 0), "L must be a whole number"),
        (lambda m: GaussianPrior(np.ones((3, 4)), 2), r"y must be a tensor .*got ndarray of shape"),
        (lambda m: GaussianPrior(torch.ones(3), 2), r"y must be a tensor .*shape \(3,\)"),
        (lambda m: model_like(torch.ones(3, 4))(E=0), "E must be a whole number"),
        (lambda m: FactorizationELBO("simple", 0), "n_draws must be a whole number"),
        (
            lambda m: m.inverse_transform([["a", "b", "c"]]),
            "transformed must be an array",
        ),
        (lambda m: T.transform_F(np.eye(3), [["a"]] * 3), "W must be an array of numbers"),
        (lambda m: T.transform_W(np.eye(3), np.ones((3, 2)), n_components="2"), "got '2'"),
        (lambda m: T.log_factors(np.eye(3)), r"model must be .*got ndarray"),
        (lambda m: T.log_factors_from_prior(m), r"prior must be .*get_prior"),
        (lambda m: still().fit(np.eye(4), callback=3), "callback must be a function"),
        (lambda m: still().fit(np.eye(4), callback_interval=0), "callback_interval must be"),
        (
            lambda m: PositiveParameter((2, 3)).multiplicative_update(torch.ones(2, 4), {}),
            r"terms must have \['exp_F_samples', 'exp_mu', 'exp_mu_sigma'\] for elbo_mode='exp",
        ),
    ],
)
def test_bad_values_are_named(call, message, fitted):
    with pytest.raises(ValueError, match=message):
        call(fitted)
