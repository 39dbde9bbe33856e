"""Orderings and neighbours against brute force."""

import contextlib

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from pnmf_pyro.data.random_state import gumbel_noise
from pnmf_pyro.gp import neighbors, ordering
from pnmf_pyro.gp.neighbors import build_graph, nearest, neighbors_of_batch, order_spots
from pnmf_pyro.gp.ordering import max_min_order


def places(kind: str, N: int = 300) -> np.ndarray:
    random = np.random.default_rng(7)
    if kind == "grid":
        side = int(np.sqrt(N))
        return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 1.0
    if kind == "clusters":
        return random.normal(size=(6, 2))[random.integers(6, size=N)] + random.normal(
            scale=1e-3, size=(N, 2)
        )
    if kind == "repeated":
        return random.integers(0, 6, size=(N, 2)) * 1.0
    return random.random((N, {"line": 1, "plane": 2, "space": 3}[kind]))


KINDS = ("line", "plane", "space", "grid", "clusters", "repeated")


def distances(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.sqrt(((A[:, None] - B[None]) ** 2).sum(-1))


def exponential(lengthscale: float = 0.3):
    return lambda A, B: 2.0 * torch.exp(-torch.cdist(A, B) / lengthscale)


def multi_group(lengthscale: float = 0.3, a: float = 1.0, p: int = 2):
    """The multi-group kernel on rows (x, g); Li et al. 2021."""

    def covariance(A, B):
        other = (A[..., :, None, p] != B[..., None, :, p]).double()
        v = 1 / (1 + a * other)
        r = torch.cdist(A[..., :p], B[..., :p], compute_mode="donot_use_mm_for_euclid_dist")
        return 2.0 * v ** (p / 2) * torch.exp(-v.sqrt() * r / lengthscale)

    return covariance


@pytest.fixture
def approximate(monkeypatch):
    """Approximate orderings of a few hundred points."""
    monkeypatch.setattr(ordering, "EXACT_UP_TO", 10)
    monkeypatch.setattr(ordering, "EXACT_PICKS", 5)


def distance_when_picked(points: np.ndarray, order: np.ndarray) -> np.ndarray:
    between = distances(points[order], points[order])
    return np.array([np.inf] + [between[i, :i].min() for i in range(1, len(order))])


@pytest.mark.parametrize("kind", KINDS)
def test_exact_order_picks_the_farthest(kind):
    points = places(kind)
    order, distance = max_min_order(points)
    assert sorted(order) == list(range(len(points)))
    np.testing.assert_allclose(distance, distance_when_picked(points, order), rtol=1e-12)
    between = distances(points, points)
    for i in range(1, len(points)):
        left = np.setdiff1d(order, order[:i])
        farthest = between[np.ix_(left, order[:i])].min(1).max()
        assert distance[i] >= farthest * (1 - 1e-12)


@pytest.mark.usefixtures("approximate")
@pytest.mark.parametrize("kind", KINDS)
def test_approximate_order_is_within_the_square_root_of_two(kind):
    points = places(kind)
    order, _ = max_min_order(points)
    assert sorted(order) == list(range(len(points)))
    between = distances(points, points)
    picked = distance_when_picked(points, order)
    for i in range(1, len(points)):
        farthest = between[np.ix_(order[i:], order[:i])].min(1).max()
        assert picked[i] >= farthest / np.sqrt(2) * (1 - 1e-12)


@pytest.mark.parametrize("approximately", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 7, 120])
def test_neighbours_are_the_nearest_predecessors(kind, K, approximately, request):
    if approximately:
        request.getfixturevalue("approximate")
    points = places(kind)
    graph = build_graph(points, K)
    ordered = points[graph.order]
    assert sorted(graph.order) == list(range(len(points)))
    for i, row in enumerate(graph.predecessors):
        found = row[row >= 0]
        assert len(found) == min(i, K) == len(set(found))
        assert (found < i).all()
        near = np.sort(distances(ordered[i : i + 1], ordered[:i])[0])[: len(found)]
        np.testing.assert_array_equal(distances(ordered[i : i + 1], ordered[found])[0], near)


def test_graph_in_the_order_of_the_user():
    points = places("plane", 40)
    graph = build_graph(points, 5)
    rows = graph.neighbors_of()
    for i, spot in enumerate(graph.order):
        expected = [graph.order[j] if j >= 0 else -1 for j in graph.predecessors[i]]
        assert list(rows[spot]) == expected
    np.testing.assert_array_equal(graph.neighbors_of([3, 1]), rows[[3, 1]])


def test_neighbours_of_a_batch_are_those_of_the_graph():
    points = places("plane", 200)
    groups = np.random.default_rng(0).integers(2, size=200)
    options = {
        "groups": groups,
        "covariance": multi_group(),
        "features": np.column_stack([points, groups]),
    }
    graph = build_graph(points, 6, **options)
    spots = [graph.order[0], graph.order[3], 17, 4, 150]
    found = neighbors_of_batch(graph.order, spots, points, 6, **options)
    np.testing.assert_array_equal(found, graph.neighbors_of(spots))


