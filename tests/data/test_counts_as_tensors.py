"""Counts where torch, or Pyro with an observed value, wants a tensor."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from pyro.ops.provenance import ProvenanceTensor, get_provenance

from pnmf_pyro.data.counts import Counts


@pytest.fixture
def dense(X) -> torch.Tensor:
    return torch.from_numpy(X.copy())


@pytest.mark.parametrize(
    "function",
    [
        lambda X: torch.stack([X, X]),
        lambda X: torch.cat((X, X), dim=1),
        lambda X: torch.where(torch.ones(1, dtype=torch.bool), X, 0.0),
        lambda X: torch.lgamma(X + torch.ones(1)),
        lambda X: torch.sum(input=X, dim=1),
        lambda X: torch.ones(1) * X,
        lambda X: torch.einsum("ij,ij->i", X, X),
        lambda X: torch.Tensor.mul(torch.full((1,), 2.0), X),
        lambda X: X.reshape(-1),
        lambda X: X.reshape(1, *X.shape),
        lambda X: X.expand((3, *X.shape)),
        lambda X: X.expand(3, *X.shape),
        lambda X: torch.Size(X.data.shape),
        lambda X: X.dim(),
        lambda X: X.numel(),
    ],
)
def test_functions_see_the_dense_tensor(counts, dense, function):
    """Those that Pyro calls on an observed value are among them."""
    given, expected = function(counts), function(dense)
    assert type(given) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(given, expected)
    assert given is not None
    assert np.array_equal(given, expected)


def test_they_are_no_tensor(counts):
    assert not isinstance(counts, torch.Tensor)
    assert not torch.is_tensor(counts)


def test_what_needs_no_dense_tensor_makes_none(counts, monkeypatch):
    """Neither shape nor detaching, which Pyro does at every observed value."""

    def refused(self):
        raise AssertionError("made dense")

    monkeypatch.setattr(type(counts), "to_dense", refused)
    assert counts.data is counts.detach() is counts
    assert (counts.dim(), counts.numel()) == (2, counts.shape[0] * counts.shape[1])
    assert isinstance(counts.device, torch.device)
    assert counts.dtype.is_floating_point
    with pytest.raises(AssertionError, match="made dense"):
        torch.stack([counts])


def test_provenance_is_tracked_through_the_dense_tensor(counts, dense):
    marked = ProvenanceTensor(torch.ones(1), frozenset({"a"}))
    product = marked * counts
    assert get_provenance(product) == {"a"}
    torch.testing.assert_close(product._t, dense)
    assert get_provenance([counts]) == set()


def test_copies(counts, dense):
    for again in (copy.copy(counts), copy.deepcopy(counts), pickle.loads(pickle.dumps(counts))):
        assert isinstance(again, Counts)
        assert torch.equal(again.to_dense(), dense)


@pytest.mark.parametrize(
    ("entry", "whole"),
    [(3.0, True), (2.5, False), (-1.0, False), (np.nan, False), (np.inf, False)],
)
def test_whole_numbers_are_told_from_others(X, counts, entry, whole):
    assert counts.whole
    values = counts.values.clone()
    values.view(-1)[-1] = entry
    counts.values = values
    del counts.__dict__["whole"]
    assert counts.whole == whole
