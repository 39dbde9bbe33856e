"""Arguments that commands share, and the form of --help; nothing here is slow to import."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

from pnmf_pyro.command_line.exits import COMMON_CODES, Exit
from pnmf_pyro.command_line.text_form import NAMES, SEPARATORS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
    name: str,
    *,
    help: str,
    description: str,
    examples: Sequence[str],
    fine: str = "all went well",
    look: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command whose --help shows examples and says what its exit codes mean.

    `run` in the module of that name does the work, and is imported when it is to. `fine` and
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
    parser.set_defaults(module=name)
    return parser


def epilog(examples: Sequence[str], codes: dict[Exit, str]) -> str:
    """Return the end of a --help: lines to type, and exit codes."""
    lines = [_paragraph(text, f"  {code.value}  ") for code, text in codes.items()]
    return "\n".join(["examples:", *(f"  {line}" for line in examples), "", "exit codes:", *lines])


def _paragraph(text: str, label: str = "") -> str:
    return textwrap.fill(text, 80, initial_indent=label, subsequent_indent=" " * len(label))


def add_counts(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_table` reads."""
    parser.add_argument(
        "counts",
        metavar="COUNTS",
        help=".h5ad, .h5 (10x), .loom, .npz (scipy sparse), .npy, .mtx, .csv, .tsv or .txt, the "
        "last four also with .gz; a folder of 10x or .zarr, of AnnData or SpatialData",
    )
    add_table(parser)
    parser.add_argument("--layer", help="layer of an AnnData file to take in place of X")
    parser.add_argument("--transpose", action="store_true", help="COUNTS is features by samples")
    parser.add_argument(
        "--mask",
        metavar="FILE",
        help="a file of the kinds and the shape of COUNTS: 1 where an entry is observed, and 0 "
        "where it is hidden and plays no part, or is missing",
    )
    text = parser.add_argument_group("tables of text", "found by looking, where they are not given")
    text.add_argument(
        "--names", choices=[*NAMES], help="whether the first row and the first column hold names"
    )
    text.add_argument(
        "--no-names", dest="names", action="store_const", const="none", help="--names none"
    )
    text.add_argument(
        "--separator",
        type=_separator,
        metavar="SIGN",
        help=f"sign between cells: {', '.join(SEPARATORS)} or one character",
    )
    text.add_argument("--decimal", choices=(".", ","), help="sign before decimals")


def add_table(parser: argparse.ArgumentParser) -> None:
    """Add the option that `find_table` reads."""
    parser.add_argument("--table", help="table of a SpatialData store, where it has several")


def add_places(parser: argparse.ArgumentParser, use: str) -> None:
    """Add the options that `places` reads; `use` says what coordinates are for."""
    parser.add_argument(
        "--spatial-key",
        default="spatial",
        help=f"coordinates in obsm of an .h5ad file: {use} (default: %(default)s, where it is "
        "there)",
    )
    parser.add_argument(
        "--coords",
        type=lambda text: text.split(","),
        metavar="X,Y",
        help="columns with coordinates: of obs of an .h5ad file, or of a table, which are then no "
        "features",
    )
    parser.add_argument("--no-space", action="store_true", help="leave coordinates alone")
    parser.add_argument(
        "--batch-key",
        type=lambda text: text.split(",") if "," in text else text,
        metavar="COLUMN",
        help="column of obs of an .h5ad file with sections, or two: section,type",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that `settings` reads, except for the number of components."""
    add_counts(parser)
    add_places(parser, "the factors are then smooth in space")
    parser.add_argument(
        "--size-factors",
        choices=("none", "total"),
        default="none",
        help="scale the rates of each sample by its total count (default: none)",
    )
    parser.add_argument(
        "--non-spatial-components",
        type=int,
        default=0,
        metavar="N",
        help="how many of the components know no space, where the others do (default: 0)",
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


def add_maps(parser: argparse.ArgumentParser) -> None:
    """Add the options that `map_style` reads."""
    parser.add_argument("--unit", default="", help="unit of coordinates, for scale bars; um is µm")
    parser.add_argument(
        "--north-up",
        action="store_true",
        help="maps have the second coordinate up (default: down, as in images)",
    )


def add_effects(parser: argparse.ArgumentParser) -> None:
    """Add the options that `effects` reads."""
    parser.add_argument(
        "--batches",
        metavar="COLUMN",
        help="what scales each feature by a factor of its own, such as the run of a sample: a "
        "column of obs of an .h5ad file, or a .csv or .tsv file with a row for each sample, whose "
        "last column it is",
    )
    parser.add_argument(
        "--covariates",
        metavar="COLUMN,...",
        help="numbers or words whose effects on the rate of each feature are learned: columns of "
        "obs, or a file",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that computes."""
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar, nothing on standard output"
    )


def _assignment(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, where VALUE is JSON or else a word."""
    from pnmf_pyro.estimator.pnmf import PNMF  # takes seconds

    name, equals, value = text.partition("=")
    known = PNMF().get_params()
    if not equals or name not in known:
        close = get_close_matches(name, known, 1)
        hint = f"; is it {close[0]}?" if close and close[0] != name else ""
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=VALUE with a parameter of PNMF{hint}"
        )
    if value == "None":
        return name, None
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _separator(text: str) -> str:
    """Read a sign between cells, or the name of one."""
    sign = SEPARATORS.get(text, "\t" if text == r"\t" else text)
    if len(sign) != 1 or sign in '\r\n"':
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {', '.join(SEPARATORS)} or one character"
        )
    return sign
