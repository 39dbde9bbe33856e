"""Exposure: its products against the dense matrix e, with every combination of its parts."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro.data.counts import SparseCounts, as_counts
from pnmf_pyro.data.exposure import NONE, Exposure

N, D, L = 7, 5, 3
PARTS = ("size_factors", "effects", "hidden")
COMBINATIONS = [c for k in range(4) for c in itertools.combinations(PARTS, k)]


@pytest.fixture
def numbers():
    random = np.random.default_rng(0)
    return {
        "s": random.uniform(0.5, 2, N),
        "design": random.normal(size=(3, 2)),
        "codes": np.array([0, 2, 1, 1, 0, 2, 2]),
        "effects": random.normal(size=(D, 2)) / 2,
        "hidden": random.random((N, D)) < 0.3,
        "A": random.uniform(0.1, 1, (N, L)),
        "W": random.uniform(0.1, 1, (D, L)),
        "X": random.poisson(2, (N, D)).astype(float),
    }


def made(numbers, parts):
    """The exposure of some parts, and e as a dense array."""
    e, given = np.ones((N, D)), {}
    if "size_factors" in parts:
        given["size_factors"] = torch.from_numpy(numbers["s"])
        e = e * numbers["s"][:, None]
    if "effects" in parts:
        for name in ("design", "codes", "effects"):
            given[name] = torch.from_numpy(numbers[name])
        e = e * np.exp(numbers["design"][numbers["codes"]] @ numbers["effects"].T)
    if "hidden" in parts:
        given["hidden"] = SparseCounts.from_scipy(sp.csr_matrix(numbers["hidden"].astype(float)))
        e = np.where(numbers["hidden"], 0, e)
    return Exposure(**given), e


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_products_are_those_of_the_dense_matrix(numbers, parts):
    exposure, e = made(numbers, parts)
    A, W = (torch.from_numpy(numbers[name]) for name in "AW")
    close = np.testing.assert_allclose
    close(exposure.rates(W).expand(N, L), e @ numbers["W"])
    close(exposure.totals(A).expand(D, L), e.T @ numbers["A"])
    close(exposure.total(A.mT, W), (e * (numbers["A"] @ numbers["W"].T)).sum(1))
    close(exposure.squares(A, W), np.square(e * (numbers["A"] @ numbers["W"].T)).sum(0))
    block = exposure.block(slice(2, 6))
    close(1.0 if block is None else block.expand(4, D), e[2:6] if parts else 1.0)


@pytest.mark.parametrize("parts", COMBINATIONS)
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix])
def test_products_with_counts(numbers, parts, kind):
    """Counts are 0 where they are hidden, so that log 0 does not count."""
    exposure, e = made(numbers, parts)
    X = np.where(numbers["hidden"], 0, numbers["X"]) if "hidden" in parts else numbers["X"]
    counts, logs = as_counts(kind(X)), np.log(np.where(e > 0, e, 1))
    np.testing.assert_allclose(exposure.log_at(counts), (X * logs).sum(1), atol=1e-12)
    crossed = exposure.crossed(counts, torch.from_numpy(numbers["A"]))
    np.testing.assert_allclose(crossed, (X * e).T @ numbers["A"])


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_the_total_is_differentiable(numbers, parts):
    exposure, _ = made(numbers, parts)
    given = [torch.from_numpy(numbers[name]).requires_grad_() for name in "AW"]
    assert torch.autograd.gradcheck(lambda A, W: exposure.total(A.mT, W), given)


@pytest.mark.parametrize("parts", COMBINATIONS)
@pytest.mark.parametrize("samples", [None, [5, 0, 3]])
@pytest.mark.parametrize("features", [None, [4, 1]])
def test_of_some_samples_and_features(numbers, parts, samples, features):
    exposure, e = made(numbers, parts)
    rows = np.arange(N) if samples is None else samples
    columns = np.arange(D) if features is None else features
    index = (None if one is None else torch.tensor(one) for one in (samples, features))
    some, W = exposure.of(*index), numbers["W"][columns]
    expected = e[np.ix_(rows, columns)] @ W
    np.testing.assert_allclose(some.rates(torch.from_numpy(W)).expand(len(rows), L), expected)


def test_hiding_nothing_and_no_effect_are_no_exposure(numbers):
    nothing = SparseCounts.from_scipy(sp.csr_matrix((N, D)))
    design, codes = torch.ones(1, 1).double(), torch.zeros(N, dtype=torch.int64)
    flat = Exposure(None, design, codes, torch.zeros(D, 1).double(), nothing)
    A, W = (torch.from_numpy(numbers[name]) for name in "AW")
    np.testing.assert_allclose(flat.total(A.mT, W), NONE.total(A.mT, W))


def test_many_designs_go_through_in_blocks(numbers, monkeypatch):
    monkeypatch.setattr("pnmf_pyro.data.exposure.BLOCK", 2 * D)
    test_products_are_those_of_the_dense_matrix(numbers, PARTS)
