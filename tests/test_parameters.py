"""What each parameter does, seen from outside, as the user of the reference expects it.

Parameters whose effect other files test are not here: docs/api_parity.json says where they are.
"""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import fsolve

from pnmf_pyro import PNMF
from pnmf_pyro import transforms as T
from pnmf_pyro.custom_modules import ConstrainedParameter, PositiveParameter
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import drawing_from
from pnmf_pyro.gp import neighborhoods
from pnmf_pyro.initialization import INITS, initialize_factors
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior
from tests.calibration import coverage, separated_loadings

# A step so short that every step of a fit is taken from the same place, to all intents.
TINY = 1e-5

unconverged = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def X(counts) -> np.ndarray:
    """Counts in float64, so that tiny steps are seen."""
    return counts[:, :24].astype(np.float64)


def still(**parameters) -> PNMF:
    """A fit that goes on to `max_iter` at one place, without noise unless `mode` brings it."""
    settings = {"mode": "lower-bound", "learning_rate": 1e-12, "scheduler": None, "tol": 0}
    return PNMF(3, **{**settings, "max_iter": 1, "random_state": 0, **parameters})


def start_of(X: np.ndarray, init: str | None = "random") -> tuple[np.ndarray, np.ndarray]:
    """Loadings (D, L) and log-factors (N, L) where a fit with random_state=0 begins."""
    W, exp_F = initialize_factors(X, 3, init, 0)
    return W, np.log(exp_F)


def steps_of(X: np.ndarray, **parameters) -> np.ndarray:
    """Length of each step of the log-factors, relative to the learning rate.

    Where the gradient stays the same, a step of Adam is its learning rate.
    """
    seen = [start_of(X)[1]]
    model = still(**{"learning_rate": TINY, "max_iter": 20, **parameters})
    model.fit(X, callback=lambda m, *_: seen.append(T.log_factors(m)), callback_interval=1)
    return np.abs(np.diff(seen, axis=0)).max((1, 2)) / TINY


# --- the objective


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
        moved = np.abs(T.log_factors(still(learning_rate=rate).fit(X)) - before)
        np.testing.assert_allclose(moved, rate, rtol=1e-4)


@unconverged
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "SGD", "RMSprop"])
def test_optimizer_is_the_one_named(name, X):
    """Plain steps of SGD show the gradient; the named optimiser makes the same step of it."""
    before, rate = start_of(X)[1], 1e-4
    slope = (T.log_factors(still(optimizer="SGD", learning_rate=rate).fit(X)) - before) / rate
    assert np.abs(slope).max() > 1
    expected = torch.nn.Parameter(torch.tensor(before))
    expected.grad = torch.tensor(-slope)
    getattr(torch.optim, name)([expected], lr=rate).step()
    found = T.log_factors(still(optimizer=name, learning_rate=rate).fit(X))
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
        samples = (np.abs(T.log_factors(model) - log_F) > 1e-4).any(1)
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
    np.testing.assert_allclose(T.log_factors(model), log_F, atol=1e-8)
    np.testing.assert_allclose(T.factor_uncertainty(model), 0.1, rtol=1e-8)


def test_of_several_starts_the_one_is_taken_that_leads_highest(X):
    settings = {"mode": "lower-bound", "training_mode": "natural", "random_state": 0}
    settings |= {"loadings_mode": "multiplicative", "warm_up": True}
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
    model = PNMF(3, init=("random", None), mode="lower-bound", max_iter=3).fit(X)
    assert model.n_iter_ == 6


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


# --- transforms


ACCESSORS = {
    "log_factors": T.log_factors,
    "factor_uncertainty": T.factor_uncertainty,
    "factor_samples": lambda m, return_tensor: T.factor_samples(
        m, 5, return_tensor=return_tensor, random_state=0
    ),
    "exp samples": lambda m, return_tensor: T.factor_samples(
        m, 5, True, return_tensor=return_tensor, random_state=0
    ),
    "get_factors": T.get_factors,
    "get_loadings": T.get_loadings,
    "log_factors_from_prior": lambda m, return_tensor: T.log_factors_from_prior(
        T.get_prior(m), return_tensor
    ),
    "factors_from_prior": lambda m, return_tensor: T.factors_from_prior(
        T.get_prior(m), return_tensor=return_tensor
    ),
    "uncertainty_from_prior": lambda m, return_tensor: T.uncertainty_from_prior(
        T.get_prior(m), return_tensor=return_tensor
    ),
}


