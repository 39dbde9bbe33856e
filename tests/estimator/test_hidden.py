"""Hidden entries: nothing under a mask has a say, in any kind of fit."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.transforms import get_factors, get_loadings

pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")
N, D = 200, 30


@pytest.fixture(scope="module")
def data():
    """Places, true factors, counts, and which of them are observed."""
    random = np.random.default_rng(0)
    places = random.uniform(0, 10, (N, 2))
    F = np.stack([np.sin(places[:, 0]), np.cos(places[:, 1])], 1)
    X = random.poisson(np.exp(F) @ random.gamma(0.5, 6.0, (2, D))).astype(np.float64)
    return places, F, X, random.random((N, D)) > 0.1


def fitted(X, mask=None, **given):
    return pnmf_pyro.fit(X, n_components=2, mask=mask, max_iter=40, **given)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"likelihood": "negative-binomial"},
        {"size_factors": np.linspace(0.5, 2, N)},
        {"batch_size": 50, "y_batch_size": 15},
        {"coords": True},
        {"coords": True, "local": True, "K": 10},
        {"mode": "simple"},
        {"E": 2},
    ],
    ids=str,
)
def test_what_is_hidden_has_no_say(data, how):
    """Other values below the mask, the same fit."""
    places, F, X, mask = data
    given = {**how, "coords": places} if "coords" in how else how
    one = fitted(np.where(mask, X, np.nan), mask, **given)
    other = fitted(np.where(mask, X, 99), mask, **given)
    np.testing.assert_array_equal(get_factors(one), get_factors(other))
    r = np.corrcoef(F.T, np.log(get_factors(one)).T)[:2, 2:]
    assert np.abs(r).max(1).min() > 0.8


def test_recovery_is_that_of_all_entries(data):
    _, F, X, mask = data
    worst = []
    for model in (fitted(X), fitted(X, mask)):
        r = np.abs(np.corrcoef(F.T, np.log(get_factors(model)).T)[:2, 2:])
        worst.append(r.max(1).min())
    assert worst[1] > worst[0] - 0.01


@pytest.mark.parametrize("likelihood", ["poisson", "negative-binomial"])
def test_hiding_nothing_is_no_mask(data, likelihood):
    _, _, X, _ = data
    one, other = (fitted(X, mask, likelihood=likelihood) for mask in (None, np.ones((N, D), bool)))
    np.testing.assert_array_equal(get_factors(one), get_factors(other))
    assert one.elbo_ == other.elbo_


@pytest.mark.filterwarnings("ignore:1 of 30 features have no counts")
def test_a_hidden_feature_or_sample_is_as_if_it_were_not_there(data):
    _, _, X, _ = data
    mask = np.ones((N, D), bool)
    mask[:, 3] = False
    with pytest.warns(UserWarning, match="mask hides all entries of 1 features: 3"):
        one = PNMF(2, mode="lower-bound", random_state=0, max_iter=5).fit(X, mask=mask)
    assert np.isfinite(get_loadings(one)).all()
    assert np.isfinite(one.elbo_)


@pytest.mark.parametrize(
    "kind",
    [
        lambda X, mask: (np.ma.masked_array(X, ~mask), None),
        lambda X, mask: (sp.csr_matrix(X), sp.csr_matrix(mask)),
        lambda X, mask: (pd.DataFrame(X), pd.DataFrame(mask)),
        lambda X, mask: (np.where(mask, X, np.nan), mask.astype(int)),
    ],
)
def test_masks_of_any_kind(data, kind):
    _, _, X, mask = data
    found, expected = fitted(*kind(X, mask)), fitted(X, mask)
    np.testing.assert_allclose(found.elbo_, expected.elbo_, rtol=1e-5)


def test_new_samples_checks_and_files(data, tmp_path):
    _, _, X, mask = data
    model, hidden = fitted(X, mask), np.where(mask, X, np.nan)
    found = model.transform(hidden, mask=mask)
    np.testing.assert_array_equal(found, model.transform(np.where(mask, X, 7), mask=mask))
    assert np.corrcoef(np.log(found.ravel()), np.log(get_factors(model)).ravel())[0, 1] > 0.99
    assert model.score(hidden, mask=mask) > model.score(np.where(mask, X, 0))
    check = pnmf_pyro.posterior_predictive_check(model, hidden, n_draws=100, random_state=0)
    assert not check.flagged
    model.save(tmp_path / "model.npz")
    back = PNMF.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(get_factors(back), get_factors(model))
    again = pnmf_pyro.posterior_predictive_check(back, hidden, n_draws=100, random_state=0)
    assert [one.p_value for one in again.results] == [one.p_value for one in check.results]


def test_auto_leaves_hidden_entries_alone(data):
    _, _, X, mask = data
    found = [fitted(np.where(mask, X, v), mask, likelihood="auto") for v in (0, 50)]
    assert found[0].likelihood_densities_ == found[1].likelihood_densities_


def test_bad_masks_are_refused_by_name(data):
    _, _, X, mask = data
    with pytest.raises(ValueError, match=r"mask must have the shape of X, \(200, 30\)"):
        fitted(X, mask[:-1])
    with pytest.raises(ValueError, match="mask must be True where an entry is observed"):
        fitted(X, mask * 0.5)
    with pytest.raises(ValueError, match=r"contains NaN\. Say with mask="):
        fitted(np.where(mask, X, np.nan))
