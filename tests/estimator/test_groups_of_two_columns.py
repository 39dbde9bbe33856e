"""Groups of two columns, such as a section and a type: arrays, AnnData, files, the command line."""

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

import pnmf_pyro
from pnmf_pyro import PNMF, group_levels, plotting, predict_as
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.estimator.results import results_of
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel
from pnmf_pyro.transforms import get_factors
from tests.support import dense_fields
from tests.support.settings import LOCAL, STEPS, unconverged

matplotlib.use("Agg")
pytestmark = unconverged
PAIRS = {**STEPS, "multigroup": True, "max_iter": 15}


def two_columns(N=90, seed=0):
    """Counts of three types in two sections, which no sample of type C is in both of."""
    random = np.random.default_rng(seed)
    x, number = random.uniform(size=(N, 2)), np.arange(N)
    types, sections = np.array([*"ABC"])[number % 3], np.array(["s1", "s2"])[number // 3 % 2]
    sections[types == "C"] = "s1"
    smooth = np.exp(np.stack([np.sin(3 * x[:, 0]), np.cos(4 * x[:, 1])], 1))
    high = np.array([[1, 0.2], [0.2, 1], [1, 1]])[number % 3]
    W = np.kron(np.eye(2), np.ones((8, 1))) * random.gamma(3.0, 2.0, (16, 1)) + 0.05
    labels = pd.DataFrame({"section": pd.Categorical(sections), "type": types})
    return random.poisson((smooth * high) @ W.T).astype(np.float32), x, labels


@pytest.fixture(scope="module")
def fitted():
    X, x, labels = two_columns()
    return pnmf_pyro.fit(X, x, labels, n_components=2, random_state=0)


def test_what_either_column_shares_is_learned(fitted):
    """Types differ by a factor of five, sections not at all."""
    kernel = fitted.model_.prior.kernel
    assert fitted.groups_ == [(s, t) for s in ("s1", "s2") for t in "ABC"]
    assert fitted.group_columns_ == ("section", "type")
    assert kernel.sizes_of_groups == (2, 3)
    assert (kernel.group_diff_param_2 > 2 * kernel.group_diff_param).all()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PAIRS, {**LOCAL, "multigroup": True, "max_iter": 15}])
def test_forms_of_two_columns_are_one_fit(settings):
    X, x, labels = two_columns()
    forms = labels, labels.to_numpy(), labels.to_numpy().tolist()
    models = [PNMF(2, **settings).fit(X, coordinates=x, groups=form) for form in forms]
    for model in models[1:]:
        assert model.group_columns_ is None
        np.testing.assert_array_equal(model.components_, models[0].components_)


def test_every_place_as_if_of_a_pair_is_the_posterior_of_its_field():
    """By dense matrices, from the sites of a field with an inducing point at each sample."""
    X, x, labels = two_columns(N=60)
    model = PNMF(2, **{**PAIRS, "group_diff_param": 2.0, "jitter": 1e-8})
    model.fit(X, coordinates=x, groups=labels)
    prior, codes = model.model_.prior, np.asarray(model.model_.prior.place_groups)
    assert [model.groups_[code] for code in codes] == list(
        labels.itertuples(index=False, name=None)
    )
    apart = np.array([[(s != u) + (t != w) for u, w in model.groups_] for s, t in model.groups_])
    given = {"gx": codes, "a": 2.0, "d": np.sqrt(apart)}
    K = dense_fields.covariance("Matern32", x, x, 0.4, 1.0, gz=codes, **given)
    h, b, _ = (site.detach().numpy() for site in prior.sites())
    as_c = np.array([model.groups_.index((s, "C")) for s in labels["section"]])
    cases = [(pair, np.full(60, number)) for number, pair in enumerate(model.groups_)]
    for group, gz in [*cases, ({"type": "C"}, as_c)]:
        K_star = dense_fields.covariance("Matern32", x, x, 0.4, 1.0, gz=gz, **given)
        found = predict_as(model, group)
        for l in range(2):
            level = float(prior.mean[l])
            mean, cov = dense_fields.regression(K, K_star, K, level, b[l] / h[l], 1 / h[l])
            spread = np.diag(cov) - np.diag(K) + 1.0
            np.testing.assert_allclose(found[:, l], np.exp(mean + spread / 2), rtol=2e-3)


