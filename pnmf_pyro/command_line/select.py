"""pnmf-pyro select: compare numbers of components."""

from __future__ import annotations

import argparse

from pnmf_pyro.analysis.selection import select_n_components
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import selection_report, selection_words


def run(options: argparse.Namespace) -> Exit:
    """Compare, say what was found, and write it."""
    if options.out:
        check_report_path("--out", options.out)
    table = shared.read_table(options)
    coordinates, groups = shared.places(options, table)
    chosen = {"n_components": options.range, **shared.settings(options, table)}
    selection = select_n_components(
        table.X,
        coordinates=coordinates,
        groups=groups,
        hold_out=options.hold_out,
        n_seeds=options.thinnings,
        n_jobs=options.jobs,
        **chosen,
    )
    shared.say(options, "\n\n".join(map(str, selection_words(selection))))
    if options.out:
        shared.write_page(options, selection_report(selection), options.out)
    return Exit.LOOK if selection.beyond else Exit.FINE
