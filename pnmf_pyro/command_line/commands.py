"""All commands: pnmf-pyro fit, check, calibrate, markers, select, plot and demo."""

from __future__ import annotations

import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.parsers import parser

# What the user can do something about: what is given, where it is to be written, what is installed.
THEIRS = (ValueError, FloatingPointError, OSError, ImportError, MemoryError)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name, those of the process if None; return the exit code."""
    options = parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["pnmf-pyro", *given])
    try:
        # What computes takes seconds to import; neither --help nor an error in the line needs it.
        from pnmf_pyro.command_line.options import find_table, show_warning
        from pnmf_pyro.command_line.outputs import check_clashes

        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # at once: a fit may take hours
            find_table(options)
            check_clashes(options)
            return import_module(f"pnmf_pyro.command_line.{options.module}").run(options)
    except THEIRS as error:
        sys.stderr.write(f"pnmf-pyro: {' '.join(str(error).split()) or type(error).__name__}\n")
        return Exit.UNUSABLE
    except Exception:
        # Python itself would end with 1, which here is an answer.
        traceback.print_exc()
        return Exit.FAULT
