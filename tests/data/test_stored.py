"""Counts in a store have the products of the same counts in memory."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro.data import stored
from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.log_rate import log_rate_with_gradients
from pnmf_pyro.data.stored import StoredCounts, StoredMatrix, joined
from pnmf_pyro.data.stores import by_annbatch, opened
from pnmf_pyro.initialization import initialize_factors

X = np.random.default_rng(0).poisson(0.5, size=(83, 12)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    monkeypatch.setattr(stored, "SLICE_ENTRIES", 100)


def in_store(table=X, sparse=True):
    table = sp.csr_matrix(table) if sparse else table
    n_stored = table.nnz if sparse else table.size
    return StoredCounts(joined(table.__getitem__), table.shape, n_stored, "cells.h5ad")


@pytest.mark.parametrize("sparse", [True, False])
def test_products_are_those_in_memory(sparse):
    counts, dense = in_store(sparse=sparse), torch.from_numpy(X).double()
    assert len(list(counts.blocks())) > 3
    random = torch.Generator().manual_seed(0)
    A, W = (torch.rand(n, 3, generator=random) for n in counts.shape)
    torch.testing.assert_close(counts.row_totals, dense.sum(1))
    torch.testing.assert_close(counts.column_totals, dense.sum(0))
    torch.testing.assert_close(counts.log_factorials, torch.lgamma(dense + 1).sum(1))
    torch.testing.assert_close(counts.matmul(counts.values, W), dense.float() @ W)
    torch.testing.assert_close(counts.transposed_matmul(counts.values, A), dense.float().T @ A)
    expected = log_rate_with_gradients(as_counts(X), A, W)
    for found, wanted in zip(log_rate_with_gradients(counts, A, W), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert counts.whole
    assert counts.values.numel() == (sp.csr_matrix(X).nnz if sparse else X.size)


def test_scaled_matrix():
    a, b = np.arange(1.0, 84), np.arange(1.0, 13)
    matrix, dense = StoredMatrix(in_store()).divided(a, b), X / a[:, None] / b
    B, A = np.random.default_rng(1).random((12, 4)), np.random.default_rng(2).random((83, 4))
    np.testing.assert_allclose(matrix @ B, dense @ B)
    np.testing.assert_allclose(matrix.left(A), dense.T @ A)
    np.testing.assert_allclose(matrix.sum(1), dense.sum(1))
    np.testing.assert_allclose(matrix.sum(0), dense.sum(0))
    np.testing.assert_allclose(matrix.mean(), dense.mean())


@pytest.mark.parametrize("init", ["nndsvda", "biwhitened", "nndsvdar", "random"])
def test_starts_are_those_in_memory(init):
    found = initialize_factors(StoredMatrix(in_store()), 3, init, random_state=0)
    for one, other in zip(found, initialize_factors(X, 3, init, random_state=0), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("entry", "words"), [(-1, "must not be negative"), (np.nan, "NaN")])
def test_what_is_no_count_is_found_in_the_last_slice(entry, words):
    table = X.copy()
    table[-1, -1] = entry
    with pytest.raises(ValueError, match=rf"cells.h5ad, rows \d+ to 82: .*{words}"):
        in_store(table)


def test_numbers_that_are_not_whole_are_known():
    assert not in_store(X / 2).whole


def test_large_counts_are_in_float64():
    assert in_store(X * 1e6).dtype == torch.float64


def test_a_store_that_changes_is_found():
    table = X.copy()
    counts = in_store(table, sparse=False)
    table[-1, 0] += 1
    with pytest.raises(ValueError, match=r"changed while it was read: rows \d+ to 82"):
        list(counts.blocks())


def test_a_store_that_cannot_be_read():
    counts = in_store()

    def fail(runs):
        raise OSError("unexpected end of file")

    counts.read = fail
    with pytest.raises(ValueError, match=r"cannot be read at rows 0 to .*unexpected end"):
        list(counts.blocks())


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_come_in_the_order_that_is_asked_for(sparse):
    counts, asked = in_store(sparse=sparse), []
    read, counts.read = counts.read, lambda runs: asked.append(runs) or read(runs)
    for index in ([5, 6, 7, 8], [7, 8, 2, 3, 4, 0, 82]):
        found = counts.rows(torch.tensor(index)).to_dense()
        torch.testing.assert_close(found, torch.from_numpy(X[index]))
    assert asked == [[slice(5, 9)], [slice(7, 9), slice(2, 5), slice(0, 1), slice(82, 83)]]


def test_shuffled_batches_are_runs_of_rows():
    generator = torch.Generator().manual_seed(0)
    batches = Batches(in_store(), 32, shuffle=True, generator=generator)
    stream = iter(batches)
    samples = torch.cat([next(stream).samples for _ in range(3)]).tolist()
    assert sorted(samples) == list(range(83))
    following = dict(itertools.pairwise(samples))
    assert all(following[i] == i + 1 for i in range(0, 82, 2))
    assert sum(following[i] == i + 1 for i in range(1, 81, 2) if i in following) < 5


@pytest.mark.parametrize("ask", ["numpy", "to_dense"])
def test_nothing_is_read_as_a_whole(ask):
    with pytest.raises(ValueError, match="Read it into memory"):
        getattr(in_store(), ask)()


def test_annbatch_reads_the_same_rows(tmp_path):
    pytest.importorskip("annbatch", reason="annbatch needs Python 3.12")
    anndata = pytest.importorskip("anndata")
    path = tmp_path / "cells.zarr"
    anndata.AnnData(sp.csr_matrix(X)).write_zarr(path, chunks=(50,))
    with opened(path) as store:
        read = by_annbatch(anndata.io.sparse_dataset(store["X"]))
        for _ in range(2):
            found = read([slice(60, 63), slice(5, 9), slice(82, 83)])
            np.testing.assert_array_equal(found.toarray(), X[[60, 61, 62, 5, 6, 7, 8, 82]])
