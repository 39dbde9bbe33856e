"""Plots: what they show, what they return, and small pictures to compare with.

PNMF_BASELINES=1 writes the pictures in tests/plotting/baselines anew; look at them before
committing them.
"""

import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from pnmf_pyro import PNMF, plotting
from pnmf_pyro.estimator.stages import Settle, SettleLoadings, WarmUp
from pnmf_pyro.plotting.tissue import disc_width, round_length, side_by_side
from tests.plotting import test_calibration_plots, test_check_plots
from tests.support.data import tissue
from tests.support.models import forms_of
from tests.support.settings import NATURAL, STEPS

matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.collections import EllipseCollection  # noqa: E402
from matplotlib.testing.compare import compare_images  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

BASELINES = Path(__file__).parent / "baselines"

# Root mean square difference of pixels, of 255.
TOLERANCE = 10.0


@pytest.fixture(autouse=True)
def unseen(monkeypatch):
    """Forbid showing figures."""

    def show(*args, **kwargs):
        raise AssertionError("a plot called show")

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.setattr(matplotlib.figure.Figure, "show", show)


def lattice(side):
    return 100.0 * np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)


def results(side=10, L=4, D=30, sections=1):
    """An AnnData object with results of a fit, made by hand: a bump for each component."""
    x = lattice(side)
    angle = 2 * np.pi * np.arange(L) / L
    centres = x.mean(0) * (1 + 0.6 * np.stack([np.cos(angle), np.sin(angle)], 1))
    away = np.linalg.norm(x[:, None] - centres, axis=2) / np.ptp(x)
    j, l = np.arange(D)[:, None], np.arange(L)
    adata = anndata.AnnData(
        np.random.default_rng(0).poisson(2.0, size=(len(x), D)).astype(np.float32),
        obs=pd.DataFrame({"depth": x[:, 0]}, index=[f"spot{i}" for i in range(len(x))]),
        var=pd.DataFrame(index=[f"gene{j}" for j in range(D)]),
        obsm={"spatial": x, "X_pnmf": 3 * np.exp(-10 * away**2), "X_pnmf_log_sd": 0.1 + away},
        varm={"PNMF_loadings": 0.9 ** ((j - 3 * l) % D)},
        uns={"pnmf": {"elbo_history": -1000 - 100 * 0.9 ** np.arange(60.0)}},
    )
    if sections > 1:
        adata.obs["section"] = pd.Categorical([f"s{i % sections}" for i in range(len(x))])
        adata.uns["pnmf"]["batch_key"] = "section"
    return adata


PICTURES = {
    "factors": (2, 2, lambda axes: plotting.plot_factors(results(), axes=axes)),
    "sections": (
        2,
        1,
        lambda axes: plotting.plot_factors(
            results(20, 2, sections=3), axes=axes, shared_scale=True
        ),
    ),
    "image": (1, 2, lambda axes: plotting.plot_factors(results(150, 2), axes=axes, y_down=False)),
    "uncertainty": (1, 2, lambda axes: plotting.plot_uncertainty(results(), [0, 2], axes=axes)),
    "top_features": (
        2,
        2,
        lambda axes: plotting.plot_top_features(results(), 5, "specificity", axes=axes),
    ),
    "loadings": (1, 1, lambda axes: plotting.plot_loadings(results(), ax=axes[0, 0])),
    "correlation": (
        1,
        1,
        lambda axes: plotting.plot_factor_correlation(results(L=12), axes[0, 0]),
    ),
    "elbo": (1, 1, lambda axes: plotting.plot_elbo(results(), axes[0, 0])),
    "images": (
        2,
        3,
        lambda axes: plotting.plot_component_images(np.arange(60).reshape(5, 12), (3, 4), axes),
    ),
    "check": (
        2,
        2,
        lambda axes: plotting.plot_predictive_check(test_check_plots.results(40, 1, 300, 5), axes),
    ),
    "selection": (1, 2, lambda axes: plotting.plot_selection(test_check_plots.selected(), axes)),
    "calibration": (
        1,
        3,
        lambda axes: plotting.plot_calibration(test_calibration_plots.made_up(2.0), axes),
    ),
}


