"""Pictures of checks and of the selection: what they show, read back from the axes."""

import numpy as np
import pytest

from pnmf_pyro.analysis.predictive_checks import PredictiveCheck, StatisticCheck
from pnmf_pyro.analysis.selection import ComponentSelection
from pnmf_pyro.analysis.statistics import Statistic

plt = pytest.importorskip("matplotlib.pyplot")
from pnmf_pyro import plotting  # noqa: E402
from pnmf_pyro.plotting import plot_predictive_check, plot_selection  # noqa: E402


def results(*sizes: int) -> PredictiveCheck:
    random = np.random.default_rng(0)
    found = []
    for number, m in enumerate(sizes):
        replicated = random.gamma(5, size=(60, m)).astype(np.float32)
        observed = replicated[0].astype(float) + (30 if number == 0 else 0)
        statistic = Statistic(f"name_{number}", "table" if m == 1 else "feature", np.sum)
        found.append(StatisticCheck(statistic, range(m), observed, replicated))
    return PredictiveCheck(found, 60, "posterior")


def test_panels_of_a_check():
    check = results(40, 1, 3000, 5, 7)
    axes = plot_predictive_check(check)
    assert axes.shape == (5,)
    assert [ax.axison for ax in axes[0].figure.axes] == [True] * 5 + [False] * 3
    first, second, third = axes.flat[:3]
    assert "name 0 of each feature" in first.get_title()
    assert f"p = {1 / 61:.3g}" in first.get_title()
    usual, odd = first.collections
    assert (len(usual.get_offsets()), len(odd.get_offsets())) == (0, 40)
    points = np.asarray(odd.get_offsets())
    np.testing.assert_allclose(points[:, 1], check.results[0].observed)
    np.testing.assert_allclose(points[:, 0], check.results[0].replicated.mean(0))
    assert sum(bar.get_height() for bar in second.patches) == 60
    assert second.lines[0].get_xdata()[0] == check.results[1].observed[0]
    assert third.collections[0].get_rasterized()
    assert not first.collections[0].get_rasterized()


def test_words_and_lines_stand_out_from_a_dark_background():
    with plt.style.context("dark_background"):
        axes = plot_predictive_check(results(40, 30))
    assert axes[1].title.get_color() == axes[1].lines[0].get_color() == "white"


def test_axes_of_ones_own():
    axes = plt.subplots(1, 2)[1]
    assert list(plot_predictive_check(results(3, 4), axes)) == list(axes)
    with pytest.raises(ValueError, match="axes must be at least 3"):
        plot_predictive_check(results(3, 4, 5), axes)


def selected() -> ComponentSelection:
    random = np.random.default_rng(0)
    deviance = np.array([3.0, 1.0, 1.2])[:, None] + 0.01 * random.normal(size=(3, 4))
    return ComponentSelection([2, 4, 6], deviance, random.uniform(0.6, 1, size=(3, 6)))


def test_selection():
    selection = selected()
    deviance = selection.deviance
    left, right = plot_selection(selection)
    line = left.containers[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), deviance.mean(1))
    np.testing.assert_allclose(right.lines[0].get_ydata(), selection.stability.mean(1))
    assert all(4 in np.ravel(ax.lines[-1].get_xdata()) for ax in (left, right))
    assert "4: smallest within" in left.get_title()
    given = plt.subplots(2, 1)[1]
    assert plot_selection(selection, given)[0] is given[0]


@pytest.mark.parametrize(
    ("plot", "maker"),
    [
        ("plot_predictive_check", "posterior_predictive_check or prior_predictive_check"),
        ("plot_selection", "select_n_components"),
        ("plot_calibration", "calibrate"),
        ("plot_group_levels", "group_levels"),
        ("plot_lengthscale_profile", "lengthscale_profile"),
    ],
)
def test_a_plot_of_an_answer_says_what_it_wants(plot, maker):
    with pytest.raises(ValueError, match=rf"must be what {maker} returned; got int"):
        getattr(plotting, plot)(3)
