"""Domains: against formulas written out, and on samples whose domains are known."""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

import pnmf_pyro
from pnmf_pyro import plotting
from pnmf_pyro.transforms import factor_samples, get_factors


@pytest.fixture(scope="module")
def halves():
    """A fit of two halves with types of their own, places, halves and types."""
    random = np.random.default_rng(0)
    places = random.uniform(size=(240, 2)) * [2, 1]
    half = (places[:, 0] > 1).astype(int)
    kind = 2 * half + random.integers(2, size=240)
    W = np.kron(np.eye(4), np.full((5, 1), 8.0)) + 0.2
    model = pnmf_pyro.fit(random.poisson(W[:, kind].T), n_components=4)
    return model, places, half, kind


def test_neighbours_make_regions_and_their_own_factors_types(halves):
    model, places, half, kind = halves
    regions = pnmf_pyro.domains(model, 2, n_neighbors=10, coordinates=places)
    types = pnmf_pyro.domains(model, 4, n_neighbors=0)
    assert adjusted_rand_score(half, regions.labels) > 0.6
    assert adjusted_rand_score(kind, types.labels) > 0.9
    border = np.abs(places[:, 0] - 1) < 0.1
    assert regions.certainty[border].mean() < regions.certainty[~border].mean()
    assert list(regions.table["samples"]) == sorted(np.bincount(regions.labels), reverse=True)


def test_probabilities_are_responsibilities_over_draws(halves):
    """A dense twin: profiles by loops, responsibilities by densities, averaged over draws."""
    model, places, *_ = halves
    found = pnmf_pyro.domains(model, 2, n_neighbors=5, coordinates=places, n_draws=4)
    weight = model.components_.astype(float).sum(1)
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    near = np.argsort(distance, axis=1, kind="stable")[:, :6]

    def profile(factors):
        return np.sqrt(np.stack([(factors[rows] * weight).mean(0) for rows in near]))

    random = np.random.RandomState(0)
    mixture = GaussianMixture(2, covariance_type="tied", n_init=3, random_state=random)
    mixture.fit(profile(get_factors(model)))
    expected = np.zeros((240, 2))
    for draw in factor_samples(model, 4, return_exp=True, random_state=random):
        normals = [multivariate_normal(mean, mixture.covariances_) for mean in mixture.means_]
        log = np.stack([one.logpdf(profile(draw)) for one in normals], 1) + np.log(mixture.weights_)
        expected += np.exp(log - logsumexp(log, axis=1, keepdims=True)) / 4
    expected = expected[:, np.argsort(-np.bincount(expected.argmax(1)), kind="stable")]
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-9)


def test_anndata_gives_the_domains_of_its_model(halves):
    anndata = pytest.importorskip("anndata")
    _, places, half, _ = halves
    counts = np.random.default_rng(1).poisson(5 * np.array([[3.0, 1], [1, 3]])[half])
    adata = anndata.AnnData(counts.astype(np.float32), obsm={"spatial": places})
    model = pnmf_pyro.fit(adata, n_components=2, spatial=False)
    of_model = pnmf_pyro.domains(model, 2, coordinates=places)
    of_object = pnmf_pyro.domains(adata, 2)
    assert adjusted_rand_score(of_model.labels, of_object.labels) > 0.95


@pytest.mark.parametrize(("name", "wrong"), [("n", 0), ("n", 241), ("n_neighbors", -1)])
def test_what_cannot_be_is_refused(halves, name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        pnmf_pyro.domains(halves[0], **{"n": 2, name: wrong})


def test_the_plot_names_domains_and_needs_places(halves):
    model, places, *_ = halves
    axes = plotting.plot_domains(pnmf_pyro.domains(model, 2, coordinates=places))
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["0", "1"]
    assert axes[1].get_title() == "certainty"
    with pytest.raises(ValueError, match="coordinates"):
        plotting.plot_domains(pnmf_pyro.domains(model, 2))
