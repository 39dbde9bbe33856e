"""One page of text, tables and pictures, written as PNG or HTML."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pnmf_pyro.data.checks import check_output_path
from pnmf_pyro.plotting.figures import new_figure, pyplot

FORMATS = (".png", ".html")
DPI = 110

# Characters in a line of text, and points of its letters in a picture.
LINE, POINTS = 100, 10

STYLE = """
body{font-family:sans-serif;line-height:1.5;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}
h2{font-size:1.15em;margin:1.6em 0 .6em}
section.table{max-width:100%;overflow-x:auto;display:inline-block;vertical-align:top;margin-right:2em}
p{white-space:pre-line;max-width:48em;margin:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
.number{text-align:right}
"""


class Block(ABC):
    """A part of a page under its own heading.

    Attributes
    ----------
    heading : str
    """

    heading: str

    @abstractmethod
    def html(self) -> str:
        """Return it as HTML, without the heading."""

    @abstractmethod
    def image(self) -> np.ndarray:
        """Return it as a picture with its heading, (height, width, 3), from 0 to 1."""


class Words(Block):
    """A block of lines; as a string it is these lines."""

    @property
    @abstractmethod
    def lines(self) -> list[str]:
        """Lines in letters of one width."""

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def image(self) -> np.ndarray:
        """Return it as a picture with its heading, (height, width, 3), from 0 to 1."""
        return _image_of_lines(self.heading, self.lines)


@dataclass(frozen=True)
class Text(Words):
    """Paragraphs.

    Parameters
    ----------
    heading, text : str
    """

    heading: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Lines in letters of one width."""
        return [part for line in self.text.splitlines() for part in textwrap.wrap(line, LINE)]

    def html(self) -> str:
        """Return it as HTML, without the heading."""
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Table(Words):
    """Columns of equal length by name, of numbers or strings.

    Parameters
    ----------
    heading : str
    columns : mapping of str to sequence
    """

    heading: str
    columns: Mapping[str, Any]

    @cached_property
    def _cells(self) -> list[list[str]]:
        """Rows of what is to be read, the first of them names of columns."""
        columns = [[name, *map(_shown, values)] for name, values in self.columns.items()]
        return [list(row) for row in zip(*columns, strict=True)]

    @cached_property
    def _is_number(self) -> list[bool]:
        return [
            not any(isinstance(value, str) for value in values) for values in self.columns.values()
        ]

    @property
    def lines(self) -> list[str]:
        """Lines in letters of one width."""
        widths = [max(map(len, column)) for column in zip(*self._cells, strict=True)]
        signs = [">" if number else "<" for number in self._is_number]
        form = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
        return [form.format(*row).rstrip() for row in self._cells]

    def html(self) -> str:
        """Return it as HTML, without the heading."""
        kinds = [" class='number'" if number else "" for number in self._is_number]
        tags = ["th"] + ["td"] * (len(self._cells) - 1)
        head, *body = [
            "".join(
                f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
                for cell, kind in zip(row, kinds, strict=True)
            )
            for tag, row in zip(tags, self._cells, strict=True)
        ]
        rows = "".join(f"<tr>{row}</tr>" for row in body)
        return f"<table><thead><tr>{head}</tr></thead>{rows}</table>"


@dataclass(frozen=True)
class Picture(Block):
    """A figure, drawn when it is needed.

    Parameters
    ----------
    heading : str
    draw : callable
        Returns matplotlib Axes, or an array of them, of a figure of their own.
    """

    heading: str
    draw: Callable[[], Any]

    @cached_property
    def _png(self) -> bytes:
        figure = np.atleast_1d(np.asarray(self.draw(), dtype=object))[0].figure
        try:
            return _png(figure)
        finally:
            pyplot().close(figure)

    def html(self) -> str:
        """Return it as HTML, without the heading."""
        data = base64.b64encode(self._png).decode()
        alt = html.escape(self.heading, quote=True)
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'

    def image(self) -> np.ndarray:
        """Return it as a picture with its heading, (height, width, 3), from 0 to 1."""
        return _stacked([_image_of_lines(self.heading, []), _pixels(self._png)])


@dataclass(frozen=True)
class Page:
    """Blocks under a title.

    Parameters
    ----------
    title : str
    blocks : sequence of Block
    """

    title: str
    blocks: Sequence[Block]

    def write(self, path: str | Path) -> None:
        """Write the page.

        Parameters
        ----------
        path : path
            Ending in .png, one long picture, or .html, one file with the pictures in it.

        Raises
        ------
        ValueError
            For another ending, and for a folder that is not there.
        """
        path = check_output_path("path", path, FORMATS)
        if path.suffix == ".html":
            path.write_text(self.html(), encoding="utf-8")
        else:
            pyplot().imsave(path, self.image())

    def html(self) -> str:
        """Return the page as one HTML file."""
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
        body = f"<h1>{title}</h1>\n{blocks}"
        return f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{body}</body></html>"

    def image(self) -> np.ndarray:
        """Return the page as one picture, (height, width, 3), from 0 to 1."""
        title = _image_of_lines(self.title, [], size=16)
        return _stacked([title, *(block.image() for block in self.blocks)])


def _shown(value: Any) -> str:
    """A cell to be read."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else ""
    return f"{value + 0.0:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _image_of_lines(heading: str, lines: Sequence[str], size: float = 12) -> np.ndarray:
    """A bold heading of `size` points, and lines below it; as large as these are."""
    figure = new_figure((1, 1))
    figure.set_layout_engine("none")
    figure.text(0, 1, heading, va="bottom", size=size, weight="bold")
    text = "\n".join(lines)
    figure.text(0, 0.93, text, va="top", size=POINTS, family="monospace", linespacing=1.25)
    return _pixels(_png(figure, bbox_inches="tight", pad_inches=0.12))


def _png(figure: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, **options)
    return buffer.getvalue()


def _pixels(png: bytes) -> np.ndarray:
    return pyplot().imread(io.BytesIO(png))[..., :3]


def _stacked(images: Sequence[np.ndarray]) -> np.ndarray:
    """One picture below the other, on white."""
    page = np.ones((sum(len(image) for image in images), max(i.shape[1] for i in images), 3))
    top = 0
    for image in images:
        page[top : top + len(image), : image.shape[1]] = image
        top += len(image)
    return page
