"""Simulate, fit, recover (identity 7): factors match up to order and scale."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from pnmf_pyro import PNMF
from pnmf_pyro.transforms import log_factors
from tests.support.data import simulate
from tests.support.settings import NATURAL


def matched_correlation(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean correlation of columns under the best one-to-one matching."""
    L = truth.shape[1]
    correlation = np.corrcoef(found.T, truth.T)[:L, L:]
    rows, columns = linear_sum_assignment(-correlation)
    return float(correlation[rows, columns].mean())


def test_the_measure_sees_order_and_noise():
    truth = np.random.default_rng(0).normal(size=(300, 4))
    assert matched_correlation(3 * truth[:, [2, 0, 3, 1]] + 1, truth) == pytest.approx(1)
    assert matched_correlation(truth[::-1], truth) < 0.2


@pytest.mark.slow
def test_adam_recovers_the_factors_of_three_data_sets():
    """A seed fails below 0.95; 0 of the seeds 0 to 19 did when this was written."""
    scores = []
    for seed in range(3):
        X, F, _ = simulate(seed, 500, 200, 5)
        model = PNMF(5, max_iter=2000, tol=0, learning_rate=0.05, random_state=seed).fit(X)
        scores.append(matched_correlation(log_factors(model), F))
    assert np.mean(scores) > 0.95


def test_natural_steps_recover_the_factors():
    X, F, _ = simulate(0, 300, 100, 4)
    model = PNMF(4, max_iter=400, random_state=0, **NATURAL).fit(X)
    assert matched_correlation(log_factors(model), F) > 0.93
