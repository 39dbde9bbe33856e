"""Damaged and foreign files of counts: one line that names the file, or a table that can be used.

Bytes of whole files are changed at random, by fixed seeds, and headers claim what is not there.
"""

import io
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest

from pnmf_pyro.command_line.cli import main
from pnmf_pyro.command_line.tables import read_counts
from tests.support.damaged_tables import (
    CHANGES,
    NAMES,
    S,
    cut_off,
    refused_or_usable,
    whole_files,
)

N_EACH = 12

HEAD = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("whole"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_changed_bytes(name, change, whole, tmp_path):
    path = tmp_path / name
    random = np.random.default_rng([NAMES.index(name), CHANGES.index(change)])
    n_refused = 0
    for _ in range(N_EACH):
        path.write_bytes(change(whole[name], random))
        n_refused += refused_or_usable(path)
    if change is cut_off and name != "t.csv":
        assert n_refused > N_EACH / 2


def npz(**parts):
    """A sparse matrix as scipy saves it, with other parts."""
    whole = {"data": S.data, "indices": S.indices, "indptr": S.indptr, "shape": S.shape}
    file = io.BytesIO()
    np.savez_compressed(file, **({"format": b"csr"} | whole | parts))
    return file.getvalue()


def npy_claims(name, shape):
    """The same, where the header of an array claims a shape."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz())) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.namelist():
            data = old.read(member)
            if member == f"{name}.npy":
                header = io.BytesIO()
                np.lib.format.write_array_header_1_0(
                    header, {"descr": "<f8", "fortran_order": False, "shape": shape}
                )
                data = header.getvalue() + data[128:]
            new.writestr(member, data)
    return file.getvalue()


def indices(value):
    changed = S.indices.copy()
    changed[0] = value
    return changed


CLAIMS = {
    "column out of range": ("t.npz", npz(indices=indices(500))),
    "negative column": ("t.npz", npz(indices=indices(-3))),
    "last column": ("t.npz", npz(indices=indices(2**31 - 1))),
    "decreasing starts": ("t.npz", npz(indptr=S.indptr[::-1])),
    "rows": ("t.npz", npz(shape=(10**12, 10**12))),
    "columns": ("t.npz", npz(shape=(20, 10**9))),
    "negative rows": ("t.npz", npz(shape=(-20, 6))),
    "more counts than cells": ("t.npz", npz(data=np.zeros(10**6), indices=np.zeros(10**6, int))),
    "terabytes": ("t.npz", npy_claims("data", (10**12,))),
    "terabytes of starts": ("t.npz", npy_claims("indptr", (10**12,))),
    "words": ("t.npz", npz(data=np.full(S.nnz, "a"))),
    "objects": ("t.npz", npz(data=np.array([None] * S.nnz))),
    "complex": ("t.npz", npz(data=S.data + 1j)),
    "missing": ("t.npz", npz(data=S.data * np.nan)),
    "negative": ("t.npz", npz(data=-S.data)),
    "another format": ("t.npz", npz(format=b"dia")),
    "no sparse matrix": ("t.npz", npz(format=b"csr", data=S.data[:5])),
    "mtx rows": ("t.mtx", f"{HEAD}1000000000 1000000000 1\n1 1 3\n"),
    "mtx more rows": ("t.mtx", f"{HEAD}{10**18} {10**18} 1\n1 1 3\n"),
    "mtx entries": ("t.mtx", f"{HEAD}5 5 1000000000000\n1 1 3\n"),
    "mtx array": ("t.mtx", "%%MatrixMarket matrix array real general\n1000000 1000000\n1\n"),
    "mtx out of range": ("t.mtx", f"{HEAD}5 5 1\n9 9 3\n"),
    "mtx entry 0": ("t.mtx", f"{HEAD}5 5 1\n0 0 3\n"),
    "mtx negative size": ("t.mtx", f"{HEAD}-5 5 1\n1 1 3\n"),
    "mtx words": ("t.mtx", f"{HEAD}5 5 1\n1 1 word\n"),
    "mtx too large": ("t.mtx", f"{HEAD}5 5 1\n1 1 99999999999999999999999999\n"),
    "mtx zeros": ("t.mtx", f"{HEAD}5 5 1\n1 \0 3\n"),
    "mtx more entries": ("t.mtx", f"{HEAD}5 5 1\n1 1 3\n2 2 2\n"),
    "mtx half a heading": ("t.mtx", HEAD),
    "not gzip": ("t.csv.gz", "hello"),
    "binary": ("t.csv", bytes(range(256)) * 20),
    "empty": ("t.h5ad", b""),
    "text": ("t.h5", "counts"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_refused_before_memory_is_taken(claim, tmp_path):
    name, data = CLAIMS[claim]
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    tracemalloc.start()
    assert refused_or_usable(path)
    assert tracemalloc.get_traced_memory()[1] < 3e7
    tracemalloc.stop()


def test_heaps_of_hdf5_without_an_end(whole, tmp_path):
    data = whole["sparse.h5ad"]
    free = data.index(b"GCOL") + 16
    (tmp_path / "t.h5ad").write_bytes(data[:free] + b"\0" * 16 + data[free + 16 :])
    with pytest.raises(ValueError, match="a heap of it has an object of no size"):
        read_counts(tmp_path / "t.h5ad")


def test_arrays_of_hdf5_that_are_not_there(whole, tmp_path):
    path = tmp_path / "t.h5ad"
    path.write_bytes(whole["sparse.h5ad"])
    with h5py.File(path, "a") as file:
        del file["X/data"]
        file["X"].create_dataset("data", shape=(10**11,), dtype="f4", chunks=(10**5,))
    with pytest.raises(ValueError, match="X/data claims 400000000000 bytes"):
        read_counts(path)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_with_code_2_and_one_line(name, whole, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(whole[name][: len(whole[name]) // 2].rstrip(b"\n0123456789"))
    assert main(["fit", str(path), "--out", str(tmp_path / "o.npz"), "--components", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"pnmf-pyro: {path} cannot be read: ")


def test_a_fault_of_the_program_is_a_traceback(whole, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise AttributeError("of ours")

    monkeypatch.setattr("pnmf_pyro.command_line.tables.read_text", broken)
    (tmp_path / "t.csv").write_bytes(whole["t.csv"])
    assert main(["fit", str(tmp_path / "t.csv"), "--out", str(tmp_path / "o.npz")]) == 3
    assert "Traceback" in capsys.readouterr().err
