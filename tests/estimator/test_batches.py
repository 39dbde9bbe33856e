"""Batches and covariates in every kind of fit, in what follows it, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.transforms import get_factors, get_loadings

pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")
N, D, L = 240, 40, 2


@pytest.fixture(scope="module")
def data():
    """Places, true log-factors, batches, covariates, their true effects, and counts."""
    r = np.random.default_rng(0)
    places = r.uniform(0, 10, (N, 2))
    F = np.stack([np.sin(places[:, 0]), np.cos(places[:, 1])], 1) * 1.2
    W, labels, z = r.gamma(0.5, 8.0, (D, L)) + 0.3, r.integers(0, 3, N), r.normal(size=(N, 1))
    b, c = r.normal(0, 0.5, (D, 3)), r.normal(0, 0.3, (D, 1))
    b -= b @ np.bincount(labels)[:, None] / N
    plain = np.exp(F) @ W.T
    X = r.poisson(plain * np.exp(b[:, labels].T + z @ c.T))
    return {
        **{"places": places, "F": F, "labels": np.array(["a", "b", "c"])[labels], "z": z},
        **{"b": b, "c": c, "X": X, "without": r.poisson(plain)},
    }


def fitted(data, X=None, **given):
    X = data["X"] if X is None else X
    given = {"batches": data["labels"], "covariates": data["z"], "max_iter": 150, **given}
    return pnmf_pyro.fit(X, n_components=L, **given)


@pytest.fixture(scope="module")
def model(data):
    """The fit of all that is known, which no test changes."""
    return fitted(data)


@pytest.fixture(scope="module")
def plain(data):
    """The fit of the same counts without batches and covariates."""
    return pnmf_pyro.fit(data["X"], n_components=L)


def recovery(data, model):
    r = np.abs(np.corrcoef(data["F"].T, np.log(get_factors(model)).T)[:L, L:])
    return r.max(1).min()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"likelihood": "negative-binomial"},
        {"size_factors": np.ones(N), "mask": np.random.default_rng(1).random((N, D)) > 0.1},
        {"batch_size": 80, "y_batch_size": 20},
        {"coords": True, "local": True, "K": 10},
        {"coords": True, "groups": True},
        {"mode": "simple"},
        {"training_mode": "standard", "loadings_mode": "softplus", "stages": None, "E": 3},
    ],
    ids=str,
)
def test_effects_are_found_in_every_kind_of_fit(data, how):
    given = dict(how)
    if given.pop("coords", None):
        given["coords"] = data["places"]
    if given.pop("groups", None):  # batches are the groups
        given["groups"] = data["labels"]
    if how.get("training_mode"):
        given |= {"learning_rate": 0.1, "max_iter": 150}
    model = fitted(data, **{"max_iter": 60, **given})
    assert model.batches_ == ["a", "b", "c"]
    assert np.corrcoef(model.batch_effects_.ravel(), data["b"].ravel())[0, 1] > 0.97
    assert np.corrcoef(model.covariate_effects_.ravel(), data["c"].ravel())[0, 1] > 0.97
    share = np.mean(data["labels"][:, None] == model.batches_, 0)
    np.testing.assert_allclose(model.batch_effects_ @ share, 0, atol=1e-5)
    assert recovery(data, model) > 0.85
    assert np.isfinite(model.batch_effects_se_).all()
    assert (model.covariate_effects_se_ > 0).all()


def test_factors_are_as_if_there_were_no_effects(data, model, plain):
    alone = pnmf_pyro.fit(data["without"], n_components=L)
    assert recovery(data, model) > recovery(data, alone) - 0.01
    assert recovery(data, plain) < recovery(data, alone) - 0.02


@pytest.mark.parametrize("likelihood", ["poisson", "negative-binomial"])
def test_the_bound_never_falls(data, likelihood):
    model = fitted(data, mode="lower-bound", likelihood=likelihood, max_iter=80)
    values = np.array(model.history_)
    for _, first, last in model.history_.stages:
        assert (np.diff(values[first:last]) >= -1e-6 * np.abs(values[-1])).all()


def test_sparse_and_dense_counts_give_the_same(data, model):
    other = fitted(data, sp.csr_matrix(data["X"]))
    np.testing.assert_allclose(model.batch_effects_, other.batch_effects_, atol=1e-3)


def test_errors_are_as_large_as_the_effects_are_off(data, model):
    for kind, true in (("batch", "b"), ("covariate", "c")):
        off = getattr(model, f"{kind}_effects_") - data[true]
        z = off / getattr(model, f"{kind}_effects_se_")
        assert 0.5 < np.sqrt(np.mean(z**2)) < 1.5


@pytest.mark.slow
def test_labels_and_units_do_not_matter(data, model):
    other = fitted(data, batches=pd.Series(data["labels"]).map({"a": 3, "b": 1, "c": 2}).to_numpy())
    np.testing.assert_allclose(model.batch_effects_, other.batch_effects_[:, [2, 0, 1]], atol=1e-3)
    scaled = fitted(data, covariates=1000 * data["z"] + 1e6)
    np.testing.assert_allclose(
        model.covariate_effects_, 1000 * scaled.covariate_effects_, atol=1e-3
    )


def test_a_frame_has_numbers_and_words(data):
    r = np.random.default_rng(0)
    frame = pd.DataFrame({"age": data["z"][:, 0], "kind": r.choice(["p", "q", "r"], N)})
    model = fitted(data, batches=None, covariates=frame, max_iter=40)
    assert model.covariates_ == ["age", "kind[q]", "kind[r]"]
    assert model.batch_effects_ is None
    codes = np.stack([frame["age"], frame["kind"] == "q", frame["kind"] == "r"], 1).astype(float)
    by_hand = fitted(data, batches=None, covariates=codes, max_iter=40)
    np.testing.assert_allclose(model.covariate_effects_, by_hand.covariate_effects_, atol=1e-4)


def test_new_samples(data, model, plain):
    new = slice(0, 50)
    given = {"batches": data["labels"][new], "covariates": data["z"][new]}
    found = model.transform(data["X"][new], **given)
    own = get_factors(model)[new]
    assert np.corrcoef(np.log(found + 1e-2).ravel(), np.log(own).ravel())[0, 1] > 0.9
    score = model.score(data["X"][new], **given)
    other = {**given, "batches": np.roll(data["labels"], 1)[new]}
    assert score > model.score(data["X"][new], **other)
    z = (data["z"] - data["z"].mean()) @ model.covariate_effects_.T
    b = model.batch_effects_[:, [model.batches_.index(one) for one in data["labels"]]].T
    rates = model.inverse_transform(found, **given)
    np.testing.assert_allclose(rates, found @ model.components_ * np.exp(b + z)[new], rtol=1e-4)
    for name, wrong in (("batches", None), ("covariates", None)):
        with pytest.raises(ValueError, match=f"{name} must be given: the model was fitted with"):
            model.transform(data["X"][new], **{**given, name: wrong})
    with pytest.raises(ValueError, match=r"of the fit, a, b, c; got d\. .*fit it again"):
        model.transform(data["X"][new], **{**given, "batches": ["d"] * 50})
    with pytest.raises(ValueError, match="batches are for models that were fitted with batches"):
        plain.score(data["X"][new], batches=given["batches"])


def test_a_spatial_fit_predicts_counts_of_a_batch(data):
    model = fitted(data, coords=data["places"], max_iter=30)
    given = {"batches": data["labels"], "covariates": data["z"]}
    assert np.isfinite(model.score(data["X"], coordinates=data["places"], **given))
    with pytest.raises(ValueError, match="batches do not change what a spatial model predicts"):
        model.transform(None, data["places"], batches=data["labels"])


def test_checks_see_the_effects(data, model):
    check = pnmf_pyro.posterior_predictive_check(model, data["X"], n_draws=100, random_state=0)
    assert not check.flagged


def test_saved_and_loaded(data, tmp_path):
    frame = pd.DataFrame({"age": data["z"][:, 0], "kind": np.tile(["p", "q"], N // 2)})
    model = fitted(data, covariates=frame, max_iter=30)
    model.save(tmp_path / "model.npz")
    back = PNMF.load(tmp_path / "model.npz")
    assert back.design_ == model.design_
    for name in ("batch_effects_", "batch_effects_se_", "covariate_effects_", "batches_"):
        np.testing.assert_array_equal(getattr(back, name), getattr(model, name))
    given = {"batches": data["labels"], "covariates": frame}
    assert back.score(data["X"], **given) == model.score(data["X"], **given)


def test_anndata_names_columns_of_obs(data, model, tmp_path):
    anndata = pytest.importorskip("anndata")
    obs = pd.DataFrame({"run": pd.Categorical(data["labels"]), "age": data["z"][:, 0]})
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(data["X"].astype(np.float32), obs=obs)
    alone = model
    model = pnmf_pyro.fit(adata, n_components=L, batches="run", covariates="age", max_iter=150)
    np.testing.assert_allclose(model.batch_effects_, alone.batch_effects_, atol=1e-3)
    table = adata.varm["PNMF_batch_effects"]
    assert list(table.columns) == ["a", "b", "c"]
    np.testing.assert_array_equal(table.to_numpy(), model.batch_effects_)
    assert list(adata.uns["pnmf"]["covariates"]) == ["age"]
    adata.write(tmp_path / "out.h5ad")
    one, other = pnmf_pyro.effects_table(model), pnmf_pyro.effects_table(adata)
    np.testing.assert_array_equal(one["effect"], other["effect"])
    assert list(one["name"].unique()) == ["a", "b", "c", "age"]
    own = {"batches": data["labels"], "covariates": data["z"]}
    assert model.score(adata) == pytest.approx(model.score(adata, **own), rel=1e-5)
    pnmf_pyro.fit(adata, n_components=L, max_iter=5)
    assert "PNMF_batch_effects" not in adata.varm
    with pytest.raises(ValueError, match="batches: lane is no column of"):
        pnmf_pyro.fit(adata, n_components=L, batches="lane")
    with pytest.raises(ValueError, match="names a column of obs of an AnnData object, and X is"):
        pnmf_pyro.fit(data["X"], n_components=L, batches="run")


def test_a_batch_of_one_sample_is_warned_of_by_name(data):
    labels = data["labels"].astype(object)
    labels[7] = "lone"
    with pytest.warns(UserWarning, match="batches: lone has one sample"):
        model = fitted(data, batches=labels, max_iter=60)
    assert np.isfinite(model.batch_effects_).all()
    assert recovery(data, model) > 0.9


BAD = [
    ({"batches": ["a"] * N}, "batches must have two labels or more"),
    ({"batches": ["a"] * 3}, r"batches must have one label for each of the 240 samples"),
    ({"batches": [None, *["a", "b"] * 119, "a"]}, "batches must not be missing .* sample 0"),
    ({"covariates": np.ones(N)}, "'covariate 0' is the same for all samples"),
    ({"covariates": np.arange(N - 1)}, "covariates must have one row for each of the 240"),
    ({"covariates": np.full(N, np.nan)}, "'covariate 0' has NaN or infinity for 240 samples"),
    ({"covariates": np.array([[1, 2]] * N) * np.arange(N)[:, None]}, "is a combination of"),
    ({"covariates": {"w": ["x"] * N}}, "'w' is the same for all samples"),
    ({"covariates": {"w": np.arange(N) % 2}, "batches": np.arange(N) % 2}, "of batches, so that"),
    ({"covariates": np.zeros((N, 2, 2))}, r"numbers of shape \(n_samples, P\)"),
    ({"covariates": np.zeros((N, 0))}, "covariates must have at least one column"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_by_name(data, given, message):
    with pytest.raises(ValueError, match=message):
        fitted(data, **{"batches": None, "covariates": None, **given})


def test_what_new_samples_lack_is_named(data):
    model = fitted(data, covariates=pd.DataFrame({"kind": np.tile(["p", "q"], N // 2)}), max_iter=5)
    given = {"batches": data["labels"][:4]}
    with pytest.raises(ValueError, match=r"'kind' must be among those of the fit, p, q; got s"):
        model.transform(data["X"][:4], **given, covariates={"kind": ["p", "q", "s", "p"]})
    with pytest.raises(ValueError, match=r"covariates must be those of the fit, \['kind'\]"):
        model.transform(data["X"][:4], **given, covariates={"age": ["p", "q", "p", "p"]})
    with pytest.raises(ValueError, match="'kind' must hold words, as in the fit"):
        model.transform(data["X"][:4], **given, covariates={"kind": np.arange(4)})


def test_plans_and_likelihoods_take_them(data):
    plan = pnmf_pyro.plan(
        data["X"], n_components=L, batches=data["labels"], mask=np.ones((N, D), bool)
    )
    assert plan.prior == "GaussianPrior"
    some = {"batches": data["labels"][:80], "covariates": data["z"][:80]}
    model = fitted(data, data["X"][:80], **some, likelihood="auto", max_iter=60)
    assert model.likelihood_ == "poisson"


def test_what_is_published_is_plain(model):
    json.dumps({"batches": model.batches_, "covariates": model.covariates_})
    assert get_loadings(model).shape == (D, L)
    assert model.batch_effects_.shape == model.batch_effects_se_.shape == (D, 3)


def test_a_fit_without_effects_says_so(plain):
    assert plain.batch_effects_ is None
    with pytest.raises(ValueError, match="fit has no effects"):
        pnmf_pyro.effects_table(plain)
