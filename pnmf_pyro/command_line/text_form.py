"""The form of a table of text, found in its first lines.

What they do not tell for sure is refused, with the option that decides.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

import numpy as np

# Characters of a file that are looked at, and of the longest line.
LOOKED_AT, LONGEST_LINE = 1 << 18, 1 << 27

SEPARATORS = {"tab": "\t", "semicolon": ";", "comma": ",", "space": " "}

# Whether the first row and the first column hold names, by what --names says.
NAMES = {
    "both": (True, True),
    "first-row": (True, False),
    "first-column": (False, True),
    "none": (False, False),
}

MISSING = {"", "na", "nan", "n/a", "null", "none", "-", ".", "?", "#n/a"}

# Headings that the writing program gives to names of rows.
NO_HEADING = re.compile(r"(unnamed: \d+(\.\d+)?|index|row[._]?names)?", re.IGNORECASE)

# Headings of identifiers, which may be numbers.
IDENTIFIERS = {
    *("id", "ids", "cell", "cells", "cellid", "barcode", "sample", "samples", "name", "names"),
    *("site", "sites", "plot", "plots", "quadrat", "station", "transect", "subject", "patient"),
    *("year", "date", "day", "month", "time", "row", "nr", "no", "number", "replicate", "block"),
    *("batch", "group", "gene", "geneid", "feature", "otu", "otu id"),
}

IsNumber = Callable[[str], object]


@dataclass(frozen=True)
class TextForm:
    """What the user says of a table of text; None is for what is to be found.

    `names` is a key of NAMES.
    """

    names: str | None = None
    separator: str | None = None
    decimal: str | None = None


@dataclass
class Look:
    """What the first lines of a table say of its form.

    Attributes
    ----------
    separator, decimal : str
        Signs between cells, and before decimals.
    heading : list of str, or None
        Headings of the columns, "" where there is none; None where there is no row of them.
    body_starts : int
        Number of lines before the body.
    width, end : int
        Number of columns of the body; number of columns up to the last one of counts.
    n_names : int
        Number of columns at the left that hold names.
    names_known : bool
        False where the first column is made of numbers, which may be names all the same.
    """

    separator: str
    decimal: str
    heading: list[str] | None
    body_starts: int
    width: int
    end: int
    n_names: int
    names_known: bool

    def label(self, j: int) -> str:
        """Return how to call a column in a message."""
        name = self.heading[j] if self.heading else ""
        return f"column {name!r}" if name else f"column {j + 1}"


def open_text(path: Path) -> TextIO:
    """Open a file of text, perhaps compressed; a byte order mark is left out."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return cast(TextIO, opener(path, "rt", newline="", encoding="utf-8-sig"))


def look_at(path: Path, form: TextForm) -> Look:
    """Look at the first lines of a table; raise a ValueError where its form cannot be known."""
    first, body, before, lines_of_first, separator = _rows(path, form.separator)
    wants_heading, wants_names = NAMES.get(form.names or "", (None, None))
    if lines_of_first == 0:  # a heading that was a comment
        wants_heading = True
    decimal = form.decimal or _decimal(body)
    is_number = _number(decimal)
    if not body and (wants_heading or not all(map(is_number, first))):
        raise ValueError("it has no rows below the heading")
    if not body:
        body, wants_heading = [first], False
    width = len(body[0])
    end = _end(first, body)
    if not end - 1 <= len(first) <= width:
        raise ValueError(
            f"line {before + 1} has {len(first)} cells and the next one {width}. If it is a title, "
            "delete it or put # before it; if the separator is wrong, name it with --separator"
        )
    shorter = len(first) == end - 1  # as R writes headings where rows have names
    columns = [*zip(*(row for row in body if len(row) == width), strict=True)][:end]
    n_names, end = _columns_of_words(columns, is_number)
    if wants_heading is not False and not shorter:
        while n_names < end - 1 and NO_HEADING.fullmatch(first[n_names].strip()):
            n_names += 1
    if wants_names is not None or shorter:
        n_names = 0 if wants_names is False else max(n_names, 1)
    if end <= n_names:
        raise ValueError(
            "it has no column of numbers. If the separator is wrong, name it with --separator"
        )
    if wants_heading is None:
        rest = [cell for row in body for cell in row[n_names:end]]
        wants_heading = _is_heading(first, n_names, end, rest, is_number)
    return Look(
        separator,
        decimal,
        [*[""] * shorter, *(cell.strip() for cell in first)] if wants_heading else None,
        before + (lines_of_first if wants_heading else 0),
        width,
        end,
        n_names,
        names_known=wants_names is not None or n_names > 0,
    )