@pytest.mark.parametrize("name", ACCESSORS)
def test_return_tensor_everywhere(name, fitted):
    array = ACCESSORS[name](fitted, return_tensor=False)
    tensor = ACCESSORS[name](fitted, return_tensor=True)
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    assert tensor.dtype == torch.float32
    assert array.dtype == np.float32
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(array, tensor.numpy())


def test_use_mgf_of_factors_from_prior(fitted):
    prior = T.get_prior(fitted)
    mean, sigma = T.log_factors(fitted), T.factor_uncertainty(fitted)
    np.testing.assert_allclose(T.factors_from_prior(prior), np.exp(mean + sigma**2 / 2), 1e-5)
    np.testing.assert_allclose(T.factors_from_prior(prior, use_mgf=False), np.exp(mean), 1e-5)


def test_return_variance_of_uncertainty_from_prior(fitted):
    prior = T.get_prior(fitted)
    sigma, variance = (T.uncertainty_from_prior(prior, flag) for flag in (False, True))
    np.testing.assert_allclose(variance, sigma**2, rtol=1e-5)
    assert (variance != sigma).all()


def global_state() -> list:
    return [
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - that it stays is the point
    ]


def test_single_and_empty_samples(fitted, counts):
    """transform treats samples one by one, whatever the form, and leaves global seeds alone."""
    rows = np.vstack([counts[:4], np.zeros((2, 25), np.float32)])
    before = global_state()
    dense, sparse = fitted.transform(rows), fitted.transform(sp.csr_matrix(rows))
    assert global_state() == before
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(dense[4:], 0)
    for i in range(5):
        np.testing.assert_allclose(fitted.transform(rows[i : i + 1])[0], dense[i], 1e-4, 1e-6)
    np.testing.assert_array_equal(fitted.transform(sp.csr_matrix((1, 25))), 0)


@pytest.fixture(scope="module")
def conditional():
    """Counts from known loadings that overlap little."""
    rng = np.random.default_rng(1)
    W = separated_loadings(60, 3, 0.05, 5.0, rng)
    return rng.poisson(np.exp(rng.normal(size=(40, 3))) @ W.T).astype(np.float64), W


def test_transform_F_of_sparse_single_and_empty_samples(conditional):
    """For a sample without counts the best q solves two equations in mean and variance."""
    X, W = conditional
    rows = np.vstack([X, np.zeros((1, 60))])
    settings = {"mode": "lower-bound", "return_prior": True, "tol": 0}
    settings |= {"learning_rate": 1e-3, "max_iter": 60}
    before = global_state()
    priors = [T.transform_F(form(rows), W, **settings) for form in (np.asarray, sp.csr_matrix)]
    single = T.transform_F(rows[:1], W, **settings)
    assert global_state() == before
    dense, sparse = (T.log_factors_from_prior(prior) for prior in priors)
    np.testing.assert_allclose(sparse, dense, atol=1e-3)
    np.testing.assert_allclose(T.log_factors_from_prior(single)[0], dense[0], atol=1e-3)

    def stationary(q, total):
        mean, log_variance = q
        expected = total * np.exp(mean + np.exp(log_variance) / 2)
        return [expected + mean, np.exp(-log_variance) - 1 - expected]

    sigma = T.uncertainty_from_prior(priors[0])
    for l, total in enumerate(W.sum(0)):
        mean, log_variance = fsolve(stationary, [-2.0, -0.5], args=(total,))
        assert dense[-1, l] == pytest.approx(mean, abs=1e-3)
        assert sigma[-1, l] == pytest.approx(np.exp(log_variance / 2), rel=1e-3)


def test_mode_and_E_of_transform_F(conditional):
    """Without draws the seed does not matter; with nine times as many a third as much.

    Adam moves by its learning rate whatever the noise; a small one leaves that of the draws.
    """
    X, W = conditional[0][:15], conditional[1]
    settings = {"learning_rate": 1e-4, "tol": 1e9}

    def spread(**parameters) -> float:
        found = [T.transform_F(X, W, random_state=s, **settings, **parameters) for s in (0, 1)]
        return float(np.abs(np.log(found[0] / found[1])).mean())

    assert spread(mode="lower-bound") == 0
    for mode in ("simple", "expanded"):
        assert spread(mode=mode, E=1) > 1.5 * spread(mode=mode, E=9) > 0


