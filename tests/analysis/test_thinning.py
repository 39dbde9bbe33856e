"""Thinned tables add up to the counts, and each part is Poisson."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro.analysis.hold_out import thin_counts
from tests.support.data import as_dense, table_with_empty_parts


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    return table_with_empty_parts()


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
        assert (as_dense(part) >= 0).all()
        assert (as_dense(part) == as_dense(part).round()).all()
        assert not sp.issparse(part) or (part.data != 0).all(), "a stored zero"
    np.testing.assert_array_equal(as_dense(parts[0]) + as_dense(parts[1]), X)


@pytest.mark.parametrize("fraction", [0.2, 0.7])
@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
def test_each_part_of_a_thinned_table_is_poisson(make, fraction):
    """Mean, variance and the correlation of the two parts, each within 5 standard errors.

    A right implementation fails with probability below 6e-7 per assertion under a new seed.
    """
    n, rate = 40_000, 3.0
    X = np.random.default_rng(3).poisson(rate, (n // 4, 4)).astype(np.float64)
    first, second = (as_dense(p) for p in thin_counts(make(X), fraction, np.random.RandomState(4)))
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
