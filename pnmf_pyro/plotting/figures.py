"""Figures and their panels; the only file that imports matplotlib's pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from pnmf_pyro.estimator.results import import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AxesLike = Union["Axes", Sequence["Axes"], np.ndarray, None]

# One colour of viridis, for bars and lines.
BLUE = "#31688e"

# Widest figure that is made without being asked for, in inches.
WIDEST = 12.0


def pyplot() -> ModuleType:
    """Import pyplot, or say how to install matplotlib."""
    return import_optional("matplotlib.pyplot", "Plots need matplotlib", "plot")


def check_answer(name: str, value: object, kind: type, *makers: str) -> None:
    """Raise a ValueError unless `value` is of the kind that the functions `makers` return."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{name} must be what {' or '.join(makers)} returned; got {type(value).__name__}."
        )


def new_figure(size: tuple[float, float]) -> Figure:
    """Return a figure of `size` inches that no window manager knows of, for saving to a file."""
    pyplot()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def one_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure of `size` inches if it is None."""
    return pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def panels(n: int, size: tuple[float, float], columns: int, axes: AxesLike = None) -> np.ndarray:
    """Return axes of n panels, (n,), in rows of a new figure unless they are given.

    A row has at most `columns` panels of `size` inches; all are smaller where it would be wider
    than a page. Axes that are given and left over are hidden.
    """
    if axes is None:
        columns = min(columns, n)
        rows = -(-n // columns)
        width, height = np.array(size) * min(1.0, WIDEST / (size[0] * columns))
        whole = (width * columns, height * rows)
        _, axes = pyplot().subplots(rows, columns, figsize=whole, layout="constrained")
    flat = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    if len(flat) < n:
        raise ValueError(f"axes must be at least {n}, one for each panel; got {len(flat)}.")
    for ax in flat[n:]:
        ax.set_axis_off()
    return flat[:n]


def verbatim(name: object) -> str:
    """Return a name as matplotlib is to draw it, a pair with a comma, dollar signs as such."""
    text = ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)
    return text.replace("$", r"\$")


def ink(ax: Axes) -> Any:
    """Return the colour of text in the style, which stands out from the background."""
    return ax.title.get_color()


def plain(ax: Axes) -> None:
    """Take away the frame's upper and right side."""
    ax.spines[["top", "right"]].set_visible(False)
