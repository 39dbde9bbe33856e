"""Neighbourhoods: predictions and draws at new places against dense Gaussian processes."""

import numpy as np
import pytest
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.neighborhoods import Neighborhoods
from tests.support import dense_fields
from tests.support.vecchia import LENGTHSCALES, SCALES, VERY_CLOSE, dense_q, points_of, variational


def neighborhoods_of(points, K, **settings):
    kernel = SpatialKernel("Matern32", n_sets=2)
    kernel.lengthscale.copy_(torch.tensor(LENGTHSCALES, dtype=torch.float64))
    kernel.sigma.copy_(torch.tensor(SCALES, dtype=torch.float64).sqrt())
    return Neighborhoods(kernel, Places(torch.tensor(points)), 2, K, **settings)


def exact(x, z):
    return [
        dense_fields.covariance("Matern32", x, z, lengthscale, scale**0.5)
        for lengthscale, scale in zip(LENGTHSCALES, SCALES, strict=True)
    ]


def predict(found, points, m, d, V, mean):
    mean = torch.tensor(mean, dtype=torch.float64)
    return found.predict(Places(torch.tensor(points)), m.detach(), d.detach(), V.detach(), mean)


@pytest.mark.parametrize("rank", [0, 3])
def test_all_neighbours_give_the_exact_prediction(rank):
    points, new, prior_mean = points_of(80), points_of(15, seed=5), (0.4, -1.0)
    found = neighborhoods_of(points, 79)
    found.K = 80  # a new place can have all of them
    m, d, V = variational(80)
    mean, variance = predict(found, new, m, d, V[..., :rank], prior_mean)
    means, S = dense_q(m, d, V[..., :rank])
    for l, c in enumerate(prior_mean):
        cross = exact(new, points)[l]
        weights = np.linalg.solve(exact(points, points)[l], cross.T).T
        expected = c + weights @ (means[l] - c)
        np.testing.assert_allclose(mean[l], expected, **VERY_CLOSE)
        spread = SCALES[l] - (weights * cross).sum(1) + ((weights @ S[l]) * weights).sum(1)
        np.testing.assert_allclose(variance[l], spread, **VERY_CLOSE)


def test_prediction_at_the_places_themselves():
    points = points_of(60)
    m, d, V = variational(60)
    mean, variance = predict(neighborhoods_of(points, 5), points, m, d, V, (0.3, 0.3))
    np.testing.assert_allclose(mean, m.detach(), atol=1e-5)
    np.testing.assert_allclose(variance, (d + V.square().sum(-1)).detach(), atol=1e-4)


def test_all_neighbours_give_the_exact_conditionals():
    """Draws are linear: the identity as known values or as noise shows weights and roots."""
    points, new = points_of(30), points_of(6, seed=5)
    found = neighborhoods_of(points, 29)
    found.K = 35
    conditionals = found.conditionals(Places(torch.tensor(new)))
    np.testing.assert_array_equal(conditionals.used, np.arange(30))
    identity, zeros = (torch.zeros(2, n, 30).double() for n in (30, 6))
    identity += torch.eye(30)
    weights = conditionals.draw(identity, zeros)
    roots = conditionals.draw(
        torch.zeros(2, 30, 6).double(), torch.eye(6).double().expand(2, -1, -1)
    )
    for l in range(2):
        cross, among = exact(new, points)[l], exact(points, points)[l]
        expected = np.linalg.solve(among, cross.T).T
        np.testing.assert_allclose(weights[l], expected, rtol=1e-7, atol=1e-9)
        covariance = exact(new, new)[l] - expected @ cross.T
        np.testing.assert_allclose(roots[l] @ roots[l].T, covariance, rtol=1e-7, atol=1e-9)


def test_components_share_weights_under_one_set_of_hyperparameters():
    points = Places(torch.tensor(points_of(40)))
    found = Neighborhoods(SpatialKernel("Matern32", 0.3), points, 3, 5)
    assert found.factor.triangle.C == 1
    assert found.factor.variances.shape == (3, 40)


