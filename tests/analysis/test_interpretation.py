"""What is said of components, against sums written out and places compared one by one."""

import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pnmf_pyro import PNMF
from pnmf_pyro.analysis.interpretation import (
    contributions,
    feature_scores,
    spatial_scores,
    top_features,
)
from pnmf_pyro.transforms import get_factors, get_loadings
from tests.support.settings import NATURAL

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def scaled(counts):
    """A fit with size factors and names, its counts, and its expected counts (N, D, L)."""
    s = np.linspace(0.5, 2, 80)
    frame = pd.DataFrame(counts, columns=[f"gene{j}" for j in range(25)])
    model = PNMF(3, random_state=0, max_iter=100, **NATURAL).fit(frame, size_factors=s)
    s = model.model_.size_factors.double().numpy()
    factors, loadings = get_factors(model).astype(float), get_loadings(model).astype(float)
    return model, frame, np.einsum("i,il,jl->ijl", s, factors, loadings)


def test_contributions_add_up_to_the_reconstruction(scaled):
    model, _, expected = scaled
    by_sample, by_feature = contributions(model), contributions(model, "feature")
    np.testing.assert_allclose(by_sample, expected.sum(1), rtol=1e-6)
    np.testing.assert_allclose(by_feature, expected.sum(0), rtol=1e-6)
    s = model.model_.size_factors.numpy()[:, None]
    reconstruction = s * model.inverse_transform(get_factors(model))
    np.testing.assert_allclose(by_sample.sum(1), reconstruction.sum(1), rtol=1e-5)
    np.testing.assert_allclose(by_feature.sum(1), reconstruction.sum(0), rtol=1e-5)
    np.testing.assert_allclose(by_sample.sum(0), by_feature.sum(0), rtol=1e-6)


def dense_scores(expected):
    """Weight, specificity and share from expected counts (N, D, L), entry by entry."""
    counts = expected.sum(0)
    D, L = counts.shape
    weight, specificity, share = (np.zeros((D, L)) for _ in range(3))
    for j in range(D):
        for l in range(L):
            weight[j, l] = counts[j, l] / counts[:, l].sum()
            share[j, l] = counts[j, l] / counts[j].sum()
            whole = counts[j].sum() / counts.sum()
            if weight[j, l] > 0:
                specificity[j, l] = weight[j, l] * np.log(weight[j, l] / whole)
    return {"weight": weight, "specificity": specificity, "share": share}


@pytest.mark.parametrize("by", ["weight", "specificity"])
def test_features_are_ranked(by, scaled):
    model, frame, expected = scaled
    dense = dense_scores(expected)
    scores = feature_scores(model, by)
    assert list(scores.columns) == list(model.get_feature_names_out())
    assert list(scores.index) == list(frame.columns)
    np.testing.assert_allclose(scores, dense[by], rtol=1e-6, atol=1e-12)
    table = top_features(model, 4, by)
    assert table.shape == (12, 6)
    for l, part in table.groupby("component"):
        best = np.argsort(-dense[by][:, l])[:4]
        assert list(part["feature"]) == [f"gene{j}" for j in best]
        assert list(part["rank"]) == [1, 2, 3, 4]
        for name, values in dense.items():
            np.testing.assert_allclose(part[name], values[best, l], rtol=1e-6, atol=1e-12)
    assert len(top_features(model, 1000)) == 75


def test_specificity_is_a_divergence(scaled):
    """Its sum is the Kullback-Leibler divergence: positive, and 0 for a component like the rest."""
    model, _, _ = scaled
    assert (feature_scores(model, "specificity").sum() > 0).all()
    alone = anndata.AnnData(
        np.ones((5, 3), np.float32),
        obsm={"X_pnmf": np.ones((5, 2)), "X_pnmf_log_sd": np.ones((5, 2))},
        varm={"PNMF_loadings": np.outer([1.0, 2.0, 0.0], [3.0, 5.0])},
        uns={"pnmf": {"elbo_history": [0.0]}},
    )
    np.testing.assert_allclose(feature_scores(alone, "specificity"), 0, atol=1e-12)
    assert top_features(alone, 1)["feature"].tolist() == ["1", "1"]
    assert np.isfinite(top_features(alone)["share"]).all()


def test_tables_without_pandas(scaled, monkeypatch):
    model, frame, _ = scaled
    with_pandas = top_features(model, 2), feature_scores(model)
    monkeypatch.setitem(sys.modules, "pandas", None)
    table, scores = top_features(model, 2), feature_scores(model)
    assert table.dtype.names == ("component", "rank", "feature", "weight", "specificity", "share")
    assert list(table["feature"]) == list(with_pandas[0]["feature"])
    assert list(scores["feature"]) == list(frame.columns)
    np.testing.assert_array_equal(scores["pnmf1"], with_pandas[1]["pnmf1"])


def dense_spatial(z, noise, points, groups, K):
    """Smooth part and variance beyond noise of z (N,), by comparing all pairs of places."""
    N = len(z)
    centred, smooth = np.empty(N), 0.0
    for i in range(N):
        centred[i] = z[i] - np.mean([z[k] for k in range(N) if groups[k] == groups[i]])
    for i in range(N):
        others = [k for k in range(N) if k != i and groups[k] == groups[i]]
        near = sorted(others, key=lambda k: np.linalg.norm(points[k] - points[i]))[:K]
        smooth += centred[i] * np.mean([centred[k] for k in near]) / N
    return smooth, np.mean(centred**2) - np.mean(noise)


@pytest.fixture(scope="module")
def places():
    return np.random.default_rng(1).uniform(size=(80, 2))


