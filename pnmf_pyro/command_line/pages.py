"""One page of text, tables and pictures, written as one file of HTML."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pnmf_pyro import __version__
from pnmf_pyro.data.atomic import replacing
from pnmf_pyro.data.checks import check_output_path
from pnmf_pyro.plotting.figures import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Dots per inch of a picture.
DPI = 110

# Characters in a line of text on a terminal.
LINE = 100

STYLE = """
body{font-family:sans-serif;line-height:1.5;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}
h2{font-size:1.15em;margin:1.6em 0 .6em}
section{max-width:100%;overflow-x:auto}
.table,.picture{display:inline-block;vertical-align:top;margin-right:2em}
.picture>div{max-width:100%}
footer{margin:2em 0;color:#666;font-size:.85em;overflow-wrap:anywhere}
p{white-space:pre-line;max-width:48em;margin:0 0 .4em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
.number{text-align:right}
"""


@dataclass(frozen=True)
class Text:
    """Paragraphs, with a line break between them; as a string, lines for a terminal."""

    heading: str
    text: str

    def __str__(self) -> str:
        wrapped = (
            textwrap.wrap(line, LINE, break_on_hyphens=False) for line in self.text.splitlines()
        )
        return "\n".join(part for parts in wrapped for part in parts)

    def html(self) -> str:
        """Return it as HTML, without the heading."""
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Table:
    """Columns of equal length by name, of numbers or strings; as a string, lines of one width."""

    heading: str
    columns: Mapping[str, Sequence | np.ndarray]

    @cached_property
    def _cells(self) -> list[list[str]]:
        """Rows of what is to be read, the first of them names of columns."""
        columns = [[name, *map(_shown, values)] for name, values in self.columns.items()]
        return [list(row) for row in zip(*columns, strict=True)]

    @cached_property
    def _is_number(self) -> list[bool]:
        return [
            all(not isinstance(cell, str) for cell in column) for column in self.columns.values()
        ]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._cells, strict=True)]
        signs = [">" if number else "<" for number in self._is_number]
        form = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
        return "\n".join(form.format(*row).rstrip() for row in self._cells)

    def html(self) -> str:
        """Return it as HTML, without the heading."""
        kinds = [" class='number'" if number else "" for number in self._is_number]

        def row(tag: str, cells: Sequence[str]) -> str:
            pairs = zip(cells, kinds, strict=True)
            inside = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in pairs)
            return f"<tr>{''.join(inside)}</tr>"

        head, *body = self._cells
        rows = "".join(row("td", cells) for cells in body)
        return f"<table><thead>{row('th', head)}</thead>{rows}</table>"


@dataclass(frozen=True)
class Picture:
    """A figure, drawn when it is needed, and what it shows.

    `draw` returns matplotlib Axes, or an array of them, of a figure of their own.
    """

    heading: str
    draw: Callable[[], Axes | np.ndarray]
    caption: str = ""

    def html(self) -> str:
        """Return it as HTML, without the heading."""
        figure = np.ravel(np.asarray(self.draw(), dtype=object))[0].figure
        file = io.BytesIO()
        try:
            figure.savefig(file, format="png", dpi=DPI)
        finally:
            pyplot().close(figure)
        width = round(DPI * figure.get_figwidth())  # which the caption does not exceed
        data = base64.b64encode(file.getvalue()).decode()
        alt = html.escape(self.heading, quote=True)
        words = f"<p>{html.escape(self.caption)}</p>" if self.caption else ""
        image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
        return f"<div style='width:{width}px'>{words}{image}</div>"


Block = Text | Table | Picture


@dataclass(frozen=True)
class Page:
    """Blocks under a title, in this order."""

    title: str
    blocks: Sequence[Block]

    def write(self, path: str | Path, command: str = "") -> None:
        """Write the page to a file that ends in .html and holds the pictures."""
        text = self.html(command)
        with replacing(check_report_path("path", path)) as part:
            part.write_text(text, encoding="utf-8")

    def html(self, command: str = "") -> str:
        """Return the page as one HTML file; its foot has date, version and command."""
        title = html.escape(self.title)
        head = (
            "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            f"<title>{title}</title><style>{STYLE}</style>"
        )
        blocks = "\n".join(
            f"<section class='{type(block).__name__.lower()}'>"
            f"<h2>{html.escape(block.heading)}</h2>{block.html()}</section>"
            for block in self.blocks
        )
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        by = f"pnmf_pyro {__version__}{command and ': '}{command}"
        body = f"<h1>{title}</h1>\n{blocks}\n<footer>Written {now} by {html.escape(by)}</footer>"
        return f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def _shown(value: object) -> str:
    """A cell to be read."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else ""
    return f"{value + 0.0:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def check_report_path(name: str, path: str | Path) -> Path:
    """Return a path to write a page to; raise a ValueError for another than .html."""
    if Path(path).suffix != ".html":
        raise ValueError(
            f"{name} must end in .html, a page for a browser; got {Path(path).name}. "
            "pnmf_pyro.plotting draws single plots, for files of any kind."
        )
    pyplot()  # before anything is computed for the page
    return check_output_path(name, path, (".html",))
