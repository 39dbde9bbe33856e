"""Fits and models from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pnmf_pyro.command_line.tables import check_file, open_anndata, readable
from pnmf_pyro.estimator.pnmf import PNMF

if TYPE_CHECKING:
    from anndata import AnnData


def read_fit(path: str | Path) -> PNMF | AnnData:
    """Read an .h5ad file or .zarr folder with results, or the .npz of :meth:`PNMF.save`."""
    path, kind = check_file(path, "FIT", (".h5ad", ".npz"), folders=True)
    if kind == ".npz":
        return PNMF.load(path)
    with readable(path):
        return open_anndata(path)


def read_model(path: str | Path) -> PNMF:
    """Read the .npz of :meth:`PNMF.save`."""
    path, _ = check_file(path, "MODEL", (".npz",))
    return PNMF.load(path)