def test_levels_of_one_column_and_of_pairs(fitted):
    labels = two_columns()[2]
    levels = group_levels(fitted, column="type")
    assert levels.groups == [*"ABC"]
    as_if = get_factors(fitted, coordinates=two_columns()[1], groups=labels.assign(type="B"))
    np.testing.assert_allclose(levels.levels[1], as_if.mean(0), rtol=1e-5)
    pairs = group_levels(fitted)
    assert pairs.groups == fitted.groups_
    first = predict_as(fitted, ("s1", "A"))
    np.testing.assert_allclose(pairs.levels[0], first.mean(0), rtol=1e-5)
    drawn = plotting.plot_group_levels(pairs)
    assert drawn.get_yticklabels()[0].get_text() == "s1, A"
    maps = plotting.plot_factors(fitted, components=[0])
    assert maps is not None


def test_a_saved_fit_is_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    assert (again.groups_, again.group_columns_) == (fitted.groups_, ("section", "type"))
    for name, values in fitted.model_.prior.kernel.hyperparameters.items():
        assert torch.equal(values, getattr(again.model_.prior.kernel, name))
    for group in (("s2", "C"), {"section": "s2"}):
        np.testing.assert_array_equal(predict_as(again, group), predict_as(fitted, group))


def test_columns_are_told_by_name(fitted):
    _, x, labels = two_columns()
    found = fitted.transform(None, coordinates=x, groups=labels)
    turned = fitted.transform(None, coordinates=x, groups=labels[["type", "section"]])
    np.testing.assert_array_equal(turned, found)


def adata():
    X, x, labels = two_columns()
    labels.index = [f"cell{i}" for i in range(len(X))]
    return anndata.AnnData(X, obs=labels, obsm={"spatial": x})


def test_two_columns_of_obs(fitted, tmp_path):
    table = adata()
    model = pnmf_pyro.fit(table, batch_key=["section", "type"], n_components=2, random_state=0)
    np.testing.assert_array_equal(model.components_, fitted.components_)
    table.write_h5ad(tmp_path / "table.h5ad")
    again = anndata.read_h5ad(tmp_path / "table.h5ad")
    assert list(again.uns["pnmf"]["batch_key"]) == ["section", "type"]
    assert {"group_diff_param", "group_diff_param_2"} <= set(again.uns["pnmf"]["hyperparameters"])
    for source in (again, model):
        np.testing.assert_array_equal(results_of(source).groups, table.obs[["section", "type"]])
    model.save(tmp_path / "model.npz")
    assert PNMF.load(tmp_path / "model.npz").keys_ == model.keys_
    np.testing.assert_array_equal(model.transform(again), predict_where_they_are(fitted))
    plan = pnmf_pyro.plan(table, batch_key=["section", "type"], n_components=2)
    assert "90 samples" in str(plan)


def predict_where_they_are(model):
    _, x, labels = two_columns()
    return model.transform(None, coordinates=x, groups=labels)