def read_cells(path: Path) -> tuple[list[list[str]], str]:
    """Return the rows of a small table that may hold words, and the sign before its decimals.

    Separator and decimals are found as those of counts are, and comments are left out.
    """
    _, body, before, _, separator = _rows(path, None)
    with open_text(path) as file:
        lines = file.readlines()[before:]
    rows = [row for row in _reader(lines, separator) if any(map(str.strip, row))]
    return [[cell.strip() for cell in row] for row in rows], _decimal(body)


def number_of(cell: str, decimal: str) -> float | None:
    """Return the number that a cell holds; None where it holds none."""
    return float(cell.replace(decimal, ".")) if _number(decimal)(cell) else None


def _columns_of_words(columns: Sequence[Sequence[str]], is_number: IsNumber) -> tuple[int, int]:
    """Number of columns of names at the left, and of columns without those of words at the right.

    Names at the left may begin with numbers, and may be missing, but for the first.
    """
    words = [_holds_words(column, is_number) for column in columns]
    n_names, end = 0, len(columns)
    if len(words) > 2 and words[1]:
        n_names = 1
    while n_names < end and (
        words[n_names] or (n_names and not any(map(is_number, columns[n_names])))
    ):
        n_names += 1
    while end > n_names and words[end - 1]:
        end -= 1
    return n_names, end


def _rows(path: Path, separator: str | None) -> tuple[list[str], list[list[str]], int, int, str]:
    """First row, the next ones, lines before it and its number of lines, and the separator."""
    numbered = [(i, line) for i, line in enumerate(_first_lines(path)) if line.strip()]
    n_comments = next((k for k, (_, line) in enumerate(numbered) if line[0] != "#"), 0)
    lines = [line for _, line in numbered[n_comments:]]
    if not lines:
        raise ValueError("it is empty")
    try:
        separator = separator or _separator(lines)
        reader = _reader(lines, separator)
        first, body = next(reader), list(reader)
        lines_of_first = 1 + sum(cell.count("\n") for cell in first)
        if n_comments:  # biom writes the heading as a comment
            above = next(_reader([numbered[n_comments - 1][1].lstrip("#").lstrip(" ")], separator))
            fits = len(above) > 1 and len(above) in (len(first), len(first) - 1)
            if fits and any(map(_number("."), first)):
                first, body, lines_of_first = above, [first, *body], 0
    except csv.Error as error:
        raise ValueError(f"{error}. Is there a quotation mark that is never closed?") from error
    return first, body, numbered[n_comments][0], lines_of_first, separator


def _first_lines(path: Path) -> list[str]:
    """First lines of a file, at least three where there are so many."""
    lines: list[str] = []
    n_read = 0
    with open_text(path) as file:
        while n_read < LOOKED_AT or len(lines) < 3:
            line = file.readline(LONGEST_LINE)
            if not line:
                break
            if len(line) == LONGEST_LINE or "\0" in line:
                raise ValueError("it is no text, or one line without end")
            lines.append(line)
            n_read += len(line)
    return lines


def _reader(lines: Sequence[str], separator: str) -> Iterator[list[str]]:
    if separator == " ":
        lines = [line.strip() + "\n" for line in lines]
    return csv.reader(lines, delimiter=separator, skipinitialspace=separator == " ")


