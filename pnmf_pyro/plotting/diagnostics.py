"""How a fit went, and how sure its lengthscale is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.lengthscales import LengthscaleProfile
from pnmf_pyro.data.checks import check_array
from pnmf_pyro.estimator.results import Fit, is_fit, results_of
from pnmf_pyro.plotting.figures import BLUE, check_answer, ink, one_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Stage = tuple[str, int, int]


# What the marks below a profile are.
LEARNED = "learned, by component"


def plot_elbo(
    history: Fit | ArrayLike, ax: Axes | None = None, *, label: str | None = None, key: str = "pnmf"
) -> Axes:
    """Plot the ELBO against the steps of a fit.

    The vertical axis shows the last nine tenths of the steps; the first may leave the picture.
    Where a fit went through several stages, each begins at a light vertical
    line with its name: from one to the next the ELBO may jump, for it is that of what is trained.

    Parameters
    ----------
    history : PNMF, AnnData, ModelFit or sequence of float
        Fit, see :func:`~pnmf_pyro.estimator.results.results_of`, or values of the ELBO in nats. A
        PoissonFactorization alone has no history.
    ax : matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.
    label : str, optional
        Name of the line, for a legend.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    matplotlib Axes
    """
    values, stages = _elbo_values(history, key)
    ax = one_axes(ax, (5, 3.2))
    ax.plot(np.arange(1, len(values) + 1), values, label=label, lw=1.5)
    late = values[len(values) // 10 :]
    margin = 0.08 * (np.ptp(late) or 1.0)
    ax.set_ylim(late.min() - margin, late.max() + margin)
    ax.set(xlabel="iteration", ylabel="ELBO (nats)")
    ax.ticklabel_format(axis="y", style="plain", useOffset=False)
    if len(stages) > 1:
        _mark_stages(ax, stages)
    plain(ax)
    return ax


def _mark_stages(ax: Axes, stages: Sequence[Stage]) -> None:
    """Draw a light line where each stage begins, and write its name along it."""
    for name, first, last in stages:
        if last > first:
            ax.axvline(first + 0.5, color="0.85", lw=0.8, zorder=0)
            ax.annotate(
                name,
                (first + 0.5, 0.03),
                xycoords=ax.get_xaxis_transform(),
                xytext=(2, 0),
                textcoords="offset points",
                rotation=90,
                va="bottom",
                fontsize=7,
                color="0.45",
            )


def _elbo_values(history: Fit | ArrayLike, key: str) -> tuple[np.ndarray, Sequence[Stage]]:
    """Values of the ELBO, and the stages that they are of where these are known."""
    if not is_fit(history):
        values = check_array("history", history).astype(np.float64)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"history must be numbers, one a step; got shape {values.shape}.")
        return values, getattr(history, "stages", ())
    found = results_of(history, key)
    if found.elbo_history is None:
        raise ValueError(
            f"history must be the ELBO at each step, or a fit that keeps it; a "
            f"{type(history).__name__} does not. Pass what fit_model returned, or the values."
        )
    return found.elbo_history, found.stages


def plot_lengthscale_profile(profile: LengthscaleProfile, ax: Axes | None = None) -> Axes:
    """Plot how well samples are predicted without themselves, against the lengthscale.

    The horizontal axis is the geometric mean of the components' lengthscales, whose ratios stay as
    learned; the dotted line is that of the fit, and marks below are the components' own. Lower is
    better: shown is the distance from the best, up to three times that of the median. A flat
    stretch says that the data do not tell its lengthscales apart.

    Parameters
    ----------
    profile : LengthscaleProfile
        What :func:`~pnmf_pyro.analysis.lengthscales.lengthscale_profile` returned.
    ax : matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.

    Returns
    -------
    matplotlib Axes
    """
    check_answer("profile", profile, LengthscaleProfile, "lengthscale_profile")
    ax = one_axes(ax, (5, 3.2))
    excess = profile.loss - profile.loss.min()
    ax.plot(profile.lengthscales, excess, color=BLUE, lw=1.5, marker="o", ms=3)
    height, from_below = np.full(len(profile.learned), 0.03), ax.get_xaxis_transform()
    marks: dict[str, Any] = {"marker": "|", "ls": "", "color": ink(ax), "ms": 12, "mew": 1.5}
    ax.plot(profile.learned, height, **marks, transform=from_below, label=LEARNED)
    mean = np.exp(np.log(profile.learned).mean())
    ax.axvline(mean, color="0.4", lw=1, ls=":", label="learned, geometric mean", zorder=0)
    ax.set(
        xscale="log",
        xlabel="lengthscale (geometric mean)",
        ylabel="loss above the best (nats per sample)",
    )
    top = 3 * np.median(excess)
    if top > 0:
        ax.set_ylim(-0.08 * top, top)
    ax.legend(frameon=False, fontsize=8)
    plain(ax)
    return ax