def draw(name, path, plot=None):
    """Draw without text, and at places that do not depend on the size of any.

    Every version of freetype draws text in its own way.
    """
    rows, columns, own = PICTURES[name]
    figure = matplotlib.figure.Figure((4, 3), dpi=50)
    (plot or own)(figure.subplots(rows, columns, squeeze=False))
    for text in figure.findobj(matplotlib.text.Text):
        text.set_visible(False)
    figure.savefig(path)
    return str(path)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, tmp_path):
    folder = BASELINES if os.environ.get("PNMF_BASELINES") else tmp_path
    drawn = draw(name, folder / f"{name}.png")
    problem = compare_images(str(BASELINES / f"{name}.png"), drawn, TOLERANCE)
    assert problem is None, problem


@pytest.mark.parametrize(
    ("name", "plot"),
    [
        ("factors", lambda axes: plotting.plot_factors(results(), [0, 1, 3, 2], axes=axes)),
        ("factors", lambda axes: plotting.plot_factors(results(), axes=axes, cmap="cividis")),
        ("factors", lambda axes: plotting.plot_factors(results(), axes=axes, y_down=False)),
        ("uncertainty", lambda axes: plotting.plot_factors(results(), [0, 2], axes=axes)),
        ("loadings", lambda axes: plotting.plot_loadings(results(), 6, ax=axes[0, 0])),
        ("correlation", lambda axes: plotting.plot_factor_correlation(results(L=11), axes[0, 0])),
        (
            "check",
            lambda axes: plotting.plot_predictive_check(test_check_plots.results(9, 2), axes),
        ),
        (
            "calibration",
            lambda axes: plotting.plot_calibration(test_calibration_plots.made_up(2.0, 20), axes),
        ),
    ],
)
def test_pictures_that_differ_are_seen(name, plot, tmp_path):
    drawn = draw(name, tmp_path / "drawn.png", plot)
    assert compare_images(str(BASELINES / f"{name}.png"), drawn, TOLERANCE) is not None


@pytest.mark.parametrize("L", [1, 4, 20])
def test_one_panel_for_each_component(L):
    adata = results(L=L, D=60)
    for axes in (plotting.plot_factors(adata), plotting.plot_top_features(adata)):
        assert axes.shape == (L,)
        assert [ax.get_title() for ax in axes] == [f"component {l}" for l in range(L)]
        width, height = axes[0].figure.get_size_inches()
        assert width <= 12
        assert height <= 12
        visible = [ax for ax in axes[0].figure.axes if ax.get_title()]
        assert len(visible) == L
    assert plotting.plot_factors(adata, L - 1)[0].get_title() == f"component {L - 1}"


def test_maps_are_to_scale():
    adata = results()
    axes = plotting.plot_factors(adata, unit="mm", unit_length=0.001)
    for ax in axes:
        assert ax.get_aspect() == 1
        below, above = ax.get_ylim()
        assert below > 900 > 0 > above  # y down
        (spots,) = (c for c in ax.collections if isinstance(c, EllipseCollection))
        assert spots.get_rasterized()
        assert spots.get_clim()[0] == 0
        np.testing.assert_array_equal(spots.get_offsets(), adata.obsm["spatial"])
        if hasattr(spots, "get_widths"):  # from matplotlib 3.8 on
            np.testing.assert_allclose(spots.get_widths(), 100)
    (line,) = axes[0].lines
    (text,) = axes[0].texts
    assert np.ptp(line.get_xdata()) * 0.001 == pytest.approx(0.2)
    assert text.get_text() == "0.2 mm"
    assert not any(ax.lines for ax in axes[1:])
    up = plotting.plot_factors(adata, y_down=False)[0]
    assert up.get_ylim()[0] < 0 < up.get_ylim()[1]


