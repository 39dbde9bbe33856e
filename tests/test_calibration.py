"""Intervals hold the truth as often as they say."""

import numpy as np
import pytest

from tests.support.calibration import coverage, coverage_at_new_places


@pytest.mark.parametrize("mode", ["expanded", "lower-bound"])
@pytest.mark.parametrize(("overlap", "mean"), [(0.05, 0.2), (0.8, 0.2), (0.05, 2.0), (0.8, 2.0)])
def test_intervals_cover_as_often_as_they_say(mode, overlap, mean):
    """3000 intervals: the share has a standard error of 0.006, so that another seed would be out
    by 0.025 once in 10^4 times. This one is fixed.
    """
    assert coverage(mode, overlap, mean) == pytest.approx(0.9, abs=0.025)


def test_overlapping_loadings_bring_coverage_of_the_factorised_posterior_down():
    """It leaves out that what one component gains the others lose."""
    expanded, lower_bound = (
        coverage(mode, 0.8, 2.0, N=400, joint=False) for mode in ("expanded", "lower-bound")
    )
    assert expanded < 0.85
    assert lower_bound < expanded - 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "least"), [("leave-one-out", 0.85), ("elbo", 0.8)])
def test_intervals_at_new_places_are_calibrated(criterion, least):
    """Hyperparameters by the evidence of the sites leave intervals that are a little narrow."""
    found = [coverage_at_new_places(seed, criterion) for seed in range(3)]
    assert least <= np.mean(found) <= 0.95