def test_tol_and_max_iter_of_transform_F(conditional):
    """A tol that any step meets stops after forty, the least that can be judged."""
    X, W = conditional
    early = T.transform_F(X, W, tol=1e9)
    np.testing.assert_array_equal(early, T.transform_F(X, W, tol=0, max_iter=40))
    assert (early != T.transform_F(X, W, tol=0, max_iter=41)).any()


@unconverged
def test_learning_rate_of_transform_F(conditional):
    """The first step of Adam is the learning rate, from a start that does not depend on it."""
    X, W = conditional
    settings = {"mode": "expanded", "max_iter": 1, "tol": 0, "return_prior": True}
    first, second = (
        T.log_factors_from_prior(T.transform_F(X, W, learning_rate=rate, **settings))
        for rate in (1e-3, 3e-3)
    )
    np.testing.assert_allclose(np.abs(second - first), 2e-3, rtol=1e-3)


def test_scale_pf_of_transform_F(conditional):
    """A tight prior draws the log-factors to zero."""
    X, W = conditional
    loose, tight = (
        T.log_factors_from_prior(T.transform_F(X, W, scale_pf=s, return_prior=True))
        for s in (1.0, np.float32(0.1))
    )
    assert np.abs(tight).mean() < 0.5 * np.abs(loose).mean()


def test_progress_of_transform_F(conditional, capsys):
    X, W = conditional
    T.transform_F(X, W)
    assert capsys.readouterr().err == ""
    T.transform_F(X, W, verbose=True)
    assert "ELBO" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_device_of_the_transforms(conditional):
    X, W = conditional
    for call in (lambda **k: T.transform_F(X, W, **k), lambda **k: T.transform_W(X, X[:, :3], **k)):
        np.testing.assert_array_equal(call(device="cpu"), call(device="auto"))
        with pytest.raises(ValueError, match="device='cuda'"):
            call(device="cuda")
        with pytest.raises(ValueError, match="device must be one of"):
            call(device="gpu")


def test_transform_W_of_sparse_single_and_empty_samples(conditional):
    X, _ = conditional
    F = np.exp(np.random.default_rng(0).normal(size=(40, 3)))
    before = global_state()
    dense, sparse = T.transform_W(X, F), T.transform_W(sp.csr_matrix(X), F)
    assert global_state() == before
    np.testing.assert_allclose(sparse, dense, rtol=1e-6, atol=1e-9)
    # Samples without counts add to the exposure and to nothing else.
    padded = T.transform_W(np.vstack([X, 0 * X]), np.vstack([F, F]), tol=0)
    np.testing.assert_allclose(padded, T.transform_W(X, F, tol=0) / 2, rtol=1e-6, atol=1e-9)
    # From one sample of one component the loadings are its counts over its factor.
    single = T.transform_W(X[:1], np.full((1, 1), 2.0))
    np.testing.assert_allclose(single[:, 0], X[0] / 2)
    np.testing.assert_array_equal(T.transform_W(0 * X, F), 0)


def test_W_init_and_max_iter_of_transform_W(conditional):
    """The problem is convex: after enough updates the start is forgotten, after one it is not."""
    X, _ = conditional
    F = np.exp(np.random.default_rng(0).normal(size=(40, 3)))
    start = np.random.default_rng(1).gamma(1.0, 1.0, size=(60, 3)) + 0.1
    first = [T.transform_W(X, F, W_init=w, max_iter=1) for w in (None, start)]
    last = [T.transform_W(X, F, W_init=w, max_iter=3000, tol=0) for w in (None, start)]
    assert np.abs(first[0] - first[1]).max() > 0.1
    np.testing.assert_allclose(last[0], last[1], atol=2e-2)
    loss = [(F @ w.T - X * np.log(F @ w.T)).sum() for w in (first[0], last[0])]
    assert loss[1] < loss[0]


def test_tol_of_transform_W(conditional):
    X, _ = conditional
    F = np.exp(np.random.default_rng(0).normal(size=(40, 3)))
    once = T.transform_W(X, F, max_iter=1)
    np.testing.assert_array_equal(T.transform_W(X, F, tol=1e9), once)
    assert (T.transform_W(X, F, tol=1e-4) != once).any()


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


# --- calibration


@pytest.mark.parametrize("mean", [0.2, 2.0])
def test_intervals_cover_as_often_as_they_say(mean):
    """3000 intervals: the share has a standard error of 0.006, and is 0.876 to 0.904 in ten seeds,
    so that another seed would fall below 0.85 once in 10^4 times at most. This one is fixed.
    """
    found = coverage("expanded", 0.05, mean)
    assert 0.85 < found < 0.95
    assert found > 0.87


