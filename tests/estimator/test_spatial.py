"""Spatial models through the estimator: parameters, prediction, input, saving, learning."""

import numpy as np
import pytest
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.stages import RestoreSpread, Settle, SettleLoadings, WarmUp
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.transforms import factor_samples, factor_uncertainty, get_factors, log_factors
from tests.support.data import tissue
from tests.support.settings import STEPS, fitted_in_space, unconverged

pytestmark = unconverged

# Of q(F) itself, which a prediction is and which stages move.
Q = {"posterior": "factorised"}


@pytest.fixture(scope="module")
def data():
    return tissue(groups=2)


@pytest.fixture(scope="module")
def model(data):
    return PNMF(2, **STEPS).fit(data[0], coordinates=data[1])


@pytest.fixture(scope="module")
def grouped(data):
    X, x, labels, *_ = data
    return PNMF(2, multigroup=True, **STEPS).fit(X, coordinates=x, groups=labels)


def test_fields_are_smooth_and_right(model, data):
    found, true = log_factors(model), data[3]
    correlation = np.corrcoef(found.T, true.T)[:2, 2:]
    assert correlation.max(1).min() > 0.9
    independent = pnmf_pyro.fit(data[0], n_components=2)
    assert roughness(get_factors(model), data[1]) < roughness(get_factors(independent), data[1])


def roughness(values, x):
    """Mean squared difference of logarithms between nearest places, over the variance."""
    logs = np.log(values)
    gaps = ((x[:, None] - x) ** 2).sum(-1) + 9 * np.eye(len(x))
    return ((logs - logs[gaps.argmin(1)]) ** 2).mean() / logs.var()


def test_prediction_at_the_samples_is_the_fit(model, data):
    np.testing.assert_allclose(
        model.transform(None, coordinates=data[1]), get_factors(model), rtol=1e-6
    )
    for function in (log_factors, factor_uncertainty):
        there = function(model, coordinates=data[1], **Q)
        np.testing.assert_allclose(there, function(model, **Q), rtol=1e-4, atol=1e-6)


def test_prediction_ignores_x_and_reverts_far_away(model, data):
    X, x, *_ = data
    np.testing.assert_array_equal(model.transform(X, x), model.transform(3 * X, x))
    far = factor_uncertainty(model, coordinates=[[1e3, 1e3]])
    np.testing.assert_allclose(far, 1.0, rtol=1e-4)  # sigma


def test_draws_at_new_places_are_joint(model):
    near = np.array([[0.5, 0.5], [0.5, 0.5 + 1e-4]])
    draws = factor_samples(model, 200, coordinates=near, random_state=0)
    assert draws.shape == (200, 2, 2)
    apart = np.abs(draws[:, 0] - draws[:, 1]).mean()
    assert apart < 0.2 * draws[:, 0].std(0).mean()
    again = factor_samples(model, 200, coordinates=near, random_state=0)
    np.testing.assert_array_equal(draws, again)
    exp = factor_samples(model, 200, True, coordinates=near, random_state=0, return_tensor=True)
    np.testing.assert_allclose(exp.numpy(), np.exp(draws))


def test_score_prefers_the_model_that_generated_the_data(data):
    X, x, *_ = data
    train, test = np.arange(45), np.arange(45, 60)
    spatial = PNMF(2, **STEPS).fit(X[train], coordinates=x[train])
    flat = PNMF(2, **{**STEPS, "lengthscale": 0.01})
    with pytest.warns(UserWarning, match="lengthscale"):
        flat.fit(X[train], coordinates=x[train])
    scores = [one.score(X[test], coordinates=x[test]) for one in (spatial, flat)]
    assert scores[0] > scores[1]


def test_groups(grouped, data):
    X, x, labels, *_ = data
    assert grouped.groups_ == ["a", "b"]
    at = grouped.transform(None, x, labels)
    np.testing.assert_allclose(at, get_factors(grouped), rtol=1e-6)
    other = np.where(labels == "a", "b", "a")
    assert not np.allclose(grouped.transform(None, x, other), at, rtol=0.05)
    with pytest.raises(ValueError, match=r"groups.*\['z'\]"):
        grouped.transform(None, x[:1], ["z"])
    with pytest.raises(ValueError, match="groups must be given"):
        grouped.transform(None, x)
    import pandas

    as_category = PNMF(2, multigroup=True, **STEPS).fit(
        X, coordinates=x, groups=pandas.Categorical(labels)
    )
    np.testing.assert_array_equal(get_factors(as_category), get_factors(grouped))


