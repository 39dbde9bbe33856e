"""The arguments of each command; nothing here is slow to import."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from pnmf_pyro import __version__
from pnmf_pyro.command_line.arguments import (
    Commands,
    add_command,
    add_common,
    add_counts,
    add_effects,
    add_maps,
    add_places,
    add_settings,
    add_table,
    epilog,
)
from pnmf_pyro.command_line.exits import COMMON_CODES, Exit

EXAMPLES = (
    "pnmf-pyro select counts.h5ad --range 2:12 --out select.html",
    "pnmf-pyro fit counts.h5ad --components 8 --out factors.h5ad --save-model model.npz",
    "pnmf-pyro plot factors.h5ad --out report.html",
    "pnmf-pyro check model.npz counts.h5ad --out check.html",
    "pnmf-pyro calibrate model.npz --out calibration.html",
    "pnmf-pyro markers model.npz --out markers.csv",
    "pnmf-pyro fit --help",
)
CODES = {
    Exit.FINE: "all went well",
    Exit.LOOK: "done, but look at the result: the fit had not settled, the check or the "
    "calibration flagged something, or the chosen number is at the end of its range",
    **COMMON_CODES,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it has parsed names a `module` to run."""
    found = argparse.ArgumentParser(
        prog="pnmf-pyro",
        description="Probabilistic non-negative matrix factorisation of counts.",
        epilog=epilog(EXAMPLES, CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = found.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (_fit, _check, _calibrate, _markers, _select, _plot, _demo):
        add(commands)
    return found


def _fit(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fit",
        help="factorise a table of counts",
        description="Factorise a table of counts, samples by features, and write the factors, "
        "their uncertainty, the loadings, the settings and the ELBO history. Where an .h5ad file "
        "has coordinates the factors are smooth in space.",
        examples=(
            "pnmf-pyro fit section.h5ad --components 8 --out factors.h5ad",
            "pnmf-pyro fit sections.h5ad --batch-key section --size-factors total "
            "--out factors.h5ad",
            "pnmf-pyro fit table.csv --out factors.npz --save-model model.npz --report fit.html",
            "pnmf-pyro fit section.h5ad --checkpoint run.ckpt --out factors.h5ad",
            "pnmf-pyro fit section.h5ad --plan",
        ),
        fine="the fit has settled, and results are written",
        look="results are written, but the fit had not settled or is no use, or not all that was "
        "asked for is written: a warning says what",
    )
    parser.add_argument("--components", type=int, default=10, help="how many (default: 10)")
    parser.add_argument(
        "--out",
        "-o",
        help="where to write results: .h5ad, .npz, .csv, or FOLDER/ for CSV files; an .h5ad file "
        "of COUNTS gets them as well",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="fit and write nothing: say what the fit would do, how long it would take and in "
        "which memory",
    )
    parser.add_argument(
        "--save-model",
        metavar="MODEL",
        help="write the fitted model as well, .npz, for check, plot and PNMF.load",
    )
    parser.add_argument("--report", help="write the report that plot draws as well, .html")
    add_maps(parser)
    _add_checkpoint(parser)
    add_effects(parser)
    add_settings(parser)


def _check(commands: Commands) -> None:
    parser = add_command(
        commands,
        "check",
        help="compare the data with tables that a fit makes",
        description="Posterior predictive check: draw tables of counts from a fitted model and "
        "compare their totals, variances, zeros, maxima, correlations and, where there are "
        "coordinates, Moran's I with those of the data. MODEL is what fit --save-model or "
        "PNMF.save wrote; the factors in an .h5ad file are not enough, since they do not say how "
        "samples vary together. COUNTS are those of the fit.",
        examples=(
            "pnmf-pyro fit section.h5ad --out factors.h5ad --save-model model.npz",
            "pnmf-pyro check model.npz section.h5ad --out check.html",
        ),
        fine="no misfit is flagged, which is no proof of the model",
        look="a misfit is flagged: at least one statistic has p < 0.01",
    )
    parser.add_argument("model", metavar="MODEL", help=".npz by fit --save-model or PNMF.save")
    add_counts(parser)
    parser.add_argument("--out", "-o", help="write a report, .html")
    parser.add_argument("--draws", type=int, default=200, help="number of tables (default: 200)")
    add_places(parser, "where samples are, for Moran's I; a spatial model knows its own")
    add_common(parser)


def _calibrate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "calibrate",
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
        help="number of tables, at least 20 (default: 50)",
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="fit each table as a whole; its loadings are taken for known otherwise",
    )
    add_common(parser)


def _markers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "markers",
        help="say which features mark each component",
        description="Compare the share of each feature in a component with that in the other "
        "component where it comes closest, and list those that are surely more frequent: the "
        "log-ratio, shrunk by what log-ratios are like over all features, and its local false "
        "sign rate (lfsr), the probability that the sign is wrong. MODEL is what fit --save-model "
        "or PNMF.save wrote.",
        examples=(
            "pnmf-pyro fit section.h5ad --out factors.h5ad --save-model model.npz",
            "pnmf-pyro markers model.npz",
            "pnmf-pyro markers model.npz --out markers.csv",
            "pnmf-pyro markers model.npz --out markers.html --lfsr 0.01",
        ),
    )
    parser.add_argument("model", metavar="MODEL", help=".npz by fit --save-model or PNMF.save")
    parser.add_argument(
        "--out",
        "-o",
        help="write all comparisons, .csv, or a page with volcano plots, .html",
    )
    parser.add_argument(
        "--lfsr",
        type=float,
        default=0.05,
        help="local false sign rate below which a feature is listed (default: 0.05)",
    )
    parser.add_argument(
        "--top", type=int, default=10, help="features listed for each component (default: 10)"
    )


def _select(commands: Commands) -> None:
    parser = add_command(
        commands,
        "select",
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
        choices=["thinning", "entries"],
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
    add_settings(parser)


def _plot(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plot",
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


def _demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        help="fit scikit-learn's digits and compare with other models",
        description="Fit the 1,797 x 64 pixel counts of scikit-learn's digits, print the ELBO and "
        "the deviance of held-out counts beside that of other models, and draw the components.",
        examples=("pnmf-pyro demo --out demo",),
    )
    parser.add_argument("--components", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--out", default=".", help="folder for the picture (default: here)")
    add_common(parser)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add what keeps a fit that is stopped."""
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="keep the fit in FILE; if it is stopped, even killed, the same command goes on from "
        "there, to the same results",
    )
    parser.add_argument(
        "--every",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="from one writing of FILE to the next (default: %(default)g)",
    )


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