def test_scales_are_each_panels_own_or_shared():
    values = np.stack([np.arange(100.0), 10 * np.arange(100.0)], 1)
    own = plotting.plot_spatial(lattice(10), values)
    assert [ax.collections[0].get_clim()[0] for ax in own] == [0, 0]
    highest = [ax.collections[0].get_clim()[1] for ax in own]
    np.testing.assert_allclose(highest, np.quantile(values, 0.995, axis=0))
    shared = plotting.plot_spatial(lattice(10), values, shared_scale=True)
    assert shared[0].collections[0].get_clim() == shared[1].collections[0].get_clim()
    assert len(own[0].figure.axes) == 4
    assert len(shared[0].figure.axes) == 3
    constant = plotting.plot_spatial(lattice(10), np.ones(100))
    assert constant[0].collections[0].get_clim() == (1, 2)


def test_large_sections_are_images_of_means():
    x = lattice(320)
    values = np.random.default_rng(0).normal(5.0, 1.0, size=len(x))
    (ax,) = plotting.plot_spatial(x, values, spot_size=2)
    assert not ax.collections
    (image,) = ax.images
    assert image.get_rasterized()
    shown = image.get_array().compressed()
    assert 320**2 / 3 < len(shown) < 320**2
    assert shown.mean() == pytest.approx(5.0, abs=0.02)
    left, right, bottom, top = image.get_extent()
    assert left < 0 < 31900 < right
    assert bottom < 0 < 31900 < top
    column = image.get_array()[:, 100]
    assert column.count() > 200


def test_images_stand_where_the_places_are():
    x = np.random.default_rng(0).uniform(size=(25_000, 2)) * (2, 1)
    (ax,) = plotting.plot_spatial(x, x[:, 0])
    (image,) = ax.images
    left, right, _, _ = image.get_extent()
    mean = image.get_array().mean(0)
    middle = left + (right - left) * (np.arange(len(mean)) + 0.5) / len(mean)
    np.testing.assert_allclose(mean[2:-2], middle[2:-2], atol=0.02)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_sections_stand_apart_and_keep_their_shape(n):
    random = np.random.default_rng(0)
    points = random.uniform(size=(70, 2)) * 1e4
    sections = [np.arange(70)[i::n] for i in range(n)]
    moved, tops = side_by_side(points, sections)
    boxes = []
    for members, top in zip(sections, tops, strict=True):
        shift = moved[members] - points[members]
        np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-6)
        boxes.append((moved[members].min(0), moved[members].max(0)))
        assert top[1] == pytest.approx(moved[members, 1].min())
    for i in range(n):
        for k in range(i):
            apart = (boxes[i][0] > boxes[k][1]) | (boxes[k][0] > boxes[i][1])
            assert apart.any()
    same, _ = side_by_side(points, [np.arange(70)])
    np.testing.assert_array_equal(same, points)


def test_sections_of_a_fit_are_named():
    adata = results(20, 2, sections=3)
    axes = plotting.plot_factors(adata)
    assert [text.get_text() for text in axes[0].texts][:3] == ["s0", "s1", "s2"]
    again = plotting.plot_spatial(adata, "depth", "section")
    np.testing.assert_array_equal(
        again[0].collections[0].get_offsets(), axes[0].collections[0].get_offsets()
    )


def test_disc_widths():
    assert disc_width([lattice(5)]) == 100
    assert disc_width([np.zeros((1, 2))]) == 1
    random = np.random.default_rng(0).uniform(size=(10_000, 2))
    # third nearest in a Poisson process of rate 10,000: between 0.8 and 1.1 of 1/100
    assert 0.008 < disc_width([random]) < 0.011


@pytest.mark.parametrize(
    ("given", "expected"), [(0.3, 0.2), (1, 1), (7, 5), (499, 200), (5e3, 5e3)]
)
def test_round_lengths(given, expected):
    assert round_length(given) == pytest.approx(expected)


def test_columns_of_obs_and_features():
    adata = results()
    axes = plotting.plot_spatial(adata, ["depth", "gene3"])
    assert [ax.get_title() for ax in axes] == ["depth", "gene3"]
    shown = [ax.collections[0].get_array() for ax in axes]
    np.testing.assert_array_equal(shown[0], adata.obs["depth"])
    np.testing.assert_array_equal(shown[1], adata.X[:, 3])


