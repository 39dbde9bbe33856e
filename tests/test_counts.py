"""Counts and batches: every format a user may bring, and what is refused or warned of."""

from __future__ import annotations

import warnings
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import special

import pnmf_pyro.data.counts
from pnmf_pyro.analysis.selection import thin_counts
from pnmf_pyro.data.batches import Batch, Batches, take
from pnmf_pyro.data.checks import check_counts, check_size_factors, library_size_factors, warn_empty
from pnmf_pyro.data.counts import DenseCounts, SparseCounts, as_counts

SPARSE_FORMATS = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    """Counts with an empty row and an empty column, (12, 8)."""
    X = np.random.default_rng(0).poisson(0.8, (12, 8)).astype(np.float64)
    X[4], X[:, 2], X[11] = 0, 0, 1
    X[11, 2] = 0
    return X


@pytest.fixture(params=["dense", "sparse"])
def counts(request, X):
    return as_counts(sp.csr_matrix(X) if request.param == "sparse" else X)


@pytest.fixture(params=["whole", "blocks"])
def block(request, monkeypatch) -> str:
    if request.param == "blocks":
        monkeypatch.setattr(pnmf_pyro.data.counts, "BLOCK_ENTRIES", 9)
    return request.param


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


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
    np.testing.assert_array_equal(dense(counts.numpy()), X)
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


def test_blocks_together_are_the_matrix(counts, X, block):
    parts = list(counts.blocks())
    assert (len(parts) > 3) == (block == "blocks")
    np.testing.assert_array_equal(np.vstack([part.to_dense() for _, part in parts]), X)
    for rows, part in parts:
        np.testing.assert_array_equal(part.to_dense(), X[rows])
    assert [id(part) for _, part in counts.blocks()] == [id(part) for _, part in parts]


def test_blocks_of_rows_larger_than_a_block(X, monkeypatch):
    monkeypatch.setattr(pnmf_pyro.data.counts, "BLOCK_ENTRIES", 1)
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
    np.testing.assert_array_equal(dense(part.numpy()), X[index])
    if index:
        np.testing.assert_array_equal(part.row_totals, X[index].sum(1))


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_columns_equal_fancy_indexing(counts, X, index):
    part = counts.columns(torch.tensor(index, dtype=torch.int64))
    assert part.shape == (12, len(index))
    np.testing.assert_array_equal(part.to_dense(), X[:, index])
    np.testing.assert_array_equal(dense(part.numpy()), X[:, index])
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


# --- what is refused


def with_entry(value) -> np.ndarray:
    X = np.ones((3, 4))
    X[1, 2] = value
    return X


