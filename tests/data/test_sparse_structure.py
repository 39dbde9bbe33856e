"""Sparse matrices whose indices point outside of them: refused before compiled code runs."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro import PNMF
from pnmf_pyro.data.counts import as_counts, transposed_counts

X = np.random.default_rng(0).poisson(1.0, (12, 8)).astype(np.float64)


def changed(form, part, at, value):
    """The matrix with one number of its structure changed, which scipy does not notice."""
    matrix = sp.csr_matrix(X).asformat(form)
    getattr(matrix, part)[at] = value
    return matrix


BAD = [
    *[(form, "indices", 0, v) for form in ("csr", "csc", "bsr") for v in (-3, 57, 2**31 - 1)],
    *[(form, "indptr", -1, v) for form in ("csr", "csc", "bsr") for v in (1000, -5, 3)],
    *[(form, "indptr", 0, 2) for form in ("csr", "csc", "bsr")],
    *[("csr", "indptr", 5, v) for v in (0, 60)],
    *[("coo", part, 0, v) for part in ("row", "col") for v in (-1, 12)],
]


@pytest.mark.parametrize(("form", "part", "at", "value"), BAD)
def test_damaged_structure_is_refused_everywhere(form, part, at, value):
    for take in (as_counts, lambda matrix: transposed_counts(matrix), PNMF(2).fit):
        with pytest.raises(
            ValueError, match="X must be a sparse matrix whose indices fit its shape"
        ):
            take(changed(form, part, at, value))


def test_lengths_are_compared():
    matrix = sp.csr_matrix(X)
    matrix.data = matrix.data[:-1]
    with pytest.raises(ValueError, match="indices for"):
        as_counts(matrix)
    matrix = sp.csr_matrix(X)
    matrix.indptr = matrix.indptr[:-1]
    with pytest.raises(ValueError, match="an indptr of 12 numbers"):
        as_counts(matrix)


@pytest.mark.parametrize("form", ["csr", "csc", "bsr", "coo", "lil", "dok", "dia"])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csr_array])
def test_whole_matrices_are_taken(form, kind):
    np.testing.assert_array_equal(as_counts(kind(X).asformat(form)).to_dense(), X)
    empty = kind(np.zeros((3, 2))).asformat(form)
    np.testing.assert_array_equal(as_counts(empty).to_dense(), np.zeros((3, 2)))


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_damaged_tensors_are_refused(layout):
    tensor = getattr(torch.tensor(X), f"to_sparse_{layout}")()
    indices = {"csr": "col_indices", "csc": "row_indices", "coo": "_indices"}[layout]
    np.testing.assert_array_equal(as_counts(tensor).to_dense(), X)
    getattr(tensor, indices)().view(-1)[0] = 57
    with pytest.raises(ValueError, match="X must be a sparse matrix whose indices fit its shape"):
        as_counts(tensor)