@pytest.mark.parametrize("a", [0.0, 0.5, 1e6])
def test_with_groups_the_kernel_says_what_is_near(a):
    points = places("plane", 150)
    groups = np.random.default_rng(0).choice(3, size=150, p=[0.6, 0.38, 0.02])  # one of few
    rows = np.column_stack([points, groups])
    covariance = multi_group(a=a)
    K = 9
    graph = build_graph(points, K, groups=groups, covariance=covariance, features=rows)
    matrix = covariance(torch.tensor(rows), torch.tensor(rows)).numpy()
    matrix = matrix[np.ix_(graph.order, graph.order)]
    for i, row in enumerate(graph.predecessors):
        found = row[row >= 0]
        assert len(found) == min(i, K) == len(set(found))
        assert (found < i).all()
        best = np.sort(matrix[i, :i])[::-1][: len(found)]
        np.testing.assert_allclose(np.sort(matrix[i, found])[::-1], best, rtol=1e-12)


def grouped(a: float, N: int = 400):
    points = places("plane", N)
    groups = np.random.default_rng(0).integers(3, size=N)
    rows = np.column_stack([points, groups])
    options = {"groups": groups, "covariance": multi_group(a=a), "features": rows}
    return points, groups, order_spots(points, **options)


def test_groups_that_share_their_field_are_ordered_as_one():
    points, _, order = grouped(0.0)
    np.testing.assert_array_equal(order, max_min_order(points)[0])


def test_groups_that_share_nothing_are_ordered_each_by_itself():
    points, groups, order = grouped(1e6)
    for label in range(3):
        own = order[groups[order] == label]
        picked = distance_when_picked(points, own)
        between = distances(points[own], points[own])
        farthest = [between[i:, :i].min(1).max() for i in range(1, len(own))]
        assert (picked[1:] >= 0.999 * np.array(farthest)).all()


@pytest.mark.usefixtures("approximate")
@pytest.mark.parametrize("a", [0.0, 0.1, 1e6])
def test_approximate_order_with_groups(a):
    points, groups, order = grouped(a, 150)
    assert sorted(order) == list(range(150))
    rows = np.column_stack([points, groups])
    apart = ordering.group_embedding(points, groups, rows, multi_group(a=a))
    embedded = np.column_stack([points, apart[groups]])
    between = distances(embedded[order], embedded[order])
    for i in range(1, 150):
        farthest = between[i:, :i].min(1).max()
        assert between[i, :i].min() >= farthest / np.sqrt(2) * (1 - 1e-9)


@pytest.mark.parametrize("a", [0.01, 0.2])
def test_distance_between_groups_is_the_one_of_equal_covariance(a):
    """With an RBF, exp(-c^2 / (2 l^2)) = v^(p / 2) at the same place."""
    points = places("plane", 400)
    groups = np.random.default_rng(0).integers(3, size=400)
    rows = np.column_stack([points, groups])

    def covariance(A, B):
        v = 1 / (1 + a * (A[..., :, None, 2] != B[..., None, :, 2]).double())
        return v * torch.exp(-v * torch.cdist(A[..., :2], B[..., :2]).square() / (2 * 0.3**2))

    embedding = ordering.group_embedding(points, groups, rows, covariance)
    apart = distances(embedding, embedding)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(apart, 0.3 * np.sqrt(2 * np.log(1 + a)), rtol=0.1)


def test_probabilistic_neighbours_are_seeded_predecessors():
    points = places("plane", 200)
    options = {"method": "probabilistic", "covariance": exponential()}
    graph = build_graph(points, 6, **options, random_state=1)
    again = build_graph(points, 6, **options, random_state=1)
    other = build_graph(points, 6, **options, random_state=2)
    np.testing.assert_array_equal(graph.predecessors, again.predecessors)
    assert (graph.predecessors != other.predecessors).any()
    near = build_graph(points, neighbors.CANDIDATES * 6).predecessors
    for i, row in enumerate(graph.predecessors):
        found = row[row >= 0]
        assert len(found) == min(i, 6) == len(set(found))
        assert set(found) <= set(near[i])


def test_probabilistic_neighbours_follow_the_kernel():
    """Of three places the first is drawn with its share; P(false alarm) below 1e-4 (4 sd)."""
    score = np.log(np.tile([3.0, 2.0, 1.0], (20_000, 1)))
    noise = gumbel_noise(7, np.arange(20_000)[:, None], np.arange(3))
    drawn = neighbors._perturbed(score, 3, noise).argsort(1)[:, ::-1]
    first = (drawn[:, 0] == 0).mean()
    assert abs(first - 1 / 2) < 4 * np.sqrt(0.25 / 20_000)
    second_given_first = (drawn[drawn[:, 0] == 0, 1] == 1).mean()
    assert abs(second_given_first - 2 / 3) < 4 * np.sqrt(0.23 / 10_000)


