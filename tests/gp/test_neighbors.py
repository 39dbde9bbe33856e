"""Orderings and neighbours against brute force."""

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp import neighbors, ordering
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.neighborhoods import Neighborhoods
from pnmf_pyro.gp.neighbors import build_graph, nearest, nearest_before
from pnmf_pyro.gp.ordering import max_min_order


def points_of(kind: str, N: int = 300) -> np.ndarray:
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


def places_of(points: np.ndarray, groups: np.ndarray | None = None) -> Places:
    return Places(torch.tensor(points), None if groups is None else torch.tensor(groups))


def exponential(lengthscale: float = 0.3):
    return lambda A, B: 2.0 * torch.exp(-torch.cdist(A.coordinates, B.coordinates) / lengthscale)


def multi_group(lengthscale: float = 0.3, a: float = 1.0, p: int = 2):
    """The multi-group kernel; Li et al. 2021."""

    def covariance(A, B):
        other = (A.groups[..., :, None] != B.groups[..., None, :]).double()
        v = 1 / (1 + a * other)
        exactly = "donot_use_mm_for_euclid_dist"
        r = torch.cdist(A.coordinates, B.coordinates, compute_mode=exactly)
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
    points = points_of(kind)
    order = max_min_order(points)
    assert sorted(order) == list(range(len(points)))
    distance = distance_when_picked(points, order)
    between = distances(points, points)
    for i in range(1, len(points)):
        left = np.setdiff1d(order, order[:i])
        farthest = between[np.ix_(left, order[:i])].min(1).max()
        assert distance[i] >= farthest * (1 - 1e-12)


@pytest.mark.usefixtures("approximate")
@pytest.mark.parametrize("kind", KINDS)
def test_approximate_order_is_within_the_square_root_of_two(kind):
    points = points_of(kind)
    order = max_min_order(points)
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
    points = points_of(kind)
    graph = build_graph(places_of(points), K)
    ordered = points[graph.order]
    assert sorted(graph.order) == list(range(len(points)))
    for i, row in enumerate(graph.predecessors):
        found = row[row >= 0]
        assert len(found) == min(i, K) == len(set(found))
        assert (found < i).all()
        near = np.sort(distances(ordered[i : i + 1], ordered[:i])[0])[: len(found)]
        np.testing.assert_array_equal(distances(ordered[i : i + 1], ordered[found])[0], near)


def test_positions_are_the_ordering_read_backwards():
    graph = build_graph(places_of(points_of("plane", 40)), 5)
    assert graph.N == 40
    np.testing.assert_array_equal(graph.order[graph.position], np.arange(40))


def test_the_last_places_have_the_predecessors_of_the_graph():
    points = points_of("plane", 200)
    places = places_of(points, np.random.default_rng(0).integers(2, size=200))
    graph = build_graph(places, 6, multi_group())
    found = nearest_before(places[graph.order], 6, 150, multi_group())
    np.testing.assert_array_equal(found, graph.predecessors[150:])


@pytest.mark.parametrize("a", [0.0, 0.5, 1e6])
def test_with_groups_the_kernel_says_what_is_near(a):
    points = points_of("plane", 150)
    groups = np.random.default_rng(0).choice(3, size=150, p=[0.6, 0.38, 0.02])  # one of few
    places, covariance = places_of(points, groups), multi_group(a=a)
    K = 9
    graph = build_graph(places, K, covariance)
    matrix = covariance(places, places).numpy()
    matrix = matrix[np.ix_(graph.order, graph.order)]
    for i, row in enumerate(graph.predecessors):
        found = row[row >= 0]
        assert len(found) == min(i, K) == len(set(found))
        assert (found < i).all()
        best = np.sort(matrix[i, :i])[::-1][: len(found)]
        np.testing.assert_allclose(np.sort(matrix[i, found])[::-1], best, rtol=1e-12)


