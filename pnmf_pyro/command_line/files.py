"""Results and models in files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.command_line.tables import check_file, open_anndata, readable
from pnmf_pyro.data.checks import check_output_path
from pnmf_pyro.estimator.anndata_bridge import add_results, import_anndata, results, settings
from pnmf_pyro.estimator.archive import write_archive
from pnmf_pyro.estimator.pnmf import PNMF

if TYPE_CHECKING:
    from anndata import AnnData


def write_results(path: str | Path, model: PNMF, table: CountTable) -> None:
    """Write factors, their uncertainty, loadings, settings and history of a fit, as .h5ad or .npz.

    An .h5ad file keeps the annotation of samples and features, but not the counts.
    """
    check_results_path(path)
    if Path(path).suffix == ".npz":
        names = {"sample_names": table.sample_names, "feature_names": table.feature_names}
        named = {key: np.asarray(value, dtype=str) for key, value in names.items() if value}
        write_archive(path, {"settings": settings(model)}, results(model) | named)
        return
    adata = table.annotation
    if adata is None:
        adata = import_anndata().AnnData(shape=table.X.shape)
        adata.obs_names = table.sample_names or adata.obs_names
        adata.var_names = table.feature_names or adata.var_names
    add_results(adata, model)
    adata.write_h5ad(path)


def read_fit(path: str | Path) -> PNMF | AnnData:
    """Read an .h5ad file with results, or the .npz of :meth:`PNMF.save`."""
    path, kind = check_file(path, "FIT", (".h5ad", ".npz"))
    if kind == ".npz":
        return PNMF.load(path)
    with readable(path):
        return open_anndata(path)


def read_model(path: str | Path) -> PNMF:
    """Read the .npz of :meth:`PNMF.save`."""
    path, _ = check_file(path, "MODEL", (".npz",))
    return PNMF.load(path)


def check_results_path(path: str | Path) -> None:
    """Raise a ValueError if results cannot be written there, before a fit takes its time."""
    if check_output_path("--out", path, (".h5ad", ".npz")).suffix == ".h5ad":
        import_anndata()
