"""What is refused or warned of in counts and size factors."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro import PNMF, fit
from pnmf_pyro.data.checks import check_counts, check_size_factors, library_size_factors, warn_empty
from pnmf_pyro.data.counts import as_counts
from tests.support.data import simulate, with_entry

REFUSED = {
    "negative": (lambda: with_entry(-2.5), r"Negative values in data passed to X: .*-2\.5"),
    "NaN": (lambda: with_entry(np.nan), "X must be finite; it contains NaN 1 times and infinity 0"),
    "infinity": (lambda: with_entry(np.inf), "X must be finite; .*NaN 0 times and infinity 1"),
    "minus infinity": (lambda: with_entry(-np.inf), "X must be finite"),
    "sparse negative": (lambda: sp.csr_matrix(with_entry(-1)), "Negative values in data .*-1"),
    "sparse NaN": (lambda: sp.csc_matrix(with_entry(np.nan)), "X must be finite"),
    "tensor negative": (lambda: torch.tensor(with_entry(-1)), "Negative values .* X"),
    "integer negative": (lambda: with_entry(-3).astype(int), "Negative values .* X.*-3"),
    "nothing": (lambda: None, r"X must be a matrix .*NoneType of shape \(\)"),
    "number": (lambda: 3.0, r"X must be a matrix .*float of shape \(\)"),
    "one dimension": (lambda: np.ones(4), r"X must be a matrix .*shape \(4,\).*reshape\(1, -1\)"),
    "tensor of one": (lambda: torch.ones(4), r"X must be a matrix .*shape \(4,\)"),
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
if sp.coo_array(np.ones(4)).ndim == 1:  # before scipy 1.13 that is a row
    REFUSED["sparse array of one"] = (
        lambda: sp.coo_array(np.ones(4)),
        r"X must be a matrix .*\(4,\)",
    )


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


def test_warnings_name_the_line_outside_the_package():
    """However deep in it they arise: at once, in the estimator, in a fit in one call."""
    X = simulate(0, 40, 12, 2)[0] + 0.5
    for call in (check_counts, PNMF(2, tol=1.0, random_state=0).fit, lambda X: fit(X, tol=0.5)):
        with pytest.warns(UserWarning, match="X is not made of counts") as seen:
            call(X)
        assert {Path(one.filename) for one in seen} == {Path(__file__)}


# --- size factors


def test_size_factors_take_the_type_of_the_counts():
    for dtype in (np.float32, np.float64):
        like = as_counts(np.ones((3, 2), dtype))
        s = check_size_factors([1, 2, 0.5], like)
        assert s.dtype == like.dtype
        assert s.tolist() == [1, 2, 0.5]
    assert check_size_factors(None, like) is None
    assert check_size_factors(pd.Series([1, 2, 3]), like).tolist() == [1, 2, 3]


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
        (["a", "b", "c"], "be an array of numbers: .*'a'"),
    ],
)
def test_bad_size_factors_are_refused(given, message):
    with pytest.raises(ValueError, match=f"size_factors must .*{message}"):
        check_size_factors(given, as_counts(np.ones((3, 2))))


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
