"""pnmf-pyro select: compare numbers of components."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from pnmf_pyro.analysis.hold_out import HOLD_OUT
from pnmf_pyro.analysis.selection import select_n_components
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import selection_report, selection_words


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "select",
        run,
        help="compare numbers of components",
        description="Fit each number of components to one half of the events of a table of counts "
        "and predict the other half, for several random halves, or, with --hold-out entries, to "
        "nine tenths of the entries and predict the others; compare how well they predict, and "
        "whether they find the same components each time. Takes the options of fit, and by "
        "default the same model: in space where there are coordinates, which takes longer; "
        "--no-space gives a first answer soon.",
        examples=(
            "pnmf-pyro select section.h5ad --range 2:12 --no-space --out select.html",
            "pnmf-pyro select table.csv --range 2,4,8,16 --thinnings 3 --jobs 2",
        ),
        fine="the chosen number is inside the range, or there is nothing beyond it to try",
        look="the chosen number is at the end of the range, beyond which there may be a better one",
    )
    parser.add_argument(
        "--range",
        type=_numbers,
        default=_numbers("2:12"),
        metavar="NUMBERS",
        help="numbers to try: FIRST:LAST or FIRST:LAST:STEP, both ends included, or A,B,C "
        "(default: 2:12)",
    )
    parser.add_argument(
        "--hold-out",
        choices=[*HOLD_OUT],
        default="thinning",
        help="what the fits do not see: a part of each count, or some of the entries (default: "
        "thinning)",
    )
    parser.add_argument(
        "--thinnings",
        type=int,
        default=5,
        help="random halves, or random sets of entries, at least 2 (default: 5)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="fits at the same time (default: 1)")
    parser.add_argument("--out", "-o", help="write a report, .html")
    shared.add_settings(parser)


def run(options: argparse.Namespace) -> shared.Exit:
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
    return shared.Exit.LOOK if selection.beyond else shared.Exit.FINE


def _numbers(text: str) -> Sequence[int]:
    """Read FIRST:LAST, FIRST:LAST:STEP, or numbers with commas between them."""
    steps = re.fullmatch(r"(\d+):(\d+)(?::([1-9]\d*))?", text)
    if steps:
        first, last, step = (int(number or 1) for number in steps.groups())
        found: Sequence[int] = range(first, last + 1, step)
    else:
        listed = re.fullmatch(r"\d+(,\d+)*", text)
        found = [int(number) for number in text.split(",")] if listed else []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range of numbers from 1 on, such as 2:12, 2:20:3 or 2,4,8"
        )
    return found