def test_two_columns_on_the_command_line(tmp_path):
    adata().write_h5ad(tmp_path / "table.h5ad")
    out, options = tmp_path / "out.h5ad", ["--batch-key", "section,type", "--components", "2"]
    command = ["fit", str(tmp_path / "table.h5ad"), "--out", str(out), *options]
    assert main([*command, "--set", "tol=0.05", "--quiet"]) in (0, 1)
    written = anndata.read_h5ad(out).uns["pnmf"]
    assert {"group_diff_param", "group_diff_param_2"} <= set(written["hyperparameters"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda g: g.assign(third=1), r"or two columns, .* got shape \(90, 3\)"),
        (lambda g: g[["type"]], r"got shape \(90, 1\)"),
        (lambda g: g[:-1], r"shape \(90,\); got shape \(89,\)"),
        (lambda g: g.assign(type=[None, *g["type"][1:]]), "must not be missing"),
        (lambda g: g.set_axis(["type", "type"], axis=1), "of different names"),
    ],
)
def test_two_columns_that_cannot_be_used(groups, message):
    X, x, labels = two_columns()
    with pytest.raises(ValueError, match=message):
        PNMF(2, **PAIRS).fit(X, coordinates=x, groups=groups(labels))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda g: g["type"], "must have the 2 columns of the fit, .*'section', 'type'.*; got 1"),
        (lambda g: g.rename(columns={"type": "kind"}), r"columns of the fit, .* got .*'kind'"),
        (lambda g: g.assign(type="D"), "among those of the fit.*'D'"),
    ],
)
def test_new_samples_have_the_columns_of_the_fit(groups, message, fitted):
    _, x, labels = two_columns()
    with pytest.raises(ValueError, match=message):
        fitted.transform(None, coordinates=x, groups=groups(labels))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("A", "one of the pairs of the fit"),
        (("s1", "D"), "one of the pairs of the fit"),
        ({"type": "D"}, r"group must be of \['A', 'B', 'C'\]"),
        ({"kind": "A"}, r"one of the columns of groups, \['section', 'type'\]; got 'kind'"),
        ({}, "one of the pairs of the fit"),
    ],
)
def test_pairs_that_are_not_of_the_fit(group, message, fitted):
    with pytest.raises(ValueError, match=message):
        predict_as(fitted, group)


def test_other_places_need_both_labels(fitted):
    with pytest.raises(ValueError, match="must say both labels"):
        predict_as(fitted, {"type": "A"}, np.zeros((3, 2)))
    both = predict_as(fitted, {"type": "A", "section": "s2"}, np.full((3, 2), 0.5))
    np.testing.assert_array_equal(both, predict_as(fitted, ("s2", "A"), np.full((3, 2), 0.5)))


def test_kernels_that_are_not_of_these_groups():
    X, x, labels = two_columns()
    from pyro.contrib.gp.kernels import Matern32

    one = SpatialKernel("Matern32", 0.4, group_distances=1 - np.eye(6))
    with pytest.raises(ValueError, match="over 6 groups, and groups has 2 x 3"):
        PNMF(2, **{**PAIRS, "kernel": one}).fit(X, coordinates=x, groups=labels)
    apart = {"group_distances": 1 - np.eye(2), "group_distances_2": 1 - np.eye(3)}
    two = SpatialKernel("Matern32", 0.4, **apart)
    given = PNMF(2, **{**PAIRS, "kernel": two}).fit(X, coordinates=x, groups=labels)
    named = PNMF(2, **PAIRS).fit(X, coordinates=x, groups=labels)
    np.testing.assert_allclose(given.components_, named.components_, rtol=1e-5)
    wrapped = MultiGroupKernel(Matern32(2), 1 - np.eye(6))
    with pytest.raises(ValueError, match="group_distances must have shape"):
        PNMF(2, **{**PAIRS, "kernel": wrapped}).fit(X, coordinates=x, groups=labels)


def test_keys_of_obs_are_one_or_two_names():
    for wrong in (["section"], ["section", "type", "kind"], ["section", 1], 3):
        with pytest.raises(ValueError, match="batch_key must be a name, two names or None"):
            pnmf_pyro.fit(adata(), batch_key=wrong, n_components=2)
    with pytest.raises(ValueError, match=r"batch_key='kind' is not a column"):
        pnmf_pyro.fit(adata(), batch_key=["section", "kind"], n_components=2)
