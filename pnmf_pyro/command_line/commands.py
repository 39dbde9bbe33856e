"""All commands: pnmf-pyro fit, check, calibrate, markers, select, plot and demo."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from pnmf_pyro import __version__
from pnmf_pyro.command_line import calibrate, check, demo, fit, markers, plot, select
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.exits import COMMON_CODES, Exit
from pnmf_pyro.command_line.options import epilog, show_warning
from pnmf_pyro.command_line.outputs import check_clashes

COMMANDS = (fit, check, calibrate, markers, select, plot, demo)

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

# What the user can do something about: what is given, where it is to be written, what is installed.
THEIRS = (ValueError, FloatingPointError, OSError, ImportError)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name, those of the process if None; return the exit code."""
    options = parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["pnmf-pyro", *given])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # at once: a fit may take hours
            shared.find_table(options)
            check_clashes(options)
            return options.run(options)
    except THEIRS as error:
        sys.stderr.write(f"pnmf-pyro: {' '.join(str(error).split())}\n")
        return Exit.UNUSABLE
    except Exception:
        # Python itself would end with 1, which here is an answer.
        traceback.print_exc()
        return Exit.FAULT


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it has parsed can `run`."""
    found = argparse.ArgumentParser(
        prog="pnmf-pyro",
        description="Probabilistic non-negative matrix factorisation of counts.",
        epilog=epilog(EXAMPLES, CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = found.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return found
