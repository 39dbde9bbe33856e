"""Renumbering in fronts: the same graph, in an order in which many rows are solved at once."""

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.fronts import fronts, grid_sizes, in_fronts
from pnmf_pyro.gp.neighbors import build_graph
from tests.support.vecchia import points_of


@pytest.fixture(scope="module", params=[1, 4, 59])
def graph(request):
    return build_graph(Places(torch.tensor(points_of(60))), request.param)


def longest_chain(predecessors, start, stop):
    """Number of places of the longest chain in which each is conditioned on the one before."""
    depth = np.zeros(len(predecessors), int)
    for i in range(start, stop):
        near = predecessors[i]
        depth[i] = 1 + depth[near[near >= start]].max(initial=0)
    return depth[start:stop].max()


def test_predecessors_and_grids_stay_the_same(graph):
    numbers, predecessors = in_fronts(graph.predecessors)
    assert sorted(numbers) == list(range(60))
    for old, near in zip(numbers, predecessors, strict=True):
        expected = graph.predecessors[old]
        np.testing.assert_array_equal(np.where(near < 0, -1, numbers[near]), expected)
    assert (predecessors < np.arange(60)[:, None]).all()
    assert grid_sizes(60) == [15, 30, 60]
    for M in grid_sizes(60):
        assert set(numbers[:M]) == set(range(M))
    again = graph.in_fronts()
    np.testing.assert_array_equal(again.order, graph.order[numbers])
    np.testing.assert_array_equal(again.predecessors, predecessors)


def test_fronts_are_as_few_as_the_longest_chain(graph):
    _, predecessors = in_fronts(graph.predecessors)
    for start, stop in ((0, 15), (15, 30), (30, 60)):
        found = fronts(predecessors, start, stop)
        assert len(found) == longest_chain(predecessors, start, stop)
        assert [a for a, _ in found] == [start, *(b for _, b in found)][:-1]
        assert found[-1][1] == stop
        for a, b in found:
            assert (predecessors[a:b] < a).all()


def test_any_order_has_fronts(graph):
    for a, b in fronts(graph.predecessors, 0, 60):
        assert (graph.predecessors[a:b] < a).all()


def test_places_that_are_conditioned_on_none_are_one_front():
    numbers, predecessors = in_fronts(np.full((9, 2), -1, np.int32))
    np.testing.assert_array_equal(numbers, np.arange(9))
    assert fronts(predecessors, 0, 9) == [(0, 9)]


@pytest.mark.parametrize("N", [900, 6400])
@pytest.mark.parametrize("lattice", ["plane", "line"])
def test_fronts_of_a_lattice_are_few(N, lattice):
    """Some 20 for each grid; in an order of rows they would be hundreds."""
    n = int(N**0.5)
    points = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) * 1.0
    if lattice == "line":
        points = np.arange(N)[:, None] * 1.0
    graph = build_graph(Places(torch.tensor(points)), 16).in_fronts()
    sizes = grid_sizes(N)
    number = sum(
        len(fronts(graph.predecessors, *ends)) for ends in zip([0, *sizes], sizes, strict=False)
    )
    assert number < 30 * len(sizes)