def test_transforms_take_groups(grouped, data):
    _, x, labels, *_ = data
    swapped = np.where(labels == "a", "b", "a")
    for function in (log_factors, factor_uncertainty):
        mine, other = (function(grouped, coordinates=x, groups=g, **Q) for g in (labels, swapped))
        np.testing.assert_allclose(mine, function(grouped, **Q), rtol=1e-4, atol=1e-6)
        assert np.abs(mine - other).max() > 0.01
    draws = factor_samples(grouped, 3, coordinates=x, groups=labels, random_state=0)
    assert draws.shape == (3, 60, 2)


def test_fit_transform_is_the_fit(data, model):
    found = PNMF(2, **STEPS).fit_transform(data[0], coordinates=data[1])
    np.testing.assert_array_equal(found, get_factors(model))


@pytest.mark.parametrize(
    "settings", [{}, {"multigroup": True, "group_diff_param": 2.0}, {"kernel": ("RBF", "Matern12")}]
)
def test_a_saved_model_predicts_the_same(data, tmp_path, settings):
    X, x, labels, *_ = data
    groups = labels if "multigroup" in settings else None
    fit = PNMF(2, **STEPS, **settings).fit(X, coordinates=x, groups=groups)
    fit.save(tmp_path / "model.npz")
    loaded = PNMF.load(tmp_path / "model.npz")
    new = x[:5] + 0.01
    codes = None if groups is None else groups[:5]
    np.testing.assert_array_equal(
        loaded.transform(None, new, codes), fit.transform(None, new, codes)
    )
    assert loaded.groups_ == fit.groups_


@pytest.mark.parametrize(
    ("settings", "effect"),
    [
        ({"kernel": "RBF"}, "smoother"),
        ({"lengthscale": 0.1}, "rougher"),
        ({"sigma": 0.2}, "smoother"),
        ({"kernel": "Matern12"}, "rougher"),
    ],
)
def test_kernel_parameters_change_smoothness(model, data, settings, effect):
    other = roughness(get_factors(fitted_in_space(data, **settings)), data[1])
    base = roughness(get_factors(model), data[1])
    assert (other < base) == (effect == "smoother")


def test_group_diff_param_separates_groups(data):
    X, x, labels, *_ = data
    apart = {}
    for a in (0.0, 1e6):
        fit = PNMF(2, multigroup=True, group_diff_param=a, **STEPS).fit(X, None, x, labels)
        mine, other = (
            fit.transform(None, x, g) for g in (labels, np.where(labels == "a", "b", "a"))
        )
        apart[a] = np.abs(np.log(mine / other)).mean()
    assert apart[0.0] < 1e-6
    assert apart[1e6] > 0.1


def test_num_inducing_and_allocation(data):
    X, x, labels, *_ = data
    fit = fitted_in_space(data, num_inducing=15)
    assert fit.model_.prior.M == 15
    equal = PNMF(2, multigroup=True, num_inducing=20, inducing_allocation="equal", **STEPS)
    equal.fit(X, coordinates=x, groups=labels)
    codes = equal.model_.prior.inducing_groups
    np.testing.assert_array_equal(np.bincount(codes), [10, 10])
    for allocation in ("proportional", "derived"):
        equal.set_params(inducing_allocation=allocation).fit(X, coordinates=x, groups=labels)
        assert set(equal.model_.prior.inducing_groups.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("cholesky_mode", "diagonal_only"), [("exp", True), ("exp", False), ("softplus", False)]
)
def test_standard_training(data, cholesky_mode, diagonal_only):
    fit = fitted_in_space(
        data,
        training_mode="standard",
        loadings_mode="projected",
        learning_rate=0.05,
        max_iter=80,
        cholesky_mode=cholesky_mode,
        diagonal_only=diagonal_only,
        mode="expanded",
        tol=0,
    )
    assert np.mean(fit.history_[-10:]) > np.mean(fit.history_[:10])
    assert hasattr(fit.model_.prior.q, "u_below") != diagonal_only
    assert np.isfinite(get_factors(fit)).all()