def test_loadings_show_shares():
    adata = results(L=3)
    ax = plotting.plot_loadings(adata, 2)
    expected = adata.varm["PNMF_loadings"] * adata.obsm["X_pnmf"].sum(0)
    share = expected / expected.sum(1, keepdims=True)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert len(names) == len(set(names)) == 6
    rows = [adata.var_names.get_loc(name) for name in names]
    np.testing.assert_allclose(ax.images[0].get_array(), share[rows])


def test_correlation_is_that_of_log_factors():
    adata = results(L=3)
    ax = plotting.plot_factor_correlation(adata)
    expected = pd.DataFrame(np.log(adata.obsm["X_pnmf"])).corr()
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert ax.images[0].get_clim() == (-1, 1)


@pytest.fixture(scope="module")
def spatial():
    X, x, _, _, _ = tissue(N=60)
    return PNMF(2, **STEPS).fit(X, coordinates=x), X, x


PLOTS = {
    "factors": plotting.plot_factors,
    "uncertainty": plotting.plot_uncertainty,
    "spatial": lambda fit: plotting.plot_spatial(fit, np.arange(60.0)),
    "top features": lambda fit: plotting.plot_top_features(fit, 3),
    "loadings": plotting.plot_loadings,
    "correlation": plotting.plot_factor_correlation,
    "images": lambda fit: plotting.plot_component_images(fit, (4, 5)),
    "elbo": plotting.plot_elbo,
}


def drawn(axes):
    """Numbers that a plot shows."""
    shown = []
    for ax in np.ravel(axes):
        shown += [c.get_array() for c in ax.collections] + [i.get_array() for i in ax.images]
        shown += [c.get_offsets() for c in ax.collections] + [i.get_xydata() for i in ax.lines]
        shown += [[bar.get_width() for bar in ax.patches]]
    return shown


@pytest.mark.parametrize("form", ["module", "trained", "anndata"])
@pytest.mark.parametrize("name", PLOTS)
def test_every_form_of_a_fit_is_drawn_alike(name, form, spatial):
    forms = forms_of(*spatial)
    if (name, form) == ("elbo", "module"):
        with pytest.raises(ValueError, match="a PoissonFactorization does not"):
            plotting.plot_elbo(forms[form])
        return
    expected, found = (drawn(PLOTS[name](forms[one])) for one in ("estimator", form))
    assert any(map(len, expected))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_stages_of_a_fit_are_marked_where_they_begin():
    """By a line halfway between two steps, with the name; a single stage needs none."""
    X, x, *_ = tissue(N=60)
    stages = [WarmUp(), Settle(), SettleLoadings()]
    settings = {**STEPS, "max_iter": 30, "tol": 0}
    model = PNMF(2, **settings, stages=stages).fit(X, coordinates=x)
    forms = forms_of(model, X, x)
    for fit in (model, model.history_, forms["trained"], forms["anndata"]):
        ax = plotting.plot_elbo(fit)
        curve, *marks = ax.lines
        assert curve.get_xdata().tolist() == list(range(1, 31))
        assert [mark.get_xdata()[0] for mark in marks] == [0.5, 10.5, 20.5]
        assert [text.get_text() for text in ax.texts] == ["warm-up", "settle", "loadings"]
        assert [text.xy[0] for text in ax.texts] == [0.5, 10.5, 20.5]
    for fit in (list(model.history_), PNMF(2, **settings).fit(X, coordinates=x)):
        ax = plotting.plot_elbo(fit)
        assert (len(ax.lines), len(ax.texts)) == (1, 0)
    few = PNMF(2, **{**settings, "max_iter": 2}, stages=stages).fit(X, coordinates=x)
    assert [text.get_text() for text in plotting.plot_elbo(few).texts] == ["settle", "loadings"]


def test_axes_may_be_given(spatial):
    model, _, _ = spatial
    figure = plotting.new_figure((6, 3))
    axes = figure.subplots(1, 3)
    drawn = plotting.plot_factors(model, axes=axes)
    assert list(drawn) == list(axes[:2])
    assert not axes[2].axison
    for plot in (plotting.plot_loadings, plotting.plot_factor_correlation):
        assert plot(model, ax=axes[0]) is axes[0]
    with pytest.raises(ValueError, match="axes must be at least 2, one for each panel; got 1"):
        plotting.plot_factors(model, axes=axes[0])


