"""Stages of a fit: what each does, how they combine, how they share `max_iter`."""

import copy
import gc
import logging
import pickle
import weakref

import numpy as np
import pytest
import torch
from sklearn.base import clone

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator import plan
from pnmf_pyro.estimator import stages as module
from pnmf_pyro.estimator.recipe import CLOSER, NEIGHBORS, RECIPE, SPATIAL
from pnmf_pyro.estimator.stages import (
    STAGES,
    WARM_UP_TOL,
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleJointly,
    SettleLoadings,
    WarmUp,
)
from pnmf_pyro.training.hyperparameters import HyperparameterSearch
from pnmf_pyro.transforms import factor_uncertainty, get_factors, log_factors
from tests.support.data import tissue
from tests.support.settings import LOCAL, NATURAL, STEPS, unconverged

pytestmark = unconverged

FLAT = {**NATURAL, "random_state": 0, "max_iter": 40, "tol": 1e-3}
# Of q(F) itself, which stages move.
Q = {"posterior": "factorised"}
STANDARD = {
    "training_mode": "standard",
    "loadings_mode": "softplus",
    "learning_rate": 0.1,
    "scheduler": None,
}
KINDS = {
    "flat": FLAT,
    "flat, expanded": {**FLAT, "mode": "expanded"},
    "flat, standard": {**FLAT, **STANDARD},
    "SVGP": STEPS,
    "few inducing": {**STEPS, "num_inducing": 15},
    "SVGP, standard": {**STEPS, **STANDARD},
    "LCGP": LOCAL,
    "LCGP, standard": {**LOCAL, **STANDARD},
    "batches": {**STEPS, "batch_size": 20},
}


@pytest.fixture(scope="module")
def data():
    return tissue()


def fit(data, settings, stages=None, **more) -> PNMF:
    """A fit of the table, at its places where the settings are those of a field."""
    places = data[1] if settings.get("spatial") else None
    model = PNMF(2, **{**settings, **more, "stages": stages})
    return model.fit(data[0], coordinates=places)


def assert_same(one: PNMF, other: PNMF) -> None:
    """Two fits to the last bit."""
    assert one.history_ == other.history_
    assert one.elbo_ == other.elbo_
    np.testing.assert_array_equal(one.components_, other.components_)
    np.testing.assert_array_equal(log_factors(one), log_factors(other))
    np.testing.assert_array_equal(factor_uncertainty(one), factor_uncertainty(other))


# --- what stands where none are named


@pytest.mark.parametrize("kind", KINDS)
def test_without_stages_a_fit_settles(data, kind):
    settings = {**KINDS[kind], "max_iter": 20}
    stages = [Settle(), Correlate(), Settle()] if settings.get("local") else [Settle()]
    assert_same(fit(data, settings), fit(data, settings, tuple(stages)))


@pytest.mark.parametrize(
    ("kind", "learning"),
    [
        ("SVGP", {"train_lengthscale": True}),
        ("SVGP, standard", {"learn": ("sigma", "nugget")}),
        ("LCGP", {"kernel": ("RBF", "Matern12")}),
    ],
)
def test_what_is_learned_is_learned_where_the_field_has_settled(data, learning, kind):
    settings = {**KINDS[kind], **learning, "max_iter": 20}
    stages = [Settle(mode="lower-bound"), LearnHyperparameters(), Settle()]
    if settings.get("local"):
        stages += [Correlate(30), Settle()]
    assert_same(fit(data, settings), fit(data, settings, stages))


def test_names_of_what_is_learned_need_a_field(data):
    assert_same(fit(data, FLAT, learn=("sigma",)), fit(data, FLAT))


def test_lengthscale_has_two_names(data):
    one, other = {"train_lengthscale": True}, {"learn": ("lengthscale",)}
    assert_same(fit(data, STEPS, **one), fit(data, STEPS, **other))


# --- each stage


def test_settle_takes_a_mode_of_its_own(data):
    lower = fit(data, FLAT)
    same = fit(data, {**FLAT, "mode": "expanded"}, [Settle(mode="lower-bound")])
    assert same.history_ == lower.history_
    np.testing.assert_array_equal(log_factors(same), log_factors(lower))
    assert same.elbo_ > lower.elbo_  # the tighter bound of the same q


