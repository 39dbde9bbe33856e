"""Tables of counts in .mtx, 10x and AnnData files and folders, with their names and places."""

import gzip
import re
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from pnmf_pyro.command_line.cli import main
from pnmf_pyro.command_line.files import read_fit
from pnmf_pyro.command_line.tables import read_counts

# Cells by genes.
X = np.random.default_rng(0).poisson(1.0, (9, 5))
CELLS = [f"CELL{i}-1" for i in range(9)]
IDS = [f"ENSG{j}" for j in range(5)]
SYMBOLS = ["A", "B", "A", "C", "D"]
NAMES = ["A_ENSG0", "B", "A_ENSG2", "C", "D"]


def run(*arguments):
    return main([*map(str, arguments)])


def check(table, counts=X, features=NAMES):
    np.testing.assert_array_equal(table.X.toarray(), counts)
    assert table.sample_names == CELLS
    assert table.feature_names == features


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def mtx(counts):
    """A Matrix Market file, by its definition."""
    rows, columns = np.nonzero(counts)
    entries = [f"{i + 1} {j + 1} {counts[i, j]}\n" for i, j in zip(rows, columns, strict=True)]
    sizes = f"{counts.shape[0]} {counts.shape[1]} {len(entries)}\n"
    return "%%MatrixMarket matrix coordinate integer general\n%\n" + sizes + "".join(entries)


def write_10x(folder, version, kinds=("Gene Expression",) * 5, prefix=""):
    end = ".gz" if version == 3 else ""
    names = "features.tsv.gz" if version == 3 else "genes.tsv"
    lines = [
        f"{i}\t{s}" + f"\t{k}" * (version == 3) for i, s, k in zip(IDS, SYMBOLS, kinds, strict=True)
    ]
    write(folder / f"{prefix}matrix.mtx{end}", mtx(X.T))
    write(folder / f"{prefix}barcodes.tsv{end}", "\n".join(CELLS) + "\n")
    write(folder / f"{prefix}{names}", "\n".join(lines) + "\n")


@pytest.mark.parametrize("version", [2, 3])
def test_folders_of_10x(version, tmp_path):
    write_10x(tmp_path / "run", version)
    check(read_counts(tmp_path / "run"))
    [matrix] = (tmp_path / "run").glob("matrix*")
    check(read_counts(matrix))
    with pytest.raises(ValueError, match="leave out --transpose"):
        read_counts(matrix, transpose=True)
    write_10x(tmp_path / "run", version, prefix="GSM1_")
    check(read_counts(next((tmp_path / "run").glob("GSM1_matrix*"))))


def test_types_of_features(tmp_path):
    kinds = ["Gene Expression", "Antibody Capture"] * 2 + ["Gene Expression"]
    write_10x(tmp_path / "run", 3, kinds)
    table = read_counts(tmp_path / "run")
    check(table, X[:, ::2], NAMES[::2])
    assert table.notes[-1] == "took 3 features of type Gene Expression; left out Antibody Capture"
    write_10x(tmp_path / "run", 3, ["Antibody Capture"] * 5)
    check(read_counts(tmp_path / "run"))


def write_10x_h5(path, version):
    """A file of Cell Ranger: genes by cells, compressed columns."""
    matrix = sp.csc_matrix(X.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "hg19")
        group["barcodes"] = np.array(CELLS, dtype="S")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array(matrix.shape)
        if version == 3:
            features = group.create_group("features")
            features["id"], features["name"] = np.array(IDS, "S"), np.array(SYMBOLS, "S")
            features["feature_type"] = np.array(["Gene Expression"] * 5, "S")
            features["_all_tag_keys"] = np.array(["genome"], "S")
        else:
            group["genes"], group["gene_names"] = np.array(IDS, "S"), np.array(SYMBOLS, "S")


@pytest.mark.parametrize("version", [2, 3])
def test_h5_of_10x(version, tmp_path):
    write_10x_h5(tmp_path / "run.h5", version)
    check(read_counts(tmp_path / "run.h5"))
    with h5py.File(tmp_path / "run.h5", "a") as file:
        file.create_group("mm10")["indptr"] = np.zeros(3)
    with pytest.raises(ValueError, match="it must hold one matrix of Cell Ranger; it holds "):
        read_counts(tmp_path / "run.h5")


