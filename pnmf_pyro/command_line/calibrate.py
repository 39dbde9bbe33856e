"""pnmf-pyro calibrate: how often the intervals of a fit hold the truth."""

from __future__ import annotations

import argparse

from pnmf_pyro.analysis.calibration import FEWEST, calibrate
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.files import read_model
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import calibration_report, calibration_words


def run(options: argparse.Namespace) -> Exit:
    """Calibrate, say what was found, and write it."""
    if options.simulations < FEWEST:
        raise ValueError(
            f"--simulations must be at least {FEWEST}, since fewer tables show nothing; got "
            f"{options.simulations}."
        )
    if options.out:
        check_report_path("--out", options.out)
    found = calibrate(
        read_model(options.model),
        options.simulations,
        refit=options.refit,
        random_state=options.seed,
        verbose=not options.quiet,
    )
    shared.say(options, "\n\n".join(map(str, calibration_words(found))))
    if options.out:
        shared.write_page(options, calibration_report(found), options.out)
    return Exit.LOOK if found.flagged else Exit.FINE
