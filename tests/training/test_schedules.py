"""How the learning rate moves from step to step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnmf_pyro.priors.natural import Step
from pnmf_pyro.training.schedules import Constant, Decreasing, GradientSteps, OneCycle, Plateau


def learning_rates(schedule, elbos: list[float], lr: float = 0.2) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    steps = GradientSteps(optimizer)
    adjust = schedule.attach(steps, len(elbos))
    rates = []
    for elbo in elbos:
        rates.append(optimizer.param_groups[0]["lr"])
        assert steps.lr == pytest.approx(rates[-1] / lr)
        steps.step()
        adjust(elbo)
    return rates


@pytest.mark.parametrize("schedule", [Constant(), Decreasing(start=0.3), OneCycle()])
def test_the_size_of_any_step_is_the_factor_on_a_learning_rate(schedule):
    class Counted(Step):
        def step(self) -> None:
            pass

    step, sizes = Counted(), []
    adjust = schedule.attach(step, 12)
    for _ in range(12):
        sizes.append(step.lr)
        adjust(0.0)
    np.testing.assert_allclose(sizes, np.array(learning_rates(schedule, [0.0] * 12)) / 0.2)


def test_each_group_of_an_optimizer_keeps_its_own_learning_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.2, 0.5)]
    steps = GradientSteps(torch.optim.SGD(groups))
    steps.lr = 0.1
    assert [group["lr"] for group in steps.optimizer.param_groups] == pytest.approx([0.02, 0.05])


@pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("steps", [101, 11])
def test_one_cycle_rises_to_its_peak_and_falls(pct_start, steps):
    schedule = OneCycle(pct_start, div_factor=20.0, final_div_factor=50.0)
    rates = np.array(learning_rates(schedule, [0.0] * steps))
    peak = round(pct_start * (steps - 1))
    assert rates.argmax() == peak
    assert rates[0] == pytest.approx(0.2 / 20)
    assert rates[peak] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.2 / 20 / 50)
    assert (np.diff(rates)[:peak] > 0).all()
    assert (np.diff(rates)[peak:] < 0).all()
    np.testing.assert_allclose(rates[: peak + 1], np.linspace(0.01, 0.2, peak + 1))
    # Half way down a cosine is the mean of both ends.
    half = peak + (steps - 1 - peak) / 2
    if half.is_integer():
        assert rates[int(half)] == pytest.approx((0.2 + rates[-1]) / 2)


def test_one_cycle_defaults_are_those_of_the_reference():
    assert OneCycle() == OneCycle(pct_start=0.3, div_factor=25.0, final_div_factor=1e4)
    assert OneCycle().warm_up(200) == 60


@pytest.mark.parametrize("pct_start", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_one_cycle_at_its_limits(pct_start, steps):
    rates = np.array(learning_rates(OneCycle(pct_start), [0.0] * steps))
    assert np.isfinite(rates).all()
    assert (rates > 0).all()
    assert (rates <= 0.2 + 1e-12).all()


def test_one_cycle_stays_at_its_end_beyond_the_last_step():
    schedule = OneCycle()
    assert schedule.factor(1.5) == pytest.approx(schedule.factor(1.0))


def test_decreasing_falls_as_stated():
    """(1 + step / delay) ** -forgetting, whose sum diverges and whose squares are summable."""
    rates = learning_rates(Decreasing(delay=4.0, forgetting=0.8), [0.0] * 30)
    np.testing.assert_allclose(rates, 0.2 * (1 + np.arange(30) / 4) ** -0.8, rtol=1e-12)
    assert Decreasing().warm_up(100) == 0
    assert 0.5 < Decreasing().forgetting <= 1


def test_plateau_reduces_to_its_floor_and_no_further():
    schedule = Plateau(patience=3, factor=0.5, min_lr=0.03)
    rates = learning_rates(schedule, [-10.0] * 40)
    assert schedule.warm_up(100) == 0
    # Three steps of patience, after the first, which is the best so far.
    assert rates[:5] == [0.2] * 5
    assert rates[5] == pytest.approx(0.1)
    assert sorted(set(rates), reverse=True) == pytest.approx([0.2, 0.1, 0.05, 0.03])
    assert min(rates) == 0.03


def test_plateau_waits_while_the_elbo_rises():
    schedule = Plateau(patience=2, factor=0.5)
    assert set(learning_rates(schedule, list(np.linspace(-100, -1, 30)))) == {0.2}
    assert min(learning_rates(schedule, list(np.linspace(-1, -100, 30)))) < 0.2


def test_plateau_defaults_are_those_of_the_reference():
    assert Plateau() == Plateau(patience=200, factor=0.8, min_lr=1e-5)


def test_constant_changes_nothing():
    assert set(learning_rates(Constant(), [-1.0] * 20)) == {0.2}
    assert Constant().warm_up(100) == 0
