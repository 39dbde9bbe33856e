"""Tables of counts from files of every kind.

A file that is not there is a FileNotFoundError, and one that cannot be read a ValueError.
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.command_line.matrix_files import (
    check_zarr,
    open_hdf5,
    read_10x_folder,
    read_10x_h5,
    read_loom,
    read_mtx,
    read_npy,
    read_npz,
)
from pnmf_pyro.command_line.text_form import TextForm
from pnmf_pyro.command_line.text_tables import read_text
from pnmf_pyro.data.stores import is_zarr
from pnmf_pyro.estimator.anndata_bridge import ANNOTATION, AnnDataKeys, import_anndata
from pnmf_pyro.estimator.results import import_optional
from pnmf_pyro.estimator.spatialdata_bridge import centroids

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

# What readers of damaged files raise; a fault of ours is mostly another kind.
DAMAGE = (
    *(ValueError, OSError, EOFError, KeyError, OverflowError, MemoryError, RuntimeError),
    *(SyntaxError, zlib.error, zipfile.BadZipFile, struct.error, tokenize.TokenError),
)

READERS: dict[str, Callable[[Path], CountTable]] = {
    ".npz": read_npz,
    ".npy": read_npy,
    ".mtx": read_mtx,
    ".h5": read_10x_h5,
    ".loom": read_loom,
    "a folder": read_10x_folder,
}
TEXT = (".csv", ".tsv", ".txt")
ANNDATA = (".h5ad", ".zarr")
KINDS = (*ANNDATA, *READERS, *TEXT)


def read_counts(
    path: str | Path,
    layer: str | None = None,
    transpose: bool = False,
    form: TextForm | None = None,
    coords: Sequence[str] = (),
    mask: str | Path | None = None,
) -> CountTable:
    """Read a table of counts.

    Parameters
    ----------
    path : str or Path
        An .h5ad, .h5 (10x), .loom, .npz (scipy sparse), .npy, .mtx, .csv, .tsv or .txt file, the
        last four also compressed (.gz); a .zarr folder of AnnData, or a folder of 10x.
    layer : str, optional
        Layer of an AnnData file to take in place of X.
    transpose : bool
        Whether the file holds features by samples.
    form : TextForm, optional
        Form of a table of text, as far as it is not to be found by looking.
    coords : sequence of str
        Columns with coordinates: of obs in an AnnData file, of the table otherwise.
    mask : str or Path, optional
        A file of the same kinds that holds 1 where an entry is observed and 0 where it is hidden,
        for all samples and features, turned as the counts are.

    Raises
    ------
    FileNotFoundError
        For a file that is not there.
    ValueError
        For a file that is damaged, foreign or ambiguous; its one line names the file.
    """
    table = _read(path, "COUNTS", layer, transpose, form, missing=mask is not None)
    if coords:
        table = table.with_coordinates(coords)
    if mask is not None:
        is_text = check_file(mask, "--mask", KINDS, folders=True)[1] in TEXT
        observed = _read(mask, "--mask", None, transpose, form if is_text else None)
        table = table.hiding(observed)
    with readable(Path(path)):
        table = table.checked()
    table.warn_turned()
    return table


def _read(
    path: str | Path,
    argument: str,
    layer: str | None,
    transpose: bool,
    form: TextForm | None,
    missing: bool = False,
) -> CountTable:
    """Read what a file holds, with NaN for missing cells of text if these are allowed."""
    path, kind = check_file(path, argument, KINDS, folders=True)
    if layer is not None and kind not in ANNDATA:
        raise ValueError(f"--layer {layer!r} is for AnnData files; {path.name} has no layers.")
    if form is not None and form != TextForm() and kind not in TEXT:
        raise ValueError(
            f"--names, --no-names, --separator and --decimal are for tables of text, and "
            f"{path.name} is none. Leave them out."
        )
    with readable(path):
        if kind in ANNDATA:
            table = _anndata_table(path, layer)
        elif kind in TEXT:
            table = read_text(path, form or TextForm(), missing)
        else:
            table = READERS[kind](path)
        if transpose and table.is_10x:
            raise ValueError("it says itself which way round it is: leave out --transpose")
        return (table.T if transpose else table).structured()


def _anndata_table(path: Path, layer: str | None) -> CountTable:
    adata = open_anndata(path)
    X = AnnDataKeys(layer).counts(adata)
    # The images of squidpy, which tell how many sections there are, and what SpatialData says.
    kept = {key: adata.uns[key] for key in ("spatial", ANNOTATION) if key in adata.uns}
    bare = import_anndata().AnnData(obs=adata.obs, var=adata.var, obsm=dict(adata.obsm), uns=kept)
    return CountTable(X, list(adata.obs_names), list(adata.var_names), bare)


def table_path(path: str, name: str | None) -> str:
    """Return where a table of a SpatialData store lies, the only one unless named.

    Other paths are returned as they are.
    """
    if not is_zarr(path) or (Path(path) / "obs").exists():
        if name is not None:
            raise ValueError(f"--table is for SpatialData stores; leave it out for {path}.")
        return path
    names = sorted(folder.parent.name for folder in Path(path).glob("tables/*/obs"))
    name = names[0] if name is None and len(names) == 1 else name
    if name not in names:
        got = "none was named" if name is None else f"got {name!r}"
        raise ValueError(f"--table must name a table of the store {path}, of {names}; {got}.")
    return str(Path(path) / "tables" / name)


def region_places(path: str, table: AnnData) -> np.ndarray:
    """Return centroids of the elements that the rows of a table of a SpatialData store are of."""
    what = f"obsm['spatial'] is not in {path}: --no-space fits without, and centroids"
    spatialdata = import_optional("spatialdata", f"{what} need spatialdata", "spatialdata")
    return centroids(spatialdata.read_zarr(Path(path).parents[1]), table)


def open_anndata(path: Path) -> AnnData:
    """Read an .h5ad file or a .zarr folder; raise a ValueError for whatever anndata raises."""
    anndata = import_anndata()
    if path.is_dir():
        import_optional("zarr", "Reading .zarr folders needs zarr", "zarr")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what anndata will change, and of names
            if path.is_dir():
                check_zarr(path)
                return anndata.read_zarr(path)
            with open_hdf5(path):
                pass
            return anndata.read_h5ad(path)
    except Exception as error:
        raise ValueError(
            f"{_reason(error)}; it is damaged, of another program, or of a newer anndata than "
            f"{version('anndata')}"
        ) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what readers raise of a file that cannot be used into a ValueError that names it."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """The first line of what an error says, or what it means."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8: save it as UTF-8"
    if isinstance(error, (EOFError, zlib.error, zipfile.BadZipFile)):
        return f"it is cut off or damaged ({error})"
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__} {line}" if isinstance(error, (KeyError, struct.error)) else line


def check_file(
    path: str | Path, argument: str, endings: Sequence[str], folders: bool = False
) -> tuple[Path, str]:
    """Return the path of a file that is there, and its ending, in small letters, without .gz.

    Where `folders` are allowed, a folder is of the kind ".zarr" or "a folder".
    """
    path = Path(path)
    if folders and path.is_dir():
        return path, ".zarr" if is_zarr(path) or path.suffix == ".zarr" else "a folder"
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be a file; there is no {path}.")
    suffix = path.suffix.lower()
    kind = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    if kind not in endings or (suffix == ".gz" and kind not in (*TEXT, ".mtx")):
        known = [ending for ending in endings if ending != "a folder"]
        raise ValueError(f"{argument} must end in {' or '.join(known)}; got {path.name}.")
    return path, kind
