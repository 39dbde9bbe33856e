"""Signals that wait for the end of a block."""

import signal
import threading

import pytest

from pnmf_pyro.data.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block_and_a_second_one_does_not(number):
    came = []
    before = signal.signal(number, lambda number, frame: came.append(number))
    usual = signal.getsignal(number)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(number)
            assert came == [number]  # outside of a block nothing waits
            with interrupts.waiting():
                signal.raise_signal(number)
                assert interrupts.came
                assert came == [number]
            assert came == [number]
            interrupts.hand_on()
            assert came == [number] * 2
            with interrupts.waiting():
                signal.raise_signal(number)
                signal.raise_signal(number)
                assert came == [number] * 3
        assert came == [number] * 4  # what still waited
        assert signal.getsignal(number) == usual
    finally:
        signal.signal(number, before)


def test_an_error_goes_before_a_signal_that_waits():
    before = signal.getsignal(signal.SIGINT)
    interrupts = Interrupts()

    def fail() -> None:
        with interrupts, interrupts.waiting():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert signal.getsignal(signal.SIGINT) == before


def test_other_threads_leave_signals_alone():
    usual, found = signal.getsignal(signal.SIGINT), []

    def look() -> None:
        with Interrupts() as interrupts, interrupts.waiting():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [usual]