def _separator(lines: Sequence[str]) -> str:
    """The first separator that cuts all lines into equally many cells; R's heading has one less."""
    shorter, most, found = "", 1, ","
    for separator in SEPARATORS.values():
        if not any(separator in line for line in lines[:2]):
            continue
        heading, *body = (len(row) for row in _reader(lines[:200], separator))
        width = body[0] if body else heading
        if width > 1 and {*body} <= {width}:
            if heading == width:
                return separator
            shorter = shorter or (separator if heading == width - 1 else "")
        if width > most:
            most, found = width, separator
    return shorter or found


def _decimal(body: Sequence[Sequence[str]]) -> str:
    """The sign before decimals; a ValueError where 1,234 may be a thousand or one and a bit."""
    cells = [cell for row in body[:200] for cell in row if re.fullmatch(r"[+-]?\d+[.,]\d+", cell)]
    commas = [cell for cell in cells if "," in cell]
    if not commas or len(commas) < len(cells):
        return "."
    if all(re.fullmatch(r"[1-9]\d{0,2},\d{3}", cell) for cell in commas):
        raise ValueError(
            f"{commas[0]!r} may be thousands or decimals: give --decimal , for decimals, or take "
            "the commas out of the file"
        )
    return ","


def _number(decimal: str) -> IsNumber:
    sign = re.escape(decimal)
    form = rf"\s*[+-]?(\d+({sign}\d*)?|{sign}\d+|inf)(e[+-]?\d+)?\s*"
    return re.compile(form, re.IGNORECASE).fullmatch


def _end(first: Sequence[str], body: Sequence[Sequence[str]]) -> int:
    """Number of columns without those at the right that are empty, as after a last comma."""
    end = len(body[0])
    while end > 1 and not any("".join(row[end - 1 : end]).strip() for row in (first, *body)):
        end -= 1
    return end


def _holds_words(column: Sequence[str], is_number: IsNumber) -> bool:
    """Whether most cells of a column are neither numbers nor missing."""
    return sum(not is_number(cell) and not is_missing(cell) for cell in column) * 2 > len(column)


def is_missing(cell: str) -> bool:
    """Whether a cell says that a number is missing."""
    return cell.strip().lower() in MISSING


def _is_heading(
    first: Sequence[str], n_names: int, end: int, rest: Sequence[str], is_number: IsNumber
) -> bool:
    """Whether the first row holds names; a ValueError where that cannot be known."""
    shorter = len(first) == end - 1
    cells, corner = first[n_names - shorter : end], first[0].strip()
    if any(not is_number(cell) and not is_missing(cell) for cell in cells):
        return True
    if n_names and not shorter and (NO_HEADING.fullmatch(corner) or is_identifier(corner)):
        return True
    highest = max((float(cell) for cell in rest if cell.strip().isdecimal()), default=0.0)
    found = like_names(cells, highest)
    if found is None or (shorter and not found):
        raise ValueError(
            f"its first row ({some_cells(cells)}) may be names or counts: give --names first-row "
            "or --names both for names, --no-names or --names first-column for counts"
        )
    return found


def is_identifier(heading: str) -> bool:
    """Whether a column is called like those of identifiers."""
    return heading.lower() in IDENTIFIERS or heading.lower().endswith("_id")


def like_names(cells: Sequence[str], highest: float) -> bool | None:
    """Whether numbers are names: if they count from 0 or 1. Return None where they may be.

    That is where five or more ascend, or where all are above `highest`, that of the others.
    """
    if len(cells) < 3 or not all(cell.strip().isdecimal() for cell in cells):
        return False
    numbers = np.array([float(cell) for cell in cells])
    steps = np.diff(numbers)
    if numbers[0] in (0, 1) and (steps == 1).all():
        return True
    above = len(np.unique(numbers)) == len(numbers) and numbers.min() > highest
    return None if above or (len(steps) >= 4 and (steps > 0).all()) else False


def some_cells(cells: Sequence[str]) -> str:
    """Return the first cells, for a message."""
    return ", ".join(cells[:3]) + (", ..." if len(cells) > 3 else "")
