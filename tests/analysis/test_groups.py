"""Groups that are types: every place as if of one, and which components are whose."""

import matplotlib
import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro import PNMF, group_levels, plotting, predict_as
from pnmf_pyro.analysis.groups import GroupLevels
from pnmf_pyro.transforms import get_factors
from tests.support import dense_fields
from tests.support.data import tissue
from tests.support.settings import STEPS, unconverged

matplotlib.use("Agg")
pytestmark = unconverged

TYPES = ["A", "B", "C"]


def typed(N=240, seed=0):
    """Counts of three types at shared places: all have component 0, A and B 1, and C alone 2."""
    random = np.random.default_rng(seed)
    x, types = random.uniform(size=(N, 2)), np.asarray(TYPES)[np.arange(N) % 3]
    smooth = np.exp(np.stack([np.sin(3 * x[:, 0]), np.cos(4 * x[:, 1]), np.sin(4 * x.sum(1))], 1))
    has = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1]])[np.arange(N) % 3]
    W = np.kron(np.eye(3), np.ones((6, 1))) * random.gamma(3.0, 2.0, (18, 1)) + 0.05
    return random.poisson((smooth * (has + 0.03)) @ W.T).astype(np.float32), x, types, W


@pytest.fixture(scope="module")
def fitted():
    X, x, types, _ = typed()
    return pnmf_pyro.fit(X, x, types, n_components=3)


def test_every_place_as_if_of_a_type_is_the_posterior_of_its_field():
    """By dense matrices, from the sites of a field with an inducing point at each sample."""
    X, x, labels, *_ = tissue(groups=2)
    model = PNMF(2, **{**STEPS, "multigroup": True, "group_diff_param": 2.0, "jitter": 1e-8})
    model.fit(X, coordinates=x, groups=labels)
    prior, codes = model.model_.prior, np.asarray(model.model_.prior.place_groups)
    h, b, _ = (site.detach().numpy() for site in prior.sites())
    new = np.random.default_rng(1).uniform(size=(7, 2))
    for number, group in enumerate(model.groups_):
        for places in (None, new):
            z = x if places is None else places
            given = {"gx": codes, "a": 2.0, "d": 1 - np.eye(2)}
            gz = np.full(len(z), number)
            K = dense_fields.covariance("Matern32", x, x, 0.4, 1.0, gz=codes, **given)
            K_star = dense_fields.covariance("Matern32", x, z, 0.4, 1.0, gz=gz, **given)
            K_new = dense_fields.covariance("Matern32", z, z, 0.4, 1.0)  # of one group
            found = predict_as(model, group, places)
            for l in range(2):
                level = float(prior.mean[l])
                mean, cov = dense_fields.regression(K, K_star, K_new, level, b[l] / h[l], 1 / h[l])
                np.testing.assert_allclose(found[:, l], np.exp(mean + np.diag(cov) / 2), rtol=2e-3)


@pytest.mark.slow
def test_of_many_places_levels_are_means_over_some(fitted, monkeypatch):
    whole = group_levels(fitted).levels
    monkeypatch.setattr("pnmf_pyro.analysis.groups.PLACES", 100)
    found = group_levels(fitted).levels
    rows = np.random.RandomState(0).permutation(240)[:100]
    np.testing.assert_allclose(found[1], predict_as(fitted, "B")[rows].mean(0), rtol=1e-5)
    assert 0 < np.abs(found / whole - 1).max() < 0.3


@pytest.mark.slow
def test_components_are_sorted_by_the_types_that_have_them(fitted):
    _, _, _, W = typed()
    C = np.corrcoef(W.T, fitted.components_)[:3, 3:]
    where = C.argmax(1)
    assert sorted(where) == [0, 1, 2]
    table = group_levels(fitted, fold=3.0).table
    kinds = dict(zip(table["component"], table["kind"], strict=True))
    groups = dict(zip(table["component"], table["groups"], strict=True))
    assert kinds[where[0]] == "universal"
    assert (kinds[where[2]], groups[where[2]]) == ("specific", ("C",))
    assert kinds[where[1]] == "universal"  # two of three groups are more than half
    assert table["tau"][where[2]] > table["tau"][where[0]]


def test_levels_are_means_over_all_places(fitted):
    levels = group_levels(fitted)
    x = typed()[1]
    for number, group in enumerate(TYPES):
        as_if = get_factors(fitted, coordinates=x, groups=[group] * len(x))
        np.testing.assert_allclose(levels.levels[number], as_if.mean(0), rtol=1e-5)
        expected = as_if.mean(0) * fitted.components_.T
        np.testing.assert_allclose(levels.loadings_of(group), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("levels", "kind", "groups", "fold", "tau"),
    [
        ([1, 1, 1, 1], "universal", (), 1, 0),
        ([8, 1, 1, 2], "specific", ("a",), 4, (7 / 8 + 7 / 8 + 6 / 8) / 3),
        ([1, 6, 1, 9], "enriched", ("d", "b"), 6, (3 / 9 + 8 / 9 + 8 / 9) / 3),
        ([6, 6, 1, 6], "universal", (), 1, 5 / 6 / 3),  # one group without it
        ([1.5, 1, 1, 1], "universal", (), 1.5, 1 / 3),
        ([5, 0, 0, 0], "specific", ("a",), 1e12, 1),
        ([0, 0, 0, 0], "universal", (), 1, 0),
    ],
)
def test_kinds_follow_from_levels(levels, kind, groups, fold, tau):
    found = GroupLevels([*"abcd"], np.array(levels, float)[:, None], np.ones((2, 1)), 2.0)
    row = found.table.iloc[0]
    assert (row["kind"], row["groups"]) == (kind, groups)
    assert row["fold"] == pytest.approx(fold)
    assert row["tau"] == pytest.approx(tau)
    assert found.kinds.tolist() == [kind]


def test_what_is_not_known_is_refused(fitted):
    X, x, *_ = typed()
    with pytest.raises(ValueError, match="one of the groups of the fit"):
        predict_as(fitted, "D")
    with pytest.raises(ValueError, match="fold must be"):
        group_levels(fitted, fold=0.5)
    alone = PNMF(2, **{**STEPS, "max_iter": 2}).fit(X, coordinates=x)
    with pytest.raises(ValueError, match="several groups"):
        group_levels(alone)
    with pytest.raises(ValueError, match="must be one of"):
        group_levels(fitted).loadings_of("D")


def test_the_picture_has_a_column_for_each_component(fitted):
    levels = group_levels(fitted)
    ax = plotting.plot_group_levels(levels)
    image = ax.images[0].get_array()
    order = [int(tick.get_text()) for tick in ax.get_xticklabels()]
    np.testing.assert_allclose(image, (levels.levels / levels.levels.max(0))[:, order])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == TYPES
    assert {text.get_text() for text in ax.texts} == set(levels.kinds)
