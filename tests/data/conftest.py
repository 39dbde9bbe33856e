"""A table with an empty row and an empty column, and its counts."""

import numpy as np
import pytest
import scipy.sparse as sp

from pnmf_pyro.data.counts import as_counts
from tests.support.data import table_with_empty_parts


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    return table_with_empty_parts()


@pytest.fixture(params=["dense", "sparse"])
def counts(request, X):
    return as_counts(sp.csr_matrix(X) if request.param == "sparse" else X)
