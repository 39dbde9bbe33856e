"""Maps: values at places, one panel for each quantity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.data.checks import check_array
from pnmf_pyro.data.places import check_coordinates
from pnmf_pyro.data.tables import counts_of, is_anndata
from pnmf_pyro.estimator.results import (
    SPATIAL_KEY,
    Fit,
    Results,
    chosen_numbers,
    is_fit,
    results_of,
)
from pnmf_pyro.plotting.categories import Column, is_categorical, legend, legend_width
from pnmf_pyro.plotting.figures import AxesLike, panels, verbatim
from pnmf_pyro.plotting.tissue import MapStyle, Tissue

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

# Share of the values that has its own colour; the highest, if far above, all have the last one.
SHOWN = 0.995


def plot_factors(
    fit: Fit,
    components: Sequence[int] | int | None = None,
    *,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    axes: AxesLike = None,
    key: str = "pnmf",
    **style: Any,
) -> np.ndarray:
    """Map the factors E exp F, one panel for each component, on scales that begin at 0.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to draw, see :func:`~pnmf_pyro.estimator.results.results_of`.
    components : sequence of int, optional
        Numbers of the components to draw, counted from 0; all unless given.
    coordinates : array-like of shape (n_samples, 2), optional
        Places of the samples; those of the fit unless given, needed where it knew no space.
    groups : array-like of shape (n_samples,) or str, optional
        Section of each sample, or for AnnData a column of obs; those of the fit unless given. They
        are drawn side by side.
    axes : array of matplotlib Axes, optional
        Axes to draw in, one for each panel; those of a new figure unless given.
    key : str
        `key_added` of the fit, for AnnData.
    **style
        See :class:`MapStyle`.

    Returns
    -------
    ndarray of matplotlib Axes, one for each panel
    """
    found, where = results_of(fit, key), (coordinates, _labels(fit, groups))
    style = {"lowest": 0.0, **style}
    return _plot_components(found, found.factors, "", components, where, axes, style)


def plot_uncertainty(
    fit: Fit,
    components: Sequence[int] | int | None = None,
    *,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    axes: AxesLike = None,
    key: str = "pnmf",
    **style: Any,
) -> np.ndarray:
    """Map the standard deviation of the log-factors F, the relative uncertainty of the factors.

    Scales begin at 0, so that small differences look small.

    Parameters
    ----------
    fit, components, coordinates, groups, axes, key, **style
        As for :func:`plot_factors`.

    Returns
    -------
    ndarray of matplotlib Axes, one for each panel
    """
    found, where = results_of(fit, key), (coordinates, _labels(fit, groups))
    sd, style = found.log_factors_sd, {"cmap": "cividis", "lowest": 0.0, **style}
    return _plot_components(found, sd, ": sd of F", components, where, axes, style)


def _plot_components(
    found: Results,
    values: np.ndarray,
    quantity: str,
    components: Sequence[int] | int | None,
    where: tuple[ArrayLike | None, ArrayLike | None],
    axes: AxesLike,
    style: dict[str, Any],
) -> np.ndarray:
    """Map chosen columns of values (N, L) at the coordinates and groups given, or the fit's."""
    chosen = chosen_numbers("components", components, found.n_components)
    coordinates, groups = where
    return plot_spatial(
        found.coordinates if coordinates is None else coordinates,
        values[:, chosen],
        found.groups if groups is None else groups,
        titles=[f"component {number}{quantity}" for number in chosen],
        axes=axes,
        **style,
    )


def plot_spatial(
    places: Fit | ArrayLike,
    values: np.ndarray | Sequence[float] | Sequence[Sequence[float]] | Sequence[str] | str,
    groups: ArrayLike | None = None,
    *,
    titles: Sequence[str] | None = None,
    axes: AxesLike = None,
    **style: Any,
) -> np.ndarray:
    """Map any values, one panel for each column.

    Axes are equal, discs as wide as the spacing of the places, and large sections are drawn as
    images of means. Several sections stand side by side in each panel.

    Parameters
    ----------
    places : array-like of shape (n_samples, 2), AnnData, PNMF, ModelFit or PoissonFactorization
        Coordinates, or what holds them.
    values : array-like of shape (n_samples,) or (n_samples, n_panels), str or sequence of str
        Numbers to map; for AnnData, also names of columns of obs and of features. A column of
        words, truth values or categories has a colour for each, and a legend; so has an array or a
        Series of them.
    groups : array-like of shape (n_samples,) or str, optional
        Section of each sample; for AnnData, also a column of obs.
    titles : sequence of str, optional
        Titles of the panels.
    axes, **style
        As for :func:`plot_factors`.

    Returns
    -------
    ndarray of matplotlib Axes, one for each panel
    """
    look = MapStyle(**style)
    named = list | tuple | np.ndarray if is_anndata(places) else list | tuple
    several = isinstance(values, named) and len(values) > 0
    if isinstance(values, str) or (several and isinstance(values[0], str)):
        names = np.atleast_1d(values)
        titles = [*map(verbatim, names)] if titles is None else titles
        columns = [_named_column(places, name) for name in names]
    else:
        columns = _columns(values)
    n_panels = len(columns)
    titles = [""] * n_panels if titles is None else titles
    if len(titles) != n_panels:
        raise ValueError(f"titles must be {n_panels}, one for each panel; got {len(titles)}.")
    coordinates = check_coordinates(_coordinates(places), None)
    if (rows := len(columns[0].values)) != len(coordinates):
        raise ValueError(
            f"coordinates and values must have one row for each sample; got {len(coordinates)} and "
            f"{rows}."
        )
    return map_columns(coordinates, columns, _labels(places, groups), titles, axes, look)


