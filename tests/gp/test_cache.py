"""Values are made once for each state of the tensors that they depend on."""

import copy
import pickle

import pytest
import torch

from pnmf_pyro.gp.cache import Cache


@pytest.fixture
def counted():
    """A function of tensors that is kept, and the list of its calls."""
    cache, calls = Cache(), []

    def total(*tensors):
        def make():
            calls.append(len(calls))
            return sum(tensor.detach().sum() for tensor in tensors)

        return cache("total", tensors, make)

    total.cache = cache
    return total, calls


def test_a_value_is_made_once(counted):
    total, calls = counted
    x = torch.ones(3)
    assert total(x) == total(x) == 3
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.detach().fill_(2),
        lambda x: x.copy_(torch.full((3,), 2.0)),
        lambda x: x[1:].add_(1.5),
    ],
)
def test_a_change_in_place_is_noticed(counted, change):
    total, calls = counted
    x = torch.nn.Parameter(torch.ones(3))
    total(x)
    with torch.no_grad():
        change(x)
    assert total(x) == x.sum() != 3
    assert len(calls) == 2


def test_an_optimiser_changes_its_parameters(counted):
    total, _ = counted
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([x], lr=0.5)
    total(x)
    x.sum().backward()
    optimizer.step()
    assert total(x) == pytest.approx(x.sum().item())


def test_other_tensors_are_others_even_where_they_are_equal(counted):
    total, calls = counted
    for _ in range(3):
        total(torch.ones(3))  # could lie where the one before did
    total(torch.ones(3), torch.ones(2))
    assert len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_makes_its_own(counted, copied):
    total, _ = counted
    x = torch.ones(3)
    total(x)
    assert copied(total.cache)("total", [x], lambda: "made anew") == "made anew"
    assert total.cache("total", [x], lambda: "made anew") == 3
