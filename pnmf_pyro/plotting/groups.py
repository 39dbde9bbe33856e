"""Components and groups of samples, such as types of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pnmf_pyro.analysis.groups import KINDS, GroupLevels
from pnmf_pyro.plotting.figures import check_answer, one_axes, verbatim

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_group_levels(levels: GroupLevels, ax: Axes | None = None) -> Axes:
    """Show how high each component is in each group, as a heat map.

    A column is a component, relative to its highest group. Columns are sorted by kind, and within a
    kind by the group that is highest; lines divide the kinds.

    Parameters
    ----------
    levels : GroupLevels
        What :func:`~pnmf_pyro.analysis.groups.group_levels` returned.
    ax : matplotlib Axes, optional
        Axes to draw in; those of a new figure unless given.

    Returns
    -------
    matplotlib Axes
    """
    check_answer("levels", levels, GroupLevels, "group_levels")
    G, L = levels.levels.shape
    names = [*map(verbatim, levels.groups)]
    room = 0.055 * max(map(len, names))
    ax = one_axes(ax, (max(3.1, 1.4 + 0.32 * L) + room, max(2.2, 1.2 + 0.2 * G)))
    relative = levels.levels / np.maximum(levels.levels.max(0), np.finfo(float).tiny)
    number = np.asarray([KINDS.index(kind) for kind in levels.kinds])
    order = np.lexsort((relative.argmax(0), number))
    image = ax.imshow(relative[:, order], vmin=0, vmax=1, cmap="viridis", aspect="auto")
    ax.set_yticks(range(G), names, fontsize=7)
    ax.set_xticks(range(L), [str(l) for l in order], fontsize=8)
    ax.set_xlabel("component")
    for kind in np.unique(number):
        columns = np.flatnonzero(number[order] == kind)
        text = ax.text(columns[0] - 0.3, -0.6, KINDS[kind], fontsize=8, va="bottom")
        text.set(rotation=40, rotation_mode="anchor")
        if columns[0] > 0:
            ax.axvline(columns[0] - 0.5, color="white", lw=2)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("relative level", fontsize=8)
    return ax
