"""The picture of a calibration."""

import numpy as np
import pytest

from pnmf_pyro.analysis import Calibration
from pnmf_pyro.plotting import plot_calibration


def made_up(scale=1.0, n=60):
    rng = np.random.default_rng(0)
    z, ranks = scale * rng.normal(size=(n, 30, 2)), rng.integers(0, 100, (n, 3))
    names = ["component 0", "component 1", "the log-likelihood"]
    return Calibration(z, ranks, names, 99, False)


def test_three_panels_show_ranks_and_coverage():
    found = made_up()
    histogram, distribution, coverage = plot_calibration(found)
    bars = np.array([bar.get_height() * bar.get_width() for bar in histogram.patches])
    shares = np.histogram((found.ranks + 0.5) / 100, 10, (0, 1))[0] / found.ranks.size
    np.testing.assert_allclose(bars, shares)
    drawn = [line for line in distribution.lines if len(line.get_xdata()) == 99]
    assert [line.get_linestyle() for line in drawn] == ["-", "-", "--"]
    below = (found.ranks[:, 0] < 25).mean() - 0.25
    assert drawn[0].get_ydata()[24] == pytest.approx(below)
    marked = coverage.lines[-1]
    np.testing.assert_allclose(marked.get_ydata()[2], found.coverage(0.9).share - 0.9)
    assert "p = " in distribution.get_title()


def test_what_is_off_is_red():
    axes = plot_calibration(made_up(2.0))
    assert axes[2].title.get_color() == "#d1495b"
    assert axes[1].title.get_color() != "#d1495b"
    with pytest.raises(ValueError, match="calibration must be"):
        plot_calibration(None)
