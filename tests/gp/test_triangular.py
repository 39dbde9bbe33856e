"""Products and solves front by front against dense matrices (identity 5)."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.fronts import grid_sizes
from pnmf_pyro.gp.neighbors import build_graph
from pnmf_pyro.gp.triangular import Triangle
from tests.support.vecchia import points_of

pytestmark = pytest.mark.cuda

N, L = 60, 3
OPERATIONS = {
    "multiply": lambda A, x: A @ x,
    "multiply_transposed": lambda A, x: A.mT @ x,
    "solve": torch.linalg.solve,
    "solve_transposed": lambda A, x: torch.linalg.solve(A.mT, x),
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return request.param


def graph_of(kind, K):
    points = {
        "plane": lambda: points_of(N),
        "line": lambda: np.linspace(0, 1, N)[:, None] ** [1, 1],
        "one place": lambda: np.zeros((N, 2)),
    }[kind]()
    return build_graph(Places(torch.tensor(points)), K)


def triangle_of(kind="plane", K=5, C=L, dtype=torch.float64, device="cpu", fronts=True):
    """A triangle, and I - B of each of L components, dense, in float64."""
    graph = graph_of(kind, K)
    predecessors = (graph.in_fronts() if fronts else graph).predecessors
    random = np.random.default_rng(0)
    values = torch.tensor(random.normal(size=(N, C, K)) / K).to(dtype)
    weights = values * torch.tensor(predecessors >= 0)[:, None]
    dense = torch.eye(N, dtype=torch.float64).repeat(L, 1, 1)
    for i, near in enumerate(predecessors):
        for k, j in enumerate(near):
            for l in range(L):
                dense[l, i, j] -= weights[i, l % C, k] if j >= 0 else 0.0
    return Triangle(predecessors, weights.to(device)), dense


def vectors(R, dtype=torch.float64, device="cpu"):
    return torch.tensor(np.random.default_rng(1).normal(size=(N, L, R))).to(device, dtype)


def expected(name, dense, x):
    return OPERATIONS[name](dense, x.cpu().double().movedim(0, 1)).movedim(1, 0)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("C", [1, L])
@pytest.mark.parametrize(("kind", "K"), [("plane", 5), ("plane", 59), ("line", 4)])
def test_dense_triangles_in_float64(name, R, C, kind, K, device):
    triangle, dense = triangle_of(kind, K, C, device=device)
    x = vectors(R, device=device)
    before = x.clone()
    found = getattr(triangle, name)(x)
    torch.testing.assert_close(found.cpu(), expected(name, dense, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("R", [1, 4])
def test_weights_in_float32(name, R, device):
    """To 1e-5 for vectors in float32; in float64 to rounding, with the weights as they are."""
    triangle, dense = triangle_of(dtype=torch.float32, device=device)
    for dtype, close in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = vectors(R, dtype, device)
        found = getattr(triangle, name)(x)
        assert found.dtype == dtype
        right = expected(name, dense, x)
        torch.testing.assert_close(found.cpu().double(), right, rtol=close, atol=close)


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_order_with_predecessors_first(name):
    triangle, dense = triangle_of(fronts=False)
    found = getattr(triangle, name)(vectors(2))
    torch.testing.assert_close(found, expected(name, dense, vectors(2)), rtol=1e-12, atol=1e-12)


def test_places_that_are_all_one():
    """Each is conditioned on others at its own place: a front for each at worst."""
    triangle, dense = triangle_of("one place", 4)
    x = vectors(1)
    torch.testing.assert_close(triangle.solve(x), expected("solve", dense, x))


def test_products_in_small_parts_are_the_same(monkeypatch):
    triangle, _ = triangle_of()
    x = vectors(2)
    whole = triangle.multiply(x), triangle.multiply_transposed(x)
    monkeypatch.setattr("pnmf_pyro.gp.triangular.CHUNK", 7)
    assert torch.equal(triangle.multiply(x), whole[0])
    torch.testing.assert_close(triangle.multiply_transposed(x), whole[1])


@pytest.mark.parametrize("C", [1, L])
def test_diagonals_of_the_grids(C, device):
    triangle, dense = triangle_of(C=C, device=device)
    D = torch.tensor(np.random.default_rng(2).gamma(2.0, size=(N, L, 1)))
    found = list(triangle.grid_diagonals(D.to(device)))
    assert [len(one) for one in found] == grid_sizes(N)
    for one in found:
        M = len(one)
        A = dense[:, :M, :M]
        Q = A.mT @ (D[:M, :, 0].T[..., None] * A)
        torch.testing.assert_close(one[..., 0].cpu(), Q.diagonal(dim1=1, dim2=2).T)


@pytest.mark.parametrize("C", [1, L])
def test_what_is_passed_on_to_the_grids(C, device, monkeypatch):
    """From the last position on, all it has, in proportion to the size of its weights."""
    monkeypatch.setattr("pnmf_pyro.gp.triangular.CHUNK", 50)
    triangle, dense = triangle_of(C=C, device=device)
    x = np.random.default_rng(2).gamma(1.0, size=(N, L, 1))
    found = triangle.passed_on(torch.tensor(x).to(device))
    for M, one in zip(reversed(grid_sizes(N)), found, strict=True):
        expected = x[..., 0].T.copy()
        for l, i in itertools.product(range(L), range(N - 1, M - 1, -1)):
            shares = dense[l, i, :i].abs().numpy()
            expected[l, :i] += expected[l, i] * shares / shares.sum()
        np.testing.assert_allclose(one[..., 0].T.cpu(), expected[:, :M], rtol=1e-10)
        np.testing.assert_allclose(one.sum(0).cpu(), x.sum(0), rtol=1e-10)


def test_a_position_whose_weights_are_0_passes_nothing_on():
    triangle, _ = triangle_of(dtype=torch.float32)
    triangle.weights[30:] = 0  # as of places far apart
    again = Triangle(triangle.predecessors, triangle.weights)
    *_, coarsest = (one.clone() for one in again.passed_on(torch.full((N, L, 1), 1e5)))
    assert coarsest.isfinite().all()
    assert (coarsest.sum(0) < 30.1e5).all()


def test_copies_solve_alike():
    triangle, _ = triangle_of()
    for other in (copy.deepcopy(triangle), pickle.loads(pickle.dumps(triangle))):
        assert torch.equal(other.solve(vectors(1)), triangle.solve(vectors(1)))


def test_solves_leave_the_number_of_threads_alone():
    triangle, _ = triangle_of()
    before = torch.get_num_threads()
    triangle.solve(vectors(1))
    assert torch.get_num_threads() == before


def test_columns_of_a_block_end_with_it():
    """Or each halving of the places takes as many row starts as there are places."""
    triangle, _ = triangle_of()
    ends = [grid * L for grid in grid_sizes(N)]
    assert [len(block.transposed.starts) - 1 for block in triangle.blocks] == ends
    assert sum(ends) < 3 * N * L
