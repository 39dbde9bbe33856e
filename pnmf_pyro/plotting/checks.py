"""Pictures of predictive checks and of the choice of the number of components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pnmf_pyro.analysis.predictive_checks import FLAGGED, PredictiveCheck, StatisticCheck
from pnmf_pyro.analysis.selection import ComponentSelection
from pnmf_pyro.plotting.figures import AxesLike, check_answer, ink, panels, plain, verbatim

if TYPE_CHECKING:
    from matplotlib.axes import Axes

USUAL, ODD = "#7a9cc6", "#d1495b"

# Points beyond which a panel is drawn as pixels in a vector file.
RASTERIZED = 1000


def plot_predictive_check(check: PredictiveCheck, axes: AxesLike = None) -> np.ndarray:
    """Draw a panel for each statistic of a check.

    Where a statistic has many numbers, observed values stand over the mean of the replicated ones,
    on the line where the model reproduces them; red ones are beyond 95% of their replicated values.
    A statistic with one number shows the histogram of the replicated ones and a line for the data.

    Parameters
    ----------
    check : PredictiveCheck
        Check to draw.
    axes : array of matplotlib Axes, optional
        Axes to draw in, one for each statistic; those of a new figure unless given.

    Returns
    -------
    ndarray of matplotlib Axes
    """
    makers = "posterior_predictive_check", "prior_predictive_check"
    check_answer("check", check, PredictiveCheck, *makers)
    axes = panels(len(check.results), (2.9, 2.8), 4, axes)
    for ax, one in zip(axes, check.results, strict=True):
        (_histogram if len(one.observed) == 1 else _scatter)(ax, one)
        of = "" if one.statistic.of == "table" else f" of each {one.statistic.of}"
        colour = ODD if one.p_value < FLAGGED else ink(ax)
        name = verbatim(one.statistic.name.replace("_", " "))
        ax.set_title(f"{name}{of}\np = {one.p_value:.3g}", fontsize=9, color=colour)
        ax.tick_params(labelsize=8)
        plain(ax)
    return axes


def _scatter(ax: Axes, one: StatisticCheck) -> None:
    expected, odd = one.replicated.mean(0), one.p_values < 0.05
    many = len(expected) > RASTERIZED
    size, alpha = (4, 0.5) if many else (12, 0.8)
    for chosen, colour in ((~odd, USUAL), (odd, ODD)):
        x, y = expected[chosen], one.observed[chosen]
        ax.scatter(x, y, s=size, color=colour, alpha=alpha, lw=0, rasterized=many)
    both = np.concatenate([expected, one.observed])
    low, high = both.min(), both.max()
    if low > 0 and high > max(1, 30 * low):  # shares stay on a linear scale
        ax.set(xscale="log", yscale="log")
    ax.axline((low, low), (high, high if high > low else low + 1), color=ink(ax), lw=0.8, zorder=0)
    ax.set_xlabel("replicated (mean)", fontsize=8)
    ax.set_ylabel("observed", fontsize=8)


def _histogram(ax: Axes, one: StatisticCheck) -> None:
    ax.hist(one.replicated[:, 0], bins="auto", color=USUAL)
    ax.axvline(one.observed[0], color=ODD if one.p_value < FLAGGED else ink(ax), lw=1.5)
    ax.set_xlabel("replicated (bars), observed (line)", fontsize=8)
    ax.set_ylabel("tables", fontsize=8)


def plot_selection(selection: ComponentSelection, axes: AxesLike = None) -> np.ndarray:
    """Draw held-out deviance and stability against the number of components.

    Parameters
    ----------
    selection : ComponentSelection
        Choice to draw.
    axes : array of two matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.

    Returns
    -------
    ndarray of matplotlib Axes
    """
    check_answer("selection", selection, ComponentSelection, "select_n_components")
    left, right = panels(2, (4, 3.2), 2, axes)
    numbers = selection.n_components
    mean, error = selection.mean_deviance, selection.standard_error
    left.errorbar(numbers, mean, error, fmt="o-", color=USUAL, ecolor=ink(left), capsize=3, ms=5)
    left.set_ylabel("held-out deviance\n(± 1 s.e. of the difference)")
    lowest, highest = selection.stability.min(1), selection.stability.max(1)
    right.fill_between(numbers, lowest, highest, color=USUAL, alpha=0.3, lw=0)
    right.plot(numbers, selection.stability.mean(1), "o-", color=USUAL, ms=5)
    right.set_ylabel("stability, mean and range\n(cosine of matched components)")
    right.set_ylim(min(0.5, lowest.min() - 0.02), 1.01)
    for ax in (left, right):
        ax.axvline(selection.chosen, color=ODD, lw=1, ls="--", zorder=0)
        ax.set_xlabel("number of components")
        ax.xaxis.get_major_locator().set_params(integer=True)
        plain(ax)
    left.set_title(f"{selection.chosen}: smallest within 1 s.e. of the best", fontsize=9, color=ODD)
    return np.asarray([left, right])
