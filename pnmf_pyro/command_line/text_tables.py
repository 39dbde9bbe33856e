"""Tables of text: .csv, .tsv and .txt of many programs, read by pandas in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from pnmf_pyro.command_line.count_table import CountTable, Matrix
from pnmf_pyro.command_line.text_form import (
    Look,
    TextForm,
    is_identifier,
    is_missing,
    like_names,
    look_at,
    open_text,
    some_cells,
)
from pnmf_pyro.estimator.results import import_optional

if TYPE_CHECKING:
    from types import ModuleType

    from pandas import DataFrame, Series

# Cells that are read at once, and rows at least.
PIECE, FEWEST_ROWS = 1 << 20, 100

# A table of more cells, fewer than a tenth of them above zero, is kept as a sparse matrix.
LARGE = 1 << 20


def import_pandas() -> ModuleType:
    """Import pandas, or say how to install it."""
    return import_optional("pandas", "Reading tables of text needs pandas", "tables")


def read_text(path: Path, form: TextForm, missing: bool = False) -> CountTable:
    """Read a table of text; cells without a number are NaN, if that is allowed by `missing`."""
    pandas = import_pandas()
    look = look_at(path, form)
    old = int(pandas.__version__.split(".")[0]) < 3  # whose own way of reading is less exact
    words: list[list[str]] = [[] for _ in range(max(look.n_names, 1))]
    pieces: list[np.ndarray] = []
    with open_text(path) as file:
        for _ in range(look.body_starts):
            file.readline()
        try:
            for frame in pandas.read_csv(
                file,
                sep=r"\s+" if look.separator == " " else look.separator,
                decimal=look.decimal,
                header=None,
                dtype=dict.fromkeys([*range(len(words)), *range(look.end, look.width)], str),
                keep_default_na=False,
                na_values=[],
                low_memory=False,
                **({"float_precision": "round_trip"} if old else {}),
                chunksize=max(FEWEST_ROWS, PIECE // look.width),
            ):
                for j, column in enumerate(words):
                    column.extend(frame[j].str.strip())
                pieces.append(_compact(_numbers(frame, look, words[0], missing)))
        except pandas.errors.ParserError as error:
            raise ValueError(_parser_words(str(error), look.body_starts)) from error
    return _table(_joined(pieces), look, words)


def _numbers(frame: DataFrame, look: Look, rows: Sequence[str], missing: bool) -> np.ndarray:
    """Numbers of a piece of the body; `rows` are the names of all rows up to its last."""
    frame = frame.iloc[:, look.n_names : look.end]
    found = np.empty(frame.shape)
    is_text = np.array([kind.kind not in "biuf" for kind in frame.dtypes])
    found[:, ~is_text] = frame.loc[:, ~is_text].to_numpy(np.float64)
    for j in np.flatnonzero(is_text):
        found[:, j] = _parsed(frame.iloc[:, j], look.decimal)
    wrong = ~np.isfinite(found)
    if missing:
        for j in np.flatnonzero(wrong.any(0)):
            wrong[wrong[:, j], j] = ~frame.iloc[wrong[:, j], j].map(is_missing).to_numpy(bool)
    if wrong.any():
        i, j = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        row = len(rows) - len(frame) + int(i)
        name = f" ({rows[row]!r})" if look.n_names else ""
        where = f"row {row + 1}{name}, {look.label(int(j) + look.n_names)}"
        raise ValueError(_wrong_cell(str(frame.iat[i, j]), where, float(wrong[:, j].mean())))
    return found


def _parsed(cells: Series, decimal: str) -> Series:
    """Cells as numbers, NaN where they are none."""
    if decimal != ".":
        cells = cells.str.replace(".", "x", regex=False).str.replace(decimal, ".", regex=False)
    return import_pandas().to_numeric(cells.str.strip(), errors="coerce")


def _wrong_cell(cell: str, where: str, share: float) -> str:
    """What to do about a cell that is no number; `share` of those of its column are none."""
    if is_missing(cell):
        return (
            f"{where} is missing{f' ({cell})' if cell.strip() else ''}. Give it a number, leave "
            "out its row or its column, or say by --mask what is observed"
        )
    if share > 0.5:
        return f"{where} holds {cell[:40]!r}, and most of this column is no number: leave it out"
    if re.fullmatch(r"[+-]?\d+[.,]\d+", cell.strip()):
        return f"{where} holds {cell!r}: if that is a number, name its sign with --decimal"
    return f"{where} holds {cell[:40]!r}, which is no number: correct it, or name it by --names"


def _parser_words(message: str, before: int) -> str:
    """Return what pandas says of a line, with the number of the line in the file."""
    if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", message):
        wanted, line, saw = map(int, found.groups())
        return f"line {line + before} has {saw} cells where {wanted} are expected"
    if found := re.search(r"EOF inside string starting at row (\d+)", message):
        line = int(found[1]) + before + 1
        return f"a quotation mark in or after line {line} is never closed"
    return message


def _compact(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest type that holds them, others as they are."""
    low, high = numbers.min(initial=0), numbers.max(initial=0)
    if low < 0 or high >= 2**32 or (numbers != np.floor(numbers)).any():
        return numbers
    return numbers.astype(np.min_scalar_type(int(high)))