REFUSED = {
    "negative": (lambda: with_entry(-2.5), r"Negative values in data passed to X: .*-2\.5"),
    "NaN": (lambda: with_entry(np.nan), "X must be finite; it contains NaN 1 times and infinity 0"),
    "infinity": (lambda: with_entry(np.inf), "X must be finite; .*NaN 0 times and infinity 1"),
    "minus infinity": (lambda: with_entry(-np.inf), "X must be finite"),
    "sparse negative": (lambda: sp.csr_matrix(with_entry(-1)), "Negative values in data .*-1"),
    "sparse NaN": (lambda: sp.csc_matrix(with_entry(np.nan)), "X must be finite"),
    "tensor negative": (lambda: torch.tensor(with_entry(-1)), "Negative values .* X"),
    "integer negative": (lambda: with_entry(-3).astype(int), "Negative values .* X.*-3"),
    "nothing": (lambda: None, r"X must be a matrix .*got shape \(\)"),
    "number": (lambda: 3.0, r"X must be a matrix .*got shape \(\)"),
    "one dimension": (lambda: np.ones(4), r"X must be a matrix .*shape \(4,\).*reshape\(1, -1\)"),
    "tensor of one": (lambda: torch.ones(4), r"X must be a matrix .*shape \(4,\)"),
    "sparse array of one": (lambda: sp.coo_array(np.ones(4)), r"X must be a matrix .*\(4,\)"),
    "three dimensions": (lambda: np.ones((2, 3, 4)), r"X must be a matrix .*\(2, 3, 4\)"),
    "no samples": (lambda: np.ones((0, 4)), r"X must have samples and features.*\(0, 4\)"),
    "no features": (lambda: sp.csr_matrix((3, 0)), r"X must have samples and features.*\(3, 0\)"),
    "strings": (lambda: np.array([["a", "b"]]), "X must hold numbers.*<U1.*'a'"),
    "numeric strings": (lambda: np.array([["1", "2"]]), "X must hold numbers.*<U1.*'1'"),
    "words in objects": (lambda: np.array([[1, "b"]], dtype=object), "X must hold numbers.*object"),
    "frame of words": (lambda: pd.DataFrame({"a": [1], "b": ["x"]}), "X must hold numbers"),
    "complex": (lambda: np.ones((2, 2), complex), "X must hold numbers.*complex"),
    "sparse complex": (lambda: sp.csr_matrix(np.ones((2, 2), complex)), "X must hold .*complex"),
    "complex tensor": (lambda: torch.ones(2, 2, dtype=torch.complex64), "X must hold .*complex"),
    "dates": (lambda: np.zeros((2, 2), "datetime64[s]"), "X must hold numbers.*datetime64"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_counts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        check_counts(make())


def test_frame_with_missing_values_is_refused():
    frame = pd.DataFrame({"a": [1.0, None], "b": [2.0, 3.0]})
    with pytest.raises(ValueError, match="NaN 1 times"):
        check_counts(frame)
    with pytest.raises(ValueError, match="X must"):
        check_counts(np.array([[None, 1.0]], dtype=object))


# --- what is warned of


@pytest.mark.parametrize("make", [np.array, sp.csr_matrix, torch.tensor, pd.DataFrame])
def test_fractions_are_warned_of_once_and_kept(make):
    X = np.array([[0.5, 1.0], [2.0, 0.25]])
    with pytest.warns(UserWarning, match="X is not made of counts") as seen:
        counts = check_counts(make(X))
    assert len(seen) == 1
    np.testing.assert_array_equal(counts.to_dense(), X)


@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
def test_empty_samples_and_features_are_counted_and_named(make):
    X = np.ones((9, 4))
    X[[0, 2, 3, 4, 5, 6, 8]] = 0
    X[:, 1] = 0
    with pytest.warns(UserWarning, match="no counts at all") as seen:
        warn_empty(check_counts(make(X)), ["alpha", "beta", "gamma", "delta"])
    samples, features = sorted((str(w.message) for w in seen), key=len, reverse=True)
    assert samples.startswith("7 of 9 samples have no counts at all: 0, 2, 3, 4, 5 and 2 more.")
    assert features.startswith("1 of 4 features have no counts at all: beta.")


def test_empty_features_have_numbers_where_they_have_no_names():
    X = np.array([[1.0, 0, 2, 0]])
    with pytest.warns(UserWarning, match="2 of 4 features have no counts at all: 1, 3"):
        warn_empty(as_counts(X))


@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
def test_full_tables_give_no_warning(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_empty(check_counts(make(np.eye(3) + 1)))
        warn_empty(check_counts(make(np.eye(3))))


@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
def test_all_zero_table_is_warned_of_and_accepted(make):
    with pytest.warns(UserWarning, match="no counts at all") as seen:
        warn_empty(check_counts(make(np.zeros((2, 3)))))
    assert len(seen) == 2


# --- size factors


def test_size_factors_take_the_type_of_the_counts():
    for dtype in (np.float32, np.float64):
        like = as_counts(np.ones((3, 2), dtype))
        s = check_size_factors([1, 2, 0.5], 3, like)
        assert s.dtype == like.dtype
        assert s.tolist() == [1, 2, 0.5]
    assert check_size_factors(None, 3, like) is None
    assert check_size_factors(pd.Series([1, 2, 3]), 3, like).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], r"each of the 3 samples, shape \(3,\); got shape \(2,\)"),
        ([[1.0, 2.0, 3.0]], r"got shape \(1, 3\)"),
        (2.0, r"got shape \(\)"),
        ([1.0, 0.0, 2.0], "positive and finite; the lowest is 0"),
        ([1.0, -2.0, 2.0], "positive and finite; the lowest is -2"),
        ([1.0, np.nan, 2.0], "positive and finite"),
        ([1.0, np.inf, 2.0], "positive and finite"),
        ([np.nan] * 3, "positive and finite"),
        (["a", "b", "c"], "be numbers; got .*'a'"),
    ],
)
def test_bad_size_factors_are_refused(given, message):
    with pytest.raises(ValueError, match=f"size_factors must .*{message}"):
        check_size_factors(given, 3, as_counts(np.ones((3, 2))))


