"""Values that are made anew only where the tensors that they depend on have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

Made = TypeVar("Made")


class Remembered:
    """Keep the last value of each name, for as long as the tensors it was made of are the same."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": {}}  # a copy makes its own

    def __call__(self, name: str, tensors: Iterable[Tensor], make: Callable[[], Made]) -> Made:
        """Return the value of a name, made by `make` unless it is known for these tensors.

        Tensors that are changed in place count as changed.
        """
        tensors = [tensor.detach() for tensor in tensors]  # kept: no other can take their place
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if name not in self._known or self._known[name][0] != state:
            self._known.pop(name, None)
            self._known[name] = (state, tensors, make())
        return self._known[name][-1]

    def renew(self, name: str, tensors: Iterable[Tensor], value: Any) -> None:
        """Keep a value that somebody else has made of these tensors."""
        self._known.pop(name, None)
        self(name, tensors, lambda: value)
