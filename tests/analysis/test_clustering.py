"""Domains: against formulas written out, and on samples whose domains are known."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

import pnmf_pyro
from pnmf_pyro import plotting
from pnmf_pyro.analysis import clustering
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


def test_contiguous_domains_are_pieces(halves):
    """Halves by few neighbours; each domain hangs together, but for samples at its border."""
    model, places, half, _ = halves
    found = pnmf_pyro.domains(model, 2, contiguous=True, coordinates=places)
    assert adjusted_rand_score(half, found.labels) > 0.9
    border = np.abs(places[:, 0] - 1) < 0.2
    assert found.certainty[~border].min() == pytest.approx(1)
    several = pnmf_pyro.domains(model, 6, contiguous=True, coordinates=places)
    near = np.linalg.norm(places[:, None] - places, axis=-1).argsort(1)[:, :9]
    linked = np.zeros((240, 240))
    linked[np.arange(240)[:, None], near] = 1
    whole = 0
    for mine in np.eye(6, dtype=bool)[several.labels].T:
        _, part = connected_components(linked[mine][:, mine], directed=False)
        whole += np.bincount(part).max()
    assert whole > 0.9 * 240


def test_merging_is_that_of_ward():
    """A dense twin: of all linked pairs that one is merged that raises the squares least."""
    random = np.random.default_rng(0)
    profile, links = random.normal(size=(12, 2)), np.abs(np.subtract.outer(range(12), range(12)))
    sets = [{i} for i in range(12)]

    def squares(some):
        rows = profile[sorted(some)]
        return np.square(rows - rows.mean(0)).sum()

    while len(sets) > 4:
        pairs = [(a, b) for a in sets for b in sets if min(a) == max(b) + 1]
        a, b = min(pairs, key=lambda ab: squares(ab[0] | ab[1]) - squares(ab[0]) - squares(ab[1]))
        sets = [one for one in sets if one not in (a, b)] + [a | b]
    mixture, possible = clustering._merged(profile, 4, sp.csr_array(links == 1, dtype=float))
    order = np.argsort([min(one) for one in sets])
    means = np.array([profile[sorted(sets[i])].mean(0) for i in order])
    rank = [int(np.square(mixture.means_ - mean).sum(1).argmin()) for mean in means]
    np.testing.assert_allclose(mixture.means_[rank], means)
    np.testing.assert_allclose(mixture.weights_[rank], [len(sets[i]) / 12 for i in order])
    within = sum(squares(one) for one in sets)
    assert np.trace(mixture.covariances_) == pytest.approx(within / 12 + 2e-6)
    rows = np.zeros((12, 4), dtype=bool)
    for number, i in zip(rank, order, strict=True):
        for sample in sets[i]:
            rows[max(sample - 1, 0) : sample + 2, number] = True
    np.testing.assert_array_equal(possible, rows)


@pytest.mark.parametrize("sections", [None, np.repeat([0, 1], 40)])
def test_parts_that_do_not_touch_are_linked_where_they_are_nearest(sections):
    random = np.random.default_rng(0)
    points = random.uniform(size=(80, 2)) + np.repeat([[0.0, 0.0], [5.0, 0.0]], 40, axis=0)
    links = clustering._links(points, sections, 80).toarray() > 0
    across = np.argwhere(links[:40, 40:])
    distance = np.linalg.norm(points[:40, None] - points[40:], axis=-1)
    np.testing.assert_array_equal(across, np.argwhere(distance == distance.min()))


def test_places_on_a_line_are_linked():
    line = np.r_[np.arange(20.0), 100 + np.arange(20.0)]
    links = clustering._links(line[:, None], None, 40).toarray() > 0
    assert np.argwhere(links[:20, 20:]).tolist() == [[19, 0]]


def test_contiguous_domains_need_places(halves):
    with pytest.raises(ValueError, match="contiguous=True needs the places"):
        pnmf_pyro.domains(halves[0], 2, contiguous=True)


def test_one_domain_and_one_for_each_sample(halves):
    model, places, *_ = halves
    for n in (1, 240):
        found = pnmf_pyro.domains(
            model, n, contiguous=True, n_neighbors=0, coordinates=places, n_draws=2
        )
        assert found.probabilities.shape == (240, n)
        np.testing.assert_allclose(found.probabilities.sum(1), 1)


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
