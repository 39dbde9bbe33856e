"""pnmf-pyro calibrate: how often the intervals of a fit hold the truth."""

from __future__ import annotations

import argparse

from pnmf_pyro.analysis.calibration import FEWEST, calibrate
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.files import read_model
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import calibration_report, calibration_words


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "calibrate",
        run,
        help="measure how often intervals of a fit hold the truth",
        description="Simulation-based calibration: draw log-factors and tables of counts from a "
        "fitted model, infer the log-factors again, and count how often their intervals hold what "
        "was drawn. It says whether the intervals are right where the model is; whether the model "
        "is right is for check. MODEL is what fit --save-model or PNMF.save wrote.",
        examples=(
            "pnmf-pyro fit section.h5ad --out factors.h5ad --save-model model.npz",
            "pnmf-pyro calibrate model.npz --out calibration.html",
            "pnmf-pyro calibrate model.npz --refit --simulations 20",
        ),
        fine="nothing is told from calibrated intervals, as far as so many tables show",
        look="intervals are too narrow or too wide, or ranks are not uniform",
    )
    parser.add_argument("model", metavar="MODEL", help=".npz by fit --save-model or PNMF.save")
    parser.add_argument("--out", "-o", help="write a report, .html")
    parser.add_argument(
        "--simulations",
        type=int,
        default=50,
        help=f"number of tables, at least {FEWEST} (default: 50)",
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="fit each table as a whole; its loadings are taken for known otherwise",
    )
    shared.add_common(parser)


def run(options: argparse.Namespace) -> shared.Exit:
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
    return shared.Exit.LOOK if found.flagged else shared.Exit.FINE
