"""pnmf-pyro markers: which features mark each component, and how sure that is."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from pnmf_pyro.analysis.differential import differential_features
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.files import read_model
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import markers_report, markers_table
from pnmf_pyro.data.atomic import replacing
from pnmf_pyro.data.checks import check_output_path


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "markers",
        run,
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


def run(options: argparse.Namespace) -> shared.Exit:
    """Compare, say what was found, and write it."""
    if not 0 < options.lfsr <= 1:
        raise ValueError(f"--lfsr must be a rate above 0, up to 1; got {options.lfsr:g}.")
    if options.top < 1:
        raise ValueError(f"--top must be at least 1; got {options.top}.")
    if options.out and Path(options.out).suffix == ".html":
        check_report_path("--out", options.out)
    elif options.out:
        check_output_path("--out", options.out, (".csv", ".html"))
    model = read_model(options.model)
    shared.say(options, str(markers_table(model, options.lfsr, options.top)))
    if options.out and Path(options.out).suffix == ".html":
        page = markers_report(model, options.lfsr, options.top)
        shared.write_page(options, page, options.out)
    elif options.out:
        _write_csv(options.out, differential_features(model))
        shared.say(options, f"wrote {options.out}")
    return shared.Exit.FINE


def _write_csv(path: str, table: object) -> None:
    """Write a table, which is a data frame or a structured array."""
    rows = table.to_records(index=False) if hasattr(table, "to_records") else np.asarray(table)
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows.dtype.names or ())
        writer.writerows(rows.tolist())