@pytest.mark.parametrize("distances", [[0, 1, 1, 1], [0, 1, 1, 3], [0, 2, 4, 7]])
def test_groups_at_one_distance_are_searched_together(distances):
    """The K of largest covariance, by brute force; groups lie on a line, or all apart."""
    points, random = points_of("plane", 160), np.random.default_rng(1)
    groups = random.integers(4, size=160)
    at = np.asarray(distances, float)
    apart = 1 - np.eye(4) if at.max() == 1 else np.abs(at[:, None] - at)
    kernel = SpatialKernel("Matern32", 0.3, 1.0, 2, group_diff_param=0.7, group_distances=apart)
    places, K = places_of(points, groups), 8
    covariance = Neighborhoods(kernel, places, 2, K)._covariance()
    found = nearest(places[:120], places[120:], K, covariance)
    matrix = covariance(places[120:], places[:120]).numpy()
    for row, values in zip(found, matrix, strict=True):
        assert len(set(row)) == K
        np.testing.assert_allclose(np.sort(values[row]), np.sort(values)[-K:], rtol=1e-12)


@pytest.mark.parametrize("a", [0.05, 0.7])
def test_pairs_of_groups_are_searched_by_what_they_share(a):
    """The K of largest covariance, by brute force, where parts of a pair differ in what they do."""
    points, random = points_of("plane", 160), np.random.default_rng(1)
    groups = random.integers(6, size=160)
    apart = {"group_distances": 1 - np.eye(2), "group_distances_2": 1 - np.eye(3)}
    kernel = SpatialKernel("Matern32", 0.3, 1.0, 2, group_diff_param=0.7, **apart)
    kernel.group_diff_param_2.fill_(a)
    places, K = places_of(points, groups), 8
    covariance = Neighborhoods(kernel, places, 2, K)._covariance()
    found = nearest(places[:120], places[120:], K, covariance)
    matrix = covariance(places[120:], places[:120]).numpy()
    for row, values in zip(found, matrix, strict=True):
        assert len(set(row)) == K
        np.testing.assert_allclose(np.sort(values[row]), np.sort(values)[-K:], rtol=1e-12)


