"""Places: how far apart they are."""

import numpy as np
import torch

from pnmf_pyro.data.places import Places, spacing, typical_lengthscale


def test_spacing_and_start():
    places = Places(torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [4, 0]], dtype=torch.float64))
    assert spacing(places) == 1.0
    np.testing.assert_allclose(typical_lengthscale(places), 2.0)
