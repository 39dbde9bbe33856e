"""Prediction of samples without themselves, against the lengthscale."""

import numpy as np
import pytest

from pnmf_pyro import PNMF
from pnmf_pyro.analysis.lengthscales import lengthscale_profile
from tests.support.data import tissue
from tests.support.settings import NATURAL, fitted_in_space, unconverged

pytestmark = unconverged


@pytest.fixture(scope="module")
def spatial():
    data = tissue(N=60)
    return fitted_in_space(data), data[0]


def test_the_profile_is_low_where_prediction_is_good(spatial):
    model, X = spatial
    before = {k: v.clone() for k, v in model.model_.state_dict().items()}
    profile = lengthscale_profile(model, X)
    tried, loss = profile
    assert tried.shape == loss.shape == (25,)
    assert (np.diff(tried) > 0).all()
    own = float(model.model_.prior.kernel.lengthscale)
    np.testing.assert_array_equal(profile.learned, [own])
    at_own, short = (lengthscale_profile(model, X, [one]).loss for one in (own, own / 50))
    assert at_own < short
    for name, value in model.model_.state_dict().items():
        assert (value == before[name]).all()


def test_a_model_alone_has_the_same_profile(spatial):
    model, X = spatial
    ours, bare = (lengthscale_profile(fit, X, [0.1, 0.5]).loss for fit in (model, model.model_))
    np.testing.assert_array_equal(ours, bare)


def test_what_has_no_profile(spatial, counts):
    model, X = spatial
    with pytest.raises(ValueError, match=r"X must be the counts of the fit, of shape \(60, 20\)"):
        lengthscale_profile(model, X[:, :5])
    with pytest.raises(ValueError, match="lengthscales must be positive"):
        lengthscale_profile(model, X, [0.0])
    with pytest.raises(ValueError, match="knows no space"):
        lengthscale_profile(PNMF(2, random_state=0, max_iter=5, **NATURAL).fit(counts), counts)
