"""Formats of saved files: names in them are a contract, and those of version 0.1 still open.

The folder `files` holds models that version 0.1 saved, and what it found in them.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.archive import read_archive
from pnmf_pyro.estimator.saved_models import NAMES
from pnmf_pyro.estimator.stages import (
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleLoadings,
    WarmUp,
)
from pnmf_pyro.transforms import factor_uncertainty, get_factors, log_factors
from tests.support.data import tissue
from tests.support.settings import LOCAL, NATURAL, STEPS, unconverged

pytestmark = unconverged

FILES = Path(__file__).parent / "files"
EXPECTED = np.load(FILES / "expected.npz")
SAVED = sorted(file.stem for file in FILES.glob("*.npz") if file.stem != "expected")
CONVERTED = ("svgp_few",)  # held in natural parameters, which nothing has any more


def data_of_these_models():
    """Counts, places and groups, as the script made them that wrote the files."""
    random = np.random.default_rng(0)
    x = random.uniform(0, 10, (30, 2))
    F = np.stack([np.sin(x[:, 0] / 2), np.cos(x[:, 1] / 3)], 1)
    W = random.gamma(0.5, 2.0, (12, 2))
    return random.poisson(np.exp(F) @ W.T), x, np.repeat(["a", "b"], 15)


COUNTS, PLACES, GROUPS = data_of_these_models()


def predicted(model: PNMF) -> np.ndarray:
    groups = None if model.groups_ is None else GROUPS[:5]
    return model.transform(None, coordinates=PLACES[:5] + 0.3, groups=groups)


def rewritten(stem: str, path: Path, without=(), **parameters) -> Path:
    """A copy of a file of version 0.1 in which parameters have other values."""
    with np.load(FILES / f"{stem}.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name not in without}
    header = json.loads(str(arrays["header"]))
    assert parameters.keys() <= header["parameters"].keys()
    header["parameters"] |= parameters
    np.savez(path, **{**arrays, "header": np.array(json.dumps(header))})
    return path


# --- files of version 0.1


def test_every_kind_of_prior_of_version_1_is_there():
    assert len(SAVED) == 9
    for stem in SAVED:
        assert read_archive(FILES / f"{stem}.npz")[0]["format_version"] == 1


@pytest.mark.parametrize("stem", SAVED)
def test_a_file_of_version_1_says_what_it_said(stem):
    model = PNMF.load(FILES / f"{stem}.npz")
    expected = {name: EXPECTED[f"{stem}.{name}"] for name in ("components", "elbo", "history")}
    np.testing.assert_array_equal(model.components_, expected["components"])
    np.testing.assert_array_equal(model.history_, expected["history"])
    assert model.elbo_ == expected["elbo"]
    assert model.history_.stages == []
    found = {"loc": log_factors(model).T, "scale": factor_uncertainty(model).T}
    if "coordinates" in str(list(model.model_.state_dict())):
        found["transform"] = predicted(model)
    for name, values in found.items():
        exact = stem.startswith("gaussian")
        tolerance = 0 if exact else 1e-6
        np.testing.assert_allclose(values, EXPECTED[f"{stem}.{name}"], tolerance, tolerance)
    assert (f"{stem}.transform" in EXPECTED) == ("transform" in found)


@pytest.mark.parametrize("stem", SAVED)
def test_a_file_of_version_1_is_saved_as_the_present_format(stem, tmp_path):
    model = PNMF.load(FILES / f"{stem}.npz")
    model.save(tmp_path / "model.npz")
    header, arrays = read_archive(tmp_path / "model.npz")
    assert header["format_version"] == 2
    assert set(arrays) <= {*NAMES, "components", "history", "feature_names"}
    again = PNMF.load(tmp_path / "model.npz")
    states = model.model_.state_dict(), again.model_.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(bool((states[0][key] == states[1][key]).all()) for key in states[0])
    assert again.get_params() == model.get_params()
    assert again.history_ == model.history_
    for function in (log_factors, factor_uncertainty, get_factors):
        np.testing.assert_array_equal(function(again), function(model))
    if not stem.startswith("gaussian"):
        np.testing.assert_array_equal(predicted(again), predicted(model))


@pytest.mark.filterwarnings("ignore:.*has no effect here:UserWarning")
@pytest.mark.parametrize("stem", SAVED)
def test_a_model_of_version_1_can_be_fitted_again(stem):
    model = PNMF.load(FILES / f"{stem}.npz").set_params(max_iter=10)
    places = None if stem.startswith("gaussian") else PLACES
    groups = None if model.groups_ is None else GROUPS
    model.fit(COUNTS, coordinates=places, groups=groups)
    assert model.n_iter_ == 10 or model.tol > 0
    assert np.isfinite(model.elbo_)


@pytest.mark.parametrize(
    ("stem", "settings"),
    [("svgp_fit", {}), ("svgp_few", {"num_inducing": 12}), ("svgp_groups", {"groups": GROUPS})],
)
def test_the_recipe_finds_what_version_1_found(stem, settings):
    """From its counts, but for levels: its warm-up ended at another scale of the prior.

    A level is what loadings gain and factors lose.
    """
    model = pnmf_pyro.fit(COUNTS, PLACES, n_components=2, max_iter=400, **settings)
    found, before = (
        W / W.sum(1, keepdims=True) for W in (model.components_, EXPECTED[f"{stem}.components"])
    )
    np.testing.assert_allclose(found, before, rtol=0, atol=0.06 * before.max())
    fields = log_factors(model, posterior="factorised").T, EXPECTED[f"{stem}.loc"]
    found, before = (F - F.mean(1, keepdims=True) for F in fields)
    np.testing.assert_allclose(found, before, rtol=0, atol=0.2)
    assert all(np.corrcoef(*pair)[0, 1] > 0.995 for pair in zip(found, before, strict=True))
    assert model.elbo_ == pytest.approx(float(EXPECTED[f"{stem}.elbo"]), rel=2e-3)


def test_default_parameters_find_what_they_found_in_version_1():
    """Draws are of torch, whose stream may change: the course of a fit hardly depends on them."""
    model = PNMF(3, random_state=0, max_iter=30).fit(COUNTS)
    loadings = EXPECTED["gaussian_default.components"]
    np.testing.assert_allclose(model.components_, loadings, rtol=0, atol=0.05 * loadings.max())
    assert model.elbo_ == pytest.approx(float(EXPECTED["gaussian_default.elbo"]), rel=0.02)


def test_a_q_in_natural_parameters_is_converted_whatever_the_mode_of_scales(tmp_path):
    plain = PNMF.load(FILES / "svgp_few.npz")
    other = PNMF.load(rewritten("svgp_few", tmp_path / "a.npz", cholesky_mode="softplus"))
    for function in (log_factors, factor_uncertainty):
        np.testing.assert_array_equal(function(other), function(plain))
    other.save(tmp_path / "b.npz")
    np.testing.assert_array_equal(log_factors(PNMF.load(tmp_path / "b.npz")), log_factors(plain))


SEARCH = LearnHyperparameters()


@pytest.mark.parametrize(
    ("stem", "parameters", "stages"),
    [
        ("gaussian_default", {}, [Settle()]),
        ("gaussian_fit", {}, [WarmUp(), Settle()]),
        ("gaussian_fit", {"mode": "lower-bound"}, [Settle()]),
        ("gaussian_fit", {"kl_weight": 0.5}, [WarmUp(0.5), Settle(kl_weight=0.5)]),
        (
            "gaussian_fit",
            {"shrink_loadings": True},
            [WarmUp(), Settle(), SettleLoadings(shrink=True)],
        ),
        (
            "svgp_fit",
            {},
            [WarmUp(0.6), SEARCH, Settle(kl_weight=0.6), RestoreSpread(), SettleLoadings(True)],
        ),
        (
            "svgp_fit",
            {"shrink_loadings": False, "criterion": "elbo"},
            [
                *(WarmUp(0.6), LearnHyperparameters("elbo"), Settle(kl_weight=0.6)),
                *(RestoreSpread(), SettleLoadings()),
            ],
        ),
        (
            "svgp_fit",
            {"restore_spread": False, "warm_up": False},
            [Settle("lower-bound", 0.6), SEARCH, Settle(kl_weight=0.6), SettleLoadings(True)],
        ),
        ("svgp_standard", {}, [Settle()]),
        ("svgp_standard", {"warm_up": True}, [WarmUp(), SEARCH, Settle()]),
        ("svgp_standard", {"train_nugget": True}, [Settle("lower-bound"), SEARCH, Settle()]),
        ("lcgp_standard", {}, [Settle(), Correlate(30), Settle()]),
        ("lcgp_standard", {"rank": 0}, [Settle()]),
        ("lcgp_fit", {}, [WarmUp(), SEARCH, Settle(), Correlate(4), Settle()]),
        (
            "lcgp_fit",
            {"kl_weight": 0.5, "restore_spread": True, "shrink_loadings": True},
            [
                *(WarmUp(0.5), SEARCH, Settle(kl_weight=0.5)),
                *(RestoreSpread(), Correlate(4), SettleLoadings(True)),
            ],
        ),
    ],
)
def test_parameters_of_version_1_become_the_stages_that_they_stood_for(
    stem, parameters, stages, tmp_path
):
    model = PNMF.load(rewritten(stem, tmp_path / "old.npz", **parameters))
    assert model.stages == tuple(stages)


def test_what_was_learned_has_a_name_each():
    assert PNMF.load(FILES / "svgp_groups.npz").learn == ("sigma", "nugget", "group_diff_param")
    assert PNMF.load(FILES / "svgp_groups.npz").train_lengthscale
    assert PNMF.load(FILES / "gaussian_default.npz").learn == ()


def test_a_file_of_version_1_that_lacks_something_is_damaged(tmp_path):
    path = rewritten("svgp_fit", tmp_path / "a.npz", without=["model.prior.q.site_shift"])
    with pytest.raises(ValueError, match="not a saved PNMF model, or is damaged"):
        PNMF.load(path)


# --- format 2

KINDS = {
    "flat": {"max_iter": 5},
    "flat, natural": NATURAL,
    "softplus": {"loadings_mode": "softplus"},
    "SVGP": STEPS,
    "SVGP, few": {**STEPS, "num_inducing": 10},
    "SVGP, standard": {**STEPS, "training_mode": "standard"},
    "SVGP, diagonal": {**STEPS, "training_mode": "standard", "diagonal_only": True},
    "SVGP, groups": {**STEPS, "multigroup": True},
    "SVGP, kernels": {**STEPS, "kernel": ("RBF", "Matern12")},
    "LCGP": LOCAL,
    "LCGP, settled": {**LOCAL, "stages": [Settle()]},
    "LCGP, standard": {**LOCAL, "training_mode": "standard"},
    "LCGP, groups": {**LOCAL, "multigroup": True},
    "SVGP, beside": {**STEPS, "non_spatial_components": 1},
    "LCGP, beside": {**LOCAL, "non_spatial_components": 1, "learn": ("sigma",)},
    "LCGP, standard, beside": {
        **{**LOCAL, "training_mode": "standard"},
        "non_spatial_components": 1,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def fitted_kind(request):
    X, x, labels, *_ = tissue(N=30, groups=2)
    settings = {"random_state": 0, **KINDS[request.param], "max_iter": 6, "tol": 0}
    places = x if settings.get("spatial") else None
    groups = labels if settings.get("multigroup") else None
    s = np.linspace(0.5, 2, 30) if "natural" in request.param else None
    return PNMF(2, **settings).fit(X, coordinates=places, groups=groups, size_factors=s)


def test_every_array_of_every_model_has_a_name(fitted_kind, tmp_path):
    held = set(fitted_kind.model_.state_dict())
    beside = fitted_kind.non_spatial_components > 0
    held = {name.replace("prior.sides.0.", "prior.") if beside else name for name in held}
    assert held <= set(NAMES.values())
    fitted_kind.save(tmp_path / "model.npz")
    header, arrays = read_archive(tmp_path / "model.npz")
    assert header["format_version"] == 2
    named = {name for name, attribute in NAMES.items() if attribute in held}
    assert set(arrays) == named | {"components", "history"}


def test_a_file_gives_the_model_back_to_the_last_bit(fitted_kind, tmp_path):
    fitted_kind.save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    states = fitted_kind.model_.state_dict(), again.model_.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(bool((states[0][key] == states[1][key]).all()) for key in states[0])
    assert again.history_ == fitted_kind.history_
    assert again.history_.stages == fitted_kind.history_.stages
    params = {**fitted_kind.get_params(), "stages": None}
    assert {**again.get_params(), "stages": None} == params


def test_names_in_a_file_are_a_contract():
    """They stay, whatever attributes are called: a file of today opens in a later version."""
    assert set(NAMES) == {
        "loadings/unconstrained",
        "loadings/unit",
        "loadings/errors/blocks",
        "loadings/errors/coupling",
        "size_factors",
        "hidden/starts",
        "hidden/columns",
        "effects/design",
        "effects/codes",
        "effects/values",
        "effects/errors",
        "dispersion/inverse",
        "prior/scale",
        "prior/mean",
        "prior/kernel/lengthscale",
        "prior/kernel/sigma",
        "prior/kernel/nugget",
        "prior/kernel/group_diff_param",
        "prior/kernel/group_distances",
        "prior/kernel/group_diff_param_2",
        "prior/kernel/group_distances_2",
        "prior/kernel/chosen",
        "places/coordinates",
        "places/groups",
        "inducing/coordinates",
        "inducing/groups",
        "factors/joint_covariance",
        "factors/joint_draws",
        "factors/mean",
        "factors/scale/unconstrained",
        "factors/scale/unit",
        "factors/natural/first",
        "factors/natural/second",
        "inducing/mean",
        "inducing/scale/unconstrained",
        "inducing/scale/unit",
        "inducing/below_diagonal",
        "sites/shift",
        "sites/precision",
        "local/mean",
        "local/variance",
        "local/low_rank",
        "local/sites/precision",
        "local/sites/shift",
        "non_spatial/prior/scale",
        "non_spatial/mean",
        "non_spatial/scale/unconstrained",
        "non_spatial/scale/unit",
        "non_spatial/natural/first",
        "non_spatial/natural/second",
    }
    assert len(set(NAMES.values())) == len(NAMES)
    attributes = {part for held in NAMES.values() for part in held.split(".")}
    assert not {name for name in NAMES if "_raw" in name or name in attributes - {"size_factors"}}


def test_a_file_holds_numbers_and_text_alone(fitted_kind, tmp_path):
    """No code: numpy reads it without pickles, and its header is JSON with plain stages."""
    fitted_kind.save(tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz", allow_pickle=False) as archive:
        header = json.loads(str(archive["header"]))
        assert all(archive[name].dtype.kind in "fiuU" for name in archive.files)
    assert set(header) == {
        *("format", "format_version", "parameters", "groups", "group_columns", "n_samples"),
        *("elbo", "elbo_se", "stages", "mean_total", "likelihood", "keys", "design"),
    }
    stages = header["parameters"]["stages"]
    assert stages is None or stages == [{"stage": "Settle", "mode": None, "kl_weight": 1.0}]
