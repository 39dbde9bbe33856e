"""Solutions and diagonals by Cholesky factors, and the jitter that these need."""

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
    with pytest.raises(ValueError, match="jitter"):
        jittered_cholesky(-torch.eye(2, dtype=torch.float64), 1e-9)
