"""Odd calls of the public functions: taken rightly, or refused in a sentence."""

import time

import numpy as np
import pytest

from tests.support.fuzz import cases, verdict

CASES = cases()
SECONDS = 45


@pytest.mark.slow
def test_odd_calls_are_taken_rightly_or_refused_in_a_sentence():
    """As many as a minute allows, from an order that its seed fixes; `benchmarks fuzz` has all."""
    began, bad, seen = time.perf_counter(), {}, 0
    for number in np.random.default_rng(0).permutation(len(CASES)):
        if time.perf_counter() - began > SECONDS:
            break
        wrong = verdict(CASES[number], int(number))
        seen += 1
        if wrong:
            bad[CASES[number].name, int(number)] = wrong
    assert not bad
    assert seen > 20


@pytest.mark.parametrize("right", ["taken", "refused", "either"])
def test_there_are_cases_of_each_kind(right):
    assert sum(case.right == right for case in CASES) > 10
