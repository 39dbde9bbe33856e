"""Training repeats with its generator, and nothing global moves."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.training.loop import train
from tests.support import dense as ref
from tests.support.models import by_adam, model_of
from tests.support.state import global_state


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_training_moves_no_global_state(mode, users_parameter, validation, batch_size):
    problem = ref.simulate_problem(9)
    model = model_of(problem, mode)
    generator = torch.Generator().manual_seed(0)
    batches = Batches(as_counts(problem.X), batch_size, shuffle=True, generator=generator)
    steps = by_adam(model)
    with pyro.validation_enabled(validation):
        before = global_state()
        first = model.W.numpy()
        result = train(model, batches, FactorizationELBO(mode), steps, generator, max_iter=5)
        assert global_state() == before
    assert len(result.history) == 5
    assert (model.W.numpy() != first).any()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_training_repeats_with_its_generator(mode):
    problem = ref.simulate_problem(10)

    def fit(seed: int) -> tuple[list[float], np.ndarray]:
        model = model_of(problem, mode)
        generator = torch.Generator().manual_seed(seed)
        batches = Batches(as_counts(problem.X), 4, shuffle=True, generator=generator)
        objective = FactorizationELBO(mode)
        result = train(model, batches, objective, by_adam(model), generator, max_iter=6)
        return result.history, model.W.numpy()

    (history, W), (again, W_again), (other, _) = fit(0), fit(0), fit(1)
    assert history == again
    np.testing.assert_array_equal(W, W_again)
    assert history != other


def test_a_failed_fit_leaves_the_global_state_as_well(users_parameter):
    problem = ref.simulate_problem(11)
    model = model_of(problem, "expanded")
    with torch.no_grad():
        model.prior.mean[0, 0] = float("nan")
    before = global_state()
    with pytest.raises(FloatingPointError, match=r"at its first step: .*mean is the first"):
        train(
            model,
            Batches(as_counts(problem.X)),
            FactorizationELBO("expanded"),
            by_adam(model),
            torch.Generator(),
            max_iter=3,
        )
    assert global_state() == before
