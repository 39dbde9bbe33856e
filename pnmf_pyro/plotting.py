"""Pictures of a fit: arrays or a fitted model in, matplotlib Axes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib. Install it with: pip install 'pnmf-pyro[plot]'"
        ) from error
    return plt


def new_figure(size: tuple[float, float]) -> Any:
    """Return a figure of `size` inches that no window manager knows of, for saving to a file."""
    _pyplot()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def plot_elbo(history: Sequence[float] | Any, ax: Any = None, *, label: str | None = None) -> Any:
    """Plot the ELBO against the steps of a fit.

    The vertical axis shows the last nine tenths of the steps in full; the first, often far below,
    may leave the picture.

    Parameters
    ----------
    history : sequence of float, or PNMF
        ELBO values in nats, or a fitted estimator.
    ax : matplotlib Axes, optional
        Drawn in a new figure unless given.
    label : str, optional
        Of the line, for a legend.

    Returns
    -------
    matplotlib Axes
    """
    values = np.asarray(getattr(history, "history_", history), dtype=float)
    if ax is None:
        _, ax = _pyplot().subplots(figsize=(5, 3.2), layout="constrained")
    ax.plot(np.arange(1, len(values) + 1), values, label=label, lw=1.5)
    late = values[len(values) // 10 :]
    margin = 0.08 * (np.ptp(late) or 1.0)
    ax.set_ylim(late.min() - margin, late.max() + margin)
    ax.set(xlabel="iteration", ylabel="ELBO (nats)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_component_images(
    components: Any, shape: tuple[int, int], axes: Any = None, *, cmap: str = "viridis"
) -> np.ndarray:
    """Show each component's loadings as an image, for features that are pixels.

    Each panel has a colour scale of its own, from zero.

    Parameters
    ----------
    components : ndarray of shape (n_components, n_features), or PNMF
        Non-negative loadings, or a fitted estimator.
    shape : tuple of int
        Height and width; their product is n_features.
    axes : array of matplotlib Axes, optional
        One for each component; a new figure with five to a row unless given.
    cmap : str
        Colour map.

    Returns
    -------
    ndarray of matplotlib Axes
    """
    images = np.asarray(getattr(components, "components_", components))
    if images.ndim != 2 or images.shape[1] != shape[0] * shape[1]:
        raise ValueError(
            f"components must have shape (n_components, {shape[0] * shape[1]}) for images of "
            f"{shape[0]} x {shape[1]} pixels; got {images.shape}."
        )
    if axes is None:
        columns = min(5, len(images))
        rows = -(-len(images) // columns)
        size = (1.5 * columns, 1.7 * rows)
        _, axes = _pyplot().subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
    axes = np.asarray(axes)
    for ax in axes.flat:
        ax.set_axis_off()
    for number, (ax, image) in enumerate(zip(axes.flat, images, strict=False), start=1):
        ax.imshow(image.reshape(shape), cmap=cmap, vmin=0)
        ax.set_title(f"component {number}", fontsize=9)
    return axes