def test_library_size_factors_are_relative_totals(counts, X):
    """Totals over their mean; the empty sample counts as the smallest of the others."""
    totals = X.sum(1)
    totals[4] = totals[totals > 0].min()
    factors = library_size_factors(counts)
    assert factors.shape == (12,)
    assert factors.mean() == pytest.approx(1)
    np.testing.assert_allclose(factors / factors[0], totals / totals[0], rtol=1e-12)


def test_library_size_factors_without_any_counts():
    np.testing.assert_array_equal(library_size_factors(as_counts(np.zeros((3, 2)))), np.ones(3))


# --- thinning


@pytest.mark.parametrize("kind", ["csr", "coo", "dense", "int dense", "int csr", "tensor", "frame"])
def test_thinned_tables_add_up_to_the_counts(X, kind):
    given = {
        "csr": lambda: sp.csr_matrix(X),
        "coo": lambda: sp.coo_matrix(X),
        "dense": lambda: X,
        "int dense": lambda: X.astype(int),
        "int csr": lambda: sp.csr_matrix(X.astype(int)),
        "tensor": lambda: torch.tensor(X),
        "frame": lambda: pd.DataFrame(X),
    }[kind]()
    parts = thin_counts(given, 0.3, np.random.RandomState(2))
    for part in parts:
        assert sp.issparse(part) == (kind in ("csr", "coo", "int csr"))
        assert part.shape == X.shape
        assert (dense(part) >= 0).all()
        assert (dense(part) == dense(part).round()).all()
        assert not sp.issparse(part) or (part.data != 0).all(), "a stored zero"
    np.testing.assert_array_equal(dense(parts[0]) + dense(parts[1]), X)


