"""A base class of what is no tensor, and stands for one where torch or Pyro wants a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pyro.ops.provenance import extract_provenance
from torch import Tensor
from torch.utils._pytree import tree_map_only

Self = TypeVar("Self", bound="TensorLike")


class TensorLike(ABC):
    """A matrix of shape (n, d) that functions of torch take, and Pyro as an observed value.

    A function of torch sees :meth:`to_dense`, so that `torch.stack([X, X])` is a dense tensor. The
    methods are those of a tensor that Pyro calls on an observed value; only `expand` and `reshape`
    make it dense.
    """

    shape: tuple[int, int]

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrix as a dense tensor of shape (n, d)."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with dense tensors in its arguments."""
        given = (tuple(args), dict(kwargs or {}))
        args, kwargs = tree_map_only(TensorLike, lambda matrix: matrix.to_dense(), given)
        return func(*args, **kwargs)

    @property
    def data(self: Self) -> Self:
        """The matrix itself, which carries no gradient."""
        return self

    def detach(self: Self) -> Self:
        """Return the matrix itself, which carries no gradient."""
        return self

    def dim(self) -> int:
        """Return the number of dimensions, 2."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of entries n d, stored or not."""
        return self.shape[0] * self.shape[1]

    def expand(self, *shape: int) -> Tensor:
        """Return the matrix as a dense tensor, expanded."""
        return self.to_dense().expand(*shape)

    def reshape(self, *shape: int) -> Tensor:
        """Return the matrix as a dense tensor, reshaped."""
        return self.to_dense().reshape(*shape)


@extract_provenance.register(TensorLike)
def _without_provenance(matrix: TensorLike) -> tuple[Tensor, frozenset[str]]:
    """Give `pyro.render_model` a tensor, which it marks as what a sample statement gave."""
    return matrix.to_dense(), frozenset()
