"""What objects hand on from one step of training to the next, so that a run can go on later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

# Tensors, numbers, words and None, in dictionaries, lists and tuples.
State = dict[str, Any]


class Resumable:
    """Something that a step leaves different from what it was, beside parameters and buffers.

    What is made anew at each step, or from what is there, is no part of its state.

    Attributes
    ----------
    carried : tuple of str
        Names of the attributes that are handed on.
    """

    carried: ClassVar[tuple[str, ...]] = ()

    def state(self) -> State:
        """Return what the next step needs, as it stands: it is not copied."""
        return {name: getattr(self, name) for name in self.carried}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, value in state.items():
            setattr(self, name, value)
