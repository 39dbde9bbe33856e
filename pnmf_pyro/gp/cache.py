"""Values that are made anew only where the tensors they depend on have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

Made = TypeVar("Made")


class Cache:
    """The last value of each name, with the tensors that it was made of.

    A tensor has changed where it lies elsewhere in memory, or where torch has written to it, which
    its counter `_version` says. Writes that torch does not see, as through a numpy array of the
    same memory, are not noticed.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[list[tuple[int, int]], list[Tensor], Any]] = {}

    def __getstate__(self) -> dict[str, dict]:
        return {"_made": {}}  # a copy makes its own

    def __call__(self, name: str, tensors: Iterable[Tensor], make: Callable[[], Made]) -> Made:
        """Return the value of a name, made by `make` unless it is there for these tensors."""
        held = [tensor.detach() for tensor in tensors]  # so that no other takes their memory
        state = [(tensor.data_ptr(), tensor._version) for tensor in held]
        if name not in self._made or self._made[name][0] != state:
            self._made.pop(name, None)
            self._made[name] = (state, held, make())
        return self._made[name][-1]

    def renew(self, name: str, tensors: Iterable[Tensor], value: object) -> None:
        """Keep a value that somebody else has made of these tensors."""
        self._made.pop(name, None)
        self(name, tensors, lambda: value)
