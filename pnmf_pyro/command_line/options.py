"""What the commands share: options, the counts they name, exit codes and the form of --help."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.command_line.exits import COMMON_CODES, Exit
from pnmf_pyro.command_line.pages import Page
from pnmf_pyro.command_line.tables import read_counts, region_places, table_path
from pnmf_pyro.command_line.text_form import NAMES, SEPARATORS, TextForm
from pnmf_pyro.data.checks import warn
from pnmf_pyro.data.stores import is_zarr
from pnmf_pyro.estimator.anndata_bridge import ANNOTATION, AnnDataKeys, unnamed_places
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.results import SPATIAL_KEY

if TYPE_CHECKING:
    from anndata import AnnData

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
        help=".h5ad, .h5 (10x), .npz (scipy sparse), .npy, .mtx, .csv, .tsv or .txt, the last four "
        "also with .gz; a folder of 10x or .zarr, of AnnData or SpatialData",
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
    """Add the option that :func:`find_table` reads."""
    parser.add_argument("--table", help="table of a SpatialData store, where it has several")


def find_table(options: argparse.Namespace) -> None:
    """Let options that name a SpatialData store name its table."""
    if not hasattr(options, "table"):
        return
    whole: str = options.counts if hasattr(options, "counts") else options.fit
    found = table_path(whole, options.table)
    for name in ("counts", "fit", "out") if found != whole else ():
        if (path := getattr(options, name, None)) and os.path.realpath(path) == os.path.realpath(
            whole
        ):
            setattr(options, name, found)


def add_places(parser: argparse.ArgumentParser, use: str) -> None:
    """Add the options that :func:`places` reads; `use` says what coordinates are for."""
    parser.add_argument(
        "--spatial-key",
        default=SPATIAL_KEY,
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
    """Add the options that :func:`map_style` reads."""
    parser.add_argument("--unit", default="", help="unit of coordinates, for scale bars; um is µm")
    parser.add_argument(
        "--north-up",
        action="store_true",
        help="maps have the second coordinate up (default: down, as in images)",
    )


def map_style(options: argparse.Namespace) -> dict[str, Any]:
    """How a report draws maps, by the names that it takes."""
    return {"unit": "µm" if options.unit == "um" else options.unit, "y_down": not options.north_up}


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


def _separator(text: str) -> str:
    """Read a sign between cells, or the name of one."""
    sign = SEPARATORS.get(text, "\t" if text == r"\t" else text)
    if len(sign) != 1 or sign in '\r\n"':
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {', '.join(SEPARATORS)} or one character"
        )
    return sign


def read_table(options: argparse.Namespace) -> CountTable:
    """Read the counts that the options name, and say what was taken for what."""
    form = TextForm(options.names, options.separator, options.decimal)
    coords = options.coords or ()
    table = read_counts(
        options.counts, options.layer, options.transpose, form, coords, options.mask
    )
    if not options.quiet:
        for note in table.notes:
            sys.stderr.write(f"pnmf-pyro: {note}\n")
    return table


def places(
    options: argparse.Namespace, table: CountTable
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Coordinates and groups of the samples, where there are any."""
    spatial_key = None if options.no_space else options.spatial_key
    keys = AnnDataKeys(None, spatial_key, options.batch_key)
    if options.coords and spatial_key not in (None, SPATIAL_KEY):
        raise ValueError("--coords and --spatial-key both name coordinates: leave one of them out.")
    if table.annotation is not None:
        if spatial_key == SPATIAL_KEY and SPATIAL_KEY not in table.annotation.obsm:
            if ANNOTATION in table.annotation.uns and is_zarr(options.counts):
                table.annotation.obsm[SPATIAL_KEY] = region_places(options.counts, table.annotation)
                return keys.places(table.annotation)
            _warn_unused_places(table.annotation)
            keys = AnnDataKeys(None, None, options.batch_key)
        return keys.places(table.annotation)
    if keys != AnnDataKeys(None, spatial_key and SPATIAL_KEY):
        raise ValueError("--spatial-key and --batch-key are for .h5ad files; leave them out.")
    return None if options.no_space else table.coordinates, None


def _warn_unused_places(adata: AnnData) -> None:
    """Warn of what looks like coordinates in a file whose coordinates nothing names."""
    key, pair = unnamed_places(adata)
    if key:
        where, option = f"obsm has {key!r}", f"--spatial-key {key}"
    elif pair:
        where, option = f"obs has {pair[0]!r} and {pair[1]!r}", f"--coords {','.join(pair)}"
    else:
        return
    warn(f"{where}, which no option names: give {option} to use them, or --no-space.")


def settings(options: argparse.Namespace, table: CountTable) -> dict[str, Any]:
    """Size factors, seed, mask, verbosity and parameters of PNMF, by the names that fits take."""
    return {
        "mask": table.mask,
        "size_factors": "total" if options.size_factors == "total" else None,
        "random_state": options.seed,
        "verbose": not options.quiet,
        "non_spatial_components": options.non_spatial_components,
        **dict(options.set),
    }


def heard(fit: Callable[[], PNMF]) -> tuple[PNMF, bool]:
    """Return a fitted model, and whether it settled; warnings are shown when it has ended."""
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            model = fit()
    finally:
        for one in said:
            show_warning(one.message)
    return model, not any(issubclass(one.category, ConvergenceWarning) for one in said)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Write a warning to standard error; the form of :func:`warnings.showwarning`."""
    sys.stderr.write(f"pnmf-pyro: warning: {message}\n")


def write_page(options: argparse.Namespace, page: Page, path: str) -> None:
    """Write a page, with the command at its foot, and say so."""
    page.write(path, options.command)
    say(options, f"wrote {path}")


def say(options: argparse.Namespace, text: str) -> None:
    """Write to standard output, unless it is to be quiet."""
    if not getattr(options, "quiet", False):
        sys.stdout.write(f"{text}\n")
