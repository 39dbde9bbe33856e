"""Places: how far apart they are."""

import warnings

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import (
    Places,
    check_coordinates,
    lie_over_one_another,
    spacing,
    typical_lengthscale,
    warn_units,
)


def test_spacing_and_start():
    places = Places(torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [4, 0]], dtype=torch.float64))
    assert spacing(places) == 1.0
    np.testing.assert_allclose(typical_lengthscale(places), 2.0)


RANDOM = np.random.default_rng(0)
X = RANDOM.uniform(size=(600, 2))
ONE_OF_FIVE = np.arange(600) % 5


@pytest.mark.parametrize(
    ("coordinates", "parts", "over"),
    [
        (X, ONE_OF_FIVE, True),
        (X, (np.arange(600) < 20).astype(int), True),  # few of them, all over the others
        (np.tile(X[:300].round(1), (2, 1)), np.repeat([0, 1], 300), True),  # one grid for both
        (X, (X[:, 0] > 0.3).astype(int), False),  # side by side
        (X, (5 * X[:, 0]).astype(int) + 5 * (5 * X[:, 1]).astype(int), False),  # tiles
        (X + 2 * ONE_OF_FIVE[:, None], ONE_OF_FIVE, False),  # apart
        (X, np.arange(600), False),  # a name for each sample
        (X, np.where(np.arange(600) < 5, 1, 0), False),  # a few odd ones
        (X, np.where(ONE_OF_FIVE < 2, ONE_OF_FIVE, -1), False),  # mostly of no part
    ],
)
def test_parts_that_lie_over_one_another(coordinates, parts, over):
    assert lie_over_one_another(coordinates, parts) == over
    order = RANDOM.permutation(600)
    assert lie_over_one_another(1e3 * coordinates[order], parts[order]) == over


@pytest.mark.parametrize("scale", [1e200, 1e-300, -1e101])
def test_coordinates_whose_squares_are_no_numbers_are_refused(scale):
    with pytest.raises(ValueError, match="Use another unit"):
        check_coordinates(scale * np.random.default_rng(0).uniform(1, 2, (5, 2)), 5)


@pytest.mark.parametrize(("unit", "told"), [(10.0, False), (300.0, True), (1 / 300, True)])
def test_groups_in_different_units_are_told(unit, told):
    points = np.random.default_rng(0).uniform(size=(80, 2))
    points[40:] *= unit
    places = Places(torch.from_numpy(points), torch.arange(80) // 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_units(places, ["a", "b"])
    said = [str(one.message) for one in caught]
    assert ["in different units" in one for one in said] == [True] * told
    assert all("'a'" in one and "'b'" in one for one in said)


def test_groups_of_few_places_say_nothing_of_units():
    points = np.random.default_rng(0).uniform(size=(49, 2))
    points[40:] *= 300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_units(Places(torch.from_numpy(points), torch.arange(49) // 40), ["a", "b"])
