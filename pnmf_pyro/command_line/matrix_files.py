"""Tables of counts from .npz, .npy and .mtx files, and from what 10x Genomics' programs write.

What a file claims to hold is compared with what it holds before memory is taken for it.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import scipy.sparse as sp

from pnmf_pyro.command_line.count_table import CountTable, Matrix, check_claim
from pnmf_pyro.command_line.text_form import LONGEST_LINE, open_text
from pnmf_pyro.command_line.text_tables import import_pandas
from pnmf_pyro.estimator.results import import_optional

if TYPE_CHECKING:
    from h5py import File, Group

# Bytes that one byte of a compressed file can stand for, at most (deflate).
EXPANSION = 1032

# The same for a .zarr folder, whose programs for compression take more of what repeats.
ZARR_EXPANSION = 1 << 16

# Bytes that an array may claim whatever its file holds: equal numbers take hardly any.
SMALL = 1 << 28

# How a heap of an HDF5 file begins.
HEAP = b"GCOL\x01\0\0\0"

# Entries of a .mtx file that are read at once.
PIECE = 1 << 22

NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

GENES = "Gene Expression"


def read_npz(path: Path) -> CountTable:
    """Read a sparse matrix that scipy has saved, as CSR, CSC or COO."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "format" not in names:
            raise ValueError(
                f"it holds {', '.join(names[:5])} and no sparse matrix. Write one with "
                "scipy.sparse.save_npz"
            )
        form = str(_array(archive, "format", 100).astype(str)[()])
        parts = {"csr": ("indices", "indptr"), "csc": ("indices", "indptr"), "coo": ("row", "col")}
        if form not in parts:
            raise ValueError(f"it is a sparse matrix of format {form[:20]!r}: save its tocsr()")
        rows, columns = map(int, _whole(np.ravel(_array(archive, "shape", 2)), "shape"))
        n_stored = _shape(archive, "data")
        check_claim((rows, columns), n_stored)
        longest = max(rows, columns, n_stored) + 1
        first, second = (_whole(_array(archive, name, longest), name) for name in parts[form])
        data = _array(archive, "data", n_stored)
    if form == "coo":
        return CountTable(sp.coo_matrix((data, (first, second)), shape=(rows, columns)))
    kind = sp.csr_matrix if form == "csr" else sp.csc_matrix
    return CountTable(kind((data, first, second), shape=(rows, columns)))


def read_npy(path: Path) -> CountTable:
    """Read an array that numpy has saved."""
    return CountTable(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))


