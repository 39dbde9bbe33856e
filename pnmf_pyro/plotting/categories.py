"""Colours and legends of categories, such as sections, clusters and domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pnmf_pyro.plotting.figures import verbatim

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap

# Eight colours that the colour-blind tell apart (Okabe and Ito 2008).
EIGHT = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"]

# Categories up to which tab20 has a colour for each; more are told apart by turbo less well.
TWENTY = 20

# Lines of a legend in one column.
LINES = 16


@dataclass(frozen=True)
class Column:
    """What one panel maps: numbers, or numbers of categories that have names.

    Attributes
    ----------
    values : ndarray of shape (n_samples,)
        Numbers; NaN for a sample without a category.
    categories : list of str, or None
        Names of the categories 0, 1, ...; None for numbers that are no categories.
    """

    values: np.ndarray
    categories: list[str] | None = None

    @classmethod
    def of_labels(cls, labels: Any) -> Column:
        """Return labels as categories, in the order that pandas has, or else sorted."""
        if (known := getattr(labels, "cat", None)) is not None:  # a Series of pandas
            codes = np.asarray(known.codes, dtype=np.float64)
            return cls(np.where(codes < 0, np.nan, codes), [*map(str, known.categories)])
        names, numbers = np.unique(np.asarray(labels).astype(str), return_inverse=True)
        return cls(numbers.astype(np.float64), names.tolist())


def is_categorical(values: Any) -> bool:
    """Say whether a column holds categories: a categorical of pandas, words or truth values."""
    dtype = getattr(values, "dtype", np.dtype(float))
    return hasattr(values, "cat") or getattr(dtype, "kind", "O") in "OUSTb"


def colours(n: int) -> ListedColormap:
    """Return n colours."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    if n <= len(EIGHT):
        return ListedColormap(EIGHT[:n])
    whole = matplotlib.colormaps["tab20" if n <= TWENTY else "turbo"]
    return ListedColormap([*whole(np.arange(n) if n <= TWENTY else np.linspace(0, 1, n))])


def legend_width(names: Sequence[str]) -> float:
    """Inches that a legend of these names takes, about."""
    return -(-len(names) // LINES) * (0.25 + 0.07 * max(map(len, names), default=0))


def legend(ax: Axes, names: Sequence[str]) -> None:
    """Name the colours at the right of a panel."""
    from matplotlib.lines import Line2D

    dots: Any = {"linestyle": "", "marker": "o", "markersize": 5}
    palette = colours(len(names))
    ax.legend(
        handles=[Line2D([], [], color=palette(i), **dots) for i in range(len(names))],
        labels=[*map(verbatim, names)],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=-(-len(names) // LINES),
        frameon=False,
        fontsize=7,
        handletextpad=0.2,
        borderaxespad=0.2,
    )
