"""Sections of tissue, or other places, laid out and drawn on in one panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree

from pnmf_pyro.data.checks import check_count, check_positive
from pnmf_pyro.data.places import GroupCodes, check_coordinates
from pnmf_pyro.plotting.categories import Column, colours
from pnmf_pyro.plotting.figures import WIDEST, ink, verbatim

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import EllipseCollection
    from matplotlib.image import AxesImage

# Samples up to which each is drawn as a disc; of more, the mean in each pixel of an image is shown.
DISCS = 20_000

# Samples up to which discs are drawn apart; of more, they cover the gaps of a square lattice.
APART, COVERING = 1000, 2**0.5

# Side of a pixel, and space between sections: in spacings, and as a share of a section's side.
PIXEL = 1.5
GAP = 0.06

# Room below for the scale bar and above for names of sections, as a share of the height.
BAR, NAME = 0.16, 0.06

# Inches that a character of a section's name takes, about.
CHARACTER = 0.06

# Sections in one row, up to which there is only one.
ONE_ROW = 4


@dataclass(frozen=True)
class MapStyle:
    """How maps are drawn.

    Parameters
    ----------
    cmap : str
        Colour map.
    shared_scale : bool
        Whether all panels share one colour scale.
    lowest : float, optional
        Value of the first colour; the lowest one unless given.
    unit : str
        Unit of lengths, such as "µm", for the scale bar; those of the coordinates unless given.
    unit_length : float
        Length of one unit of the coordinates, in `unit`.
    scale_bar : bool
        Whether a scale bar stands below the first panel.
    y_down : bool
        Whether the second coordinate points down, as in images.
    spot_size : float, optional
        Diameter of a disc, in distances between neighbours: 1 unless given, and for more than
        1,000 samples so wide that no gaps show.
    columns : int, optional
        Number of panels in a row; as many as suit their shape unless given.
    """

    cmap: str = "viridis"
    shared_scale: bool = False
    lowest: float | None = None
    unit: str = ""
    unit_length: float = 1.0
    scale_bar: bool = True
    y_down: bool = True
    spot_size: float | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        check_positive("unit_length", self.unit_length)
        if self.spot_size is not None:
            check_positive("spot_size", self.spot_size)
        if self.columns is not None:
            check_count("columns", self.columns)


class Tissue:
    """One section, or several side by side, on which values can be drawn."""

    def __init__(self, coordinates: ArrayLike, labels: ArrayLike | None, n: int, look: MapStyle):
        points = check_coordinates(coordinates, n, 2).numpy()
        self.look = look
        self.names: list[str] = []
        codes = np.zeros(n, dtype=np.int64)
        if labels is not None:
            groups = GroupCodes.of(labels, n)
            present, codes = np.unique(groups.encode(labels, n).numpy(), return_inverse=True)
            named = groups.decode(torch.from_numpy(present)).reshape(len(present), -1)
            self.names = [", ".join(map(str, name)) for name in named]
        sections = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
        parts = [points[members] for members in sections]
        self.disc = disc_width(parts)
        self.width = max(float(np.ptp(part[:, 0])) for part in parts) or self.disc
        self.points, self.tops = side_by_side(points, sections, self.disc, look.y_down)
        low, high = self.points.min(0) - self.disc, self.points.max(0) + self.disc
        self.size = high - low
        self.bar = BAR * self.size[1] if look.scale_bar else 0.0
        name = NAME * self.size[1] if self.names else 0.0
        below, above = high[1] + self.bar, low[1] - name
        if not look.y_down:
            below, above = low[1] - self.bar, high[1] + name
        self.limits = (low[0], high[0]), (below, above)

    def panel_size(self, n_panels: int) -> tuple[tuple[float, float], int]:
        """Width and height of a panel in inches, and how many to put in a row."""
        aspect = float(self.size[0] / abs(np.subtract(*self.limits[1])))
        rows = -(-n_panels // int(np.clip(np.round(np.sqrt(2.4 * n_panels / aspect)), 1, 6)))
        columns = self.look.columns or -(-n_panels // rows)
        height = 2.3 if n_panels <= 6 else 1.7
        section = self.width * height * aspect / float(self.size[0])  # inches
        longest = max(map(len, self.names), default=0) * CHARACTER
        height *= float(np.clip(longest / section, 1, 3))
        width = height * aspect + 0.7
        if longest > section and self.look.columns is None:
            columns = max(1, min(columns, int(WIDEST / width)))
        return (width, height + 0.3), columns

    def draw(
        self, ax: Axes, column: Column, limits: tuple[float, float]
    ) -> EllipseCollection | AxesImage:
        """Draw one panel, and return what a colour bar describes."""
        values, names = column.values, column.categories
        if len(values) <= DISCS:
            shown: Any = self._discs(ax, values)
        else:
            shown = self._image(ax, values, 0 if names is None else len(names))
        cmap = self.look.cmap if names is None else colours(len(names))
        shown.set(cmap=cmap, clim=limits, rasterized=True)
        ax.set(aspect="equal", xlim=self.limits[0], ylim=self.limits[1])
        ax.set_axis_off()
        return shown

    def _discs(self, ax: Axes, values: np.ndarray) -> EllipseCollection:
        from matplotlib.collections import EllipseCollection

        width = self.disc * (self.look.spot_size or (1.0 if len(values) <= APART else COVERING))
        discs = EllipseCollection(
            width,
            width,
            0,
            units="xy",
            offsets=self.points,
            offset_transform=ax.transData,
            array=values,
            linewidth=0,
        )
        ax.add_collection(discs)
        return discs

    def _image(self, ax: Axes, values: np.ndarray, n_categories: int) -> AxesImage:
        """Draw the mean in each pixel, or the category that is most frequent there."""
        low, side = self.points.min(0) - self.disc, PIXEL * self.disc
        cells = ((self.points - low) / side).astype(np.int64)
        shape = cells.max(0) + 2
        flat = np.ravel_multi_index(tuple(cells.T), tuple(shape))
        known = np.isfinite(values)
        flat, values, pixels = flat[known], values[known], int(shape.prod())
        seen = np.bincount(flat, minlength=pixels)
        if n_categories:
            most, shown = np.zeros(pixels), np.full(pixels, np.nan)
            for category in range(n_categories):
                number = np.bincount(flat[values == category], minlength=pixels)
                shown[number > most] = category
                most = np.maximum(most, number)
        else:
            total = np.bincount(flat, values, minlength=pixels)
            shown = np.divide(total, seen, out=np.full(pixels, np.nan), where=seen > 0)
        (left, bottom), (right, top) = low, low + side * shape
        extent = (left, right, bottom, top)
        return ax.imshow(shown.reshape(shape).T, origin="lower", extent=extent)

    def write_names(self, ax: Axes) -> None:
        """Write the names of the sections above them."""
        edge = -self.disc / 2 if self.look.y_down else self.disc / 2
        write = partial(ax.annotate, textcoords="offset points", annotation_clip=False, fontsize=7)
        for name, (x, y) in zip(self.names, self.tops, strict=False):
            write(verbatim(name), (x, y + edge), (0, 2), ha="center", va="bottom")

    def draw_scale_bar(self, ax: Axes) -> None:
        """Draw the scale bar, if there is to be one."""
        if not self.look.scale_bar:
            return
        length = round_length(0.4 * self.width * self.look.unit_length)
        left, below = self.limits[0][0] + self.disc, self.limits[1][0]
        right = left + length / self.look.unit_length
        y = below + (-0.6 if self.look.y_down else 0.6) * self.bar
        ax.plot([left, right], [y, y], color=ink(ax), lw=2, solid_capstyle="butt")
        text, below = f"{length:g} {self.look.unit or 'units'}", "offset points"
        ax.annotate(text, (left, y), (0, -3), textcoords=below, fontsize=7, va="top", ha="left")


def disc_width(sections: Sequence[np.ndarray]) -> float:
    """Median distance to the third nearest place: of a lattice the spacing, of others about it."""
    gaps = []
    for points in sections:
        points = np.unique(points, axis=0)
        k = min(4, len(points))
        if k > 1:
            gaps.append(cKDTree(points).query(points, k=[k])[0][:, 0])
    return float(np.median(np.concatenate(gaps))) if gaps else 1.0


def side_by_side(
    points: np.ndarray, sections: Sequence[np.ndarray], disc: float = 0.0, y_down: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Move sections into cells of a grid, in rows from the top, without changing their scale.

    `points` (n, 2) are moved by the numbers of each section's points, with `disc` as room beside a
    share of their size. Also returned is the middle (n_sections, 2) of each section's upper side.
    """
    low = np.stack([points[members].min(0) for members in sections])
    size = np.stack([points[members].max(0) for members in sections]) - low
    columns = len(sections)
    if columns > ONE_ROW:
        columns = int(np.ceil(np.sqrt(columns)))
    cell = size.max(0) * (1 + 2 * GAP, 1 + 4 * GAP) + disc
    row, column = np.divmod(np.arange(len(sections)), columns)
    corner = np.stack([column, row if y_down else -row], 1) * cell + (cell - size) / 2
    moved = points.astype(np.float64)
    for members, start, end in zip(sections, low, corner, strict=True):
        moved[members] += end - start if len(sections) > 1 else 0
    low = corner if len(sections) > 1 else low
    top = low[:, 1] if y_down else low[:, 1] + size[:, 1]
    return moved, np.stack([low[:, 0] + size[:, 0] / 2, top], 1)


def round_length(length: float) -> float:
    """Return the largest of 1, 2 or 5 times a power of ten that is not above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(step for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)) * power)
