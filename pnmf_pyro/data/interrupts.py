"""Signals that wait until what they would interrupt is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Lets Ctrl-C (SIGINT) and SIGTERM wait for the end of blocks; a second one does not wait.

    In other threads than the main one, and for signals that the process has no function for,
    nothing changes.

    Attributes
    ----------
    came : bool
        Whether a signal waits.
    """

    def __init__(self) -> None:
        self._usual: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._waits = False
        self._held: tuple[int, FrameType | None] | None = None

    @property
    def came(self) -> bool:
        """Whether a signal waits."""
        return self._held is not None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let signals wait in a block."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def hand_on(self) -> None:
        """Let the signal that waits do what it would have done."""
        if self._held is not None:
            (number, frame), self._held = self._held, None
            self._usual[number](number, frame)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._waits and not self.came:
            self._held = number, frame
        else:
            self._usual[number](number, frame)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                usual = signal.getsignal(number)
                if callable(usual):
                    self._usual[number] = usual
                    signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        if error[0] is None:
            self.hand_on()