@pytest.mark.parametrize("kind", ["flat", "flat, standard", "SVGP", "LCGP"])
def test_a_weight_below_one_follows_the_samples_more_closely(data, kind):
    """The divergence from the prior rises as its weight falls."""
    divergence = {}
    for weight in (0.3, 1.0, 3.0):
        model = fit(data, KINDS[kind], [Settle(kl_weight=weight)], max_iter=25).model_
        q = model.prior.marginal()
        divergence[weight] = float(q.loc.detach().var(1).mean())
    assert divergence[0.3] > divergence[1.0] > divergence[3.0]


def test_a_warm_up_without_space_settles_the_lower_bound(data):
    """More closely than a stage that settles does."""
    settings = {**FLAT, "mode": "expanded", "max_iter": 200}
    tol = WARM_UP_TOL * FLAT["tol"]
    settled = fit(data, settings, [Settle(mode="lower-bound")], tol=tol)
    assert fit(data, settings, [WarmUp()]).history_ == settled.history_


@pytest.mark.parametrize("kind", ["SVGP", "few inducing", "LCGP"])
def test_a_warm_up_in_space_is_a_fit_without(data, kind, monkeypatch):
    """Step by step, not extrapolated; its q(F) and loadings are where the next stage begins."""
    flat = {name: value for name, value in STEPS.items() if name not in ("spatial", "lengthscale")}
    settings = {**KINDS[kind], "max_iter": 60, "tol": 1e-4}
    warm = fit(data, settings, [WarmUp(), Settle()])
    name, first, last = warm.history_.stages[0]
    assert (name, first) == ("warm-up", 0)
    with monkeypatch.context() as patch:
        patch.setattr("pnmf_pyro.training.loop.MOST", 0.0)
        alone = fit(data, {**flat, "max_iter": last, "tol": 0.0})
    np.testing.assert_allclose(warm.history_[:last], alone.history_, rtol=1e-7)
    cold = fit(data, settings, [Settle()], max_iter=2)
    assert warm.history_[last] > cold.history_[0] + 100


@pytest.mark.parametrize("kind", ["SVGP", "LCGP"])
def test_what_follows_a_warm_up_takes_its_factors_over(data, kind):
    """Each stage that reads q(F) of the field finds what the warm-up has found."""
    stages = [WarmUp(), Settle()]
    settled = fit(data, KINDS[kind], stages, max_iter=60)
    after = [SettleLoadings(), RestoreSpread(), *([Correlate()] if kind == "LCGP" else [])]
    for stage in after:
        model = fit(data, KINDS[kind], [WarmUp(), stage], max_iter=60)
        correlation = np.corrcoef(log_factors(model).T, log_factors(settled).T)[:2, 2:]
        assert correlation.max(1).min() > 0.8, stage


def test_hyperparameters_are_learned_by_either_criterion(data):
    settings = {**STEPS, "train_lengthscale": True, "learn": ("sigma",), "max_iter": 80}
    found = []
    for criterion in ("leave-one-out", "elbo"):
        model = fit(data, settings, [WarmUp(), LearnHyperparameters(criterion), Settle()])
        kernel = model.model_.prior.kernel
        found.append(torch.stack([kernel.lengthscale, kernel.sigma]))
        assert (found[-1][:, 0] != found[-1][:, 1]).all()
    assert (found[0] != found[1]).any()


def test_a_search_may_come_again(data):
    """From sites of the field itself, which tell more than those of the warm-up."""
    settings = {**STEPS, "train_lengthscale": True, "max_iter": 120}
    once = [WarmUp(), LearnHyperparameters(), Settle()]
    twice = [*once, LearnHyperparameters(), Settle()]
    lengthscales = [
        fit(data, settings, stages).model_.prior.kernel.lengthscale.numpy()
        for stages in (once, twice)
    ]
    assert (lengthscales[0] != lengthscales[1]).any()
    assert (np.abs(np.log(lengthscales[0] / lengthscales[1])) < np.log(2)).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "SVGP", "few inducing", "LCGP"])
def test_restored_spread_is_that_of_weight_one_around_the_same_means(data, kind):
    settings = {**KINDS[kind], "max_iter": 300, "tol": 1e-5}
    plain = fit(data, settings, [Settle(kl_weight=0.4)])
    restored = fit(data, settings, [Settle(kl_weight=0.4), RestoreSpread()])
    tolerance = 1e-2 if kind == "LCGP" else 1e-6  # there the mean is that of one more solve
    after, before = log_factors(restored, **Q), log_factors(plain, **Q)
    np.testing.assert_allclose(after, before, tolerance, tolerance)
    spread = factor_uncertainty(restored, **Q)
    assert (spread > factor_uncertainty(plain, **Q)).all()
    assert restored.elbo_ > plain.elbo_
    again = fit(data, settings, [Settle(kl_weight=0.4), RestoreSpread(), RestoreSpread()])
    np.testing.assert_allclose(factor_uncertainty(again, **Q), spread, rtol=1e-6)