def test_overlapping_loadings_bring_coverage_down():
    """A factorised posterior leaves out that what one component gains the others lose."""
    expanded, lower_bound = (
        coverage(mode, 0.8, 2.0, N=400) for mode in ("expanded", "lower-bound")
    )
    assert expanded < 0.85
    assert lower_bound < expanded - 0.05


# --- parameters with constraints, and the modules that hold them


class UnitInterval(ConstrainedParameter):
    """A user's own: values between 0 and 1."""

    def _to_constrained(self, raw):
        return raw.sigmoid()

    def _to_unconstrained(self, value):
        return value.logit()


def test_a_parameter_of_the_users_own():
    """The base class gives every documented member to what only writes the two maps."""
    p = UnitInterval((2, 3), "open").double()
    values = torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.2, 0.7]], dtype=torch.float64)
    p.assign(values)
    p.project()
    torch.testing.assert_close(p.data.detach(), values)
    torch.testing.assert_close(p.raw.detach(), (values / (1 - values)).log())
    assert (p.mode, p.shape, p.dim(), p.size(1), p.numel()) == ("open", (2, 3), 2, 3, 6)
    assert (p.dtype, p.device) == (torch.float64, torch.device("cpu"))
    assert p.is_leaf
    assert not p.is_cuda
    torch.testing.assert_close(p[1, :2].detach(), values[1, :2])
    np.testing.assert_allclose(p.numpy(), values)
    (p.clone() * p.contiguous()).sum().backward()
    torch.testing.assert_close(p.grad, 2 * values * values * (1 - values))
    assert list(p.state_dict()) == ["_raw"]
    p.freeze()
    assert not p.requires_grad
    assert not p.detach().requires_grad
    p.unfreeze()
    assert p.requires_grad
    with pytest.raises(TypeError, match="abstract"):
        ConstrainedParameter((2, 3), "open")


def model_like(y: torch.Tensor) -> PoissonFactorization:
    return PoissonFactorization(GaussianPrior(y, 2), y, 2, "softplus", random_state=0)


def test_a_parameter_moves_as_part_of_a_model():
    model = model_like(torch.ones(6, 8))
    assert model.to(dtype=torch.float64) is model
    assert model.W.dtype == model.W.data.dtype == model.prior.scale.dtype == torch.float64
    assert {"W._raw", "W.unit", "prior.q.scale._raw"} <= set(model.state_dict())
    moved = model.to("meta")
    assert moved.W.device == moved.W.data.device == moved.prior.scale.device == torch.device("meta")
    assert PositiveParameter((2, 3)).to("meta", torch.float16).dtype == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_parameter_on_cuda():
    p = PositiveParameter((2, 3)).cuda(0)
    assert p.is_cuda
    assert p.data.is_cuda
    assert not p.cpu().is_cuda


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


def test_elbo_mode_changes_the_update(X):
    """The three updates of one W from one set of terms differ, and each lowers its own deviance."""
    y = torch.from_numpy(X.T)
    model = model_like(y)
    model.prior.assign(torch.zeros(2, 80), torch.full((2, 80), 0.8))
    with drawing_from(torch.Generator().manual_seed(0), y.device):
        terms, *_ = model(E=4, X=y)
    updated = {}
    for elbo_mode in ("lower-bound", "expanded", "simple"):
        p = PositiveParameter((24, 2), "multiplicative", elbo_mode).double()
        p.assign(model.W.detach())
        p.multiplicative_update(y, terms)
        updated[elbo_mode] = p.numpy()
    assert np.abs(updated["lower-bound"] / updated["expanded"] - 1).max() > 1e-3
    # The numerators are the same, and so are the denominators of each column.
    ratio = updated["simple"] / updated["expanded"]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-6)
    assert np.abs(ratio - 1).max() > 1e-3


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


def test_slices_and_masks_select_as_well(X):
    prior = model_like(torch.from_numpy(X.T)).prior
    mask = np.arange(80) < 10
    for index in (slice(0, 10), mask, torch.from_numpy(mask)):
        q, _ = prior.forward_batched(index)
        torch.testing.assert_close(q.loc, prior.mean[:, :10])


