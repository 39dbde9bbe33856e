"""Changes to files of counts, drawn at random, and what a changed file may lead to."""

import gzip

import anndata
import numpy as np
import scipy.sparse as sp

from pnmf_pyro.command_line.tables import read_counts
from tests.command_line.test_table_stores import mtx, write_10x_h5

X = np.random.default_rng(0).poisson(3.0, (20, 6))
S = sp.csr_matrix(X.astype(np.float64))


def whole_files(folder):
    """Bytes of whole files, by name."""
    rows = [f"c{i}," + ",".join(map(str, row)) for i, row in enumerate(X)]
    text = "\n".join([",a,b,c,d,e,f", *rows]).encode()
    sp.save_npz(folder / "t.npz", S)
    adata = anndata.AnnData(S.astype(np.float32))
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(size=(20, 2))
    adata.obs["slide"] = list("ab") * 10
    adata.write_h5ad(folder / "sparse.h5ad")
    anndata.AnnData(X.astype(np.float32)).write_h5ad(folder / "dense.h5ad")
    write_10x_h5(folder / "t.h5", 3)
    files = {"t.csv": text, "t.csv.gz": gzip.compress(text), "t.mtx": mtx(X).encode()}
    files["t.mtx.gz"] = gzip.compress(files["t.mtx"])
    return files | {path.name: path.read_bytes() for path in folder.iterdir()}


def flipped(data, random):
    changed = bytearray(data)
    for _ in range(random.choice([1, 2, 8, 64])):
        changed[random.integers(len(data))] ^= 1 << random.integers(8)
    return bytes(changed)


def cut_off(data, random):
    return data[: random.integers(len(data))]


def cut_out(data, random):
    start = random.integers(len(data))
    return data[:start] + data[start + random.integers(1, 200) :]


def repeated(data, random):
    start = random.integers(len(data))
    return data[: start + random.integers(1, 400)] + data[start:]


def zeroed(data, random):
    start, n = random.integers(len(data)), random.integers(1, 300)
    return data[:start] + b"\0" * n + data[start + n :]


def appended(data, random):
    return data + random.bytes(random.integers(1, 4000))


def in_front(data, random):
    return random.bytes(random.integers(1, 200)) + data


CHANGES = (flipped, cut_off, cut_out, repeated, zeroed, appended, in_front)
NAMES = ("t.csv", "t.csv.gz", "t.mtx", "t.mtx.gz", "t.npz", "sparse.h5ad", "dense.h5ad", "t.h5")


def refused_or_usable(path):
    """Whether a file is refused, in one line that names it; other errors go on."""
    try:
        found = read_counts(path).X
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert path.name in said
        assert len(said.splitlines()) == 1
        return True
    entries = found.data if sp.issparse(found) else found
    assert np.isfinite(entries).all()
    assert (entries >= 0).all()
    return False
