"""What the commands share: options, the counts they name, exit codes and the form of --help."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np

from pnmf_pyro.command_line.files import CountTable, read_counts
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.results import SPATIAL_KEY

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Exit(IntEnum):
    """What the exit code of a command says."""

    FINE = 0
    LOOK = 1
    UNUSABLE = 2
    FAULT = 3


COMMON_CODES = {
    Exit.UNUSABLE: "the input, the options or the place of the output cannot be used; one line on "
    "standard error says why",
    Exit.FAULT: "a fault of the program, with a traceback",
}


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], Exit],
    *,
    help: str,
    description: str,
    examples: Sequence[str],
    fine: str = "all went well",
    look: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command whose --help shows examples and says what its exit codes mean.

    `run` is a function of the options that does the work and returns an exit code. `fine` and
    `look` explain the codes 0 and 1; the command never returns 1 unless `look` is given.
    """
    codes = {Exit.FINE: fine} | ({Exit.LOOK: look} if look else {})
    parser = commands.add_parser(
        name,
        help=help,
        description=_paragraph(description),
        epilog=epilog(examples, codes | COMMON_CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def epilog(examples: Sequence[str], codes: dict[Exit, str]) -> str:
    """Return the end of a --help: lines to type, and exit codes."""
    lines = [_paragraph(text, f"  {code.value}  ") for code, text in codes.items()]
    return "\n".join(["examples:", *(f"  {line}" for line in examples), "", "exit codes:", *lines])


def _paragraph(text: str, label: str = "") -> str:
    return textwrap.fill(text, 80, initial_indent=label, subsequent_indent=" " * len(label))


def add_counts(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`read_table` reads."""
    parser.add_argument(
        "counts",
        metavar="COUNTS",
        help=".h5ad, .npz (scipy sparse), .mtx, .csv, .tsv; the last three also with .gz",
    )
    parser.add_argument("--layer", help="layer of an .h5ad file to take in place of X")
    parser.add_argument("--transpose", action="store_true", help="COUNTS is features by samples")


def add_places(parser: argparse.ArgumentParser, use: str) -> None:
    """Add the options that :func:`places` reads; `use` says what coordinates are for."""
    parser.add_argument(
        "--spatial-key",
        default=SPATIAL_KEY,
        help=f"coordinates in obsm of an .h5ad file: {use} (default: %(default)s, where it is "
        "there)",
    )
    parser.add_argument("--no-space", action="store_true", help="leave coordinates alone")
    parser.add_argument("--batch-key", help="column of obs of an .h5ad file with sections")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`settings` reads, except for the number of components."""
    add_counts(parser)
    add_places(parser, "the factors are then smooth in space")
    parser.add_argument(
        "--size-factors",
        choices=("none", "total"),
        default="none",
        help="scale the rates of each sample by its total count (default: none)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="set any parameter of pnmf_pyro.PNMF, such as --set mode=expanded; may be repeated",
    )
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that computes."""
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar, nothing on standard output"
    )


def _assignment(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, where VALUE is JSON or else a word."""
    name, equals, value = text.partition("=")
    if not equals or name not in PNMF().get_params():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a parameter of PNMF")
    if value == "None":
        return name, None
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def read_table(options: argparse.Namespace) -> CountTable:
    """Read the counts that the options name."""
    return read_counts(options.counts, options.layer, options.transpose)


def places(
    options: argparse.Namespace, table: CountTable
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Coordinates and groups of an .h5ad file, where there are any."""
    spatial_key = None if options.no_space else options.spatial_key
    keys = AnnDataKeys(None, spatial_key, options.batch_key)
    if table.annotation is not None:
        return keys.places(table.annotation)
    if keys != AnnDataKeys(None, spatial_key and SPATIAL_KEY):
        raise ValueError("--spatial-key and --batch-key are for .h5ad files; leave them out.")
    return None, None


def settings(options: argparse.Namespace, table: CountTable) -> dict[str, Any]:
    """Size factors, seed, verbosity and parameters of PNMF, by the names that fits take."""
    return {
        "size_factors": "total" if options.size_factors == "total" else None,
        "random_state": options.seed,
        "verbose": not options.quiet,
        **dict(options.set),
    }


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Write a warning to standard error; the form of :func:`warnings.showwarning`."""
    sys.stderr.write(f"pnmf-pyro: warning: {message}\n")


def say(options: argparse.Namespace, text: str) -> None:
    """Write to standard output, unless it is to be quiet."""
    if not options.quiet:
        sys.stdout.write(f"{text}\n")
