"""Counts: every format a user may bring, and the interface that models see."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import special

import pnmf_pyro.data.blocks
from pnmf_pyro.analysis.hold_out import thin_counts
from pnmf_pyro.data.batches import take
from pnmf_pyro.data.checks import check_counts
from pnmf_pyro.data.counts import DenseCounts, SparseCounts, as_counts
from tests.support.data import as_dense

SPARSE_FORMATS = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")


@pytest.fixture(params=["whole", "blocks"])
def block(request, monkeypatch) -> str:
    if request.param == "blocks":
        monkeypatch.setattr(pnmf_pyro.data.blocks, "BLOCK_ENTRIES", 9)
    return request.param


def read_only(X: np.ndarray) -> np.ndarray:
    X = X.copy()
    X.flags.writeable = False
    return X


def read_only_csr(X: np.ndarray) -> sp.csr_matrix:
    matrix = sp.csr_matrix(X)
    for part in (matrix.data, matrix.indices, matrix.indptr):
        part.flags.writeable = False
    return matrix


# --- formats


def formats() -> dict:
    """Ways to give one matrix: maker, and whether it is sparse."""
    kinds = {
        "list": (np.ndarray.tolist, False),
        "array": (np.ndarray.copy, False),
        "fortran order": (np.asfortranarray, False),
        "every second": (lambda X: np.repeat(np.repeat(X, 2, 0), 2, 1)[::2, ::2], False),
        "reversed view": (lambda X: X[::-1, ::-1].copy()[::-1, ::-1], False),
        "read-only": (read_only, False),
        "big-endian": (lambda X: X.astype(">f8"), False),
        "objects": (lambda X: X.astype(object), False),
        "tensor": (torch.tensor, False),
        "transposed tensor": (lambda X: torch.tensor(X.T.copy()).T, False),
        "frame": (pd.DataFrame, False),
        "mixed frame": (lambda X: pd.DataFrame(X).astype({0: np.int32, 1: np.float32}), False),
        "sparse frame": (lambda X: pd.DataFrame(X).astype(pd.SparseDtype(float, 0.0)), True),
        "read-only csr": (read_only_csr, True),
        "torch coo": (lambda X: torch.tensor(X).to_sparse_coo(), True),
        "torch csr": (lambda X: torch.tensor(X).to_sparse_csr(), True),
        "torch csc": (lambda X: torch.tensor(X).to_sparse_csc(), True),
        "counts": (as_counts, False),
    }
    for name in SPARSE_FORMATS:
        kinds[f"{name} matrix"] = (getattr(sp, f"{name}_matrix"), True)
        kinds[f"{name} array"] = (getattr(sp, f"{name}_array"), True)
    return kinds


@pytest.mark.parametrize("name", formats())
def test_every_format_is_the_same_matrix(X, name):
    make, sparse = formats()[name]
    counts = check_counts(make(X))
    assert isinstance(counts, SparseCounts if sparse else DenseCounts)
    assert counts.shape == X.shape
    np.testing.assert_array_equal(counts.to_dense().numpy(), X)
    np.testing.assert_array_equal(as_dense(counts.numpy()), X)
    np.testing.assert_allclose(counts.row_totals.numpy(), X.sum(1))
    if sparse:
        assert len(counts.values) == np.count_nonzero(X)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.float64, torch.float64),
        (np.float32, torch.float32),
        (np.int64, torch.float32),
        (np.int32, torch.float32),
        (np.int8, torch.float32),
        (np.uint16, torch.float32),
        (bool, torch.float32),
        (np.longdouble, torch.float32),
    ],
)
@pytest.mark.parametrize("make", [np.array, sp.csr_matrix, sp.coo_array])
def test_types_of_arrays(X, make, given, kept):
    Y = (X > 0) if given is bool else X
    counts = check_counts(make(Y.astype(given)))
    assert counts.dtype == kept
    np.testing.assert_array_equal(counts.to_dense().numpy(), Y)


@pytest.mark.parametrize("layout", ["dense", "csr", "coo"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.int64, torch.float32),
        (torch.uint8, torch.float32),
        (torch.bool, torch.float32),
        # "float64 where X is float64 and float32 otherwise", says check_counts
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_types_of_tensors(X, layout, given, kept):
    Y = (X > 0) if given == torch.bool else X
    tensor = torch.tensor(Y).to(given)
    if layout != "dense":
        tensor = tensor.to_sparse_csr() if layout == "csr" else tensor.to_sparse_coo()
    counts = check_counts(tensor)
    assert counts.dtype == kept
    np.testing.assert_array_equal(counts.to_dense().numpy(), Y)


def test_half_precision_arrays_are_accepted(X):
    assert check_counts(X.astype(np.float16)).dtype == torch.float32


def unsorted_with_duplicates_and_zeros() -> tuple[sp.csr_matrix, np.ndarray]:
    """Row 0: 2 + 1 at column 3, a stored zero at 1, then 4 at 0. Row 1: 5 - 5 at 2, and 1 at 0."""
    data = np.array([2.0, 1.0, 0.0, 4.0, 5.0, -5.0, 1.0])
    columns = np.array([3, 3, 1, 0, 2, 2, 0])
    matrix = sp.csr_matrix((data, columns, np.array([0, 4, 7])), shape=(2, 4))
    return matrix, np.array([[4.0, 0, 0, 3], [1, 0, 0, 0]])


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "torch"])
def test_repeated_entries_are_added_and_stored_zeros_dropped(kind):
    matrix, expected = unsorted_with_duplicates_and_zeros()
    if kind == "torch":
        coo = matrix.tocoo()
        indices = torch.tensor(np.stack([coo.row, coo.col]))
        values = torch.tensor(coo.data)
        given = torch.sparse_coo_tensor(indices, values, matrix.shape, check_invariants=True)
    else:
        given = matrix if kind == "csr" else sp.coo_matrix(matrix).asformat(kind)
    counts = check_counts(given)
    np.testing.assert_array_equal(counts.to_dense().numpy(), expected)
    # log 3! and log 4!, not log 2! + log 1!
    np.testing.assert_allclose(
        counts.log_factorials.numpy(), special.gammaln(expected + 1).sum(1), atol=1e-12
    )


def test_the_matrix_of_the_user_is_not_modified():
    matrix, _ = unsorted_with_duplicates_and_zeros()
    before = matrix.copy()
    check_counts(matrix)
    thin_counts(matrix, 0.5, np.random.RandomState(0))
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(matrix, name), getattr(before, name))


def test_dense_input_is_not_modified_nor_shared(X):
    given = X.copy()
    counts = check_counts(given)
    given[0, 0] = 99
    assert float(counts.to_dense()[0, 0]) == X[0, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_of_sparse_input_are_not_copied(X, dtype):
    """A large matrix is held in memory once."""
    matrix = sp.csr_matrix(X.astype(dtype))
    counts = check_counts(matrix)
    assert np.shares_memory(counts.values.numpy(), matrix.data)
    assert np.shares_memory(counts.numpy().data, matrix.data)


# --- the interface of counts


def test_counts_describe_themselves(counts, X, block):
    assert counts.shape == (12, 8)
    assert counts.dtype == torch.float64
    assert counts.device == torch.device("cpu")
    assert as_counts(counts) is counts
    np.testing.assert_array_equal(counts.to(torch.device("cpu")).to_dense(), X)
    np.testing.assert_array_equal(counts.row_totals, X.sum(1))
    assert counts.row_totals.dtype == counts.log_factorials.dtype == torch.float64
    expected = [sum(special.gammaln(x + 1) for x in row) for row in X]
    np.testing.assert_allclose(counts.log_factorials, expected, rtol=1e-12)


@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
def test_log_factorials_of_large_counts_in_float32(make):
    """A constant, computed once: not worth hundreds of nats of the ELBO.

    float32 holds whole numbers up to 2^24, but log X! of a million only to one nat.
    """
    X = np.random.default_rng(7).poisson(1e6, (5, 8))
    value = as_counts(make(X.astype(np.float32))).log_factorials
    np.testing.assert_allclose(value, special.gammaln(X + 1.0).sum(1), rtol=0, atol=0.1)


def test_products_equal_dense_products(counts, X, block):
    random = np.random.default_rng(1)
    A, B = (torch.tensor(random.normal(size=(n, 3))) for n in (12, 8))
    entries = counts.inner(A, B)
    assert entries.shape == counts.values.shape
    masked = (A @ B.T).numpy() * (X > 0)
    given = entries * (counts.values > 0)
    np.testing.assert_allclose(counts.row_sums(given), masked.sum(1), atol=1e-12)
    np.testing.assert_allclose(counts.matmul(given, B), masked @ B.numpy(), atol=1e-12)
    np.testing.assert_allclose(counts.transposed_matmul(given, A), masked.T @ A.numpy(), atol=1e-12)


def test_blocks_together_are_the_matrix(block, counts, X):
    parts = list(counts.blocks())
    assert (len(parts) > 3) == (block == "blocks")
    np.testing.assert_array_equal(np.vstack([part.to_dense() for _, part in parts]), X)
    for rows, part in parts:
        np.testing.assert_array_equal(part.to_dense(), X[rows])
    assert [id(part) for _, part in counts.blocks()] == [id(part) for _, part in parts]


def test_blocks_of_rows_larger_than_a_block(X, monkeypatch):
    monkeypatch.setattr(pnmf_pyro.data.blocks, "BLOCK_ENTRIES", 1)
    for counts in (as_counts(X), as_counts(sp.csr_matrix(X))):
        assert np.vstack([part.to_dense() for _, part in counts.blocks()]).shape == X.shape
        np.testing.assert_array_equal(counts.row_totals, X.sum(1))


INDICES = {
    "some": [3, 0, 7],
    "all": list(range(8)),
    "reversed": list(range(7, -1, -1)),
    "one": [5],
    "empty ones": [4, 2],
    "repeated": [1, 5, 1],
    "none": [],
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_equal_fancy_indexing(counts, X, index):
    part = counts.rows(torch.tensor(index, dtype=torch.int64))
    assert part.shape == (len(index), 8)
    np.testing.assert_array_equal(part.to_dense(), X[index])
    np.testing.assert_array_equal(as_dense(part.numpy()), X[index])
    if index:
        np.testing.assert_array_equal(part.row_totals, X[index].sum(1))


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_columns_equal_fancy_indexing(counts, X, index):
    part = counts.columns(torch.tensor(index, dtype=torch.int64))
    assert part.shape == (12, len(index))
    np.testing.assert_array_equal(part.to_dense(), X[:, index])
    np.testing.assert_array_equal(as_dense(part.numpy()), X[:, index])
    np.testing.assert_array_equal(part.row_totals, X[:, index].sum(1))


def test_rows_of_columns_and_columns_of_rows(counts, X):
    i, j = torch.tensor([10, 3, 4]), torch.tensor([7, 2, 0])
    expected = X[np.ix_(i, j)]
    np.testing.assert_array_equal(counts.rows(i).columns(j).to_dense(), expected)
    np.testing.assert_array_equal(counts.columns(j).rows(i).to_dense(), expected)


@pytest.mark.parametrize("part", [slice(0, 5), slice(3, 4), slice(5, 12), slice(0, 12)])
def test_slices_of_rows(counts, X, part):
    np.testing.assert_array_equal(counts.rows(part).to_dense(), X[part])


def test_take():
    values = torch.arange(6).reshape(2, 3)
    index = torch.tensor([2, 0])
    assert take(None, index) is None
    assert take(values, None) is values
    assert take(values, index).tolist() == [[2, 0], [5, 3]]
    assert take(values, torch.tensor([1]), dim=0).tolist() == [[3, 4, 5]]


def test_blocks_that_are_done_with_are_forgotten_at_once():
    """Not when cycles are looked for, since slices of a store are many and large."""
    gc.disable()
    try:
        counts = as_counts(sp.csr_matrix(np.eye(3)))
        (_, block), seen = next(counts.blocks()), weakref.ref(counts)
        del counts, block, _
        assert seen() is None
    finally:
        gc.enable()