def map_columns(
    coordinates: ArrayLike,
    columns: Sequence[Column],
    groups: ArrayLike | None,
    titles: Sequence[str],
    axes: AxesLike,
    look: MapStyle,
) -> np.ndarray:
    """Map columns that are checked, see :func:`plot_spatial`."""
    tissue = Tissue(coordinates, groups, len(columns[0].values), look)
    (width, height), across = tissue.panel_size(len(columns))
    legends = [legend_width(one.categories) for one in columns if one.categories is not None]
    axes = panels(len(columns), (width + max(legends, default=0.0), height), across, axes)
    scales = _scales(columns, look)
    numbers = []
    for ax, column, limits, title in zip(axes, columns, scales, titles, strict=True):
        shown = tissue.draw(ax, column, limits)
        ax.set_title(title, fontsize=9)
        if column.categories is None:
            numbers.append((shown, ax))
        else:
            legend(ax, column.categories)
        tissue.write_names(ax)
    tissue.draw_scale_bar(axes[0])
    if numbers:
        _colour_bars(numbers, look)
    return axes


def _coordinates(places: Fit | ArrayLike) -> ArrayLike:
    if is_anndata(places):
        if SPATIAL_KEY not in places.obsm:
            raise ValueError(
                f"places has no obsm[{SPATIAL_KEY!r}]; pass its coordinates in place of it."
            )
        return places.obsm[SPATIAL_KEY]
    if is_fit(places):
        places = results_of(places).coordinates
    if places is None:
        raise ValueError(
            "coordinates must be given, of shape (n_samples, 2): the fit knows no space; got None."
        )
    return places


def _labels(places: Fit | ArrayLike, groups: ArrayLike | None) -> ArrayLike | None:
    if isinstance(groups, str):
        return np.asarray(_named(places, "groups", groups, features=False))
    return groups


def _columns(values: ArrayLike) -> list[Column]:
    """Columns of numbers, one for each panel, or one of words or categories."""
    if np.ndim(values) == 1 and is_categorical(values) and not isinstance(values, list | tuple):
        return [Column.of_labels(values)]
    table = check_array("values", values)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            "values must be of shape (n_samples, n_panels), a row for each of the places; got "
            f"{table.shape}."
        )
    return [Column(column) for column in table.T]


def _named_column(places: Fit | ArrayLike, name: str) -> Column:
    """A column of obs, or counts of a feature."""
    values = _named(places, "values", name)
    if is_categorical(values):
        return Column.of_labels(values)
    dense = values.toarray() if hasattr(values, "toarray") else values
    return Column(check_array(f"values={name!r}", dense).ravel())


def _named(places: Fit | ArrayLike, what: str, name: str, features: bool = True) -> Any:
    """A column of obs, or of X."""
    if not is_anndata(places):
        raise ValueError(f"{what}={name!r} names a column of an AnnData object; got no AnnData.")
    if name in places.obs:
        return places.obs[name]
    if features and name in places.var_names:
        return counts_of(places[:, [name]])
    where = "adata.obs or adata.var_names" if features else "adata.obs"
    raise ValueError(f"{what}={name!r} is not in {where}; obs has {list(places.obs)}.")


def _scales(columns: Sequence[Column], look: MapStyle) -> list[tuple[float, float]]:
    """Lowest and highest value with a colour of its own, for each panel."""
    numbers = [column.values for column in columns if column.categories is None]
    scales = []
    for column in columns:
        if column.categories is not None:
            scales.append((-0.5, len(column.categories) - 0.5))
            continue
        values = np.stack(numbers) if look.shared_scale else column.values
        low = np.nanmin(values) if look.lowest is None else look.lowest
        high = np.nanquantile(values, SHOWN)
        scales.append((float(low), float(high) if high > low else float(low) + 1.0))
    return scales


def _colour_bars(drawn: Sequence[tuple[ScalarMappable, Axes]], look: MapStyle) -> None:
    """One bar beside each panel, or one for all."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    pairs = [([one], [ax]) for one, ax in drawn]
    whole = ([one for one, _ in drawn], [ax for _, ax in drawn])
    for described, beside in [whole] if look.shared_scale else pairs:
        above = any(np.nanmax(np.asarray(one.get_array())) > one.get_clim()[1] for one in described)
        bar = beside[0].figure.colorbar(
            described[-1],
            ax=beside,
            shrink=0.7,
            aspect=20,
            pad=0.02,
            extend="max" if above else "neither",
            ticks=MaxNLocator(3),
            format=ScalarFormatter(useOffset=False),
        )
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