@pytest.mark.parametrize("grouped", [False, True])
def test_spatial_scores_of_features(grouped, scaled, places):
    model, frame, _ = scaled
    groups = np.array(["a", "b"])[np.arange(80) % 2] if grouped else np.zeros(80)
    given = {"coordinates": places, "groups": groups if grouped else None, "n_neighbors": 4}
    table = spatial_scores(model, frame, "features", **given)
    sparse = spatial_scores(model, sp.csr_matrix(frame), "features", **given)
    np.testing.assert_allclose(sparse.drop(columns="feature"), table.drop(columns="feature"))
    assert list(table["feature"]) == list(frame.columns)
    s = model.model_.size_factors.double().numpy()
    for j in range(0, 25, 5):
        x = frame.iloc[:, j].to_numpy(float)
        smooth, variance = dense_spatial(x / s, x / s**2, places, groups, 4)
        row = table.iloc[j]
        np.testing.assert_allclose((row["smooth"], row["variance"]), (smooth, variance), rtol=1e-6)
        if variance > 2 * np.sqrt(2 / 80) * np.mean(x / s**2):
            assert row["score"] == pytest.approx(np.clip(smooth / variance, 0, 1))
        else:
            assert np.isnan(row["score"])


def test_spatial_scores_of_components(scaled, places):
    model, frame, expected = scaled
    table = spatial_scores(model, frame, coordinates=places)
    s = model.model_.size_factors.double().numpy()
    W = get_loadings(model).astype(float)
    D = np.diag((expected.sum(2) / s[:, None]).mean(0))
    A = np.linalg.inv(D) @ W @ np.linalg.inv(W.T @ np.linalg.inv(D) @ W)
    np.testing.assert_allclose(W.T @ A, np.eye(3), atol=1e-9)
    X = frame.to_numpy(float)
    for l in range(3):
        z, noise = X @ A[:, l] / s, X @ A[:, l] ** 2 / s**2
        dense = dense_spatial(z, noise, places, np.zeros(80), 6)
        found = table.loc[l, ["smooth", "variance"]].astype(float)
        np.testing.assert_allclose(found, dense, rtol=1e-5)


def test_scores_tell_smooth_from_rough_and_from_noise():
    """Half of the variance of log rates is smooth in feature 0, all in 1, none in 2 and 3."""
    random = np.random.default_rng(0)
    x = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 2)
    smooth = np.sin(x[:, 0] / 6) * np.sqrt(2) * 0.3
    rough = 0.3 * random.normal(size=(1600, 2))
    rates = np.exp(np.stack([smooth + rough[:, 0], smooth, rough[:, 1], 0 * smooth], 1)) * 50
    X = random.poisson(rates).astype(float)
    model = PNMF(2, random_state=0, max_iter=20, **NATURAL).fit(X)
    score = spatial_scores(model, X, "features", coordinates=x)["score"].to_numpy()
    np.testing.assert_allclose(score[:3], [0.5, 1.0, 0.0], atol=0.1)
    noise = random.poisson(3.0, size=(1600, 300)).astype(float)
    model = PNMF(2, random_state=0, max_iter=20, **NATURAL).fit(noise)
    found = spatial_scores(model, noise, "features", coordinates=x)
    # beyond two standard errors by chance: 2.3% of 300, 6.8 on average, 15 with p = 0.004
    assert found["score"].notna().sum() < 15


def test_a_component_without_counts_has_no_score(counts, places):
    adata = anndata.AnnData(
        counts,
        obsm={"X_pnmf": np.ones((80, 2)), "X_pnmf_log_sd": np.ones((80, 2)), "spatial": places},
        varm={"PNMF_loadings": np.stack([counts.mean(0), 1e-9 * counts[0]], 1)},
        uns={"pnmf": {"elbo_history": [0.0]}},
    )
    score = spatial_scores(adata)["score"]
    assert np.isfinite(score[0])
    assert np.isnan(score[1])


def test_a_section_is_no_neighbour_of_another(scaled, places):
    """Differences between sections are not smooth variation within them."""
    model, frame, _ = scaled
    groups = np.repeat(["a", "b"], 40)
    X = frame.to_numpy(float) + np.repeat([0, 100], 40)[:, None]
    apart = spatial_scores(model, X, "features", coordinates=places, groups=groups)
    pooled = spatial_scores(model, X, "features", coordinates=places)
    assert apart["variance"].max() < pooled["variance"].min()
    single = np.where(np.arange(80) == 0, "alone", "rest")
    alone = spatial_scores(model, X, "features", coordinates=places, groups=single)
    assert np.isfinite(alone["smooth"]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, X: contributions(m, "gene"), "per must be one of"),
        (lambda m, X: feature_scores(m, "share"), "by must be one of"),
        (lambda m, X: top_features(m, 0), "n must be a whole number"),
        (lambda m, X: spatial_scores(m, X, "genes"), "of must be one of"),
        (lambda m, X: spatial_scores(m), "X must be given"),
        (lambda m, X: spatial_scores(m, X), "coordinates must be given"),
        (lambda m, X: spatial_scores(m, X[:9], coordinates=np.eye(80)), r"shape \(80, 25\)"),
        (lambda m, X: spatial_scores(m, X, coordinates=np.eye(9)), "one row for each sample"),
    ],
)
def test_bad_input(call, message, scaled):
    with pytest.raises(ValueError, match=message):
        call(scaled[0], scaled[1])


def test_places_that_are_all_the_same_have_no_score(scaled):
    model, X = scaled[0], scaled[1]
    with pytest.raises(ValueError, match="coordinates must differ between samples"):
        spatial_scores(model, X, coordinates=np.ones((len(X), 2)))