def test_a_profile_of_lengthscales(spatial):
    model, X, _ = spatial
    profile = plotting.lengthscale_profile(model, X)
    ax = plotting.plot_lengthscale_profile(profile)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), profile.lengthscales)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), profile.loss - profile.loss.min())
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), profile.learned)
    assert ax.get_xscale() == "log"
    with pytest.raises(ValueError, match=r"what lengthscale_profile returned; got PNMF\."):
        plotting.plot_lengthscale_profile(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, X, x: plotting.plot_factors(m, [0, 2]), "components must be whole numbers"),
        (lambda m, X, x: plotting.plot_factors(m, coordinates=x[:, :1]), r"shape \(60, 2\)"),
        (
            lambda m, X, x: plotting.plot_factors(m, groups="section"),
            "names a column of an AnnData",
        ),
        (lambda m, X, x: plotting.plot_factors(m, spot_size=0), "spot_size"),
        (lambda m, X, x: plotting.plot_factors(m, columns=0), "columns"),
        (lambda m, X, x: plotting.plot_spatial(x, X[:9]), r"one row for each sample; got 60 and 9"),
        (lambda m, X, x: plotting.plot_spatial(x, X, titles=["one"]), "titles must be 20"),
        (lambda m, X, x: plotting.plot_spatial(x, X[None]), "values must be of shape"),
        (lambda m, X, x: plotting.plot_spatial(results(), "absent"), "is not in adata.obs or"),
        (lambda m, X, x: plotting.plot_spatial(anndata.AnnData(X), np.ones(60)), "no obsm"),
        (lambda m, X, x: plotting.plot_top_features(m, by="rank"), "by must be one of"),
        (lambda m, X, x: plotting.plot_component_images(np.ones((2, 9)), (4, 2)), "4 x 2"),
    ],
)
def test_bad_input(call, message, spatial):
    with pytest.raises(ValueError, match=message):
        call(*spatial)


def test_models_without_space(counts):
    model = PNMF(2, random_state=0, max_iter=5, **NATURAL).fit(counts)
    with pytest.raises(ValueError, match="coordinates must be given"):
        plotting.plot_factors(model)
    assert len(plotting.plot_factors(model, coordinates=lattice(9)[:80])) == 2
    with pytest.raises(TypeError, match="colour"):
        plotting.plot_factors(model, coordinates=lattice(9)[:80], colour="red")


def test_samples_have_shares_that_sum_to_one_and_stand_by_their_strongest_component():
    adata = results()
    shown = np.asarray(plotting.plot_samples(adata).images[0].get_array())
    counts = adata.obsm["X_pnmf"] * adata.varm["PNMF_loadings"].sum(0)
    share = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(np.sort(shown.max(0)), np.sort(share.max(1)))
    np.testing.assert_allclose(shown.sum(0), 1)
    assert list(shown.argmax(0)) == sorted(share.argmax(1))


def test_importance_of_space_has_components_features_and_places():
    adata = results()
    adata.uns["pnmf"]["in_space"] = [True, True, True, False]
    bars, histogram, places = plotting.plot_importance_of_space(adata, n=2)
    assert [bar.get_height() for bar in bars.patches] == pytest.approx(
        list((adata.obsm["X_pnmf"] * adata.varm["PNMF_loadings"].sum(0)).sum(0) / _total(adata))
    )
    assert sum(bar.get_height() for bar in histogram.patches) == 30
    assert len(histogram.texts) == 2
    assert places.get_title() == "importance of space"
    adata.uns["pnmf"]["in_space"] = [True] * 4
    with pytest.raises(ValueError, match="non_spatial_components"):
        plotting.plot_importance_of_space(adata)


def _total(adata):
    return (adata.obsm["X_pnmf"] @ adata.varm["PNMF_loadings"].T).sum()
