"""A fit on one page: maps, features, settings and how the fit went, as PNG or HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pnmf_pyro import plotting
from pnmf_pyro.plotting.figures import pyplot
from pnmf_pyro.results import Results, results_of

FORMATS = (".png", ".html")

STYLE = "body{font-family:sans-serif;max-width:60em;margin:2em auto}img{max-width:100%}"


def write_report(fit: Any, path: str | Path, *, key: str = "pnmf", unit: str = "") -> None:
    """Write a report on a fit: maps where there are places, top features, loadings and ELBO.

    Parameters
    ----------
    fit : PNMF or AnnData
    path : path
        Ending in .png, one long picture, or .html, one file with pictures and settings.
    key : str
        `key_added` of the fit, for AnnData.
    unit : str
        Of the coordinates, for scale bars.

    Raises
    ------
    ValueError
        For another ending, a folder that is not there, or an AnnData object without such a fit.
    """
    check_report_path(path)
    found = results_of(fit, key)
    write = _write_png if Path(path).suffix == ".png" else _write_html
    write(found, Path(path), list(_pictures(found, unit)))


def check_report_path(path: str | Path) -> None:
    """Raise a ValueError if a report cannot be written there."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"--out must end in {' or '.join(FORMATS)}; got {path.name}.")
    if not path.parent.is_dir():
        raise ValueError(f"--out must be in an existing folder; there is no {path.parent}.")


def _pictures(found: Results, unit: str) -> Iterator[tuple[str, bytes]]:
    """Headings and pictures, as PNG."""
    if found.coordinates is not None and found.coordinates.shape[1] == 2:
        yield "Factors", _png(plotting.plot_factors(found, unit=unit))
        yield "Uncertainty of log-factors", _png(plotting.plot_uncertainty(found, unit=unit))
    yield "Features by specificity", _png(plotting.plot_top_features(found, by="specificity"))
    yield "Loadings", _png(plotting.plot_loadings(found))
    yield "Correlation of factors", _png(plotting.plot_factor_correlation(found))
    yield "ELBO", _png(plotting.plot_elbo(found))


def _png(drawn: Any) -> bytes:
    """Render the figure of some axes, and close it."""
    figure = np.atleast_1d(np.asarray(drawn, dtype=object))[0].figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot().close(figure)
    return buffer.getvalue()


def _write_png(found: Results, path: Path, pictures: list[tuple[str, bytes]]) -> None:
    """One picture below the other, on white."""
    plt = pyplot()
    images = [plt.imread(io.BytesIO(picture))[..., :3] for _, picture in pictures]
    page = np.ones((sum(len(image) for image in images), max(i.shape[1] for i in images), 3))
    top = 0
    for image in images:
        page[top : top + len(image), : image.shape[1]] = image
        top += len(image)
    plt.imsave(path, page)


def _write_html(found: Results, path: Path, pictures: list[tuple[str, bytes]]) -> None:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in found.summary().items()
    )
    figures = "".join(
        f"<h2>{heading}</h2><img alt='{heading}' "
        f"src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"
        for heading, picture in pictures
    )
    head = f"<meta charset='utf-8'><title>pnmf_pyro</title><style>{STYLE}</style>"
    body = f"<h1>Poisson factorisation</h1><table>{rows}</table>{figures}"
    page = f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{body}</body></html>"
    path.write_text(page, encoding="utf-8")
