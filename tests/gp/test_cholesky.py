"""Solutions and diagonals by Cholesky factors, and the jitter that these need."""

import numpy as np
import pytest
import torch

from pnmf_pyro.gp.cholesky import inverse_diagonal, jittered_cholesky, solve
from tests.support.svgp import TIGHT


@pytest.mark.parametrize("n", [3, 128, 200])
def test_inverse_diagonal(n):
    root = torch.randn(2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.mT + torch.eye(n, dtype=torch.float64)
    found = inverse_diagonal(torch.linalg.cholesky(matrix))
    expected = torch.linalg.inv(matrix).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("draws", [(), (3,), (2, 3)])
def test_solve(draws):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 5, 5, dtype=torch.float64, generator=generator)
    matrix = root @ root.mT + torch.eye(5, dtype=torch.float64)
    b = torch.randn(*draws, 2, 5, dtype=torch.float64, generator=generator)
    found = solve(torch.linalg.cholesky(matrix), b)
    torch.testing.assert_close(torch.einsum("lij,...lj->...li", matrix, found), b, **TIGHT)


def test_jitter_grows_with_a_warning_and_gives_up_with_an_error():
    singular = torch.ones(3, 3, dtype=torch.float64) - 1e-7 * torch.eye(3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="jitter was raised"):
        tril = jittered_cholesky(singular, 1e-9)
    assert torch.isfinite(tril).all()
    with pytest.raises(ValueError, match="inducing points is not positive definite, even with"):
        jittered_cholesky(-torch.eye(2, dtype=torch.float64), 1e-9)


def test_only_the_matrices_that_need_it_get_more_jitter():
    matrices = torch.eye(2, dtype=torch.float64).repeat(4, 1, 1)
    matrices[2] = torch.tensor([[1.0, 1 + 5e-6], [1 + 5e-6, 1.0]])
    with pytest.warns(UserWarning, match=r"of the places 12 is nearly singular.*1e-09 to 1e-05"):
        tril = jittered_cholesky(matrices, 1e-9, "places", np.arange(10, 14))
    product = tril @ tril.mT
    for i, jitter in enumerate((1e-9, 1e-9, 1e-5, 1e-9)):
        raised = matrices[i] + jitter * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(product[i], raised, **TIGHT)


def test_matrices_that_cannot_be_factorised_are_named():
    matrices = torch.eye(2, dtype=torch.float64).repeat(9, 1, 1)
    matrices[2:] *= -1
    names = np.arange(10, 19)
    with pytest.raises(ValueError, match=r"places 12, 13, 14, 15, 16 and 2 more is not positive"):
        jittered_cholesky(matrices, 1e-9, "places", names)
    matrices[1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"places 11 is not finite"):
        jittered_cholesky(matrices, 1e-9, "places", names)
