"""The options --batches and --covariates: columns of obs, or a file with a row for each sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.command_line.tables import readable
from pnmf_pyro.command_line.text_form import is_missing, number_of, read_cells
from pnmf_pyro.data.checks import some_of


def effects(options: argparse.Namespace, table: CountTable) -> dict[str, Any]:
    """Return batches and covariates of the samples, by the names that `fit` takes."""
    batches = _columns("--batches", options.batches, table)
    covariates = _columns("--covariates", options.covariates, table)
    last = None if batches is None else batches[list(batches)[-1]]
    return {"batches": last, "covariates": covariates}


def _columns(option: str, given: str | None, table: CountTable) -> dict[str, Any] | None:
    """Return columns by name, of obs or of a file."""
    if given is None:
        return None
    obs = None if table.annotation is None else table.annotation.obs
    names = [given] if obs is not None and given in obs else given.split(",")
    if obs is not None and all(name in obs for name in names):
        return {name: obs[name] for name in names}
    if Path(given).suffix in (".csv", ".tsv", ".txt") and Path(given).is_file():
        return _read(option, Path(given), table)
    columns = "" if obs is None else f" The columns of obs are {some_of(list(obs))}."
    raise ValueError(
        f"{option} must name columns of obs of an .h5ad file, or a .csv or .tsv file with a header "
        f"and a row for each sample; got {given!r}.{columns}"
    )


def _read(option: str, path: Path, table: CountTable) -> dict[str, Any]:
    """Read a table of samples; where its first column has their names, in any order."""
    with readable(path):
        (head, *body), decimal = read_cells(path)
    n = table.X.shape[0]
    if len(body) != n or any(len(row) != len(head) for row in body):
        raise ValueError(
            f"{option}: {path} must have a header and one row for each of the {n} samples, all of "
            f"one length; it has {len(body)} rows below its header."
        )
    first = [row[0] for row in body]
    if table.sample_names is not None and set(first) == set(table.sample_names):
        by_name = dict(zip(first, body, strict=True))
        body, head = [by_name[name][1:] for name in table.sample_names], head[1:]
    if not head:
        raise ValueError(f"{option}: {path} must have a column beside the names of samples.")
    return {name: _values([row[j] for row in body], decimal) for j, name in enumerate(head)}


def _values(cells: list[str], decimal: str) -> np.ndarray:
    """Return cells as numbers where all of them are, and as words where not; None is missing."""
    numbers = [number_of(cell, decimal) for cell in cells]
    if None not in numbers:
        return np.array(numbers)
    return np.array([None if is_missing(cell) else cell for cell in cells], dtype=object)
