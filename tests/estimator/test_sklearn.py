"""scikit-learn's own checks of the estimator, and its tools working on it."""

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import pnmf_pyro
from pnmf_pyro import PNMF
from tests.support.settings import quick

DIFFERENT_BY_DESIGN = (
    "fit_transform gives the posterior mean under the prior, transform the maximum of the "
    "likelihood for samples that may be new"
)


@parametrize_with_checks(
    [PNMF(max_iter=5)],
    expected_failed_checks=lambda estimator: {
        "check_transformer_general": DIFFERENT_BY_DESIGN,
        "check_transformer_data_not_an_array": DIFFERENT_BY_DESIGN,
    },
)
@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning",  # in so few steps
    "ignore:X is not made of counts",  # and fit random numbers
    "ignore:.* have no counts at all",
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture
def X():
    return np.random.default_rng(0).poisson(4, size=(60, 12))


def test_clone_and_pickle(X):
    model = quick().fit(X)
    assert not hasattr(clone(model), "components_")
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    np.testing.assert_array_equal(again.fit_transform(X), model.fit_transform(X))


def test_set_output_and_feature_names(X):
    samples = [f"s{i}" for i in range(len(X))]
    frame = pd.DataFrame(X, samples, [f"gene{j}" for j in range(X.shape[1])])
    model = quick().set_output(transform="pandas")
    out = model.fit_transform(frame)
    assert list(out.index) == list(model.transform(frame).index) == samples
    assert list(out.columns) == ["pnmf0", "pnmf1", "pnmf2"]
    assert list(model.get_feature_names_out()) == list(out.columns)
    assert list(model.feature_names_in_) == list(frame.columns)
    assert set(pnmf_pyro.top_features(model, 2)["feature"]) < set(frame.columns)
    assert list(pnmf_pyro.feature_scores(model).index) == list(frame.columns)
    check = pnmf_pyro.posterior_predictive_check(model, frame, n_draws=3, random_state=0)
    named = {one.statistic.of: list(one.labels) for one in check.results[:2]}
    assert named == {"feature": list(frame.columns), "sample": samples}
    with pytest.raises(ValueError, match="feature names"):
        model.transform(frame.rename(columns={"gene0": "other"}))


def test_pipeline_passes_y_and_size_factors(X):
    labels = X[:, 0] > 4
    s = np.linspace(0.5, 2, len(X))
    pipeline = make_pipeline(FunctionTransformer(accept_sparse=True), quick())
    pipeline.fit(sp.csr_matrix(X), labels, pnmf__size_factors=s)
    alone = quick().fit(sp.csr_matrix(X), size_factors=s)
    np.testing.assert_array_equal(pipeline[-1].components_, alone.components_)


def test_grid_search_on_score_finds_the_number_of_components():
    """Three disjoint blocks of features: two components miss one."""
    random = np.random.default_rng(1)
    loadings = np.kron(np.eye(3), np.full((1, 8), 6.0))
    X = random.poisson(np.exp(random.normal(size=(120, 3))) @ loadings)
    model = PNMF(
        mode="lower-bound",
        training_mode="natural",
        loadings_mode="multiplicative",
        scheduler=None,
        random_state=0,
        max_iter=300,
    )
    search = GridSearchCV(model, {"n_components": [2, 3]}, cv=2).fit(X)
    assert search.best_params_ == {"n_components": 3}
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
