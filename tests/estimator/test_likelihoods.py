"""Likelihoods by name: the negative binomial in every kind of fit, and how one is chosen."""

import logging

import numpy as np
import pytest
import scipy.sparse as sp

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.models import NegativeBinomial
from pnmf_pyro.transforms import get_factors

pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")

NB = "negative-binomial"
N, D = 300, 40


@pytest.fixture(scope="module")
def data():
    """Places, and counts of two fields with dispersion 2 and with none."""
    random = np.random.default_rng(0)
    places = random.uniform(0, 10, (N, 2))
    F = np.stack([np.sin(places[:, 0]), np.cos(places[:, 1])], 1)
    rate = np.exp(F) @ random.gamma(0.5, 6.0, (2, D))
    return places, random.negative_binomial(2, 2 / (2 + rate)), random.poisson(rate)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"batch_size": 100},
        {"mode": "simple"},
        {"E": 3},
        {"size_factors": "total"},
        {"coords": True},
        {"coords": True, "local": True, "K": 12},
    ],
    ids=str,
)
def test_dispersions_are_learned(data, how):
    places, X, _ = data
    given = {**how, "coords": places} if "coords" in how else how
    model = pnmf_pyro.fit(X, n_components=2, likelihood=NB, **given)
    assert model.likelihood_ == NB
    assert model.dispersion_.shape == (D,)
    assert np.median(model.dispersion_) == pytest.approx(2, rel=0.15)
    assert model.elbo_ > pnmf_pyro.fit(X, n_components=2, **given).elbo_ + 1000


def test_poisson_counts_need_none(data):
    _, _, X = data
    model = pnmf_pyro.fit(X, n_components=2, likelihood=NB)
    assert np.mean(model.dispersion_ > 100) >= 0.95
    assert model.elbo_ == pytest.approx(pnmf_pyro.fit(X, n_components=2).elbo_, rel=1e-3)


def test_the_elbo_never_falls(data):
    _, X, _ = data
    how = {"training_mode": "natural", "loadings_mode": "multiplicative", "mode": "lower-bound"}
    model = PNMF(2, **how, likelihood=NB, random_state=0, max_iter=60, tol=0).fit(X)
    assert (np.diff(model.history_) >= -1e-6 * abs(model.elbo_)).all()


def test_sparse_counts_give_the_same_fit(data):
    _, X, _ = data
    dense, sparse = (
        pnmf_pyro.fit(T, n_components=2, likelihood=NB, max_iter=60) for T in (X, sp.csr_matrix(X))
    )
    np.testing.assert_allclose(sparse.dispersion_, dense.dispersion_, rtol=0.02)


def test_new_samples_score_and_files(data, tmp_path):
    _, X, _ = data
    model, poisson = (pnmf_pyro.fit(X, n_components=2, likelihood=name) for name in (NB, None))
    assert model.score(X) > poisson.score(X) + 1
    found, factors = model.transform(X), get_factors(model)
    assert np.corrcoef(np.log(found).ravel(), np.log(factors).ravel())[0, 1] > 0.95
    model.save(tmp_path / "model.npz")
    back = PNMF.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(back.dispersion_, model.dispersion_)
    np.testing.assert_array_equal(back.transform(X), found)
    assert back.likelihood_ == NB
    assert back.score(X) == pytest.approx(model.score(X), rel=1e-6)


def test_the_check_that_flags_the_poisson_passes(data):
    _, X, _ = data
    flagged = []
    for name in ("poisson", NB):
        model = pnmf_pyro.fit(X, n_components=2, likelihood=name)
        check = pnmf_pyro.posterior_predictive_check(model, X, n_draws=100, random_state=0)
        flagged.append(len(check.flagged))
    assert flagged[0] >= 5
    assert flagged[1] <= 1


def test_auto_chooses_and_says_so(data, caplog, tmp_path):
    _, dispersed, plain = data
    caplog.set_level(logging.INFO, "pnmf_pyro")
    model = pnmf_pyro.fit(dispersed, n_components=2, likelihood="auto")
    assert model.likelihood_ == NB
    assert model.likelihood_densities_[NB] > model.likelihood_densities_["poisson"] + 0.5
    assert "likelihood negative-binomial: mean log density of a hidden entry" in caplog.text
    model.save(tmp_path / "model.npz")
    assert PNMF.load(tmp_path / "model.npz").likelihood_ == NB
    model = pnmf_pyro.fit(plain, n_components=2, likelihood="auto", max_iter=30)
    densities = model.likelihood_densities_
    assert densities["poisson"] > densities[NB] - 0.01


def test_a_part_of_given_dispersions(data):
    _, X, _ = data
    model = pnmf_pyro.fit(X, n_components=2, likelihood=NegativeBinomial(D, 3.0), max_iter=40)
    np.testing.assert_allclose(model.dispersion_, 3.0, rtol=1e-6)
    assert pnmf_pyro.fit(X, n_components=2, max_iter=5).dispersion_ is None


def test_a_name_that_is_none(data):
    with pytest.raises(ValueError, match="likelihood must be among 'poisson', 'negative-binomial'"):
        pnmf_pyro.fit(data[1], likelihood="binomial")