def _joined(pieces: list[np.ndarray]) -> Matrix:
    """One matrix of float64, sparse where that is much smaller; the list is emptied."""
    if not pieces:
        raise ValueError("it has no rows below the heading")
    shape = (sum(map(len, pieces)), pieces[0].shape[1])
    n_stored = sum(map(np.count_nonzero, pieces))
    if shape[0] * shape[1] > LARGE and n_stored * 10 < shape[0] * shape[1]:
        return sp.vstack([sp.csr_matrix(piece, dtype=np.float64) for piece in pieces], "csr")
    X = np.empty(shape)
    end = shape[0]
    while pieces:
        piece = pieces.pop()
        X[end - len(piece) : end] = piece
        end -= len(piece)
    return X


def _table(X: Matrix, look: Look, words: list[list[str]]) -> CountTable:
    """The table, with names and with what was taken for them."""
    n_names = look.n_names
    if not look.names_known and _first_column_is_names(X, look, words[0]):
        X, n_names = X[:, 1:], 1
    if n_names > 1 and X.shape[1] == 1 and len({*words[0]}) < len(words[0]):
        raise ValueError(
            "it is a long table, with one row for each count: make one of samples by features of it"
        )
    heading, features = look.heading, None
    took, left = [], [*range(1, n_names), *range(look.end, look.width)]
    if heading:
        names = heading[n_names : look.end]
        features = [name or f"column {j}" for j, name in enumerate(names, n_names + 1)]
        took.append("the first row for names of columns")
    if n_names:
        took.append(f"{look.label(0)} ({some_cells(words[0])}) for names of rows")
    note = f"took {' and '.join(took) or 'no names'}"
    named = [look.label(j) for j in left if not heading or (j < len(heading) and heading[j])]
    if named:
        note += f"; left out {', '.join(named)}"
    return CountTable(
        X,
        words[0] if n_names else None,
        features,
        corner=heading[0] if heading and n_names else "",
        notes=[note],
    )


def _first_column_is_names(X: Matrix, look: Look, cells: Sequence[str]) -> bool:
    """Whether a first column of numbers holds names; a ValueError where that cannot be known."""
    heading = look.heading[0] if look.heading else None
    if X.shape[1] == 1:
        return False
    rest = X[:, 1:]
    rest = rest if isinstance(rest, np.ndarray) else rest.data
    found = like_names(cells, float(np.nanmax(rest, initial=0)))
    if found is None or (not found and heading is not None and is_identifier(heading)):
        row, column = ("both", "first-row") if look.heading else ("first-column", "none")
        raise ValueError(
            f"its {look.label(0)} ({some_cells(cells)}) may be names of rows or counts: give "
            f"--names {row} for names, --names {column} for counts"
        )
    return found
