"""Large counts, fits that need no seed, and fits that say of themselves that they are no use."""

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import LARGE_TOTAL, as_counts
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.models import FactorizationELBO, joint
from pnmf_pyro.training.loop import evaluate_elbo
from pnmf_pyro.transforms import factor_uncertainty, get_factors, log_factors
from tests.support.settings import unconverged

KINDS = ("int64", "float32", "float64")


def structured(shape=(30, 200), top=None, seed=0):
    """Counts of three components, the largest of which is about `top`."""
    random = np.random.default_rng(seed)
    rate = np.exp(random.normal(size=(shape[0], 3))) @ (random.gamma(0.3, 1, (3, shape[1])) + 0.1)
    return random.poisson(rate * (3 if top is None else top / rate.max()))


@pytest.mark.slow
@unconverged
@pytest.mark.parametrize("top", [5e4, 1e7])
@pytest.mark.parametrize("parameters", [{}, {"size_factors": "total"}, {"batch_size": 20}])
def test_large_counts_give_one_fit_whatever_their_type(top, parameters):
    X = structured(top=top)
    fits = [
        pnmf_pyro.fit(X.astype(kind), n_components=3, max_iter=40, **parameters) for kind in KINDS
    ]
    fits.append(pnmf_pyro.fit(torch.from_numpy(X), n_components=3, max_iter=40, **parameters))
    for one in fits:
        np.testing.assert_array_equal(log_factors(one), log_factors(fits[0]))
        assert one.elbo_ == fits[0].elbo_
        np.testing.assert_allclose(one.score(X[:5]), fits[0].score(X[:5]))
    for kind, one in zip(KINDS, fits, strict=False):
        assert one.transform(X.astype(kind)).dtype == ("float32" if kind == "float32" else float)


def not_worked_out(*args):
    raise torch.linalg.LinAlgError("ill-conditioned")


@unconverged
@pytest.mark.parametrize(
    "found", [not_worked_out, lambda prior, *_: torch.full((prior.N, 3), torch.nan)]
)
def test_a_fit_does_without_an_uncertainty_that_cannot_be_worked_out(found, monkeypatch, caplog):
    monkeypatch.setattr(joint, "joint_covariance", found)
    model = pnmf_pyro.fit(structured(), n_components=2, max_iter=5)
    assert "no joint posterior" in caplog.text
    of_q = factor_uncertainty(model, posterior="factorised")
    np.testing.assert_array_equal(factor_uncertainty(model), of_q)


def test_small_counts_of_all_types_agree_beyond_what_their_uncertainty_says():
    X = structured((100, 30))
    single, double = (pnmf_pyro.fit(X.astype(kind), n_components=3) for kind in KINDS[1:])
    away = (log_factors(single) - log_factors(double)) / factor_uncertainty(double)
    assert np.sqrt(np.mean(away**2)) < 0.05


@pytest.mark.parametrize("make", [np.asarray, sp.csr_matrix, sp.coo_array, torch.from_numpy])
def test_the_precision_follows_from_the_total_of_a_sample(make):
    X = np.full((2, 4), int(LARGE_TOTAL / 4))
    assert as_counts(make(X)).dtype == torch.float32
    X[1, 2] += 1
    assert as_counts(make(X)).dtype == torch.float64
    assert as_counts(make(X.astype(np.float32))).dtype == torch.float64
    X[1, 2] = 2**24 + 1  # which float32 does not hold
    assert as_counts(make(X)).to_dense()[1, 2] == 2**24 + 1


def test_one_enormous_count():
    X = np.random.default_rng(0).poisson(3, (20, 10))
    X[3, 4] = 10**12
    model = pnmf_pyro.fit(X, n_components=2)
    assert get_factors(model)[3] @ model.components_[:, 4] == pytest.approx(1e12, rel=1e-6)


@pytest.mark.slow
@unconverged
def test_another_seed_gives_the_same_recommended_fit():
    X = load_digits().data[:, 1:32]
    fits = [pnmf_pyro.fit(X, n_components=10, random_state=seed, max_iter=100) for seed in range(5)]
    for one in fits[1:]:
        np.testing.assert_array_equal(log_factors(one), log_factors(fits[0]))
        np.testing.assert_array_equal(one.components_, fits[0].components_)


@unconverged
def test_samples_alike_have_factors_alike_in_any_order():
    X = structured((60, 30), seed=1)
    X = np.vstack([X, X[:20]])
    order = np.random.default_rng(0).permutation(len(X))
    first, second = (pnmf_pyro.fit(one, n_components=3) for one in (X, X[order]))
    F, sd = log_factors(first), factor_uncertainty(first)
    np.testing.assert_allclose(F[60:], F[:20], atol=1e-4)
    away = (F[order] - log_factors(second)) / sd[order]
    assert np.sqrt(np.mean(away**2)) < 0.05


def test_other_points_give_nearly_the_same_fit(monkeypatch):
    """Components in another order are other points: what the fixed ones leave out is little."""
    from pnmf_pyro.models import points

    X = structured((100, 30))
    first, signs = pnmf_pyro.fit(X, n_components=3), points.two_level_points
    monkeypatch.setattr(points, "two_level_points", lambda L: signs(7)[:, [4, 1, 6]])
    second = pnmf_pyro.fit(X, n_components=3)
    away = (log_factors(first) - log_factors(second)) / factor_uncertainty(first)
    assert 0 < np.sqrt(np.mean(away**2)) < 0.05