def test_restored_precisions_are_those_of_the_sites_with_their_weight(data):
    """Without space: 1 / sigma^2 is that of the prior and of a site, of which the weight counts."""
    settings = {**FLAT, "max_iter": 150, "tol": 1e-9}
    tight, wide = (
        fit(data, settings, [Settle(kl_weight=0.25), *after]).model_.prior
        for after in ([], [RestoreSpread()])
    )
    torch.testing.assert_close(wide.mean, tight.mean)
    torch.testing.assert_close(1 / wide.scale**2, 1 + 0.25 * (1 / tight.scale**2 - 1))


def test_the_weight_of_a_warm_up_is_restored_where_it_trained_the_model_itself(data):
    settings = {**FLAT, "max_iter": 200}
    warm = fit(data, settings, [WarmUp(kl_weight=0.4), RestoreSpread()], tol=1e-3)
    tol = WARM_UP_TOL * 1e-3
    settled = fit(data, settings, [Settle(kl_weight=0.4), RestoreSpread()], tol=tol)
    assert_same(warm, settled)


@pytest.mark.parametrize("kind", ["flat", "flat, standard", "SVGP", "LCGP", "batches"])
@pytest.mark.parametrize("shrink", [False, True])
def test_loadings_settle_around_a_q_at_rest(data, kind, shrink):
    settings = KINDS[kind]
    if shrink and settings["loadings_mode"] != "multiplicative":
        settings = {**settings, "loadings_mode": "multiplicative"}
    plain = fit(data, settings, [Settle()], max_iter=15)
    model = fit(data, settings, [Settle(), SettleLoadings(shrink)], max_iter=30)
    for function in (log_factors, factor_uncertainty):
        np.testing.assert_array_equal(function(model, **Q), function(plain, **Q))
    assert (model.components_ != plain.components_).any()
    if not shrink and "batch_size" not in settings:
        assert model.elbo_ > plain.elbo_


# --- how they combine


RECIPES = {
    "fit": (RECIPE, RECIPE["stages"]),
    "one start": ({**RECIPE, "init": None}, RECIPE["stages"]),
    "spatial": ({**SPATIAL, "num_inducing": 20}, SPATIAL["stages"]),
    "closer": (SPATIAL, CLOSER),
    "neighbours": ({**SPATIAL, "local": True, "K": 10}, NEIGHBORS),
    "default": ({"random_state": 0}, None),
    "default, in space": ({"random_state": 0, "spatial": True, "lengthscale": 0.3}, None),
    "default, neighbours": ({**LOCAL, "mode": "expanded"}, None),
    "learned": ({**STEPS, **STANDARD, "train_lengthscale": True}, None),
    "all": (
        {**LOCAL, "train_lengthscale": True},
        [
            *(WarmUp(0.5), LearnHyperparameters("elbo"), Settle(kl_weight=0.5), RestoreSpread()),
            *(SettleLoadings(), Correlate(3), Settle("expanded"), SettleLoadings(shrink=True)),
        ],
    ),
}


