"""The picture of a calibration: ranks, their distribution, and coverage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom

from pnmf_pyro.analysis.calibration import FLAGGED, LEVELS, Calibration
from pnmf_pyro.plotting.checks import ODD, USUAL
from pnmf_pyro.plotting.figures import AxesLike, check_answer, ink, panels, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Bars of a histogram of ranks, and levels at which coverage is drawn.
BARS = 10
FINE_LEVELS = np.linspace(0.05, 0.95, 19)

# How ranges of chance are filled, on any background.
BAND: dict[str, Any] = {"color": "0.5", "alpha": 0.25, "lw": 0}


def plot_calibration(calibration: Calibration, axes: AxesLike = None) -> np.ndarray:
    """Draw where the truth lay in its posteriors, in three panels.

    The first has the histogram of all tested ranks, even where the posterior is right, with the
    range in which 95% of bars are by chance. The second has, for each quantity, the distribution
    function of its ranks minus that of uniform ones, and the band in which all of it stays in 95 of
    100 calibrations; red ones are not uniform. A bow upwards says that the truth is lower than the
    posterior says; a wave that begins below zero that intervals are too wide, and one that begins
    above that they are too narrow. The third has the share of the truth that intervals hold, minus
    their level, with two standard errors.

    Parameters
    ----------
    calibration : Calibration
        Calibration to draw.
    axes : array of three matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.

    Returns
    -------
    ndarray of matplotlib Axes
    """
    check_answer("calibration", calibration, Calibration, "calibrate")
    axes = panels(3, (3.6, 3.0), 3, axes)
    for ax, draw in zip(axes, (_histogram, _distribution, _coverage), strict=True):
        draw(ax, calibration)
        ax.tick_params(labelsize=8)
        plain(ax)
    return axes


def _histogram(ax: Axes, found: Calibration) -> None:
    K = found.n_draws + 1
    edges = np.linspace(0, K, min(BARS, K) + 1).round() / K
    shares = (found.ranks.ravel() + 0.5) / K
    n, width = shares.size, np.diff(edges)
    low, high = binom.ppf(0.025, n, width) / n / width, binom.ppf(0.975, n, width) / n / width
    ax.fill_between(edges, np.append(low, low[-1]), np.append(high, high[-1]), step="post", **BAND)
    ax.hist(shares, edges, density=True, color=USUAL, edgecolor="white", lw=0.5, alpha=0.8)
    ax.axhline(1, color=ink(ax), lw=0.8)
    ax.set_xlabel("rank of the truth among draws", fontsize=8)
    ax.set_ylabel("density", fontsize=8)
    ax.set_title(f"{n} ranks, 95% range of each bar", fontsize=9)


def _distribution(ax: Axes, found: Calibration) -> None:
    share = np.arange(1, found.n_draws + 1) / (found.n_draws + 1)
    low, high = found.band()
    ax.fill_between(share, low - share, high - share, **BAND)
    ax.axhline(0, color=ink(ax), lw=0.8)
    odd = found.p_values * len(found.p_values) < FLAGGED
    for q in np.argsort(odd, kind="stable"):
        away = found.counted(q)[0] / found.n_simulations - share
        colour = ODD if odd[q] else USUAL
        style = "--" if q == found.z.shape[2] else "-"  # the log-likelihood
        ax.plot(share, away, color=colour, lw=1.0, ls=style, alpha=0.9)
    ax.set_xlabel("rank of the truth among draws", fontsize=8)
    ax.set_ylabel("distribution function minus uniform", fontsize=8)
    colour = ODD if odd.any() else ink(ax)
    ax.set_title(
        f"ranks of {len(odd)} quantities, p = {found.p_value:.2g}", color=colour, fontsize=9
    )


def _coverage(ax: Axes, found: Calibration) -> None:
    shares, errors = np.array([found.coverage(level) for level in FINE_LEVELS]).T
    away = shares - FINE_LEVELS
    ax.axhline(0, color=ink(ax), lw=0.8)
    ax.fill_between(FINE_LEVELS, away - 2 * errors, away + 2 * errors, color=USUAL, alpha=0.3, lw=0)
    ax.plot(FINE_LEVELS, away, color=USUAL, lw=1.2)
    marked = np.array([found.coverage(level) for level in LEVELS])
    ax.plot(LEVELS, marked[:, 0] - LEVELS, "o", color=USUAL, ms=4)
    widest = max(0.05, 1.1 * np.abs([away - 2 * errors, away + 2 * errors]).max())
    ax.set(xlim=(0, 1), ylim=(-widest, widest))
    ax.set_xlabel("level of the interval", fontsize=8)
    ax.set_ylabel("share that holds the truth, minus level", fontsize=8)
    share, error = marked[LEVELS.index(0.9)]
    colour = ODD if found.off else ink(ax)
    ax.set_title(f"90% intervals: {share:.3f} (s.e. {error:.3f})", color=colour, fontsize=9)
