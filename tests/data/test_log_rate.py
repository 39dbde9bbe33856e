"""The hot kernel, sum_j X_ij log rho_ij, its gradients and its moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnmf_pyro.data.log_rate import log_rate, log_rate_and_moments, log_rate_with_gradients
from tests.support import dense as ref
from tests.support.models import LAYOUTS, assert_all_close, counts_of, double


class Kernel:
    """sum_j X_ij log rho_ij with X, A = exp F, W and weights, all dense and float64."""

    def __init__(self, dtype: torch.dtype):
        problem = ref.simulate_problem(2, N=11, D=8, L=3)
        random = np.random.default_rng(3)
        self.X = double(problem.X)
        self.A = double(np.exp(problem.mean.T)).to(dtype)
        self.W = double(problem.W).to(dtype)
        self.weights = double(random.uniform(-2, 3, 11))

    def expected(self, weights: torch.Tensor):
        """Values, and gradients of their weighted sum, by autograd through the dense formula."""
        A, W = (part.double().clone().requires_grad_() for part in (self.A, self.W))
        values = (self.X * (A @ W.T).log()).sum(1)
        return values, *torch.autograd.grad((weights * values).sum(), [A, W])


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_log_rate_and_its_gradients_equal_the_dense_formula(layout, dtype, kernel, weighted):
    twin = Kernel(dtype)
    weights = twin.weights if weighted else torch.full((11,), -1.5, dtype=torch.float64)
    counts = counts_of(twin.X.numpy(), layout, dtype)
    assert (len(list(counts.blocks())) > 2) == (kernel != "one block")
    A, W = (part.clone().requires_grad_() for part in (twin.A, twin.W))
    values = log_rate(counts, A, W)
    (weights * values).sum().backward()
    assert values.dtype == torch.float64
    assert A.grad.dtype == W.grad.dtype == dtype
    assert_all_close((values, A.grad, W.grad), twin.expected(weights), dtype)


def test_log_rate_has_the_same_values_without_gradients(layout, dtype, kernel):
    twin = Kernel(dtype)
    counts = counts_of(twin.X.numpy(), layout, dtype)
    expected, *_ = twin.expected(twin.weights)
    A = twin.A.clone().requires_grad_()
    with torch.no_grad():
        assert_all_close([log_rate(counts, A, twin.W)], [expected], dtype)
    assert_all_close([log_rate(counts, twin.A, twin.W)], [expected], dtype)


def test_log_rate_with_gradients_is_the_weighted_sum(layout, kernel):
    twin = Kernel(torch.float64)
    counts = counts_of(twin.X.numpy(), layout)
    for weights in (None, twin.weights):
        result = log_rate_with_gradients(counts, twin.A, twin.W, weights)
        assert_all_close(result, twin.expected(torch.ones(11) if weights is None else weights))


def test_log_rate_passes_gradcheck(layout, kernel):
    twin = Kernel(torch.float64)
    counts = counts_of(twin.X.numpy(), layout)
    A, W = (part.clone().requires_grad_() for part in (twin.A, twin.W))
    assert torch.autograd.gradcheck(lambda A, W: log_rate(counts, A, W), (A, W))
    assert torch.autograd.gradcheck(lambda A: log_rate(counts, A, twin.W), (A,))
    assert torch.autograd.gradcheck(lambda W: log_rate(counts, twin.A, W), (W,))


def test_log_rate_refuses_second_derivatives(layout):
    """They would be wrong: the gradients are made on the way forward."""
    twin = Kernel(torch.float64)
    A = twin.A.clone().requires_grad_()
    value = log_rate(counts_of(twin.X.numpy(), layout), A, twin.W).square().sum()
    (gradient,) = torch.autograd.grad(value, A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_log_rate_stays_finite_where_a_rate_is_zero(layout, dtype):
    """Projected loadings reach zero, also all those of a feature that has counts."""
    twin = Kernel(dtype)
    twin.W[5] = 0
    assert twin.X[:, 5].sum() > 0
    result = log_rate_with_gradients(counts_of(twin.X.numpy(), layout, dtype), twin.A, twin.W)
    assert all(bool(part.isfinite().all()) for part in result)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_rate_of_no_counts_at_all_is_zero(layout):
    counts = counts_of(np.zeros((3, 4)), layout)
    A, W = torch.ones(3, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    for part in log_rate_with_gradients(counts, A, W):
        assert bool((part == 0).all())


def test_allocation_moments_equal_the_twin(layout, dtype, kernel):
    twin = Kernel(dtype)
    _, *result = log_rate_and_moments(counts_of(twin.X.numpy(), layout, dtype), twin.A, twin.W)
    F = twin.A.double().log().T.numpy()
    expected = ref.allocation_moments(twin.X.numpy(), F, twin.W.double().numpy())
    assert_all_close(result, [double(part) for part in expected], dtype)
    # What they are for: X phi (1 - phi) is the curvature of the log rate.
    curvature = ref.log_rate_curvature(twin.X.numpy(), F, twin.W.double().numpy())
    assert_all_close([result[0] - result[1]], [double(curvature)], dtype)
