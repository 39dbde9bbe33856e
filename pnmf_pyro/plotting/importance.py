"""How much is due to space: components, features and places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pnmf_pyro.analysis.importance import both_kinds, importance_of_space
from pnmf_pyro.estimator.results import Fit, results_of
from pnmf_pyro.plotting.figures import BLUE, AxesLike, panels, plain, verbatim
from pnmf_pyro.plotting.maps import plot_spatial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour of what is free of space.
ORANGE = "#e08214"

# Bins of the histogram of features.
BINS = np.linspace(0, 1, 21)

# Numbers of components below bars, and characters of two names in one line, at most.
MOST_TICKS, ONE_LINE = 25, 45


def plot_importance_of_space(
    fit: Fit, n: int = 3, *, axes: AxesLike = None, key: str = "pnmf", **style: Any
) -> np.ndarray:
    """Show how much is due to components that are smooth in space.

    Three panels: the share of all expected counts of each component; how many features have which
    importance of space; and its map, for samples in two dimensions. Importance is that of
    :func:`~pnmf_pyro.analysis.importance.importance_of_space`.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit with components of both kinds, see :func:`~pnmf_pyro.estimator.results.results_of`.
    n : int
        Number of features to name, of those that owe most and least to space.
    axes : array of matplotlib Axes, optional
        Three axes to draw in; those of a new figure unless given.
    key : str
        `key_added` of the fit, for AnnData.
    **style
        Of the map, see :class:`~pnmf_pyro.plotting.tissue.MapStyle`.

    Returns
    -------
    ndarray of matplotlib Axes, three
    """
    found = both_kinds(results_of(fit, key))
    axes = panels(3, (3.6, 3.0), 3, axes)
    _components(axes[0], importance_of_space(found, "components"))
    _features(axes[1], found.feature_names, found.importance_of_space("feature"), n)
    where, importance = (found.coordinates, found.groups), found.importance_of_space("sample")
    style = {"lowest": 0.0, "titles": ["importance of space"], **style}
    plot_spatial(where[0], importance, where[1], axes=axes[2:], **style)
    return axes


def _components(ax: Axes, table: np.ndarray) -> None:
    """Bars of shares, in the colour of the kind of component."""
    in_space = np.asarray(table["in_space"])
    numbers, share = np.asarray(table["component"]), np.asarray(table["share"])
    for kind, colour, name in ((True, BLUE, "in space"), (False, ORANGE, "free")):
        chosen = in_space == kind
        ax.bar(numbers[chosen], share[chosen], color=colour, label=name)
    ax.locator_params(axis="x", nbins=MOST_TICKS, integer=True)
    ax.tick_params(axis="x", labelsize=7)
    ax.set(xlabel="component", ylabel="share of expected counts", xlim=(-0.6, len(numbers) - 0.4))
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    plain(ax)


def _features(ax: Axes, names: np.ndarray, importance: np.ndarray, n: int) -> None:
    """A histogram, with the names of the first and last features at its ends."""
    known = np.flatnonzero(np.isfinite(importance))
    ax.hist(importance[known], BINS.tolist(), color=BLUE)
    ax.set(xlim=(0, 1), xlabel="importance of space", ylabel="features")
    order = known[np.argsort(importance[known], kind="stable")]
    n = min(n, len(order))
    least, most = ([verbatim(names[one]) for one in some] for some in (order[:n], order[::-1][:n]))
    below = sum(max(map(len, some), default=0) for some in (least, most)) > ONE_LINE
    for side, x, lines in (("left", 0.02, least), ("right", 0.98, [""] * (n + 1) * below + most)):
        ax.text(x, 0.98, "\n".join(lines), ha=side, va="top", fontsize=7, transform=ax.transAxes)
    ax.set_ylim(top=(2.0 if below else 1.35) * ax.get_ylim()[1])
    plain(ax)