def test_jitter_is_added_to_the_variance(data):
    bound = [fitted_in_space(data, jitter=jitter).elbo_ for jitter in (1e-6, 0.5)]
    assert bound[0] > bound[1] + 1


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 32])
@pytest.mark.parametrize(
    "prior",
    [{"num_inducing": 70}, {"num_inducing": 20}, {"local": True, "K": 10}],
    ids=["all inducing", "few inducing", "local"],
)
def test_minibatches_from_a_cold_start_do_not_run_away(prior, batch_size):
    X, x, *_ = tissue(N=70)
    settings = {**STEPS, "init": None, "max_iter": 300, **prior}
    whole = PNMF(2, **settings).fit(X, coordinates=x)
    batched = PNMF(2, **settings, batch_size=batch_size).fit(X, coordinates=x)
    assert batched.elbo_ > whole.elbo_ - 0.3 * abs(whole.elbo_)
    assert np.abs(log_factors(batched)).max() < 10


def test_minibatches_come_near_the_whole(data, model):
    batched = fitted_in_space(data, batch_size=20, max_iter=120, tol=0)
    whole = fitted_in_space(data, max_iter=60, tol=0)
    assert abs(batched.elbo_ - whole.elbo_) < 0.005 * abs(whole.elbo_)


def test_two_fits_are_the_same_bits_and_no_seed_moves(data, model):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = PNMF(2, **STEPS).fit(data[0], coordinates=data[1])
    np.testing.assert_array_equal(get_factors(again), get_factors(model))
    assert torch.equal(before[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_large_offsets_and_units_do_not_matter(data, model):
    X, x, *_ = data
    far = PNMF(2, **{**STEPS, "lengthscale": 400.0}).fit(X, coordinates=1e3 * x + [5e5, 3.5e6])
    np.testing.assert_allclose(get_factors(far), get_factors(model), rtol=1e-4)


def test_duplicate_places_share_the_field(data):
    X, x, *_ = data
    fit = PNMF(2, **STEPS).fit(np.concatenate([X, X]), coordinates=np.concatenate([x, x]))
    assert len(x) == fit.model_.prior.M
    F = log_factors(fit)
    np.testing.assert_allclose(F[: len(x)], F[len(x) :], atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "coordinates must be given"),
        ({"coordinates": np.zeros((3, 2))}, "coordinates must have one row"),
        ({"coordinates": np.full((60, 2), np.nan)}, "coordinates must be finite"),
        ({"coordinates": np.ones((60, 2))}, "one single place"),
        ({"coordinates": np.array([["a", "b"]] * 60)}, "coordinates must be an array of numbers"),
    ],
)
def test_bad_coordinates(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        PNMF(2, **STEPS).fit(data[0], **arguments)


def test_bad_groups(data):
    X, x, labels, *_ = data
    multi = PNMF(2, multigroup=True, **STEPS)
    for groups, message in (
        (None, "groups must be given"),
        (labels[:5], "groups must have one entry"),
        ([None] * 60, "groups must not be missing"),
    ):
        with pytest.raises(ValueError, match=message):
            multi.fit(X, coordinates=x, groups=groups)
    with pytest.raises(ValueError, match="multigroup=True"):
        PNMF(2, **STEPS).fit(X, coordinates=x, groups=labels)


def test_places_on_a_line_and_a_group_of_one(data):
    X, x, labels, *_ = data
    line = PNMF(2, **STEPS).fit(X, coordinates=x[:, :1])
    assert np.isfinite(get_factors(line)).all()
    lonely = labels.copy()
    lonely[0] = "c"
    fit = PNMF(2, multigroup=True, **STEPS).fit(X, coordinates=x, groups=lonely)
    assert fit.groups_ == ["a", "b", "c"]
    assert np.isfinite(get_factors(fit)).all()


def test_forward_of_a_spatial_model(model, data):
    module: PoissonFactorization = model.model_
    X = torch.from_numpy(data[0].T)
    terms, qF, qU, pU = module(E=2, X=X, spatial=True)
    assert terms["log_likelihood"].shape == (60,)
    assert qF.loc.shape == (2, 60)
    kl = torch.distributions.kl_divergence(qU, pU)
    bound = float((terms["log_likelihood"].sum() - kl).detach())
    np.testing.assert_allclose(bound, model.elbo_, rtol=1e-6)
    _, at, *_ = module(coordinates=torch.from_numpy(data[1][:4]))
    found = log_factors(model, **Q)[:4]
    np.testing.assert_allclose(at.loc.detach().numpy().T, found, rtol=1e-4)
    multi = PNMF(2, multigroup=True, **STEPS).fit(data[0], None, data[1], data[2]).model_
    groups = torch.zeros(4, dtype=torch.int64)
    _, at, *_ = multi(coordinates=torch.from_numpy(data[1][:4]), groups=groups)
    assert at.loc.shape == (2, 4)


def test_kl_weight_above_one_smooths(data, model):
    heavy = fitted_in_space(data, stages=[Settle(kl_weight=20.0)])
    assert roughness(get_factors(heavy), data[1]) < roughness(get_factors(model), data[1])


@pytest.mark.parametrize("place", [{}, {"num_inducing": 20}, {"local": True, "K": 12}])
def test_restored_spread_is_wider_around_the_same_means(data, place):
    settled, settings = [Settle(kl_weight=0.4)], {**place, "tol": 1e-5}
    plain = fitted_in_space(data, stages=settled, max_iter=150, **settings)
    stages = [*settled, RestoreSpread(), SettleLoadings()]
    restored = fitted_in_space(data, stages=stages, max_iter=300, **settings)
    tolerance = 1e-2 if "local" in place else 1e-6  # a mean by one more solve
    after, before = log_factors(restored, **Q), log_factors(plain, **Q)
    np.testing.assert_allclose(after, before, tolerance, tolerance)
    after, before = (factor_uncertainty(one, **Q).mean() for one in (restored, plain))
    assert after > 1.1 * before
    assert restored.elbo_ > plain.elbo_
    # closed-form loadings: expected counts of each feature are those seen
    expected = (get_factors(restored) @ restored.components_).sum(0)
    np.testing.assert_allclose(expected, data[0].sum(0), rtol=1e-3)


@pytest.mark.parametrize("place", [{}, {"num_inducing": 20}, {"local": True, "K": 12}])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_shrunk_loadings_leave_fields_and_totals_of_features(data, place, weight):
    settled = [Settle(kl_weight=weight), RestoreSpread()]
    plain, shrunk = (
        fitted_in_space(data, stages=[*settled, SettleLoadings(shrink)], **place)
        for shrink in (False, True)
    )
    for function in (log_factors, factor_uncertainty):
        np.testing.assert_array_equal(function(shrunk, **Q), function(plain, **Q))
    assert not np.allclose(shrunk.components_, plain.components_, rtol=1e-3)
    expected = (get_factors(shrunk) @ shrunk.components_).sum(0)
    np.testing.assert_allclose(expected, data[0].sum(0), rtol=1e-3)


def test_without_a_weight_there_is_no_spread_to_restore(data, model):
    same = fitted_in_space(data, stages=[Settle(), RestoreSpread()])
    assert same.history_ == model.history_
    assert same.elbo_ == model.elbo_


def test_a_callback_sees_the_factors_of_its_step(data):
    seen = []

    def look(model, iteration, elbo):
        seen.append(get_factors(model))

    fit = PNMF(2, **STEPS, stages=[WarmUp(), Settle()])
    fit.fit(data[0], coordinates=data[1], callback=look, callback_interval=1)
    assert (seen[1] != seen[0]).any()
    # The fit ends at the last point whose bound is known, which the step before led to.
    np.testing.assert_array_equal(seen[-2], get_factors(fit, **Q))


def test_fit_with_coordinates_needs_no_tuning(data):
    X, x, labels, *_ = data
    fit = pnmf_pyro.fit(X, x, n_components=2, max_iter=60)
    assert fit.spatial
    assert np.isfinite(fit.elbo_)
    multi = pnmf_pyro.fit(X, x, labels, n_components=2, max_iter=60)
    assert multi.groups_ == ["a", "b"]
