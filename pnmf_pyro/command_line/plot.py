"""pnmf-pyro plot: a fit on one page."""

from __future__ import annotations

import argparse

from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.files import read_fit
from pnmf_pyro.command_line.options import map_style, write_page
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import fit_report


def run(options: argparse.Namespace) -> Exit:
    """Draw and write."""
    check_report_path("--out", options.out)
    page = fit_report(
        read_fit(options.fit), key=options.key, source=options.fit, **map_style(options)
    )
    write_page(options, page, options.out)
    return Exit.FINE
