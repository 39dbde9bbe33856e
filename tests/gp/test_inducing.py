"""Which places are inducing points."""

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.inducing import inducing_points


def test_inducing_points_are_all_distinct_places_where_these_are_few():
    places = Places(torch.tensor([[0.0, 0], [1, 0], [0, 0], [2, 2]], dtype=torch.float64))
    chosen = inducing_points(places, 10, "proportional", np.random.RandomState(0))
    np.testing.assert_array_equal(chosen.coordinates, [[0, 0], [1, 0], [2, 2]])


@pytest.mark.parametrize(
    ("allocation", "expected"), [("proportional", [32, 8]), ("equal", [20, 20])]
)
def test_allocation_of_inducing_points(allocation, expected):
    random = np.random.default_rng(0)
    codes = np.repeat([0, 1], [400, 100])
    places = Places(torch.from_numpy(random.uniform(size=(500, 2))), torch.from_numpy(codes))
    chosen = inducing_points(places, 40, allocation, np.random.RandomState(0))
    np.testing.assert_array_equal(np.bincount(chosen.groups), expected)


def test_derived_allocation_follows_space_and_forgets_no_group():
    random = np.random.default_rng(0)
    far = random.uniform(size=(300, 2)) + np.repeat([[0, 0], [10, 0]], [200, 100], axis=0)
    hidden = random.uniform(size=(5, 2))  # amid the first group, of which each centre is
    coordinates = torch.from_numpy(np.concatenate([far, hidden]))
    codes = torch.from_numpy(np.repeat([0, 1, 2], [200, 100, 5]))
    chosen = inducing_points(Places(coordinates, codes), 30, "derived", np.random.RandomState(0))
    right = chosen.coordinates[:, 0] > 5
    assert (chosen.groups[right] == 1).all()
    assert set(chosen.groups.tolist()) == {0, 1, 2}


def test_allocation_never_exceeds_a_groups_places():
    codes = np.repeat([0, 1], [3, 200])
    coordinates = torch.from_numpy(np.random.default_rng(0).uniform(size=(203, 2)))
    places = Places(coordinates, torch.from_numpy(codes))
    chosen = inducing_points(places, 20, "equal", np.random.RandomState(0))
    np.testing.assert_array_equal(np.bincount(chosen.groups), [3, 17])
