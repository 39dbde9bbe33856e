"""Places: how far apart they are."""

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import Places, check_coordinates, spacing, typical_lengthscale


def test_spacing_and_start():
    places = Places(torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [4, 0]], dtype=torch.float64))
    assert spacing(places) == 1.0
    np.testing.assert_allclose(typical_lengthscale(places), 2.0)


@pytest.mark.parametrize("scale", [1e200, 1e-300, -1e101])
def test_coordinates_whose_squares_are_no_numbers_are_refused(scale):
    with pytest.raises(ValueError, match="Use another unit"):
        check_coordinates(scale * np.random.default_rng(0).uniform(1, 2, (5, 2)), 5)