def test_only_the_nearest_candidates_can_be_drawn():
    score = np.log([[4.0, 3.0, 2.0, 1e-3, 1e-4]])
    drawn = neighbors._perturbed(score, 3, np.zeros((1, 5)))
    np.testing.assert_array_equal(np.isfinite(drawn), [[True, True, True, False, False]])


def test_noise_of_pairs_is_gumbel_and_independent():
    noise = gumbel_noise(3, np.arange(2000)[:, None], np.arange(10))
    assert kstest(noise.ravel(), "gumbel_r").pvalue > 1e-4
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    other = gumbel_noise(4, np.arange(2000)[:, None], np.arange(10))
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(noise.size)


@pytest.mark.parametrize("method", neighbors.METHODS)
def test_a_batch_draws_the_neighbours_of_the_graph(method):
    points = places("plane", 150)
    options = {"method": method, "covariance": exponential(), "random_state": 5}
    graph = build_graph(points, 4, **options)
    spots = np.array([7, 140, 3, 99])
    found = neighbors.neighbors_of_batch(graph.order, spots, points, 4, **options)
    np.testing.assert_array_equal(np.sort(found, 1), np.sort(graph.neighbors_of(spots), 1))


def test_chance_leaves_global_seeds_alone():
    np.random.seed(0)  # noqa: NPY002 - the global state is what is tested
    torch.manual_seed(0)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    build_graph(
        places("plane", 50), 3, method="probabilistic", covariance=exponential(), random_state=None
    )
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_spots_of_new_places(kind):
    points = places(kind)
    new = places(kind)[::3] + 0.01
    found = nearest(points, new, 8)
    between = distances(new, points)
    expected = np.sort(between, 1)[:, :8]
    np.testing.assert_array_equal(np.take_along_axis(between, found, 1), expected)


def test_nearest_spots_with_groups():
    points, new = places("plane", 100), places("space", 30)[:, :2]
    groups = np.r_[np.zeros(97), np.ones(3)]
    rows, new_rows = np.column_stack([points, groups]), np.column_stack([new, np.ones(30)])
    covariance = multi_group(a=2.0)
    options = {"groups": groups, "covariance": covariance}
    found = nearest(points, new, 6, **options, features=rows, new_features=new_rows)
    matrix = covariance(torch.tensor(new_rows), torch.tensor(rows)).numpy()
    best = -np.sort(-matrix, 1)[:, :6]
    np.testing.assert_allclose(np.take_along_axis(matrix, found, 1), best, rtol=1e-12)


@pytest.mark.parametrize("N", [1, 2, 30])
def test_identical_places(N):
    with pytest.warns(UserWarning, match="using K") if N < 5 else contextlib.nullcontext():
        graph = build_graph(np.ones((N, 2)), 4)
    assert sorted(graph.order) == list(range(N))
    assert ((graph.predecessors >= 0).sum(1) == np.minimum(np.arange(N), 4)).all()


def test_too_many_neighbours_are_all_there_are():
    with pytest.warns(UserWarning, match="K=99 neighbours .* only 19; using K=19"):
        graph = build_graph(places("plane", 20), 99)
    assert graph.K == 19
    with pytest.warns(UserWarning, match="only 20; using K=20"):
        assert nearest(places("plane", 20), places("plane", 3), 99).shape == (3, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinates": np.ones(5)}, r"coordinates must be numbers of shape \(places, columns\)"),
        ({"coordinates": np.ones((0, 2))}, "one of each at least"),
        ({"coordinates": np.array([["a", "b"]])}, "coordinates must be numbers"),
        ({"coordinates": np.array([[0.0, 1], [np.nan, 1], [2, np.inf]])}, r"rows \[1, 2\] are not"),
        ({"K": 0}, "K must be an integer of at least 1; got 0"),
        ({"K": 2.5}, "K must be an integer"),
        ({"K": True}, "K must be an integer"),
        ({"method": "near"}, "method must be one of 'knn', 'probabilistic'; got 'near'"),
        ({"method": "probabilistic"}, "method='probabilistic' needs a covariance"),
        ({"groups": np.zeros(30)}, "groups needs a covariance"),
        ({"groups": np.zeros(4)}, "groups must have one entry for each of the 30 rows"),
        ({"features": np.zeros((4, 2))}, "features must have one entry for each of the 30 rows"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        build_graph(**{"coordinates": places("plane", 30), "K": 3} | change)


def test_new_places_of_another_dimension():
    with pytest.raises(ValueError, match="new_coordinates must have 2 columns"):
        nearest(places("plane"), places("space"), 3)
    with pytest.raises(ValueError, match="new_coordinates must be finite"):
        nearest(places("plane"), np.array([[np.nan, 0.0]]), 3)
