"""Components as their features see them, and as they see one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.differential import differential_features
from pnmf_pyro.analysis.interpretation import contributions, ranked_features, top_features
from pnmf_pyro.estimator.results import Fit, chosen_numbers, is_fit, results_of
from pnmf_pyro.plotting.figures import BLUE, WIDEST, AxesLike, one_axes, panels, plain, verbatim
from pnmf_pyro.training.fitted import Fitted, fitted_module

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# Rows of a heat map of loadings that are made without being asked for, at most about.
ROWS = 60

# Inches that a character of a name takes, about.
CHARACTER = 0.06

# Smallest local false sign rate that is told from smaller ones.
LEAST_LFSR = 1e-10

# Components up to which the entries of a matrix of correlations are written out.
WRITTEN_OUT = 10


def plot_top_features(
    fit: Fit,
    n: int = 10,
    by: str = "weight",
    *,
    components: Sequence[int] | int | None = None,
    axes: AxesLike = None,
    key: str = "pnmf",
) -> np.ndarray:
    """Show the first features of each component as bars.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to draw, see :func:`~pnmf_pyro.estimator.results.results_of`.
    n : int
        Number of features of each component.
    by : {'weight', 'specificity'}
        Score that ranks them and that the bars show, see :func:`~pnmf_pyro.feature_scores`.
    components : sequence of int, optional
        Numbers of the components to draw, counted from 0; all unless given.
    axes : array of matplotlib Axes, optional
        Axes to draw in, one for each component; those of a new figure unless given.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    ndarray of matplotlib Axes, one for each component
    """
    found = results_of(fit, key)
    table = top_features(found, n, by)
    chosen = chosen_numbers("components", components, found.n_components)
    names = max(len(str(name)) for name in table["feature"])
    width = 2.0 + 0.07 * max(names - 8, 0)
    axes = panels(len(chosen), (width, 0.75 + 0.15 * n), max(1, min(5, int(WIDEST / width))), axes)
    for ax, number in zip(axes, chosen, strict=True):
        rows = table[table["component"] == number]
        ax.barh(rows["rank"], rows[by], color=BLUE, height=0.7)
        ax.set_yticks(rows["rank"], [*map(verbatim, rows["feature"])], fontsize=7)
        ax.set_ylim(n + 0.6, 0.4)
        ax.locator_params(axis="x", nbins=3)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_xlabel(by, fontsize=8)
        ax.set_title(f"component {number}", fontsize=9)
        plain(ax)
    return axes


def plot_volcano(
    fit: Fitted,
    n: int = 5,
    lfsr: float = 0.05,
    *,
    components: Sequence[int] | int | None = None,
    axes: AxesLike = None,
) -> np.ndarray:
    """Show how much more frequent features are in a component than in any other, and how sure.

    Parameters
    ----------
    fit : PNMF, ModelFit or PoissonFactorization
        Fit of Poisson counts, see :func:`~pnmf_pyro.differential_features`.
    n : int
        Number of features that are named in each panel, those with the largest log-ratio among the
        sure ones.
    lfsr : float
        Local false sign rate below which a feature is sure, and coloured.
    components : sequence of int, optional
        Numbers of the components to draw, counted from 0; all unless given.
    axes : array of matplotlib Axes, optional
        Axes to draw in, one for each component; those of a new figure unless given.

    Returns
    -------
    ndarray of matplotlib Axes, one for each component
    """
    table = differential_features(fit)
    chosen = chosen_numbers("components", components, fitted_module(fit, "fit").L)
    x, rates = np.asarray(table["mean"]), np.asarray(table["lfsr"])
    sure = -np.log10(np.clip(rates, LEAST_LFSR, None))
    marks = (x > 0) & (rates < lfsr)
    parts = [np.flatnonzero(np.asarray(table["component"]) == number) for number in chosen]
    named = [part[np.argsort(np.where(marks, -x, 1)[part], kind="stable")[:n]] for part in parts]
    named = [some[marks[some]] for some in named]
    names = np.array([*map(verbatim, table["feature"])])
    width = 2.6 + CHARACTER * max((len(name) for some in named for name in names[some]), default=0)
    axes = panels(len(chosen), (width, 2.6), max(1, min(4, int(WIDEST / width))), axes)
    for ax, number, part, some in zip(axes, chosen, parts, named, strict=True):
        for kind, size, colour in ((~marks, 6, "0.7"), (marks, 9, BLUE)):
            ax.scatter(x[part][kind[part]], sure[part][kind[part]], size, colour, linewidths=0)
        ax.axhline(-np.log10(lfsr), color="0.5", linewidth=0.6, linestyle=":")
        ax.axvline(0, color="0.5", linewidth=0.6)
        ax.update_datalim([(-1, 0), (1, 2)])  # at least, so that what is alike looks alike
        ax.autoscale_view()
        _name_points(ax, x[some], sure[some], names[some])
        ax.locator_params(axis="x", nbins=5)
        ax.set_title(f"component {number}", fontsize=9)
        ax.tick_params(labelsize=7)
        ax.set_xlabel("log2 ratio to the closest other", fontsize=8)
        ax.set_ylabel("-log10 lfsr", fontsize=8)
        plain(ax)
    return axes


def _name_points(ax: Axes, x: np.ndarray, y: np.ndarray, names: np.ndarray) -> None:
    """Write the names of points in a column right of the axes, as far apart as lines of text."""
    low, high = ax.get_ylim()
    line, last = min(0.08, 1 / max(1, len(names))) * (high - low), np.inf
    leader = {"arrowstyle": "-", "lw": 0.4, "color": "0.5", "shrinkB": 2, "relpos": (0, 0.5)}
    for left, i in zip(range(len(names))[::-1], np.lexsort((-x, -y)), strict=True):
        last = max(min(y[i], last - line), low + line * left)
        where, beside = (x[i], y[i]), ax.get_yaxis_transform()
        ax.annotate(names[i], where, (1.03, last), "data", beside, leader, fontsize=7, va="center")


def plot_loadings(
    fit: Fit,
    n: int | None = None,
    by: str = "specificity",
    ax: Axes | None = None,
    *,
    cmap: str = "viridis",
    key: str = "pnmf",
) -> Axes:
    """Show as a heat map how components share the counts of their first features.

    A row is a feature, and sums to 1 over components: the part of its expected counts that comes
    from each. Features stand in the order of the component in whose ranking they come first.

    Parameters
    ----------
    fit, key
        As for :func:`plot_top_features`.
    n : int, optional
        Number of features of each component; as many as can be read unless given, from 2 to 8.
    by : {'weight', 'specificity'}
        Score that ranks them, see :func:`~pnmf_pyro.feature_scores`.
    ax : matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.
    cmap : str
        Colour map.

    Returns
    -------
    matplotlib Axes
    """
    found = results_of(fit, key)
    L = found.n_components
    n = int(np.clip(ROWS // L, 2, 8)) if n is None else n
    scores, ranked = ranked_features(found, n, by)
    _, first = np.unique(ranked, return_index=True)
    rows = ranked.ravel()[np.sort(first)]  # without repetition
    names = [*map(verbatim, found.feature_names[rows])]
    room = CHARACTER * max(map(len, names))
    ax = one_axes(ax, (1.2 + room + 0.3 * L, 0.8 + 0.15 * len(rows)))
    share = scores["share"][rows]
    image = ax.imshow(share, cmap=cmap, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    _explain(ax, image, L, "share of a feature's counts", 0.5)
    return ax


def plot_samples(
    fit: Fit, ax: Axes | None = None, *, cmap: str = "viridis", key: str = "pnmf"
) -> Axes:
    """Show as a heat map how components share the expected counts of each sample.

    A column is a sample, and sums to 1 over components. Samples with the same strongest component
    stand together, those with most of it first.

    Parameters
    ----------
    fit, key
        As for :func:`plot_top_features`.
    ax : matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.
    cmap : str
        Colour map.

    Returns
    -------
    matplotlib Axes
    """
    counts = contributions(results_of(fit, key))
    share = counts / counts.sum(1, keepdims=True)
    shown = share[np.lexsort((-share.max(1), share.argmax(1)))].T
    ax = one_axes(ax, (7.0, 1.0 + 0.2 * len(shown)))
    image = ax.imshow(shown, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    ax.set_yticks(range(len(shown)))
    ax.tick_params(labelsize=7)
    ax.set_xlabel("samples, by their strongest component", fontsize=9)
    ax.set_ylabel("component", fontsize=9)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("share of counts", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return ax


def _explain(ax: Axes, image: AxesImage, n_components: int, label: str, shrink: float) -> None:
    """Number the components below a heat map, and draw the bar of its colours."""
    ax.set_xticks(range(n_components))
    ax.tick_params(length=0, labelsize=7)
    ax.set_xlabel("component", fontsize=9)
    bar = ax.figure.colorbar(image, ax=ax, shrink=shrink, aspect=20, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def plot_factor_correlation(
    fit: Fit, ax: Axes | None = None, *, cmap: str = "RdBu_r", key: str = "pnmf"
) -> Axes:
    """Show how the logarithms of the factors correlate over samples (Pearson).

    Parameters
    ----------
    fit, key
        As for :func:`plot_top_features`.
    ax : matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.
    cmap : str
        Diverging colour map.

    Returns
    -------
    matplotlib Axes
    """
    found = results_of(fit, key)
    L = found.n_components
    correlation = np.atleast_2d(np.corrcoef(np.log(found.factors), rowvar=False))
    side = 1.6 + 0.26 * max(L, 6)
    ax = one_axes(ax, (side + 0.6, side))
    image = ax.imshow(correlation, cmap=cmap, vmin=-1, vmax=1)
    if L <= WRITTEN_OUT:
        for row, column in np.ndindex(L, L):
            value = round(correlation[row, column], 1) + 0.0  # no -0.0
            colour = "white" if abs(value) > 0.55 else "black"
            ax.text(column, row, f"{value:.1f}", color=colour, ha="center", va="center", fontsize=7)
    ax.set_yticks(range(L))
    ax.set_ylabel("component", fontsize=9)
    _explain(ax, image, L, "correlation of log-factors", 0.7)
    return ax


def plot_component_images(
    components: Fit | ArrayLike,
    shape: tuple[int, int],
    axes: AxesLike = None,
    *,
    cmap: str = "viridis",
    key: str = "pnmf",
) -> np.ndarray:
    """Show each component's loadings as an image, for features that are pixels.

    Each panel has a colour scale of its own, from zero; components are counted from 0.

    Parameters
    ----------
    components : array-like of shape (n_components, n_features), or fit
        Non-negative loadings, or a fit that has them, as for :func:`plot_top_features`.
    shape : tuple of int
        Height and width; their product is n_features.
    axes, key
        As for :func:`plot_top_features`.
    cmap : str
        Colour map.

    Returns
    -------
    ndarray of matplotlib Axes
    """
    loadings = results_of(components, key).loadings.T if is_fit(components) else components
    images = np.asarray(loadings)
    if images.ndim != 2 or images.shape[1] != shape[0] * shape[1]:
        raise ValueError(
            f"components must have shape (n_components, {shape[0] * shape[1]}) for images of "
            f"{shape[0]} x {shape[1]} pixels; got {images.shape}."
        )
    axes = panels(len(images), (1.5, 1.7), 5, axes)
    for number, (ax, image) in enumerate(zip(axes, images, strict=True)):
        ax.set_axis_off()
        ax.imshow(image.reshape(shape), cmap=cmap, vmin=0)
        ax.set_title(f"component {number}", fontsize=9)
    return axes
