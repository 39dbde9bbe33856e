"""Posteriors of Vecchia normals with independent observations, against dense matrices."""

import numpy as np
import pytest
import torch

from pnmf_pyro.gp.fronts import grid_sizes
from pnmf_pyro.gp.vecchia_solver import VecchiaPosterior, _Preconditioner
from tests.support import dense_fields
from tests.support.vecchia import (
    SPARSE,
    VERY_CLOSE,
    all_before,
    few_neighbours,
    make,
    matern32,
    points_of,
    rbf,
)


@pytest.fixture(scope="module")
def complete():
    return all_before()


@pytest.fixture(scope="module", params=SPARSE)
def sparse(request):
    return few_neighbours(request.param)


def test_all_neighbours_give_the_exact_posterior_mean(complete):
    _, factor, exact = complete
    random = np.random.default_rng(0)
    h, y = random.gamma(1.0, 3.0, size=(2, 200)), random.normal(size=(2, 200))
    x = VecchiaPosterior(factor).solve(h, h * y, tolerance=1e-11).x
    for l in range(2):
        gain = exact[l] @ np.linalg.inv(exact[l] + np.diag(1 / h[l]))
        np.testing.assert_allclose(x[l], gain @ y[l], **VERY_CLOSE)


@pytest.mark.parametrize("columns", [(), (3,)])
def test_posterior_solve(sparse, columns):
    _, factor, covariance = sparse
    random = np.random.default_rng(0)
    h, b = random.gamma(1.0, 3.0, size=(2, 60)), random.normal(size=(2, 60, *columns))
    h[:, :5] = 0
    posterior = VecchiaPosterior(factor)
    dense = np.linalg.inv(covariance) + np.stack([np.diag(one) for one in h])
    expected = np.linalg.solve(dense, b.reshape(2, 60, -1)).reshape(b.shape)
    exact = posterior.solve(h, b, tolerance=1e-11)
    np.testing.assert_allclose(exact.x, expected, **VERY_CLOSE)
    assert exact.error.shape == (2, *columns)
    again = posterior.solve(h, b, exact.x, tolerance=1e-6)
    assert again.iterations == 0
    objective = [
        posterior.solve(h, b, tolerance=1e-12, max_iterations=n).x for n in range(exact.iterations)
    ]
    values = [(x * (_times(dense, x) / 2 - b)).sum() for x in map(np.asarray, objective)]
    assert (np.diff(values) <= 1e-12).all()


def passed_on(A, x, M):
    """What the first M positions have when all others have passed on theirs; A is I - B."""
    x = x.clone()
    for i in range(len(x) - 1, M - 1, -1):
        shares = A[i, :i].abs()
        x[:i] += x[i] * shares / shares.sum()
    return x[:M]


def test_the_preconditioner_is_the_sum_over_grids(sparse):
    """Term by term, as at the top of the module."""
    _, factor, _ = sparse
    h = torch.tensor(np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60)))
    identity = torch.eye(60, dtype=torch.float64).repeat(2, 1, 1)
    B = factor.multiply(identity)[:, factor.order]  # I - B, its rows and columns in the ordering
    B = B[:, :, factor.order]
    curvature, D = h[:, factor.order], 1 / factor.variances[:, factor.order]
    found = _Preconditioner(factor, factor.ordered(h))(identity.movedim(1, 0).contiguous())
    for l in range(2):
        A, inverse = B[l], torch.linalg.inv(B[l])
        weights, total = torch.zeros(60, dtype=torch.float64), torch.zeros(60, 60).double()
        for M in reversed(grid_sizes(60)):
            passed = passed_on(A, curvature[l], M)
            weights[:M] = passed
            Q = A[:M, :M].T @ (D[l, :M, None] * A[:M, :M])
            diagonal = 1 / (Q.diagonal() + passed)
            total[:M, :M] += A[:M, :M] @ (diagonal[:, None] * A[:M, :M].T)
        total += (1 / (D[l] + weights)).diag()
        torch.testing.assert_close(found[:, l], inverse @ total @ inverse.T)


@pytest.mark.parametrize("kernel", [matern32(0.3), rbf(0.2)])
def test_weights_in_float32_take_as_many_steps(kernel):
    """The preconditioner is in float32, all else in float64: as near to the solution as asked."""
    steps, N = [], 400
    b = torch.tensor(np.random.default_rng(0).normal(size=(1, N)))
    for dtype in (torch.float64, torch.float32):
        factor = make(points_of(N), 20, [kernel], dtype=dtype)
        found = VecchiaPosterior(factor).solve(torch.full((1, N), 5.0), b, tolerance=1e-4)
        A = factor.precision(torch.eye(N, dtype=torch.float64)[None])[0] + 5 * torch.eye(N)
        e = found.x[0] - torch.linalg.solve(A, b[0])
        assert (e @ A @ e / N).sqrt() < 1e-3
        steps.append(found.iterations)
    assert steps[1] <= steps[0] + 2
    drawn = VecchiaPosterior(factor).solve(
        torch.full((1, N), 5.0), b, tolerance=0.01, dtype=torch.float32
    )
    e = drawn.x[0].double() - torch.linalg.solve(A, b[0])
    assert (e @ A @ e / N).sqrt() < 0.02


