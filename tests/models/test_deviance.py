"""The Poisson deviance of counts from expected counts, in each form of both."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import mean_poisson_deviance

import pnmf_pyro
from pnmf_pyro import deviance
from tests.support import dense as ref
from tests.support.models import as_value, counts_of, double


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts, factors (n, L), loadings (d, L) and their product."""
    problem = ref.simulate_problem(17)
    return problem.X, np.exp(problem.mean.T), problem.W, ref.rates(problem.mean, problem.W)


def test_equals_scikit_learn(case, layout, dtype, kernel):
    X, factors, W, rate = case
    counts = counts_of(X, layout, dtype)
    expected = mean_poisson_deviance(X.ravel(), rate.ravel())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    product = (double(factors).to(dtype), double(W).to(dtype))
    assert deviance(counts, product) == pytest.approx(expected, rel=tolerance)
    assert deviance(counts, rate) == pytest.approx(expected, rel=1e-10)
    assert ref.mean_deviance(X, rate) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["int tensor", "int csr", "float32 csr", "csr", "torch csr"])
def test_counts_of_any_type(case, kind):
    X, factors, W, rate = case
    expected = ref.mean_deviance(X, rate)
    assert deviance(as_value(X, kind), (double(factors), double(W))) == pytest.approx(expected)
    assert deviance(as_value(X, kind), double(rate)) == pytest.approx(expected)


@pytest.mark.parametrize("form", [np.asarray, double, pd.DataFrame, sp.csr_matrix, np.float32])
def test_rates_of_any_type(case, form):
    X, factors, W, rate = case
    expected = ref.mean_deviance(X, rate)
    assert deviance(pd.DataFrame(X), form(rate)) == pytest.approx(expected, rel=1e-5)
    assert deviance(X, (form(factors), form(W))) == pytest.approx(expected, rel=1e-5)


def test_factors_and_loadings_of_two_types_are_promoted(case):
    X, factors, W, rate = case
    value = deviance(X, (double(factors), double(W).float().double().float()))
    assert value == pytest.approx(ref.mean_deviance(X, rate), rel=1e-5)


def test_whole_numbers_as_rates(layout):
    X = counts_of(np.array([[0.0, 2.0], [1.0, 3.0]]), layout)
    expected = mean_poisson_deviance([0, 2, 1, 3], [1, 2, 2, 4])
    assert deviance(X, np.array([[1, 2], [2, 4]])) == pytest.approx(expected)
    assert deviance(X, (torch.tensor([[1], [2]]), [[1], [2]])) == pytest.approx(expected)


def test_is_zero_for_perfect_rates(layout):
    X = np.array([[2.0, 3.0], [4.0, 6.0]])
    product = (torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[2.0], [3.0]]).double())
    assert deviance(counts_of(X, layout), product) == pytest.approx(0, abs=1e-12)
    assert deviance(counts_of(X, layout), X) == pytest.approx(0, abs=1e-12)


def test_a_rate_of_zero_counts_nothing_where_there_are_no_counts(layout):
    X = np.array([[0.0, 2.0], [0.0, 3.0]])
    rate = np.array([[0.0, 1.5], [0.0, 2.5]])
    expected = mean_poisson_deviance([2, 3], [1.5, 2.5]) / 2
    assert deviance(counts_of(X, layout), rate) == pytest.approx(expected)
    assert deviance(counts_of(X, layout), (rate[:, 1:], np.array([[0.0], [1.0]]))) == pytest.approx(
        expected
    )
    assert 10 < deviance(counts_of(X, layout), np.zeros((2, 2))) < np.inf


def test_the_product_of_a_likelihood_is_what_it_takes(sized):
    """With size factors, which the product holds."""
    problem = ref.simulate_problem(18, sized=sized)
    s = None if problem.s is None else double(problem.s)
    likelihood = pnmf_pyro.models.PoissonFactors(double(problem.mean), double(problem.W), s)
    expected = ref.mean_deviance(problem.X, ref.rates(problem.mean, problem.W, problem.s))
    assert deviance(problem.X, likelihood.product) == pytest.approx(expected)
    assert deviance(problem.X, likelihood.mean) == pytest.approx(expected)


def test_parameters_that_are_trained_give_a_number(case):
    X, factors, W, rate = case
    product = (double(factors).requires_grad_(), double(W).requires_grad_())
    assert deviance(X, product) == pytest.approx(ref.mean_deviance(X, rate))


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (np.ones((2, 3)), r"rate must have the shape of X, \(3, 2\); got \(2, 3\)"),
        (np.ones(2), r"rate must have the shape of X"),
        (-np.ones((3, 2)), r"rate must be finite and not negative; the lowest is -1"),
        (np.full((3, 2), np.nan), r"rate must be finite and not negative"),
        ((np.ones((3, 4)), np.ones((4, 2))), r"\(3, L\) and \(2, L\).*got \(3, 4\), \(4, 2\)"),
        ((np.ones((3, 4)), np.ones((2, 3))), r"got \(3, 4\), \(2, 3\)"),
        ((np.ones((3, 4)),), r"got \(3, 4\)"),
        ((), r"got an empty tuple"),
        ((np.ones((3, 4)), -np.ones((2, 4))), r"loadings must be finite and not negative"),
        ((np.full((3, 4), np.inf), np.ones((2, 4))), r"the highest inf"),
        ("rate", "rate must be an array of numbers"),
    ],
)
def test_what_is_refused(rate, message, layout):
    with pytest.raises(ValueError, match=message):
        deviance(counts_of(np.ones((3, 2)), layout), rate)


def test_counts_that_are_refused():
    with pytest.raises(ValueError, match="Negative values"):
        deviance(-np.ones((3, 2)), np.ones((3, 2)))


@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, pd.DataFrame])
def test_some_entries(case, share, form):
    """By scikit-learn at these entries alone, whatever stands at the others."""
    X, factors, W, rate = case
    seen = np.random.default_rng(0).random(X.shape) < share
    given = form(np.where(seen, X, np.nan if form is np.asarray else 50))
    expected = mean_poisson_deviance(X[seen], rate[seen])
    assert deviance(given, rate, mask=seen) == pytest.approx(expected)
    product = (double(factors), double(W))
    assert deviance(given, product, mask=sp.csr_matrix(seen)) == pytest.approx(expected)
    parts = [deviance(X, rate, mask=m) * m.mean() for m in (seen, ~seen)]
    assert sum(parts) == pytest.approx(deviance(X, rate))
    assert deviance(X, rate, mask=np.ones_like(seen)) == deviance(X, rate)


def test_no_entries_have_no_deviance(case):
    X, _, _, rate = case
    with pytest.raises(ValueError, match="mask must be True for at least one entry"):
        deviance(X, rate, mask=np.zeros(X.shape, bool))
    with pytest.raises(ValueError, match="mask must have the shape of X"):
        deviance(X, rate, mask=np.ones(3, bool))
