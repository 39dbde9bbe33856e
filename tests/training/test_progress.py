"""The progress bar of a whole fit: how far it is, and what it says."""

import pytest

from pnmf_pyro.training.progress import Progress, StageCost

COSTS = (StageCost("first", 10, 1.0, 0.5), StageCost("at once", 0, 4.0, 0.0))


def test_a_stage_takes_what_is_done_once_and_its_steps():
    assert [cost.seconds for cost in COSTS] == [6.0, 4.0]


def test_the_bar_counts_expected_seconds():
    progress = Progress(COSTS)
    progress.begin("first")
    assert (progress.bar.n, progress.bar.total) == (0, 10)
    for _ in range(5):
        progress.step(-3.0)
    assert (progress.bar.n, progress.bar.total) == (1 + 2.5, 10)
    progress.begin("at once")  # it settled after half of the steps
    assert (progress.bar.n, progress.bar.total) == (3.5, 7.5)
    progress.close()
    assert (progress.bar.n, progress.bar.total) == (7.5, 7.5)


def test_a_stage_that_takes_more_steps_lengthens_what_is_left():
    progress = Progress(COSTS)
    progress.begin("first")
    for _ in range(20):
        progress.step(-3.0)
    assert progress.bar.n == 1 + 20 * 0.5
    assert progress.bar.total == pytest.approx(progress.bar.n + 0.2 * 20 * 0.5 + 4.0)


def test_stages_that_are_passed_over_or_unknown_take_nothing():
    progress = Progress((*COSTS, StageCost("last", 2, 0.0, 1.0)))
    progress.begin("unknown")
    progress.step(-3.0)
    assert progress.bar.n == 0
    progress.begin("last")
    assert (progress.bar.n, progress.bar.total) == (0, 2)


def test_it_says_stage_elbo_and_time_left(capsys):
    with Progress(COSTS) as progress:
        progress.begin("first")
        progress.step(-1234.5)
        progress.bar.refresh()
        said = capsys.readouterr().err
        assert "first:  15%" in said
        assert "ELBO -1234.5" in said
        assert "<" in said
    assert "100%" in capsys.readouterr().err


def test_without_costs_it_is_silent(capsys):
    with Progress() as progress:
        progress.begin("first")
        progress.step(-1.0)
    assert capsys.readouterr() == ("", "")


def test_an_error_leaves_the_bar_where_it_is(capsys):
    progress = Progress(COSTS)
    progress.begin("first")
    with pytest.raises(ZeroDivisionError), progress:
        raise ZeroDivisionError
    assert "100%" not in capsys.readouterr().err