@pytest.mark.parametrize("fraction", [0.2, 0.7])
@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
def test_each_part_of_a_thinned_table_is_poisson(make, fraction):
    """Mean, variance and the correlation of the two parts, each within 5 standard errors.

    A right implementation fails with probability below 6e-7 per assertion under a new seed.
    """
    n, rate = 40_000, 3.0
    X = np.random.default_rng(3).poisson(rate, (n // 4, 4)).astype(np.float64)
    first, second = (dense(p) for p in thin_counts(make(X), fraction, np.random.RandomState(4)))
    for part, mean in ((first, fraction * rate), (second, (1 - fraction) * rate)):
        assert abs(part.mean() - mean) < 5 * np.sqrt(mean / n)
        assert abs(part.var() - mean) < 5 * np.sqrt((mean + 2 * mean**2) / n)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / np.sqrt(n)


def test_thinning_repeats_with_its_seed_and_moves_no_global_state(X):
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - that it does not move is the point
    one, two = (thin_counts(X, 0.5, np.random.RandomState(5))[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    other, _ = thin_counts(X, 0.5, np.random.RandomState(6))
    assert (one != other).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
def test_thinning_refuses_fractions(make):
    with pytest.raises(ValueError, match="X must hold whole numbers to be thinned"):
        thin_counts(make(np.array([[0.5, 1.0]])), 0.5, np.random.RandomState(0))


# --- batches


def stream(batches: Batches, n: int) -> list[Batch]:
    return list(islice(batches, n))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 6])
def test_a_pass_visits_each_sample_once(counts, X, batch_size, shuffle):
    """Twelve samples in batches of 1, of 5 (the last has 2), and of 6."""
    generator = torch.Generator().manual_seed(0)
    batches = Batches(counts, batch_size, shuffle=shuffle, generator=generator)
    per_pass = -(-12 // batch_size)
    seen = stream(batches, 3 * per_pass)
    orders = []
    for start in range(0, 3 * per_pass, per_pass):
        parts = seen[start : start + per_pass]
        sizes = [batch.counts.shape[0] for batch in parts]
        assert sizes == [min(batch_size, 12 - batch_size * k) for k in range(per_pass)]
        orders.append(torch.cat([batch.samples for batch in parts]).tolist())
        assert sorted(orders[-1]) == list(range(12))
    for batch in seen:
        assert batch.features is None
        np.testing.assert_array_equal(batch.counts.to_dense(), X[batch.samples.numpy()])
    if shuffle:
        assert orders[0] != orders[1] != orders[2]
    else:
        assert orders == [list(range(12))] * 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_visits_each_feature_once(counts, X, shuffle):
    generator = torch.Generator().manual_seed(1)
    batches = Batches(counts, y_batch_size=3, shuffle=shuffle, generator=generator)
    seen = stream(batches, 6)
    assert [batch.counts.shape for batch in seen] == [(12, 3), (12, 3), (12, 2)] * 2
    for parts in (seen[:3], seen[3:]):
        order = torch.cat([batch.features for batch in parts]).tolist()
        assert sorted(order) == list(range(8))
        assert shuffle or order == list(range(8))
    for batch in seen:
        assert batch.samples is None
        np.testing.assert_array_equal(batch.counts.to_dense(), X[:, batch.features.numpy()])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "y_batch_size"), [(6, 4), (4, 4), (3, 2), (5, 3)])
def test_every_entry_is_visited(counts, batch_size, y_batch_size, shuffle):
    """Samples and features must not run in step, or whole blocks of X would never be seen."""
    generator = torch.Generator().manual_seed(2)
    batches = Batches(counts, batch_size, y_batch_size, shuffle=shuffle, generator=generator)
    seen = np.zeros((12, 8), dtype=int)
    for batch in stream(batches, 200):
        seen[np.ix_(batch.samples, batch.features)] += 1
    assert (seen > 0).all(), f"{(seen == 0).mean():.0%} of the entries are never in a batch"


def test_batches_repeat_with_their_generator_and_leave_the_global_one(counts):
    def orders(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        batches = Batches(counts, 5, 3, shuffle=True, generator=generator)
        return [[b.samples.tolist(), b.features.tolist()] for b in stream(batches, 9)]

    before = torch.random.get_rng_state()
    assert orders(3) == orders(3)
    assert orders(3) != orders(4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("batch_size", "y_batch_size"), [(None, None), (12, 8), (100, 100)])
def test_a_batch_of_everything_is_the_data_itself(counts, batch_size, y_batch_size):
    batches = Batches(counts, batch_size, y_batch_size, shuffle=True)
    for batch in (*stream(batches, 3), *batches.one_pass()):
        assert batch.counts is counts
        assert batch.samples is batch.features is None
        assert batch.likelihood_scale == batch.prior_scale == 1.0


def test_one_pass_goes_through_the_samples_in_order(counts):
    batches = Batches(counts, 5, 3, shuffle=True, generator=torch.Generator())
    seen = list(batches.one_pass())
    assert torch.cat([batch.samples for batch in seen]).tolist() == list(range(12))
    assert [batch.counts.shape for batch in seen] == [(5, 8), (5, 8), (2, 8)]


@pytest.mark.parametrize("scaled", [True, False])
def test_scales_of_batches(counts, scaled):
    batches = Batches(counts, 5, 3, scale_ll_D=scaled, scale_kl_NM=scaled)
    seen = stream(batches, 9)  # three batches of samples for each of three batches of features
    features = [8 / 3] * 6 + [8 / 2] * 3 if scaled else [1.0] * 9
    samples = [1.0] * 9 if scaled else [5 / 12, 5 / 12, 2 / 12] * 3
    assert [batch.likelihood_scale for batch in seen] == pytest.approx(features)
    assert [batch.prior_scale for batch in seen] == pytest.approx(samples)


def test_the_plate_of_a_batch_scales_to_all_samples(counts):
    batch = Batches(counts).batch(torch.tensor([3, 1, 8]), None)
    with batch.plate(12) as index:
        assert index.tolist() == [3, 1, 8]
    assert batch.plate(12).size == 12
    assert batch.plate(12).subsample_size == 3
    assert Batch().plate(12).subsample_size == 12