@pytest.mark.parametrize(
    ("cell", "genes", "names"),
    [
        ("CellID", {"Gene": SYMBOLS, "Accession": IDS}, NAMES),
        ("obs_names", {"var_names": IDS}, IDS),
        ("other", {"Gene": SYMBOLS}, None),
    ],
)
def test_loom(cell, genes, names, tmp_path):
    """Genes by cells, with attributes of rows and columns."""
    with h5py.File(tmp_path / "run.loom", "w") as file:
        file["matrix"] = X.T.astype("f4")
        file[f"col_attrs/{cell}"] = np.array(CELLS, dtype=h5py.string_dtype())
        for name, words in genes.items():
            file[f"row_attrs/{name}"] = np.array(words, dtype=h5py.string_dtype())
    table = read_counts(tmp_path / "run.loom")
    np.testing.assert_array_equal(table.X.toarray(), X)
    assert table.feature_names == names
    assert table.sample_names == (names and CELLS)
    with h5py.File(tmp_path / "run.loom", "a") as file:
        del file["matrix"]
    with pytest.raises(ValueError, match=r"run\.loom cannot be read: it has no matrix"):
        read_counts(tmp_path / "run.loom")


def test_names_beside_a_matrix_say_which_way_round_it_is(tmp_path):
    write(tmp_path / "cells_x_genes.mtx", mtx(X))
    write(tmp_path / "cells_x_genes.barcodes.txt", "\n".join(CELLS))
    write(tmp_path / "cells_x_genes.genes.txt", "\n".join(IDS))
    check(read_counts(tmp_path / "cells_x_genes.mtx"), features=IDS)
    write(tmp_path / "cells_x_genes.genes.txt", "\n".join(IDS[1:]))
    with pytest.raises(ValueError, match="name 9 cells and 4 genes"):
        read_counts(tmp_path / "cells_x_genes.mtx")


@pytest.mark.parametrize("form", ["coordinate", "array"])
@pytest.mark.parametrize("kind", [np.int64, np.float64])
def test_matrix_market(form, kind, tmp_path):
    matrix = X.astype(kind)
    scipy.io.mmwrite(tmp_path / "t.mtx", sp.coo_matrix(matrix) if form == "coordinate" else matrix)
    table = read_counts(tmp_path / "t.mtx")
    found = table.X.toarray() if sp.issparse(table.X) else table.X
    np.testing.assert_array_equal(found, X)
    assert found.dtype == kind
    head = "%%MatrixMarket matrix coordinate "
    write(tmp_path / "t.mtx", head + "pattern general\n2 2 2\n1 1\n2 2\n")
    np.testing.assert_array_equal(read_counts(tmp_path / "t.mtx").X.toarray(), np.eye(2))
    write(tmp_path / "t.mtx", head + "integer symmetric\n2 2 2\n1 1 3\n2 1 4\n")
    np.testing.assert_array_equal(read_counts(tmp_path / "t.mtx").X.toarray(), [[3, 4], [4, 0]])


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_npz_of_scipy(form, tmp_path):
    sp.save_npz(tmp_path / "t.npz", sp.coo_matrix(X).asformat(form))
    np.testing.assert_array_equal(read_counts(tmp_path / "t.npz").X.toarray(), X)
    turned = read_counts(tmp_path / "t.npz", transpose=True)
    np.testing.assert_array_equal(turned.X.toarray(), X.T)


@pytest.fixture
def adata():
    rng = np.random.default_rng(1)
    found = anndata.AnnData(sp.csr_matrix(rng.poisson(3.0, (30, 6)).astype("f4")))
    found.obs_names = [f"c{i}" for i in range(30)]
    return found


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
def test_zarr_folders(adata, tmp_path):
    pytest.importorskip("zarr")
    adata.write_zarr(tmp_path / "t.zarr")
    (tmp_path / "t.zarr").rename(tmp_path / "table")
    table = read_counts(tmp_path / "table")
    np.testing.assert_array_equal(table.X.toarray(), adata.X.toarray())
    assert table.sample_names == list(adata.obs_names)


@pytest.fixture
def store(adata, tmp_path):
    """A store as SpatialData writes it: tables of AnnData beside other elements."""
    zarr = pytest.importorskip("zarr")
    rng = np.random.default_rng(0)
    adata.obs["region"] = pd.Categorical(["cells"] * 30)
    keys = {"region": "cells", "region_key": "region", "instance_key": "region"}
    adata.uns["spatialdata_attrs"] = keys
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_group("images").create_group("slide")
    group.create_group("tables")
    bare = adata.copy()
    adata.obsm["spatial"] = rng.uniform(0, 9, (30, 2))
    adata.write_zarr(tmp_path / "s.zarr" / "tables" / "placed")
    bare.write_zarr(tmp_path / "s.zarr" / "tables" / "bare")
    return tmp_path / "s.zarr"