@pytest.mark.slow
def test_the_error_of_the_elbo_is_that_of_its_repetitions():
    X = structured((100, 30))
    model = pnmf_pyro.fit(X, n_components=3)
    batches, exact = Batches(as_counts(X)), FactorizationELBO("expanded", 2000)
    found = [
        evaluate_elbo(model.model_, batches, FactorizationELBO("simple", 20), torch_generator(i))
        for i in range(40)
    ]
    assert 0.5 < model.elbo_se_ / np.std(found) < 2
    value = evaluate_elbo(model.model_, batches, exact, torch_generator(0))
    assert abs(model.elbo_ - value) < 5 * model.elbo_se_ + 5
    assert pnmf_pyro.fit(X, n_components=3, mode="lower-bound").elbo_se_ == 0


def test_the_elbo_of_few_deep_counts_is_below_zero():
    X = structured((4, 3), top=1e6)
    assert pnmf_pyro.fit(X, n_components=2).elbo_ < 0


def warnings_of(call):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in heard if issubclass(one.category, ConvergenceWarning)]


@pytest.mark.slow
def test_a_fit_that_ends_far_below_its_optimum_says_so():
    X = structured((200, 40), top=200)
    assert any("far below" in one for one in warnings_of(lambda: PNMF(3, random_state=0).fit(X)))
    assert not warnings_of(lambda: pnmf_pyro.fit(X, n_components=3))
    long = {"learning_rate": 0.2, "max_iter": 1000, "tol": 0, "loadings_mode": "softplus"}
    assert not warnings_of(lambda: PNMF(3, random_state=0, **long).fit(X))


def test_a_fit_no_better_than_the_means_of_features_says_so():
    """Where all samples are alike nothing explains them better than their mean."""
    alike = np.tile(np.arange(1.0, 21.0), (60, 1))
    (told,) = warnings_of(lambda: pnmf_pyro.fit(alike, n_components=2))
    X = torch.from_numpy(alike)
    assert f"is below {float(torch.distributions.Poisson(X).log_prob(X).sum()):.6g}" in told


def test_numbers_that_are_not_finite_are_said(monkeypatch):
    def broken(*arguments):
        return float("inf"), 0.0

    monkeypatch.setattr("pnmf_pyro.estimator.plan.final_elbo", broken)
    told = warnings_of(lambda: pnmf_pyro.fit(structured((30, 20)), n_components=2, max_iter=20))
    assert any("not usable" in one for one in told)


def test_presences_have_factors_that_vary():
    random = np.random.default_rng(0)
    n, d = 50, 150
    level = np.where(random.random(d) < 0.3, random.uniform(0.8, 0.999, d), 0.15)
    effect = random.normal(0, 1.2, (5, d))[np.arange(n) % 5]
    X = random.random((n, d)) < 1 / (1 + np.exp(-np.log(level / (1 - level)) - effect))
    X = X[:, X.any(0)].astype(int)
    learned = pnmf_pyro.fit(X, n_components=5)
    fixed = pnmf_pyro.fit(X, n_components=5, scale_pf=1.0)
    assert log_factors(learned).std(0).min() > 0.3
    assert learned.elbo_ > fixed.elbo_ - 5


@pytest.mark.parametrize(("shuffled", "told"), [(False, 0), (True, 1)])
def test_a_lengthscale_at_the_end_of_what_was_tried_is_said(shuffled, told):
    random = np.random.default_rng(0)
    places = random.uniform(size=(200, 2))
    field = np.stack([np.sin(5 * places[:, 0]), np.cos(4 * places[:, 1])], 1)
    X = random.poisson(np.exp(field) @ random.gamma(0.5, 4, (2, 30)))
    if shuffled:
        places = random.permutation(places)
    found = warnings_of(lambda: pnmf_pyro.fit(X, places, n_components=2))
    assert sum("lengthscale was learned as" in one for one in found) == told


@pytest.mark.slow
@pytest.mark.parametrize("each", [20])
def test_lengthscales_are_learned_from_many_samples_at_a_place(each):
    random = np.random.default_rng(0)
    side = np.arange(8.0)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    field = 1.2 * np.stack([np.sin(grid[:, 0] * 0.9), np.cos(grid[:, 1] * 0.7)], 1)
    W = random.gamma(0.3, 0.6, (2, 30)) + 0.1
    X = random.poisson(np.exp(np.repeat(field, each, 0)) @ W)
    places = np.repeat(grid, each, 0)
    found = [
        pnmf_pyro.fit(X, places * unit, n_components=2, local=False, num_inducing=64, tol=1e-2)
        for unit in (1.0, 1000.0)
    ]
    here, there = (m.model_.prior.kernel.hyperparameters["lengthscale"].numpy() for m in found)
    np.testing.assert_allclose(here, there / 1000, rtol=0.01)
    assert ((here > 1.5) & (here < 10)).all()


@unconverged
def test_a_fit_far_from_its_optimum_has_variances_and_factors():
    """Rows over eight orders of magnitude, in six steps."""
    random = np.random.default_rng(0)
    X = random.poisson(3.0, (40, 14)) * 10.0 ** np.linspace(0, 8, 40)[:, None].round()
    for n_components in (1, 2):
        model = pnmf_pyro.fit(X, n_components=n_components, max_iter=6)
        for found in (get_factors(model), factor_uncertainty(model)):
            assert np.isfinite(found).all()
            assert (found > 0).all()