@pytest.mark.parametrize(("max_iter", "tol"), [(1, 0), (12, 0), (30, 1e-3)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_max_iter_bounds_the_whole_fit(data, recipe, max_iter, tol):
    settings, stages = RECIPES[recipe]
    model = fit(data, settings, stages, max_iter=max_iter, tol=tol)
    assert model.n_iter_ == len(model.history_) <= max_iter
    assert model.n_iter_ == max_iter or tol > 0
    assert np.isfinite(model.history_).all()
    edges = [0, *(last for _, _, last in model.history_.stages)]
    assert [first for _, first, _ in model.history_.stages] == edges[:-1]
    assert edges[-1] == model.n_iter_


def test_stages_that_train_share_what_is_left(data):
    """Each may take an equal share: what one does not need is there for those after it."""
    stages = [WarmUp(), Settle(), SettleLoadings()]
    whole = fit(data, FLAT, stages, max_iter=40, tol=0)
    assert whole.history_.stages == [
        ("warm-up", 0, 13),
        ("settle", 13, 26),
        ("loadings", 26, 40),
    ]
    early = fit(data, FLAT, [WarmUp(), Settle()], max_iter=400, tol=1e-4)
    (_, _, warm), (_, _, last) = early.history_.stages
    assert warm < 200
    assert last <= 400
    longer = fit(data, FLAT, [Settle(), RestoreSpread()], max_iter=40, tol=0)
    assert longer.history_.stages == [("settle", 0, 40)]  # what does not train takes none


def test_a_schedule_has_its_cycle_in_each_stage(data):
    """The budget of a stage is the length of its cycle."""
    settings = {**FLAT, **STANDARD, "scheduler": "one_cycle", "tol": 0}
    one = fit(data, settings, [Settle()], max_iter=30)
    two = fit(data, settings, [Settle(), Settle()], max_iter=60)
    assert two.history_[:30] == one.history_


def test_steps_on_trial_count(data):
    """Those of the start that was taken."""
    settings = {**FLAT, "init": ("nndsvda", "random"), "tol": 0}
    model = fit(data, settings, max_iter=50)
    assert model.history_.stages == [("settle", 0, 50)]
    short = fit(data, settings, max_iter=20)
    assert model.history_[:20] == short.history_


def test_a_callback_counts_through_all_stages(data):
    seen = []
    model = PNMF(2, **{**STEPS, "tol": 0}, stages=[WarmUp(), Settle(), SettleLoadings()])
    model.fit(
        data[0],
        coordinates=data[1],
        callback=lambda fit, iteration, elbo: seen.append((iteration, elbo)),
        callback_interval=1,
    )
    assert seen == list(enumerate(model.history_, 1))


def test_a_stage_that_has_not_settled_is_warned_of_with_its_own_number_of_steps(data):
    with pytest.warns(UserWarning, match="still rising after 15 iterations") as caught:
        fit(data, FLAT, [WarmUp(), Settle()], max_iter=30, tol=1e-9)
    assert len(caught) == 2  # one of each stage, since the fit builds on both


# --- how they are kept


IN_SPACE = [
    WarmUp(0.5),
    LearnHyperparameters("elbo"),
    Settle("expanded", 0.7),
    RestoreSpread(),
    Correlate(4),
    SettleLoadings(True),
]
EVERY = [*IN_SPACE, SettleJointly(), SettleJointly(20)]


def test_every_stage_is_exported():
    assert {type(stage) for stage in EVERY} == set(STAGES)
    for kind in STAGES:
        assert getattr(pnmf_pyro.estimator, kind.__name__) is kind
        assert kind.__name__ in pnmf_pyro.estimator.__all__
        assert getattr(module, kind.__name__) is kind


@pytest.mark.parametrize("stage", EVERY, ids=repr)
def test_a_stage_is_a_value(stage):
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage)), eval(repr(stage))):
        assert other == stage
        assert hash(other) == hash(stage)
    assert stage == type(stage)() or repr(stage) != repr(type(stage)())


def test_stages_survive_clones_parameters_and_pickles(data):
    model = fit(data, {**LOCAL, "train_lengthscale": True, "max_iter": 12}, IN_SPACE)
    assert model.get_params()["stages"] is IN_SPACE
    again = clone(model)
    assert again.stages == IN_SPACE
    assert again.set_params(stages=None).stages is None
    pickled = pickle.loads(pickle.dumps(model))
    assert pickled.stages == IN_SPACE
    assert pickled.history_ == model.history_
    assert pickled.history_.stages == model.history_.stages
    assert copy.deepcopy(model).history_.stages == model.history_.stages
    refit = clone(model).fit(data[0], coordinates=data[1])
    np.testing.assert_array_equal(get_factors(refit), get_factors(model))


@pytest.mark.parametrize("stages", [None, tuple(IN_SPACE), [Settle()]])
def test_stages_survive_a_file(data, stages, tmp_path):
    model = fit(data, {**LOCAL, "train_lengthscale": True, "max_iter": 12}, stages)
    model.save(tmp_path / "model.npz")
    loaded = PNMF.load(tmp_path / "model.npz")
    assert loaded.stages == (None if stages is None else tuple(stages))
    assert loaded.history_ == model.history_
    assert loaded.history_.stages == model.history_.stages
    refit = loaded.set_params(stages=stages).fit(data[0], coordinates=data[1])
    assert refit.history_ == model.history_