def test_components_that_differ_in_their_size_alone_share_weights():
    points = Places(torch.tensor(points_of(40)))

    def found(sigma, nugget=(0.0, 0.0)):
        kernel = SpatialKernel("Matern32", 0.3, n_sets=2)
        kernel.sigma.copy_(torch.tensor(sigma))
        kernel.nugget.copy_(torch.tensor(nugget))
        return Neighborhoods(kernel, points, 2, 5).factor

    unlike = found((1.0, 2.0), (0.1, 0.1))
    assert unlike.triangle.C == 2
    for nugget in ((0.0, 0.0), (0.1, 0.2)):
        factor = found((1.0, 2.0), nugget)
        assert factor.triangle.C == 1
        alone = [
            found((s, s), (n, n)).variances[0] for s, n in zip((1.0, 2.0), nugget, strict=True)
        ]
        torch.testing.assert_close(factor.variances, torch.stack(alone))
    x = torch.ones(2, 40, dtype=torch.float64)
    torch.testing.assert_close(
        unlike.precision(x)[0], found((1.0, 1.0), (0.1, 0.1)).precision(x)[0]
    )


def test_predictions_and_draws_in_float32_are_close():
    points, new = points_of(60), points_of(9, seed=5)
    m, d, V = variational(60)
    double, single = (
        neighborhoods_of(points, 6, dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    assert single.factor.triangle.weights.dtype == torch.float32
    for one, other in zip(
        predict(single, new, m, d, V, (0.3, 0.3)),
        predict(double, new, m, d, V, (0.3, 0.3)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    noise = torch.tensor(np.random.default_rng(0).normal(size=(2, 9, 4)))
    drawn = []
    for found in (single, double):
        conditionals = found.conditionals(Places(torch.tensor(new)))
        known = m.detach()[:, conditionals.used, None].expand(-1, -1, 4)
        drawn.append(conditionals.draw(known, noise))
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precompute", [True, False])
def test_neighbours_and_weights_are_kept_while_the_kernel_stays(precompute):
    found = neighborhoods_of(points_of(40), 5, precompute=precompute)
    factor = found.factor
    assert (found.factor is factor) == precompute
    found.kernel.sigma.mul_(2.0)
    assert found.factor is not factor
    assert (found.factor.graph is factor.graph) == precompute  # the nearest, whatever the kernel
    np.testing.assert_allclose(found.factor.variances, 4 * factor.variances, rtol=1e-6)


def test_probabilistic_neighbours_are_drawn_by_the_seed():
    graphs = [
        neighborhoods_of(points_of(80), 4, method="probabilistic", seed=seed, precompute=kept)
        for seed, kept in ((1, True), (1, False), (2, True))
    ]
    a, b, c = (one.factor.graph.predecessors for one in graphs)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_neighbours_in_groups_follow_the_kernel():
    x, groups = torch.tensor(points_of(60)), torch.arange(60) % 2
    apart = np.array([[0.0, 1.0], [1.0, 0.0]])
    kernel = SpatialKernel("Matern32", 0.3, group_diff_param=1e6, group_distances=apart)
    found = Neighborhoods(kernel, Places(x, groups), 1, 5)
    graph = found.factor.graph
    own = groups[graph.order].numpy()
    late = np.arange(60) >= 20
    assert (own[graph.predecessors[late]] == own[late, None]).all()


def test_k_and_method_are_checked_at_the_door():
    points = points_of(20)
    assert neighborhoods_of(points, 99).K == 19
    with pytest.raises(ValueError, match="K must be a whole number of at least 1; got 0"):
        neighborhoods_of(points, 0)
    with pytest.raises(ValueError, match="neighbors must be one of 'knn', 'probabilistic'"):
        neighborhoods_of(points, 3, method="near")