def test_samples_are_predicted_from_either_part_of_a_pair():
    points, codes = points_of("plane", 300), np.random.default_rng(2).integers(6, size=300)
    judged = torch.arange(0, 300, 7)
    found = neighbors.neighbours_of(
        places_of(points, codes), judged, "leave-one-out", (2, 3)
    ).numpy()
    own, sections, types = np.split(codes[found], [16, 24], axis=1)
    mine = codes[judged.numpy()][:, None]
    assert (own == mine).all()
    assert ((sections // 3 == mine // 3) & (sections != mine)).all()
    assert ((types % 3 == mine % 3) & (types != mine)).all()
    between = distances(points, points)
    for i, row in zip(judged.tolist(), found[:, 24:], strict=True):
        pool = np.flatnonzero((codes % 3 == codes[i] % 3) & (codes != codes[i]))
        assert set(row) == set(pool[np.argsort(between[i, pool])[:8]])


def grouped(a: float, N: int = 400):
    points = points_of("plane", N)
    groups = np.random.default_rng(0).integers(3, size=N)
    return points, groups, build_graph(places_of(points, groups), 3, multi_group(a=a)).order


def test_groups_that_share_their_field_are_ordered_as_one():
    points, _, order = grouped(0.0)
    np.testing.assert_array_equal(order, max_min_order(points))


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
    apart = ordering.group_embedding(places_of(points, groups), multi_group(a=a))
    embedded = np.column_stack([points, apart])
    between = distances(embedded[order], embedded[order])
    for i in range(1, 150):
        farthest = between[i:, :i].min(1).max()
        assert between[i, :i].min() >= farthest / np.sqrt(2) * (1 - 1e-9)


@pytest.mark.parametrize("a", [0.01, 0.2])
def test_distance_between_groups_is_the_one_of_equal_covariance(a):
    """With an RBF, exp(-c^2 / (2 l^2)) = v^(p / 2) at the same place."""
    points = points_of("plane", 400)
    groups = np.random.default_rng(0).integers(3, size=400)

    def covariance(A, B):
        v = 1 / (1 + a * (A.groups[..., :, None] != B.groups[..., None, :]).double())
        r = torch.cdist(A.coordinates, B.coordinates)
        return v * torch.exp(-v * r.square() / (2 * 0.3**2))

    embedding = ordering.group_embedding(places_of(points, groups), covariance)
    assert len(np.unique(embedding, axis=0)) == 3
    of_group = embedding[[np.flatnonzero(groups == g)[0] for g in range(3)]]
    apart = distances(of_group, of_group)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(apart, 0.3 * np.sqrt(2 * np.log(1 + a)), rtol=0.1)


def test_probabilistic_neighbours_are_seeded_predecessors():
    places = places_of(points_of("plane", 200))
    graph, again, other = (
        build_graph(places, 6, exponential(), np.random.RandomState(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(graph.predecessors, again.predecessors)
    assert (graph.predecessors != other.predecessors).any()
    near = build_graph(places, neighbors.CANDIDATES * 6).predecessors
    for i, row in enumerate(graph.predecessors):
        found = row[row >= 0]
        assert len(found) == min(i, 6) == len(set(found))
        assert set(found) <= set(near[i])


def test_probabilistic_neighbours_follow_the_kernel():
    """Of three places the first is drawn with its share; P(false alarm) below 1e-4 (4 sd)."""
    score = np.log(np.tile([3.0, 2.0, 1.0], (20_000, 1)))
    noise = np.random.default_rng(7).gumbel(size=score.shape)
    drawn = neighbors._perturbed(score, 3, noise).argsort(1)[:, ::-1]
    first = (drawn[:, 0] == 0).mean()
    assert abs(first - 1 / 2) < 4 * np.sqrt(0.25 / 20_000)
    second_given_first = (drawn[drawn[:, 0] == 0, 1] == 1).mean()
    assert abs(second_given_first - 2 / 3) < 4 * np.sqrt(0.23 / 10_000)


def test_only_the_nearest_candidates_can_be_drawn():
    score = np.log([[4.0, 3.0, 2.0, 1e-3, 1e-4]])
    drawn = neighbors._perturbed(score, 3, np.zeros((1, 5)))
    np.testing.assert_array_equal(np.isfinite(drawn), [[True, True, True, False, False]])


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_to_new_points_of(kind):
    points = points_of(kind)
    new = points[::3] + 0.01
    found = nearest(places_of(points), places_of(new), 8)
    between = distances(new, points)
    expected = np.sort(between, 1)[:, :8]
    np.testing.assert_array_equal(np.take_along_axis(between, found, 1), expected)


def test_nearest_to_new_places_with_groups():
    places = places_of(points_of("plane", 100), np.arange(100) // 97)
    new = places_of(points_of("space", 30)[:, :2], np.ones(30, int))
    covariance = multi_group(a=2.0)
    found = nearest(places, new, 6, covariance)
    matrix = covariance(new, places).numpy()
    best = -np.sort(-matrix, 1)[:, :6]
    np.testing.assert_allclose(np.take_along_axis(matrix, found, 1), best, rtol=1e-12)


@pytest.mark.parametrize("N", [1, 2, 30])
def test_identical_places(N):
    K = min(4, N - 1)
    graph = build_graph(places_of(np.ones((N, 2))), K)
    assert sorted(graph.order) == list(range(N))
    assert ((graph.predecessors >= 0).sum(1) == np.minimum(np.arange(N), K)).all()


@pytest.mark.parametrize("each", [1, 3, 10])
def test_samples_are_predicted_from_several_places(each):
    """At most `AT_A_PLACE` of each place, the nearest first, never the sample itself."""
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), -1).reshape(-1, 2)
    points = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(grid, each, 0)))
    judged = torch.arange(0, len(points), 7)
    found = neighbors.neighbours_of(Places(points), judged, "leave-one-out").numpy()
    for sample, near in zip(judged.tolist(), found, strict=True):
        assert sample not in near
        assert len(set(near)) == len(near) == neighbors.NEAREST
        _, times = np.unique(points[near].numpy(), axis=0, return_counts=True)
        assert times.max() <= neighbors.AT_A_PLACE
        assert len(times) >= neighbors.NEAREST // neighbors.AT_A_PLACE
