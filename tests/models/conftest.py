"""A small problem with a sample and a feature without counts, and what the objective averages."""

import pytest
import torch

from pnmf_pyro.models.poisson import PoissonFactors
from tests.support import dense as ref


@pytest.fixture
def problem(sized) -> ref.Problem:
    """Counts, loadings and a q(F): 9 samples, 7 features, 3 components."""
    return ref.simulate_problem(sized=sized)


@pytest.fixture
def fields(monkeypatch) -> list[torch.Tensor]:
    """The fields exp F over which the objective averages, recorded as it goes."""
    seen: list[torch.Tensor] = []
    original = PoissonFactors.expected_terms

    def recording(self, value, fields, expected):
        seen.extend(field.detach().double() for field in fields)
        return original(self, value, fields, expected)

    monkeypatch.setattr(PoissonFactors, "expected_terms", recording)
    return seen
