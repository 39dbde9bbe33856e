"""pnmf-pyro markers: which features mark each component, and how sure that is."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from pnmf_pyro.analysis.differential import differential_features
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.files import read_model
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import markers_report, markers_table
from pnmf_pyro.data.atomic import replacing
from pnmf_pyro.data.checks import check_output_path


def run(options: argparse.Namespace) -> Exit:
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
    return Exit.FINE


def _write_csv(path: str, table: object) -> None:
    """Write a table, which is a data frame or a structured array."""
    rows = table.to_records(index=False) if hasattr(table, "to_records") else np.asarray(table)
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows.dtype.names or ())
        writer.writerows(rows.tolist())
