"""One rule for what a fit is: whichever object holds it, the same is found in it."""

import anndata
import numpy as np
import pytest
from sklearn.decomposition import NMF
from sklearn.exceptions import NotFittedError

from pnmf_pyro import (
    PNMF,
    contributions,
    feature_scores,
    fit_model,
    match_factors,
    posterior_predictive_check,
    spatial_scores,
    top_features,
    transforms,
)
from pnmf_pyro.analysis.arviz_bridge import to_arviz
from pnmf_pyro.estimator.anndata_bridge import add_results
from pnmf_pyro.estimator.results import plain, results_of
from tests.support.data import tissue
from tests.support.models import forms_of
from tests.support.settings import STEPS, fitted_in_space, unconverged

pytestmark = unconverged

FORMS = ("estimator", "module", "trained", "anndata")
ARRAYS = ("factors", "factors_sd", "log_factors_sd", "loadings", "size_factors", "coordinates")


@pytest.fixture(scope="module")
def data():
    return tissue(N=60)


@pytest.fixture(scope="module")
def forms(data):
    return forms_of(fitted_in_space(data), *data[:2])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same(form, forms):
    found, expected = results_of(forms[form]), results_of(forms["estimator"])
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert list(found.feature_names) == list(expected.feature_names)
    assert found.groups is None
    if form == "module":
        assert found.elbo_history is None
        assert found.stages == []
        assert "steps" not in found.summary()
    else:
        np.testing.assert_array_equal(found.elbo_history, expected.elbo_history)
        assert found.stages == expected.stages == [("settle", 0, len(expected.elbo_history))]
        assert found.summary() == expected.summary()


@pytest.mark.parametrize("form", FORMS)
def test_tables_take_every_form(form, forms, data):
    fit, expected, X = forms[form], forms["estimator"], data[0]
    np.testing.assert_array_equal(contributions(fit), contributions(expected))
    for table in (top_features, feature_scores):
        assert table(fit).equals(table(expected))
    assert spatial_scores(fit, X).equals(spatial_scores(expected, X))
    assert match_factors(fit, expected).similarity == pytest.approx(1)
    assert list(match_factors(results_of(fit).loadings, fit).permutation) == [0, 1]


@pytest.mark.parametrize("form", ["module", "trained"])
def test_what_needs_the_model_takes_what_holds_one(form, forms, data):
    fit, expected, X = forms[form], forms["estimator"], data[0]
    x = data[1][:5]
    for read in (transforms.log_factors, transforms.factor_uncertainty, transforms.get_factors):
        np.testing.assert_array_equal(read(fit), read(expected))
        np.testing.assert_array_equal(read(fit, coordinates=x), read(expected, coordinates=x))
    draws = [transforms.factor_samples(one, 3, random_state=0) for one in (fit, expected)]
    np.testing.assert_array_equal(*draws)
    np.testing.assert_array_equal(transforms.get_loadings(fit), expected.components_.T)
    assert transforms.get_prior(fit) is expected.model_.prior
    checks = [
        posterior_predictive_check(one, X, n_draws=9, random_state=0) for one in (fit, expected)
    ]
    assert checks[0].table().equals(checks[1].table())
    pytest.importorskip("arviz", reason="ArviZ is not installed")
    exported = [to_arviz(one, n_draws=3, random_state=0)["posterior"] for one in (fit, expected)]
    assert exported[0].equals(exported[1])


def test_a_model_that_was_trained_alone(counts, tmp_path):
    """What `fit_model` returns, read, written to an AnnData object and to a file."""
    module = PNMF(2, tol=1.0, random_state=0).fit(counts).model_
    result = fit_model(module, counts, max_iter=20)
    result.model = module
    found = results_of(result)
    np.testing.assert_array_equal(found.elbo_history, result.history)
    assert found.coordinates is None
    adata = anndata.AnnData(counts)
    add_results(adata, result)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert again.uns["pnmf"]["elbo"] == result.elbo
    assert again.uns["pnmf"]["n_iter"] == 20
    for name in ("factors", "loadings", "elbo_history"):
        np.testing.assert_array_equal(getattr(results_of(again), name), getattr(found, name))
    add_results(adata, module, "bare")
    assert results_of(adata, "bare").elbo_history is None


def test_groups_have_names_where_they_are_known():
    X, x, labels, _, _ = tissue(N=60, groups=2)
    model = PNMF(2, multigroup=True, **STEPS).fit(X, coordinates=x, groups=labels)
    np.testing.assert_array_equal(results_of(model).groups, labels)
    np.testing.assert_array_equal(results_of(model.model_).groups, (labels == "b").astype(int))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (np.ones((2, 2)), "fit must be a fitted PNMF, an AnnData object .* got ndarray"),
        ("model.npz", "got str"),
        (None, "got NoneType"),
        (NMF().fit(np.eye(3)), "fit must be a fitted PNMF, .* got NMF"),
    ],
)
def test_what_is_no_fit(fit, message):
    with pytest.raises(ValueError, match=message):
        top_features(fit)


def test_what_holds_no_model(forms):
    with pytest.raises(NotFittedError, match="This PNMF is not fitted yet"):
        top_features(PNMF())
    with pytest.raises(
        ValueError, match=r"model must be .* got AnnData. An AnnData object has the"
    ):
        transforms.get_factors(forms["anndata"])
    prior = transforms.get_prior(forms["module"])
    with pytest.raises(ValueError, match="For a prior use log_factors_from_prior"):
        transforms.get_loadings(prior)


def test_plain_values():
    random = np.random.RandomState(0)
    given = (np.float32(0.5), (None, "a"), np.eye(2, dtype=int), random, True, [np.int64(3)])
    assert plain(given) == [0.5, [None, "a"], [[1, 0], [0, 1]], None, True, [3]]
