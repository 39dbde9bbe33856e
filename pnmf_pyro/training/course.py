"""Where a run of the training loop stands, and who keeps that."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pnmf_pyro.data.resumable import Resumable, State


class Keeper:
    """What keeps the course of a run, so that it can go on later; this one keeps nothing.

    Attributes
    ----------
    begun : mapping or None
        State of a :class:`Course` to go on from.
    """

    begun: Mapping[str, Any] | None = None

    def whole(self) -> AbstractContextManager[object]:
        """Return a block that no signal interrupts."""
        return nullcontext()

    def passed(self, course: Course) -> None:
        """Take note that a step is done, after which more are to come."""


NOTHING_KEPT = Keeper()


class Course(Resumable):
    """Where a run of the training loop stands: all that a step hands on to the next one.

    Parameters
    ----------
    history : list of float
        ELBO at each step.
    *parts : Resumable
        What steps change, beside parameters and buffers of the model.
    """

    def __init__(self, history: list[float], *parts: Resumable):
        self.history, self.parts = history, parts

    def state(self) -> State:
        """Return the states of all parts."""
        return {"history": list(self.history), "parts": [part.state() for part in self.parts]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same parts."""
        self.history[:] = state["history"]
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.resume(own)