@pytest.mark.parametrize(
    "form",
    [torch.tensor, sp.csr_matrix, lambda a: torch.tensor(a, requires_grad=True), np.ndarray.tolist],
)
def test_factors_and_loadings_are_taken_in_any_form(form, fitted, counts):
    factors, W = T.get_factors(fitted), T.get_loadings(fitted)
    expected = fitted.inverse_transform(factors)
    np.testing.assert_allclose(fitted.inverse_transform(form(factors)), expected, rtol=1e-5)
    settings = {"mode": "lower-bound", "tol": 1.0}
    found = T.transform_F(counts, form(W), **settings)
    np.testing.assert_allclose(found, T.transform_F(counts, W, **settings), rtol=1e-4)
    assert found.dtype == np.float32


def test_attributes_of_a_model(X):
    y = torch.from_numpy(X.T)
    prior = GaussianPrior(y, 2)
    assert PoissonFactorization(prior, y, 2).prior is prior


def test_attributes_of_a_prior():
    for natural in (False, True):
        prior = GaussianPrior(torch.ones(6, 8), 2, use_natural_gradients=natural)
        assert prior.use_natural_gradients is natural
    assert isinstance(GaussianPrior(torch.ones(6, 8), 2).scale, PositiveParameter)


# --- fields over space that condition each place on its neighbours


SPACE = {
    "mode": "lower-bound",
    "training_mode": "natural",
    "loadings_mode": "multiplicative",
    "spatial": True,
    "init": "nndsvda",
    "random_state": 0,
    "max_iter": 15,
    "tol": 0,
    "lengthscale": 0.3,
}


@pytest.fixture(scope="module")
def stripes():
    """Two factors that alternate along a line of 150 places, of period 0.1."""
    x = np.sort(np.random.default_rng(0).uniform(size=(150, 1)), axis=0)
    wave = np.sin(2 * np.pi * x / 0.1)
    factors = np.exp(np.hstack([wave, -wave]))
    W = np.kron(np.eye(2), np.full((6, 1), 3.0))
    return np.random.default_rng(1).poisson(factors @ W.T) * 1.0, x, wave[:, 0]


def field_of(stripes, **parameters) -> PNMF:
    settings = {**SPACE, "local": True, "K": 10, **parameters}
    return PNMF(2, **settings).fit(stripes[0], coordinates=stripes[1])


@unconverged
def test_local_keeps_what_inducing_points_blur(stripes):
    fits = (field_of(stripes, lengthscale=0.05, num_inducing=8, local=one) for one in (True, False))
    right = [np.abs(np.corrcoef(T.log_factors(fit).T, stripes[2])[-1, :2]).min() for fit in fits]
    assert right[0] > 0.95
    assert right[1] < 0.6


@unconverged
@pytest.mark.parametrize("K", [1, 4])
def test_k_is_how_many_neighbours_a_place_has(stripes, K):
    graph = field_of(stripes, K=K, max_iter=1).model_.prior.neighborhoods.factor.graph
    assert graph.predecessors.shape == (150, K)
    np.testing.assert_array_equal((graph.predecessors >= 0).sum(1), np.minimum(np.arange(150), K))


@unconverged
def test_precompute_knn_searches_once(stripes, monkeypatch):
    calls = {"graph": 0, "batch": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name, which in (("build_graph", "graph"), ("neighbors_of_batch", "batch")):
        function = getattr(neighborhoods, name)
        monkeypatch.setattr(neighborhoods, name, counted(which, function))
    standard = {"training_mode": "standard", "loadings_mode": "projected", "rank": 0}
    settings = {**standard, "batch_size": 50, "max_iter": 6}
    field_of(stripes, **settings)
    assert calls == {"graph": 1, "batch": 0}
    field_of(stripes, **settings, precompute_knn=False)
    assert calls["batch"] >= 6


@unconverged
def test_neighbors_chooses_who_conditions_whom(stripes):
    x, spread = stripes[1][:, 0], {}
    for neighbors in ("knn", "probabilistic"):
        graph = field_of(stripes, K=4, neighbors=neighbors, max_iter=1)
        graph = graph.model_.prior.neighborhoods.factor.graph
        near = graph.neighbors_of()
        spread[neighbors] = np.where(near < 0, 0, np.abs(x[near] - x[:, None])).sum()
    assert spread["probabilistic"] > 1.2 * spread["knn"]


@unconverged
def test_rank_is_how_many_columns_q_has(stripes):
    uncertainty = {}
    for rank in (0, 5):
        fit = field_of(stripes, rank=rank)
        assert fit.model_.prior.low_rank.shape == (2, 150, rank)
        uncertainty[rank] = T.factor_uncertainty(fit).mean()
    assert uncertainty[5] > 1.1 * uncertainty[0]
