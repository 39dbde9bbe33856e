"""What options say: the counts they name, places, settings, and where words and pages go."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.command_line.pages import Page
from pnmf_pyro.command_line.tables import read_counts, region_places, table_path
from pnmf_pyro.command_line.text_form import TextForm
from pnmf_pyro.data.checks import warn
from pnmf_pyro.data.stores import is_zarr
from pnmf_pyro.estimator.anndata_bridge import ANNOTATION, AnnDataKeys, unnamed_places
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.results import SPATIAL_KEY

if TYPE_CHECKING:
    from anndata import AnnData


def find_table(options: argparse.Namespace) -> None:
    """Let options that name a SpatialData store name its table."""
    if not hasattr(options, "table"):
        return
    whole: str = options.counts if hasattr(options, "counts") else options.fit
    found = table_path(whole, options.table)
    for name in ("counts", "fit", "out") if found != whole else ():
        if (path := getattr(options, name, None)) and os.path.realpath(path) == os.path.realpath(
            whole
        ):
            setattr(options, name, found)


def map_style(options: argparse.Namespace) -> dict[str, Any]:
    """How a report draws maps, by the names that it takes."""
    return {"unit": "µm" if options.unit == "um" else options.unit, "y_down": not options.north_up}


def read_table(options: argparse.Namespace) -> CountTable:
    """Read the counts that the options name, and say what was taken for what."""
    form = TextForm(options.names, options.separator, options.decimal)
    coords = options.coords or ()
    table = read_counts(
        options.counts, options.layer, options.transpose, form, coords, options.mask
    )
    if not options.quiet:
        for note in table.notes:
            sys.stderr.write(f"pnmf-pyro: {note}\n")
    return table


def places(
    options: argparse.Namespace, table: CountTable
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Coordinates and groups of the samples, where there are any."""
    spatial_key = None if options.no_space else options.spatial_key
    keys = AnnDataKeys(None, spatial_key, options.batch_key)
    if options.coords and spatial_key not in (None, SPATIAL_KEY):
        raise ValueError("--coords and --spatial-key both name coordinates: leave one of them out.")
    if table.annotation is not None:
        if spatial_key == SPATIAL_KEY and SPATIAL_KEY not in table.annotation.obsm:
            if ANNOTATION in table.annotation.uns and is_zarr(options.counts):
                table.annotation.obsm[SPATIAL_KEY] = region_places(options.counts, table.annotation)
                return keys.places(table.annotation)
            _warn_unused_places(table.annotation)
            keys = AnnDataKeys(None, None, options.batch_key)
        return keys.places(table.annotation)
    if keys != AnnDataKeys(None, spatial_key and SPATIAL_KEY):
        raise ValueError("--spatial-key and --batch-key are for .h5ad files; leave them out.")
    return None if options.no_space else table.coordinates, None


def _warn_unused_places(adata: AnnData) -> None:
    """Warn of what looks like coordinates in a file whose coordinates nothing names."""
    key, pair = unnamed_places(adata)
    if key:
        where, option = f"obsm has {key!r}", f"--spatial-key {key}"
    elif pair:
        where, option = f"obs has {pair[0]!r} and {pair[1]!r}", f"--coords {','.join(pair)}"
    else:
        return
    warn(f"{where}, which no option names: give {option} to use them, or --no-space.")


def settings(options: argparse.Namespace, table: CountTable) -> dict[str, Any]:
    """Size factors, seed, mask, verbosity and parameters of PNMF, by the names that fits take."""
    return {
        "mask": table.mask,
        "size_factors": "total" if options.size_factors == "total" else None,
        "random_state": options.seed,
        "verbose": not options.quiet,
        "non_spatial_components": options.non_spatial_components,
        **dict(options.set),
    }


def heard(fit: Callable[[], PNMF]) -> tuple[PNMF, bool]:
    """Return a fitted model, and whether it settled; warnings are shown when it has ended."""
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            model = fit()
    finally:
        for one in said:
            show_warning(one.message)
    return model, not any(issubclass(one.category, ConvergenceWarning) for one in said)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Write a warning to standard error; the form of :func:`warnings.showwarning`."""
    sys.stderr.write(f"pnmf-pyro: warning: {message}\n")


def write_page(options: argparse.Namespace, page: Page, path: str) -> None:
    """Write a page, with the command at its foot, and say so."""
    page.write(path, options.command)
    say(options, f"wrote {path}")


def say(options: argparse.Namespace, text: str) -> None:
    """Write to standard output, unless it is to be quiet."""
    if not getattr(options, "quiet", False):
        sys.stdout.write(f"{text}\n")
