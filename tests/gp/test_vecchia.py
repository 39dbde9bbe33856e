"""Vecchia factors against dense matrices, and against the exact process where K = N - 1."""

import copy
import pickle

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.neighbors import build_graph
from pnmf_pyro.gp.vecchia import conditional_weights
from tests.support.vecchia import (
    SPARSE,
    VERY_CLOSE,
    all_before,
    among,
    distances,
    exact_covariance,
    few_neighbours,
    make,
    matern32,
    neighbors_of,
    points_of,
)


@pytest.fixture(scope="module")
def complete():
    return all_before()


@pytest.fixture(scope="module", params=SPARSE)
def sparse(request):
    return few_neighbours(request.param)


def test_all_neighbours_give_the_exact_precision(complete):
    _, factor, exact = complete
    x = np.random.default_rng(0).normal(size=(2, 200))
    product = factor.precision(exact @ x[..., None])[..., 0]
    np.testing.assert_allclose(product, x, **VERY_CLOSE)
    precision = np.linalg.inv(exact)
    np.testing.assert_allclose(
        factor.precision_diagonal, precision.diagonal(axis1=1, axis2=2), rtol=1e-8
    )
    log_det = factor.variances.log().sum(1)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(exact)[1], rtol=1e-8)


def test_the_factor_of_some_components_is_theirs(sparse):
    _, factor, _ = sparse
    x = np.random.default_rng(0).normal(size=(2, 60, 3))
    for mine in (slice(0, 1), slice(1, 2), slice(0, 2)):
        own = factor.of(mine)
        assert mine.stop - mine.start == own.L
        np.testing.assert_allclose(own.variances, factor.variances[mine])
        np.testing.assert_allclose(own.precision(x[mine]), factor.precision(x)[mine], rtol=1e-12)
    assert factor.of(mine) is own


def test_products_and_solves(sparse):
    _, factor, covariance = sparse
    x = np.random.default_rng(0).normal(size=(2, 60, 3))
    precision = np.linalg.inv(covariance)
    expected = precision @ x  # its entries cancel: 1e-10 of the largest is what the inverse has
    close = {"rtol": 1e-8, "atol": 1e-10 * np.abs(expected).max()}
    np.testing.assert_allclose(factor.precision(x), expected, **close)
    np.testing.assert_allclose(factor.precision(x[..., 0]), expected[..., 0], **close)
    scaled = factor.variances[..., None] * factor.solve_transposed(x)
    np.testing.assert_allclose(factor.solve(scaled), covariance @ x, **VERY_CLOSE)
    np.testing.assert_allclose(factor.multiply(factor.solve(x)), x, **VERY_CLOSE)
    np.testing.assert_allclose(
        factor.multiply_transposed(factor.solve_transposed(x)), x, **VERY_CLOSE
    )
    diagonal = precision.diagonal(axis1=1, axis2=2)
    np.testing.assert_allclose(factor.precision_diagonal, diagonal, rtol=1e-9)
    log_det = factor.variances.log().sum(1)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(covariance)[1], rtol=1e-10)
    np.testing.assert_allclose(
        factor.roughness(torch.tensor(x)), factor.multiply(x).square().sum(-1), rtol=1e-10
    )


def test_more_neighbours_come_closer():
    points = points_of(150)
    exact = exact_covariance(points)

    def divergence(K):
        factor = make(points, K)
        precision = factor.precision(np.tile(np.eye(150), (2, 1, 1))).numpy()
        trace = np.einsum("lij,lji->l", precision, exact)
        log_det = factor.variances.log().sum(1).numpy()
        return (trace - 150 + log_det - np.linalg.slogdet(exact)[1]) / 2

    values = np.stack([divergence(K) for K in (1, 3, 10, 30)])
    assert (values >= -1e-9).all()
    assert (values[1:] < 0.5 * values[:-1]).all()


def test_copies_solve_like_the_original(sparse):
    _, factor, _ = sparse
    x = np.random.default_rng(0).normal(size=(2, 60))
    expected = factor.solve(x)
    for other in (
        copy.deepcopy(factor),
        pickle.loads(pickle.dumps(factor)),
    ):
        np.testing.assert_array_equal(other.solve(x), expected)


def test_all_places_identical():
    factor = make(np.zeros((20, 2)), 5, [matern32(0.2)])
    draws = factor.solve(factor.variances.sqrt())
    assert np.ptp(draws.numpy()) < 0.05


def test_jitter_is_added_only_where_it_is_needed():
    points = np.concatenate([points_of(40), points_of(40)[:1]])
    kernel = matern32(0.2)
    places = Places(torch.tensor(points))
    neighbors = neighbors_of(build_graph(places, 5))
    _, variances = conditional_weights(places, places, neighbors, among(kernel))
    exact = exact_covariance(points, [kernel])[0]
    for i in range(40):
        near = neighbors[i][neighbors[i] >= 0]
        v = exact[i, i] - exact[i, near] @ np.linalg.solve(
            exact[np.ix_(near, near)], exact[near, i]
        )
        if {0, 40} & {i, *near} != {0, 40}:
            assert variances[0, i] == pytest.approx(v, rel=1e-10)


def test_weights_in_small_blocks_are_the_same(monkeypatch):
    points = points_of(50)
    whole = make(points, 6)
    monkeypatch.setattr("pnmf_pyro.gp.vecchia.BLOCK", 500)
    parts = make(points, 6)
    np.testing.assert_array_equal(whole.triangle.weights, parts.triangle.weights)


def test_a_kernel_that_is_not_positive_definite_names_the_places():
    def covariance(A, B):
        return torch.where(distances(A, B) < 1e-9, 1.0, -0.9).double()

    with pytest.raises(ValueError, match=r"of places \d.*\d and \d+ more is not positive def"):
        make(points_of(20), 4, [covariance])


def test_a_covariance_that_is_not_finite_names_the_places():
    def covariance(A, B):
        bad = (A.coordinates[..., :, None, 0] == points[7, 0]) & (
            B.coordinates[..., None, :, 0] == points[7, 0]
        )
        return torch.where(bad, torch.nan, matern32(0.2)(A, B))

    points = points_of(20)
    with pytest.raises(ValueError, match=r"places .*\b7\b.*is not finite"):
        make(points, 3, [covariance])
