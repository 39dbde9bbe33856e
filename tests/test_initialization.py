"""Where a fit starts: initialize_factors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.decomposition._nmf import _initialize_nmf

import pnmf_pyro
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.initialization import FLOOR, UPDATES, initialize_factors, start_values

NAMES = ("random", "nndsvd", "nndsvda", "nndsvdar", "biwhitened", "k-means")
INITS = (*NAMES, None)


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    """Counts with structure and without empty rows or columns, (40, 15)."""
    random = np.random.default_rng(0)
    rate = np.exp(random.normal(size=(40, 4))) @ random.gamma(0.5, 2.0, (4, 15))
    X = random.poisson(rate).astype(np.float64)
    X[:, 3] += 1
    X[5] += 1
    assert (X.sum(0) > 0).all()
    assert (X.sum(1) > 0).all()
    return X


@pytest.fixture(params=INITS, ids=str)
def init(request) -> str | None:
    return request.param


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("n_components", [1, 4, 15])
def test_shapes_and_signs(X, init, n_components, scaled):
    W, exp_F = initialize_factors(X, n_components, init, 0, scale_log_mu=scaled)
    assert W.shape == (15, n_components)
    assert exp_F.shape == (40, n_components)
    for part in (W, exp_F):
        assert np.isfinite(part).all()
        assert (part >= 0).all()
    assert (exp_F > 0).all() or not scaled


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_type_of_the_counts(X, init, dtype):
    for given in (X.astype(dtype), sp.csr_matrix(X.astype(dtype)), torch.tensor(X.astype(dtype))):
        for scaled in (True, False):
            W, exp_F = initialize_factors(given, 3, init, 0, scale_log_mu=scaled)
            assert W.dtype == exp_F.dtype == dtype


def test_integers_are_taken(X, init):
    W, exp_F = initialize_factors(X.astype(np.int64), 3, init, 0)
    expected = initialize_factors(X.astype(np.float32), 3, init, 0)
    np.testing.assert_array_equal(W, expected[0])
    np.testing.assert_array_equal(exp_F, expected[1])


@pytest.mark.parametrize("scaled", [True, False])
def test_sparse_equals_dense(X, init, scaled):
    expected = initialize_factors(X, 4, init, 1, scale_log_mu=scaled)
    for given in (
        sp.csr_matrix(X),
        sp.coo_array(X),
        torch.tensor(X),
        torch.tensor(X).to_sparse_csr(),
        as_counts(sp.csr_matrix(X)),
    ):
        for part, other in zip(
            initialize_factors(given, 4, init, 1, scale_log_mu=scaled), expected, strict=True
        ):
            np.testing.assert_allclose(part, other, rtol=1e-7, atol=1e-10)


def test_sparse_equals_dense_with_empty_samples_and_features(X, init):
    """A singular vector is zero there up to rounding, which must not decide what is filled in."""
    X = X.copy()
    X[[3, 17, 22]] = 0
    X[:, [2, 9, 11]] = 0
    results = [
        initialize_factors(given, 4, init, 1, scale_log_mu=False) for given in (X, sp.csr_matrix(X))
    ]
    for dense, sparse in zip(*results, strict=True):
        np.testing.assert_allclose(dense, sparse, rtol=1e-7, atol=1e-10)


def test_the_seed_decides(X, init):
    def flat(seed) -> np.ndarray:
        return np.concatenate([part.ravel() for part in initialize_factors(X, 4, init, seed)])

    np.testing.assert_array_equal(flat(3), flat(3))
    np.testing.assert_array_equal(flat(3), flat(np.random.RandomState(3)))
    one, two = (np.random.default_rng(3) for _ in range(2))
    np.testing.assert_array_equal(flat(one), flat(two))
    if init in ("random", "nndsvdar"):
        assert (flat(3) != flat(4)).any()
        assert (flat(None) != flat(None)).any()


def test_no_global_state_is_moved(X, init):
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 - that it stays is the point
    torch_state = torch.random.get_rng_state()
    given, before = sp.csr_matrix(X), X.copy()
    for seed in (0, None):
        initialize_factors(X, 3, init, seed)
        initialize_factors(given, 3, init, seed)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(given.toarray(), before)


def test_none_chooses_by_the_number_of_components(X):
    for n_components, name in ((15, "nndsvda"), (16, "random")):
        chosen = initialize_factors(X, n_components, None, 0)
        expected = initialize_factors(X, n_components, name, 0)
        for part, other in zip(chosen, expected, strict=True):
            np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("name", ["nndsvd", "nndsvda"])
def test_nndsvd_equals_scikit_learn(X, name):
    """To what scikit-learn calls zero, 1e-6."""
    W, exp_F = initialize_factors(X, 5, name, 2, scale_log_mu=False)
    expected_F, expected_W = _initialize_nmf(X, 5, name, random_state=2)
    np.testing.assert_allclose(exp_F, expected_F, rtol=1e-6, atol=1.1e-6)
    np.testing.assert_allclose(W.T, expected_W, rtol=1e-6, atol=1.1e-6)


def test_biwhitened_decomposes_counts_over_the_root_of_what_independence_expects(X):
    expected = np.outer(X.sum(1), X.sum(0)) / X.sum()
    factors, components = _initialize_nmf(X / np.sqrt(expected), 5, init="nndsvda", random_state=2)
    W, exp_F = initialize_factors(X, 5, "biwhitened", 2, scale_log_mu=False)
    found = np.sqrt(expected) * (factors @ components)
    np.testing.assert_allclose(exp_F @ W.T, found, rtol=1e-4)


def test_biwhitened_finds_a_pattern_that_large_counts_drown():
    """Ten rare features that go together, beside three that are large and nothing but noise."""
    random = np.random.default_rng(0)
    pattern = np.arange(400) < 100
    rare = random.poisson(np.where(pattern, 3.0, 0.1)[:, None], size=(400, 10))
    large = random.poisson(1000.0, size=(400, 3))
    X = np.hstack([rare, large]).astype(np.float64)
    found = {}
    for init in ("nndsvda", "biwhitened"):
        exp_F = initialize_factors(X, 3, init, 0)[1]
        found[init] = max(abs(np.corrcoef(pattern, f)[0, 1]) for f in exp_F.T)
    assert found["biwhitened"] > 0.6 > 0.3 > found["nndsvda"]


def test_nndsvdar_is_nndsvd_with_small_random_values_for_zeros(X):
    plain = initialize_factors(X, 5, "nndsvd", 2, scale_log_mu=False)
    filled = initialize_factors(X, 5, "nndsvdar", 2, scale_log_mu=False)
    for before, after in zip(plain, filled, strict=True):
        zero = before < 1e-6
        assert zero.sum() > 10
        np.testing.assert_allclose(after[~zero], before[~zero])
        assert (after[zero] > 0).all()
        # |N(0, 1)| * mean / 100: far below the mean, and not all the same
        assert after[zero].max() < 0.05 * X.mean()
        assert len(np.unique(after[zero])) == zero.sum()


def test_nndsvd_approximates_the_counts(X):
    """Of the rank it is given: closer than the best constant by far."""
    W, exp_F = initialize_factors(X, 4, "nndsvd", 0, scale_log_mu=False)
    assert ((X - exp_F @ W.T) ** 2).sum() < 0.5 * ((X - X.mean()) ** 2).sum()


def test_random_has_the_documented_scale():
    """|N(0, 1)| sqrt(mean / L): its mean is sqrt(2 / pi) of that, within 5 standard errors."""
    X = np.random.default_rng(1).poisson(3.0, (2000, 500)).astype(np.float64)
    scale = np.sqrt(X.mean() / 4)
    for part in initialize_factors(X, 4, "random", 0, scale_log_mu=False):
        error = scale * np.sqrt((1 - 2 / np.pi) / part.size)
        assert abs(part.mean() - scale * np.sqrt(2 / np.pi)) < 5 * error
        assert part.min() < 0.01 * scale


def test_k_means_finds_clusters():
    """Three kinds of samples: each has its largest factor in a component of its own kind."""
    random = np.random.default_rng(2)
    profiles = np.kron(np.eye(3), np.full((1, 5), 20.0)) + 1
    labels = random.permutation(np.repeat(np.arange(3), 12))
    X = random.poisson(profiles[labels]).astype(np.float64)
    W, exp_F = initialize_factors(X, 3, "k-means", 0)
    largest = exp_F.argmax(1)
    for kind in range(3):
        (component,) = set(largest[labels == kind])
        assert set(np.argsort(W[:, component])[-5:]) == set(range(5 * kind, 5 * kind + 5))


# --- the scale of the log-factors


@pytest.mark.parametrize("target_std", [1.0, 0.3, 2.5])
def test_log_factors_have_the_scale_asked_for(X, init, target_std):
    _, exp_F = initialize_factors(X, 4, init, 0, target_std=target_std)
    log_F = np.log(exp_F)
    np.testing.assert_allclose(log_F.mean(0), 0, atol=1e-8)
    np.testing.assert_allclose(log_F.std(0), target_std, rtol=1e-8)


def test_default_scale_is_one(X):
    for default, explicit in zip(
        initialize_factors(X, 4, "random", 0),
        initialize_factors(X, 4, "random", 0, True, 1.0),
        strict=True,
    ):
        np.testing.assert_array_equal(default, explicit)


@pytest.mark.parametrize("target_std", [1.0, 0.3, 2.5])
def test_each_component_keeps_its_total(X, init, target_std):
    """sum_ij exp(F_il) W_jl, so that the fit starts at the right level of counts."""
    W, exp_F = initialize_factors(X, 4, init, 0, target_std=target_std)
    W_raw, exp_F_raw = initialize_factors(X, 4, init, 0, scale_log_mu=False)
    np.testing.assert_allclose(exp_F.sum(0) * W.sum(0), exp_F_raw.sum(0) * W_raw.sum(0), rtol=1e-8)
    # W is rescaled column by column, and no more.
    np.testing.assert_allclose(W / W.sum(0), W_raw / W_raw.sum(0), rtol=1e-8)


def test_the_order_within_a_component_is_kept(X, init):
    _, exp_F = initialize_factors(X, 4, init, 0)
    _, raw = initialize_factors(X, 4, init, 0, scale_log_mu=False)
    for l in range(4):
        order = np.argsort(raw[:, l])
        assert (np.diff(exp_F[order, l]) >= -1e-12).all()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("make", [np.array, sp.csr_matrix])
@pytest.mark.parametrize(
    "table",
    {
        "no counts": np.zeros((6, 5)),
        "one count": np.eye(6, 5) * np.r_[1, 0, 0, 0, 0],
        "one sample": np.arange(5.0)[None],
        "one feature": np.arange(6.0)[:, None],
        "constant": np.full((6, 5), 3.0),
        "rank one": np.outer(np.arange(1.0, 7), np.arange(1.0, 6)),
        "large": np.random.default_rng(3).poisson(1e6, (6, 5)).astype(float),
        "six orders": np.diag(10.0 ** np.arange(6))[:, :5] + 1,
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else None,
)
def test_extreme_tables_start_at_finite_values(table, make, init):
    """With a component too many where the table allows it, so that some are degenerate."""
    _, X = table
    L = min(2, *X.shape)
    W, exp_F = initialize_factors(make(X), L, init, 0)
    assert np.isfinite(W).all()
    assert np.isfinite(exp_F).all()
    assert (W >= 0).all()
    assert (exp_F > 0).all()


# --- errors


@pytest.mark.parametrize(
    ("n_components", "options", "message"),
    [
        (3, {"init": "svd"}, r"init must be one of 'random', .*None; got 'svd'"),
        (3, {"init": 3}, r"init must be one of .*got 3"),
        (16, {"init": "nndsvd"}, r"n_components <= 15 .*\(40, 15\); got n_components=16.*random"),
        (16, {"init": "nndsvda"}, r"'nndsvda' needs n_components <= 15"),
        (16, {"init": "nndsvdar"}, r"'nndsvdar' needs n_components <= 15"),
        (41, {"init": "k-means"}, r"'k-means' needs n_components <= 40 .*got n_components=41"),
        (3, {"target_std": 0}, "target_std must be a positive finite number; got 0"),
        (3, {"target_std": -1.0}, "target_std must be a positive finite number; got -1.0"),
        (3, {"target_std": "wide"}, "target_std must be a positive finite number; got 'wide'"),
        (3, {"random_state": "seed"}, "random_state must be .*got 'seed'"),
        (3, {"random_state": -1}, "random_state must be .*got -1"),
    ],
)
def test_errors_say_what_came(X, n_components, options, message):
    with pytest.raises(ValueError, match=message):
        initialize_factors(X, n_components, **options)


def test_more_components_than_samples_and_features(X):
    W, exp_F = initialize_factors(X, 50, "random", 0)
    assert W.shape == (15, 50)
    assert exp_F.shape == (40, 50)
    assert initialize_factors(X, 40, "k-means", 0)[1].shape == (40, 40)


def test_loadings_to_start_from(X):
    """Factors by the rule of Lee and Seung, one sample after another."""
    random = np.random.default_rng(0)
    given = random.gamma(1.0, size=(15, 3))
    s = torch.from_numpy(random.uniform(0.5, 2, 40))
    W, exp_F = start_values(as_counts(X), 3, given, 0, s)
    np.testing.assert_array_equal(W, given)
    expected = np.empty((40, 3))
    for i in range(40):
        a = np.full(3, X[i].sum() / (s[i].item() * given.sum()))
        for _ in range(UPDATES):
            a = a * ((X[i] / (given @ a)) @ given) / (s[i].item() * given.sum(0))
        expected[i] = a
    expected = np.maximum(expected, FLOOR * expected.mean(0))
    np.testing.assert_allclose(exp_F, expected, rtol=1e-10)
    with pytest.raises(ValueError, match=r"init must be loadings of shape \(15, 4\), features by"):
        start_values(as_counts(X), 4, given, 0)


@pytest.mark.parametrize("init", [np.ones(3), -np.ones((4, 2)), np.full((4, 2), np.nan)])
def test_loadings_to_start_from_that_are_none(X, init):
    with pytest.raises(ValueError, match="init must be loadings, features by components"):
        pnmf_pyro.fit(X, n_components=2, init=init)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_fit_from_its_own_loadings_stays_there(X, tmp_path):
    model = pnmf_pyro.fit(X, n_components=2)
    again = pnmf_pyro.fit(X, n_components=2, init=model.components_.T)
    assert again.elbo_ == pytest.approx(model.elbo_, rel=2e-3)
    assert pnmf_pyro.match_factors(model, again).similarity > 0.99
    several = clone(again).set_params(init=(None, model.components_.T)).fit(X)
    assert several.elbo_ >= model.elbo_ - 2e-3 * abs(model.elbo_)
    for fit, kept in ((again, None), (several, (None,))):
        fit.save(tmp_path / "model.npz")
        back = pnmf_pyro.PNMF.load(tmp_path / "model.npz")
        assert back.init == kept
        np.testing.assert_array_equal(back.components_, fit.components_)