def test_a_component_without_anything_to_solve_stays_where_it_is(sparse):
    _, factor, _ = sparse
    b = torch.zeros(2, 60, dtype=torch.float64)
    b[1] = 1.0
    found = VecchiaPosterior(factor).solve(torch.ones(2, 60), b, tolerance=1e-8)
    assert (found.x[0] == 0).all()
    assert torch.isfinite(found.x).all()
    assert found.error[0] == 0


def _times(matrices, x):
    return (matrices @ x.reshape(*x.shape[:2], -1)).reshape(x.shape)


@pytest.mark.parametrize("h", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("lengthscale", [5.0, 20.0])
def test_steps_do_not_grow_with_the_lengthscale_or_the_data(h, lengthscale):
    """2,000 places at unit distance; a preconditioner without the coarse grids takes 30 to 150."""
    points = points_of(2000) * np.sqrt(2000)
    factor = make(points, 12, [matern32(lengthscale)])
    random = np.random.default_rng(0)
    noise = torch.tensor(random.normal(size=(1, 2000)))
    field = factor.solve(factor.variances.sqrt() * noise)
    curvature = h * torch.tensor(np.exp(0.5 * random.normal(size=(1, 2000))))
    noisy = field + torch.tensor(random.normal(size=(1, 2000))) / curvature.sqrt()
    posterior = VecchiaPosterior(factor)
    found = posterior.solve(curvature, curvature * noisy, tolerance=0.01)
    assert found.iterations <= 25
    best = posterior.solve(curvature, curvature * noisy, tolerance=1e-9).x
    e = found.x - best
    true_error = float((e * (factor.precision(e) + curvature * e)).sum() / 2000) ** 0.5
    assert found.error[0] / 5 < true_error < found.error[0]


def test_steps_do_not_grow_where_curvature_varies():
    """By a factor of 3,000, over the lengthscale; predictions have negative weights there."""
    points = points_of(6000) * np.sqrt(6000)
    factor = make(points, 12, [matern32(10.0)])
    curvature = torch.tensor(np.exp(2 * np.sin(points / 4).sum(1)))[None]
    draws = VecchiaPosterior(factor).sample(curvature, 1, 0)
    b = factor.precision(draws) + curvature[..., None] * draws
    assert VecchiaPosterior(factor).solve(curvature, b, tolerance=0.01).iterations <= 15


def test_posterior_draws_have_the_covariance(sparse):
    """Largest error of 1,830 covariances in sds of an estimate; P(false alarm) < 1e-6."""
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    draws = VecchiaPosterior(factor).sample(h, 2000, random_state=0, tolerance=1e-3).numpy()
    for l in range(2):
        C = np.linalg.inv(np.linalg.inv(covariance[l]) + np.diag(h[l]))
        deviation = np.sqrt(np.diag(C))
        error = (draws[l] @ draws[l].T / 2000 - C) / np.outer(deviation, deviation)
        assert np.abs(error).max() < 6.5 * np.sqrt(2 / 2000)


def test_best_diagonal_of_a_diagonal_q(sparse):
    """Its divergence from the posterior rises wherever an entry is changed."""
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    A = np.linalg.inv(covariance[0]) + np.diag(h[0])
    d = VecchiaPosterior(factor).conditional_variances(h)[0].numpy()
    best = dense_fields.kl_joint(np.zeros(60), np.diag(d), np.linalg.inv(A))
    for i in (0, 31):
        for factor_ in (0.9, 1.1):
            changed = d.copy()
            changed[i] *= factor_
            assert dense_fields.kl_joint(np.zeros(60), np.diag(changed), np.linalg.inv(A)) > best


def test_smooth_part_and_diagonal_make_the_posterior_covariance(sparse):
    """In expectation A^-1 + diag(d) A diag(d) / 4; P(false alarm) < 1e-6 as above."""
    _, factor, covariance = sparse
    h = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 60))
    V = VecchiaPosterior(factor).smooth_part(h, 2000, 0, tolerance=1e-3).numpy()
    for l in range(2):
        A = np.linalg.inv(covariance[l]) + np.diag(h[l])
        D = np.diag(1 / np.diag(A))
        expected = np.linalg.inv(A) - D + D @ A @ D / 4
        deviation = np.sqrt(np.diag(expected))
        error = (V[l] @ V[l].T - expected) / np.outer(deviation, deviation)
        assert np.abs(error).max() < 6.5 * np.sqrt(2 / 2000)


@pytest.mark.parametrize(
    ("h", "b", "message"),
    [
        (-np.ones((2, 60)), np.ones((2, 60)), "curvature must not be negative; place 0 has -1.0"),
        (
            np.ones((2, 60)),
            np.full((2, 60), np.inf),
            "b must be finite; component 0, place 0",
        ),
        (
            np.full((2, 60), np.nan),
            np.ones((2, 60)),
            "curvature must be finite; component 0, place 0",
        ),
    ],
)
def test_bad_posteriors(h, b, message):
    posterior = VecchiaPosterior(make(points_of(60), 3))
    with pytest.raises(ValueError, match=message):
        posterior.solve(h, b)