def test_the_log_of_a_fit_names_its_stages(counts, caplog):
    with caplog.at_level(logging.INFO, logger="pnmf_pyro"):
        pnmf_pyro.fit(counts, n_components=2, max_iter=4)
    warm_up, settle = "WarmUp(kl_weight=1.0, levels=None)", "Settle(mode=None, kl_weight=1.0)"
    assert f"stages=({warm_up}, {settle})" in caplog.text


# --- what cannot be


@pytest.mark.parametrize(
    ("settings", "stages", "message"),
    [
        (FLAT, [], "stages must begin with a stage that trains"),
        (FLAT, [RestoreSpread(), Settle()], "stages must begin with a stage that trains"),
        (LOCAL, [Correlate(), Settle()], "stages must begin with a stage that trains"),
        (FLAT, [Settle], "stages must be None or a list of stages"),
        (FLAT, Settle(), "stages must be None or a list of stages"),
        (FLAT, ["settle"], "stages must be None or a list of stages"),
        (FLAT, "settle", "stages must be None or a list of stages"),
        (
            FLAT,
            [Settle(), LearnHyperparameters(), Settle()],
            r"stages: LearnHyperparameters\(\) needs a spatial model .* set spatial=True",
        ),
        (
            STEPS,
            [LearnHyperparameters(), Settle()],
            r"stages: LearnHyperparameters\(\) needs .* a stage before it that trains",
        ),
        (FLAT, [Settle(), Correlate()], r"stages: Correlate\(\) is for a prior with neighbours"),
        (STEPS, [Settle(), Correlate()], r"stages: Correlate\(\) .* set local=True"),
        (
            {**FLAT, "training_mode": "standard"},
            [Settle(kl_weight=0.5), RestoreSpread()],
            r"stages: RestoreSpread\(\) needs .* set training_mode='natural'",
        ),
        (
            {**LOCAL, "training_mode": "standard"},
            [Settle(kl_weight=0.5), RestoreSpread()],
            r"stages: RestoreSpread\(\) needs .* set training_mode='natural'",
        ),
        (
            {**FLAT, "loadings_mode": "softplus"},
            [Settle(), SettleLoadings(shrink=True)],
            r"stages: SettleLoadings\(shrink=True\) needs .* set loadings_mode='multiplicative'",
        ),
        (STEPS, [Settle(), WarmUp()], r"stages: WarmUp\(\) of a model in space.* put it first"),
        (STEPS, [WarmUp(), WarmUp()], r"stages: WarmUp\(\) of a model in space.* put it first"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_one_sentence(data, settings, stages, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit(data, settings, stages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settle(mode="exact"), "mode must be one of 'simple', 'expanded'"),
        (lambda: Settle(kl_weight=0), "kl_weight must be a positive finite number; got 0"),
        (lambda: WarmUp(kl_weight=-1), "kl_weight must be a positive finite number; got -1"),
        (lambda: LearnHyperparameters("aic"), "criterion must be one of 'leave-one-out', 'elbo'"),
        (lambda: Correlate(-1), "rank must be a whole number"),
        (lambda: Correlate(2.5), "rank must be a whole number"),
        (lambda: SettleLoadings("yes"), "shrink must be True or False"),
    ],
)
def test_values_of_a_stage_are_checked_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_of_hyperparameters_are_checked(data):
    with pytest.raises(ValueError, match="learn must be one of 'lengthscale', 'sigma'"):
        fit(data, STEPS, learn=("period",))
    with pytest.raises(ValueError, match="learn must be a tuple of names"):
        fit(data, STEPS, learn="sigma")


def test_a_fit_forgets_the_warm_up_and_the_search_when_it_is_done_with_them(data, monkeypatch):
    made, left = [], []

    def noted(make):
        def call(*args, **kwargs):
            one = make(*args, **kwargs)
            made.append(weakref.ref(one))
            return one

        return call

    def end(model, counts):
        gc.collect()
        left.extend(one() for one in made)

    monkeypatch.setattr(module, "_independent", noted(module._independent))
    monkeypatch.setattr(module, "HyperparameterSearch", noted(HyperparameterSearch))
    monkeypatch.setattr(plan, "find_uncertainty", end)
    fit(data, LOCAL, [WarmUp(), LearnHyperparameters(), Settle(), Correlate(), Settle()])
    assert len(made) == 2
    assert left == [None, None]