def _shape(archive: zipfile.ZipFile, name: str) -> int:
    """Number of entries of an array, which its bytes in the archive can hold."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in NPY_HEADERS:
            raise ValueError(f"{name} is in a version of the format that is not known")
        shape, _, kind = NPY_HEADERS[version](file)
    size = math.prod(shape)
    if min(shape, default=0) < 0 or size * kind.itemsize > EXPANSION * info.compress_size:
        raise ValueError(f"{name} claims a shape of {shape}, which the file cannot hold")
    return size


def _array(archive: zipfile.ZipFile, name: str, longest: int) -> np.ndarray:
    """An array of the archive, of at most so many entries."""
    if _shape(archive, name) > longest:
        raise ValueError(f"{name} is longer than the other parts of the matrix")
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_mtx(path: Path) -> CountTable:
    """Read a Matrix Market file and, where they are beside it, names of genes and cells."""
    with open_text(path) as file:
        X = _matrix_market(file)
    prefix = path.name[: path.name.lower().index(".mtx")]
    stems = {prefix, prefix.removesuffix("matrix")}
    cells = _beside(path.parent, stems, ("barcodes",))
    genes = _beside(path.parent, stems, ("features", "genes"))
    if cells is None or genes is None:
        return CountTable(X)
    return _named(X, _lines(cells), _lines(genes), f"{cells.name} and {genes.name}")


def read_10x_folder(folder: Path) -> CountTable:
    """Read a folder with a matrix, features or genes, and barcodes."""
    found = next((p for end in ("", ".gz") if (p := folder / f"matrix.mtx{end}").is_file()), None)
    if found is None:
        inside = next(folder.glob("*/matrix.mtx*"), None)
        advice = f"name the folder {inside.parent}" if inside else "name the file in it"
        raise ValueError(
            f"it is a folder without matrix.mtx and without an AnnData store: {advice}"
        )
    table = read_mtx(found)
    if table.feature_names is None:
        raise ValueError("barcodes.tsv and features.tsv or genes.tsv must be beside matrix.mtx")
    return table


def _beside(folder: Path, stems: set[str], words: Sequence[str]) -> Path | None:
    """A file of names such as barcodes.tsv.gz or sample_barcodes.tsv, or None."""
    for stem in stems:
        for word in words:
            for sign in ("", "_", "."):
                for end in (".tsv.gz", ".tsv", ".txt.gz", ".txt"):
                    path = folder / f"{stem}{sign}{word}{end}"
                    if path.is_file():
                        return path
    return None


def _lines(path: Path) -> list[list[str]]:
    with open_text(path) as file:
        return [line.rstrip("\r\n").split("\t") for line in file if line.strip()]


def _named(
    X: Matrix, cells: Sequence[Sequence[str]], genes: Sequence[Sequence[str]], source: str
) -> CountTable:
    """A table of cells by genes, of a matrix that has one of them in its rows."""
    if X.shape == (len(genes), len(cells)):
        X = X.T
    elif X.shape != (len(cells), len(genes)):
        raise ValueError(
            f"its shape is {X.shape}, and {source} name {len(cells)} cells and {len(genes)} genes"
        )
    ids = [gene[0] for gene in genes]
    symbols = [gene[1] if len(gene) > 1 else gene[0] for gene in genes]
    kinds = np.array([gene[2] if len(gene) > 2 else GENES for gene in genes])
    repeated = {name for name, times in Counter(symbols).items() if times > 1}
    names = np.array(
        [f"{s}_{i}" if s in repeated else s for s, i in zip(symbols, ids, strict=True)],
        dtype=object,
    )
    notes = [f"took {source} for names of samples and features"]
    kept = kinds == GENES
    if not kept.all() and kept.any():
        X, names = sp.csc_matrix(X)[:, np.flatnonzero(kept)], names[kept]
        others = ", ".join(sorted({*kinds[~kept]}))
        notes.append(f"took {kept.sum()} features of type {GENES}; left out {others}")
    return CountTable(X, [cell[0] for cell in cells], names.tolist(), notes=notes, is_10x=True)


def _matrix_market(file: TextIO) -> Matrix:
    """Read a Matrix Market file, of which `file` is at the beginning."""
    banner = file.readline(1000).lower().split()
    if banner[:2] != ["%%matrixmarket", "matrix"] or len(banner) != 5:
        raise ValueError("it does not begin with %%MatrixMarket matrix")
    form, kind, symmetry = banner[2:]
    known = form in ("coordinate", "array") and symmetry in ("general", "symmetric")
    if not known or kind not in ("integer", "unsigned-integer", "real", "double", "pattern"):
        raise ValueError(f"it is a matrix of the kind {' '.join(banner[2:])}, which is not read")
    line = "%"
    while line and (line[0] == "%" or not line.strip()):
        line = file.readline(LONGEST_LINE)
    sizes = [int(size) for size in line.split()]
    if len(sizes) != (3 if form == "coordinate" else 2):
        raise ValueError(f"its line of sizes is {line.strip()[:40]!r}")
    rows, columns = sizes[:2]
    value = np.int64 if "integer" in kind else np.float64
    if form == "array":
        if symmetry != "general" or kind == "pattern":
            raise ValueError("it is a symmetric array: write all of its entries")
        entries = _entries(file, [value], rows * columns)
        return entries[0].reshape(columns, rows).T
    check_claim((rows, columns), sizes[2])
    kinds: list[type] = [np.int64, np.int64, *([] if kind == "pattern" else [value])]
    i, j, *found = _entries(file, kinds, sizes[2])
    for numbers, size in ((i, rows), (j, columns)):
        if len(numbers) and (numbers.min() < 1 or numbers.max() > size):
            raise ValueError(f"it has entries outside of its {rows} rows and {columns} columns")
    data = found[0] if found else np.ones(len(i))
    if symmetry == "symmetric":
        off = i != j
        i, j = np.concatenate([i, j[off]]), np.concatenate([j, i[off]])
        data = np.concatenate([data, data[off]])
    return sp.coo_matrix((data, (i - 1, j - 1)), shape=(rows, columns)).tocsr()


def _entries(file: TextIO, kinds: Sequence[type], n_entries: int) -> list[np.ndarray]:
    """Columns of the lines that follow; a ValueError unless there are so many lines."""
    pandas = import_pandas()
    pieces: list[list[np.ndarray]] = [[] for _ in kinds]
    try:
        frames = pandas.read_csv(
            file, sep=r"\s+", header=None, dtype=dict(enumerate(kinds)), chunksize=PIECE
        )
        for frame in frames:
            if frame.shape[1] != len(kinds):
                raise ValueError(f"its lines have {frame.shape[1]} numbers, not {len(kinds)}")
            for j, piece in enumerate(pieces):
                piece.append(frame[j].to_numpy())
    except pandas.errors.EmptyDataError:
        pass
    found = sum(map(len, pieces[0]))
    if found != n_entries:
        raise ValueError(f"it claims to have {n_entries} entries and has {found}; is it cut off?")
    return [np.concatenate([np.empty(0, k), *p]) for k, p in zip(kinds, pieces, strict=True)]


def read_10x_h5(path: Path) -> CountTable:
    """Read a matrix in an HDF5 file of Cell Ranger, of version 2 or 3."""
    with open_hdf5(path) as file:
        groups = [name for name in file if hasattr(file[name], "keys") and "indptr" in file[name]]
        if len(groups) != 1:
            raise ValueError(
                f"it must hold one matrix of Cell Ranger; it holds {', '.join([*file][:5])}. Save "
                "another kind of table as .h5ad or .mtx"
            )
        group = file[groups[0]]
        columns, rows = _whole(np.ravel(_part(group, "shape")), "shape")
        data, indices, indptr = (_part(group, name) for name in ("data", "indices", "indptr"))
        check_claim((rows, columns), data.size)
        parts = (data, _whole(indices, "indices"), _whole(indptr, "indptr"))
        X = sp.csr_matrix(parts, shape=(int(rows), int(columns)))
        if "barcodes" not in group:
            return CountTable(X, notes=["took no names: the file has none"], is_10x=True)
        return _named(X, [[name] for name in _words(group, "barcodes")], _genes(group), path.name)


def read_loom(path: Path) -> CountTable:
    """Read the matrix of a .loom file, features by samples, and names where they usually are."""
    with open_hdf5(path) as file:
        if "matrix" not in file:
            raise ValueError(f"it has no matrix; it holds {', '.join([*file][:5])}")
        X = sp.csr_matrix(_part(file, "matrix").T)

        def found(kind: str, *usual: str) -> list[str]:
            names = (f"{kind}/{name}" for name in usual)
            return next((_words(file, name) for name in names if name in file), [])

        cells = found("col_attrs", "CellID", "obs_names", "cell_names", "barcode")
        symbols = found("row_attrs", "Gene", "var_names", "gene_names", "Accession")
        if not (cells and symbols):
            return CountTable(X, notes=["took no names: the file has none"], is_10x=True)
        genes = zip(found("row_attrs", "Accession") or symbols, symbols, strict=True)
        return _named(X, [[cell] for cell in cells], [*genes], path.name)


def _part(group: Group, name: str) -> np.ndarray:
    found = group[name]
    if not hasattr(found, "shape"):
        raise ValueError(f"{found.name} is no array")
    return np.asarray(found[()])


def _whole(numbers: np.ndarray, name: str) -> np.ndarray:
    if numbers.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers; it holds {numbers.dtype}")
    return numbers


def _genes(group: Group) -> list[tuple[str, ...]]:
    """Identifier, symbol and type of each feature; the type only where it is known."""
    if "features" not in group:
        return [*zip(_words(group, "genes"), _words(group, "gene_names"), strict=True)]
    parts = (_words(group, f"features/{name}") for name in ("id", "name", "feature_type"))
    return [*zip(*parts, strict=True)]


def _words(group: Group, name: str) -> list[str]:
    words = _part(group, name).ravel()
    return [word.decode() if isinstance(word, bytes) else str(word) for word in words]


@contextmanager
def open_hdf5(path: Path) -> Iterator[File]:
    """Open an HDF5 file; raise a ValueError for damage at which its library would not end.

    That is an object of no size in a heap, and an array that claims far more than the file holds.
    """
    h5py = import_optional("h5py", f"Reading {path.suffix} files needs h5py", "anndata")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        at = data.find(HEAP)
        while at >= 0:
            end = min(at + int.from_bytes(data[at + 8 : at + 16], "little"), len(data))
            place = at + 16
            while place + 16 <= end:
                number, size = struct.unpack_from("<H6xQ", data, place)
                place += 16 + -(-size // 8) * 8 if number else size
                if not (number or size):
                    raise ValueError("it is damaged: a heap of it has an object of no size")
            at = data.find(HEAP, at + 8)

    def check(group: Group) -> None:
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            thing = group[name]
            if isinstance(thing, h5py.Group):
                check(thing)
            elif isinstance(thing, h5py.Dataset) and thing.nbytes > max(
                SMALL, EXPANSION * thing.id.get_storage_size()
            ):
                raise ValueError(f"{thing.name} claims {thing.nbytes} bytes, which it cannot hold")

    with h5py.File(path) as file:
        check(file)
        yield file


def check_zarr(folder: Path) -> None:
    """Raise a ValueError for arrays of a .zarr folder that claim far more than its files hold."""
    import zarr

    def check(group: Any) -> None:
        for name in group:
            thing = group[name]
            if not hasattr(thing, "shape"):
                check(thing)
                continue
            claimed = math.prod(thing.shape) * np.dtype(thing.dtype).itemsize
            files = (folder / thing.path).rglob("*")
            held = sum(file.stat().st_size for file in files if file.is_file())
            if claimed > max(SMALL, ZARR_EXPANSION * held):
                raise ValueError(f"{thing.path} claims {claimed} bytes, which it cannot hold")

    check(zarr.open_group(str(folder), mode="r"))
