"""Tables of counts from files, and results to files.

A file that is not there is a FileNotFoundError, and one that cannot be read a ValueError.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.io
import scipy.sparse as sp

from pnmf_pyro.data.checks import check_output_path
from pnmf_pyro.data.tables import counts_of
from pnmf_pyro.estimator.anndata_bridge import add_results, import_anndata, results, settings
from pnmf_pyro.estimator.archive import write_archive
from pnmf_pyro.estimator.pnmf import PNMF

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass
class CountTable:
    """Counts X from a file, samples by features, with what the file says of them.

    `annotation` is that of the samples and features in an .h5ad file, without the counts.
    """

    X: np.ndarray | sp.spmatrix | sp.sparray
    sample_names: list[str] | None = None
    feature_names: list[str] | None = None
    annotation: AnnData | None = None

    @property
    def T(self) -> CountTable:
        """The same table with samples and features exchanged."""
        annotation = None if self.annotation is None else self.annotation.T
        return CountTable(self.X.T, self.feature_names, self.sample_names, annotation)


def read_counts(path: str | Path, layer: str | None = None, transpose: bool = False) -> CountTable:
    """Read a table of counts from an .h5ad, .npz (scipy sparse), .mtx, .csv or .tsv file.

    The last three may be compressed (.gz). Tables of text may have a first row and a first column
    of names. `layer` is one of an .h5ad file; `transpose` says that the file holds features by
    samples.
    """
    path, kind = _check_file(path, "COUNTS", (".h5ad", *READERS))
    if layer is not None and kind != ".h5ad":
        raise ValueError(f"layer={layer!r} is for .h5ad files; {path.name} has no layers.")
    if kind == ".h5ad":
        adata = _open_h5ad(path)
        bare = import_anndata().AnnData(obs=adata.obs, var=adata.var, obsm=dict(adata.obsm))
        names = list(adata.obs_names), list(adata.var_names)
        table = CountTable(counts_of(adata, layer), *names, bare)
    else:
        try:
            table = READERS[kind](path)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a {kind} table: {error}") from error
    return table.T if transpose else table


def _open_h5ad(path: Path) -> AnnData:
    try:
        return import_anndata().read_h5ad(path)
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is not an .h5ad file, or it is damaged: {error}") from error


def _read_mtx(path: Path) -> CountTable:
    matrix = scipy.io.mmread(path)
    return CountTable(matrix.tocsr() if sp.issparse(matrix) else matrix)


def _text_reader(delimiter: str) -> Callable[[Path], CountTable]:
    def read(path: Path) -> CountTable:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
        if not rows:
            raise ValueError("it is empty")
        has_header = not all(_is_number(cell) for cell in rows[0])
        body = rows[has_header:]
        has_names = bool(body) and not all(_is_number(row[0]) for row in body)
        header = rows[0][len(rows[0]) - len(body[0]) + has_names :] if body and has_header else None
        names = [row[0] for row in body] if has_names else None
        X = np.array([row[has_names:] for row in body], dtype=np.float64)
        return CountTable(X, names, header)

    return read


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


READERS: dict[str, Callable[[Path], CountTable]] = {
    ".npz": lambda path: CountTable(sp.load_npz(path).tocsr()),
    ".mtx": _read_mtx,
    ".csv": _text_reader(","),
    ".tsv": _text_reader("\t"),
}


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
    path, kind = _check_file(path, "FIT", (".h5ad", ".npz"))
    return PNMF.load(path) if kind == ".npz" else _open_h5ad(path)


def read_model(path: str | Path) -> PNMF:
    """Read the .npz of :meth:`PNMF.save`."""
    path, _ = _check_file(path, "MODEL", (".npz",))
    return PNMF.load(path)


def _check_file(path: str | Path, argument: str, endings: Sequence[str]) -> tuple[Path, str]:
    """The path of a file that is there, and its ending, without .gz."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be a file; there is no {path}.")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in endings:
        raise ValueError(f"{argument} must end in {' or '.join(endings)}; got {path.name}.")
    return path, kind


def check_results_path(path: str | Path) -> None:
    """Raise a ValueError if results cannot be written there, before a fit takes its time."""
    if check_output_path("--out", path, (".h5ad", ".npz")).suffix == ".h5ad":
        import_anndata()
