"""The correlation that fields share: any kernel of `pyro.contrib.gp`, evaluated in one of two ways.

A kernel that is a function of distance alone is evaluated at distances of any shape, all at once.
Any other kernel is evaluated on inputs through its own `forward`, one matrix after another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import pyro
import torch
from pyro.contrib.gp.kernels import (
    RBF,
    Constant,
    Exponent,
    Exponential,
    Isotropy,
    Kernel,
    Matern32,
    Matern52,
    Product,
    Sum,
    Warping,
)
from pyro.nn import PyroModule
from torch import Tensor, nn

KERNELS: dict[str, type[Isotropy]] = {
    "Matern12": Exponential,
    "Matern32": Matern32,
    "Matern52": Matern52,
    "RBF": RBF,
}

# The same, as functions of distance. Pyro's take several times as long, and add 1e-12 to its
# square.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "Matern12": lambda r: (-r).exp(),
    "Matern32": lambda r: (3**0.5 * r + 1) * (-(3**0.5) * r).exp(),
    "Matern52": lambda r: ((5 / 3 * r + 5**0.5) * r + 1) * (-(5**0.5) * r).exp(),
    "RBF": lambda r: (-0.5 * r.square()).exp(),
}


class Correlation(nn.Module):
    """A kernel of Pyro whose own hyperparameters stay as they are given.

    It holds a copy of the kernel in float64, with numbers in the place of parameters. So it makes
    no statement in a Pyro program, and a model that holds it has no parameter or state more.

    Parameters
    ----------
    kernel : {'Matern12', 'Matern32', 'Matern52', 'RBF'} or Kernel
        Kernel without priors, or the name of one with lengthscale 1 and variance 1.

    Attributes
    ----------
    name : str
        The name that was given, or the name of the kernel's class.
    """

    def __init__(self, kernel: str | Kernel):
        super().__init__()
        self.is_named = isinstance(kernel, str)
        self.name = kernel if isinstance(kernel, str) else type(kernel).__name__
        self.kernel = _with_numbers(KERNELS[kernel](1) if isinstance(kernel, str) else kernel)

    def is_of_distance(self, dimensions: int) -> bool:
        """Return whether it is a function of distance alone, see :func:`is_of_distance`."""
        return self.is_named or is_of_distance(self.kernel, dimensions)

    def at_distance(self, distance: Tensor) -> Tensor:
        """Return the values at distances of any shape."""
        return (
            FORMULAS[self.name](distance) if self.is_named else at_distance(self.kernel, distance)
        )

    def between(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        """Return the values (..., n, m) between inputs (..., n, p) and (..., m, p), or among X.

        A kernel that acts on other columns, or returns another shape, raises a ValueError.
        """
        if X.ndim > 2 and Z is None:
            return torch.stack([self.between(x) for x in X])
        if X.ndim > 2 and Z is not None:
            batch = torch.broadcast_shapes(X.shape[:-2], Z.shape[:-2])
            both = (inputs.expand(*batch, -1, -1) for inputs in (X, Z))
            return torch.stack([self.between(x, z) for x, z in zip(*both, strict=True)])
        columns = self.kernel.active_dims
        if max(columns) >= X.shape[1]:
            raise ValueError(
                f"kernel {self.name} must act on columns of the coordinates, of which there are "
                f"{X.shape[1]}; it acts on columns {columns}. Pass input_dim={X.shape[1]} or other "
                "active_dims to it."
            )
        return self._checked(self.kernel(X, Z), len(X), len(X if Z is None else Z))

    def variance(self, X: Tensor) -> Tensor:
        """Return the value between each input and itself, of shape (..., n)."""
        inputs = X.reshape(-1, X.shape[-1])
        return self._checked(self.kernel(inputs, diag=True), len(inputs)).reshape(X.shape[:-1])

    def _checked(self, values: Tensor, *shape: int) -> Tensor:
        if values.shape != shape:
            raise ValueError(
                f"kernel {self.name} must return values of shape {shape} for such inputs; got "
                f"shape {tuple(values.shape)}. Write its forward(X, Z=None, diag=False) as that of "
                "pyro.contrib.gp.kernels.Kernel is."
            )
        return values


def check_kernels(kernels: str | Kernel | Sequence[str | Kernel]) -> list[str | Kernel]:
    """Return one kernel or several as a list; raise a ValueError for none and for all else."""
    several = kernels if isinstance(kernels, list | tuple) else [kernels]
    for kernel in several or [kernels]:
        if not isinstance(kernel, Kernel) and not (isinstance(kernel, str) and kernel in KERNELS):
            names = ", ".join(map(repr, KERNELS))
            raise ValueError(
                f"kernel must be one of {names}, a kernel of pyro.contrib.gp, or a tuple of these; "
                f"got {kernel!r}."
            )
    return cast(list[str | Kernel], list(several))


def is_of_distance(kernel: Kernel, dimensions: int) -> bool:
    """Return whether a kernel is a function of the distance between its inputs alone.

    Such are the isotropic kernels with one lengthscale over all columns of the inputs, constants,
    and sums, products, exponentials and polynomials of these.
    """
    if type(kernel) in (Sum, Product):
        parts = (part for part in (kernel.kern0, kernel.kern1) if isinstance(part, Kernel))
        return all(is_of_distance(part, dimensions) for part in parts)
    if type(kernel) is Exponent or (type(kernel) is Warping and kernel.iwarping_fn is None):
        return is_of_distance(kernel.kern, dimensions)
    if isinstance(kernel, Isotropy):
        all_columns = sorted(kernel.active_dims) == list(range(dimensions))
        return all_columns and cast(Tensor, kernel.lengthscale).numel() == 1
    return type(kernel) is Constant


def at_distance(kernel: Kernel, distance: Tensor) -> Tensor:
    """Return the values of a kernel of distance alone at distances of any shape.

    Kernels of Pyro read inputs of shape (n,) as one column, whatever their `active_dims`.
    """
    return kernel(distance.new_zeros(1), distance.reshape(-1)).reshape(distance.shape)


def _with_numbers(kernel: Kernel) -> Kernel:
    """Return a copy of a kernel that has buffers, not to be saved, in the place of parameters."""
    copied = copy.deepcopy(kernel)
    for module in copied.modules():
        values: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        if isinstance(module, PyroModule):
            values = dict(module.named_pyro_params(recurse=False))
            if module._pyro_samples:
                raise ValueError(
                    f"kernel {type(kernel).__name__} must have numbers for its hyperparameters; "
                    f"{list(module._pyro_samples)} have priors. Set them to values."
                )
        values |= dict(module.named_buffers(recurse=False))
        with pyro.get_param_store().scope():  # the original may have parameters of these names
            for name, value in values.items():
                delattr(module, name)
                module.register_buffer(name, value.detach().clone(), persistent=False)
    return copied.double()
