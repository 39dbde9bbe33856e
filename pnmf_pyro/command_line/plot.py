"""pnmf-pyro plot: a fit on one page."""

from __future__ import annotations

import argparse

from pnmf_pyro.command_line.files import read_fit
from pnmf_pyro.command_line.options import (
    Commands,
    Exit,
    add_command,
    add_maps,
    add_table,
    map_style,
    write_page,
)
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import fit_report


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plot",
        run,
        help="draw a report on a fit",
        description="Draw maps, top features, loadings and the course of a fit that is in an .h5ad "
        "file, as fit writes it, or in a model saved by fit --save-model or PNMF.save. The report "
        "is one file of HTML; pnmf_pyro.plotting draws single plots.",
        examples=(
            "pnmf-pyro plot factors.h5ad --out report.html --unit um",
            "pnmf-pyro plot model.npz --out report.html",
        ),
    )
    parser.add_argument(
        "fit", metavar="FIT", help=".h5ad or .zarr with results, or .npz with a saved model"
    )
    add_table(parser)
    parser.add_argument("--out", "-o", required=True, help="where to write it, .html")
    parser.add_argument("--key", default="pnmf", help="key_added of the fit (default: pnmf)")
    add_maps(parser)


def run(options: argparse.Namespace) -> Exit:
    """Draw and write."""
    check_report_path("--out", options.out)
    page = fit_report(
        read_fit(options.fit), key=options.key, source=options.fit, **map_style(options)
    )
    write_page(options, page, options.out)
    return Exit.FINE