def files_in(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_results_go_into_the_table_of_a_spatialdata_store(store, adata, monkeypatch, capsys):
    before = files_in(store)
    fit = ("fit", store, "--components", 2, "--set", "max_iter=2", "--quiet", "--out", f"{store}/")
    assert run(*fit, "--table", "placed") == 0
    after = files_in(store)
    changed = {str(file) for file in before if before[file] != after[file]}
    assert all(
        "/placed/obs/" in file or file.endswith((".zmetadata", ".zattrs", "zarr.json"))
        for file in changed
    )
    new = {
        file.relative_to(store / "tables" / "placed").parts[:2] for file in after.keys() - before
    }
    names = {("obsm", f"X_pnmf{end}") for end in ("", "_sd", "_log_sd")}
    assert new == {*names, ("varm", "PNMF_loadings"), ("uns", "pnmf")}
    found = anndata.read_zarr(store / "tables" / "placed")
    assert found.uns["pnmf"]["spatial_key"] == "spatial"
    np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
    assert "X_pnmf" in read_fit(store / "tables" / "placed").obsm
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    capsys.readouterr()
    for table, message in (
        ((), "--table must name a table of the store .* of ['bare', 'placed']; none was named"),
        (("--table", "bar"), "got 'bar'"),
        (("--table", "bare"), "--no-space fits without, and centroids need spatialdata"),
    ):
        assert run(*fit, *table) == 2
        assert re.search(message.replace("[", r"\["), capsys.readouterr().err)
    assert run("fit", store / "tables" / "bare", "--table", "bare", "--out", "a.npz") == 2


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
def test_a_zarr_array_that_claims_more_than_it_holds_is_refused(adata, tmp_path):
    pytest.importorskip("zarr")
    adata.write_zarr(tmp_path / "t.zarr")
    shape = rf'"shape":\s*\[\s*{adata.X.nnz}\s*\]'
    for header in (tmp_path / "t.zarr").rglob("*z*"):  # of each array, and of all together
        if header.is_file():
            header.write_text(re.sub(shape, '"shape": [10000000000000]', header.read_text()))
    with pytest.raises(ValueError, match=r"X/data claims 4.* bytes, which it cannot hold"):
        read_counts(tmp_path / "t.zarr")


def test_other_folders_are_refused_with_what_is_in_them(tmp_path):
    with pytest.raises(ValueError, match=r"it is a folder without matrix\.mtx"):
        read_counts(tmp_path)
    write_10x(tmp_path / "hg19", 2)
    with pytest.raises(ValueError, match=r"name the folder .*hg19"):
        read_counts(tmp_path)


def said(adata, folder, capsys, *options):
    """Standard error of a fit on the command line, without its progress."""
    adata.write_h5ad(folder / "t.h5ad")
    fit = ("fit", folder / "t.h5ad", "--components", 1, "--set", "max_iter=3", "--quiet")
    assert run(*fit, "--out", folder / "o.npz", *options) in (0, 1)
    return capsys.readouterr().err


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("where", "option"),
    [
        ("obsm X_spatial", "--spatial-key X_spatial"),
        ("obsm spatial_um", "--spatial-key spatial_um"),
        ("obs X Y", "--coords X,Y"),
        ("obs array_row array_col", "--coords array_row,array_col"),
    ],
)
def test_coordinates_that_nothing_names_are_told(where, option, adata, tmp_path, capsys):
    places = np.random.default_rng(0).uniform(size=(30, 2))
    kind, *names = where.split()
    if kind == "obsm":
        adata.obsm[names[0]] = places
    else:
        adata.obs[names] = places
    assert f"give {option} to use them" in said(adata, tmp_path, capsys)
    assert option not in said(adata, tmp_path, capsys, "--no-space")
    assert option not in said(adata, tmp_path, capsys, *option.split())
    table = read_counts(tmp_path / "t.h5ad", coords=names if kind == "obs" else ())
    np.testing.assert_array_equal(
        table.annotation.obsm[names[0] if kind == "obsm" else "spatial"], places
    )


@pytest.mark.filterwarnings("always")
def test_warnings_of_python_come_on_the_command_line(adata, tmp_path, capsys):
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(size=(30, 2))
    adata.uns["spatial"] = {"one": {}, "two": {}}
    adata.obs["slide"] = ["one"] * 15 + ["two"] * 15
    assert "adata holds 2 sections" in said(adata, tmp_path, capsys)
    assert "adata holds" not in said(adata, tmp_path, capsys, "--batch-key", "slide")
    adata.layers["raw_counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    assert "pass layer='raw_counts'" in said(adata, tmp_path, capsys)
    del adata.layers["raw_counts"]
    adata.raw = anndata.AnnData(np.ones((30, 6)), obs=adata.obs, var=adata.var)
    assert "pass adata.raw.to_adata()" in said(adata, tmp_path, capsys)


def test_coords_of_an_h5ad_file_are_columns_of_numbers(adata, tmp_path):
    adata.obs = pd.DataFrame({"x": ["a"] * 30, "y": np.arange(30.0)}, index=adata.obs_names)
    adata.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(ValueError, match="--coords must name columns of numbers"):
        read_counts(tmp_path / "t.h5ad", coords=("x", "y"))
    with pytest.raises(ValueError, match=r"'z' is there 0 times. The columns are x, y"):
        read_counts(tmp_path / "t.h5ad", coords=("z", "y"))
