"""What a fit left behind: its model, and quantities of its q(F) for all samples.

These are worked out a block of samples at a time. What is returned has to fit in memory; what is
needed on the way to it does not grow with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from pyro.distributions import Normal
from sklearn.exceptions import NotFittedError
from torch import Tensor

from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import Prior
from pnmf_pyro.priors.base import Field

Array = np.ndarray | Tensor


class Estimator(Protocol):
    """A fitted estimator, such as :class:`~pnmf_pyro.PNMF`."""

    @property
    def model_(self) -> PoissonFactorization:
        """The trained model."""


class Trained(Protocol):
    """A result of training, such as what :func:`~pnmf_pyro.fit_model` returns."""

    @property
    def model(self) -> PoissonFactorization:
        """The trained model."""


Fitted = Estimator | Trained | PoissonFactorization


def module_of(fit: object) -> PoissonFactorization | None:
    """Return the Pyro model and guide that a fit holds; None for what holds none."""
    if isinstance(fit, PoissonFactorization):
        return fit
    for name in ("model_", "model"):
        if isinstance(found := getattr(fit, name, None), PoissonFactorization):
            return found
    return None


def fitted_module(fit: Fitted, name: str = "model") -> PoissonFactorization:
    """Return the Pyro model and guide that a fit holds.

    Parameters
    ----------
    fit : PNMF, ModelFit or PoissonFactorization
        Fitted estimator, result of :func:`~pnmf_pyro.fit_model`, or a model trained in any way.
    name : str
        Name of the caller's parameter, for errors.

    Raises
    ------
    NotFittedError
        For an estimator that is not fitted.
    ValueError
        For what holds no model.
    """
    if (module := module_of(fit)) is not None:
        return module
    kind = type(fit).__name__
    if hasattr(fit, "fit") and not hasattr(fit, "components_"):
        raise NotFittedError(f"This {kind} is not fitted yet. Call fit before asking for factors.")
    hints = {
        "AnnData": " An AnnData object has the results of a fit but not its model: read obsm and "
        "varm, or pass the model.",
        "Prior": " For a prior use log_factors_from_prior and the functions beside it.",
    }
    raise ValueError(
        f"{name} must be a fitted PNMF, what fit_model returned, or a PoissonFactorization; got "
        f"{kind}.{hints.get('Prior' if isinstance(fit, Prior) else kind, '')}"
    )


def by_samples(
    field: Field,
    quantity: Callable[[Tensor | None], Tensor],
    return_tensor: bool,
    leading: tuple[int, ...] = (),
) -> Array:
    r"""Return a quantity of q(F) for all samples of a field.

    Parameters
    ----------
    field : Field
        A prior, or what a spatial one says of other places.
    quantity : callable
        From the numbers of n samples, or None for all, to a tensor of shape (\*leading, L, n).
    return_tensor : bool
        Return a tensor, on the device of the field, rather than an array.
    leading : tuple of int
        Leading dimensions of the quantity, such as that of draws.

    Returns
    -------
    ndarray or Tensor of shape (\*leading, N, L)
        In memory of its own, of the field's floating-point type.
    """
    size = at_once(math.prod(leading) * field.L)
    with torch.no_grad():
        first = quantity(None if size >= field.N else torch.arange(min(size, field.N)))
        device = first.device if return_tensor else torch.device("cpu")
        output = torch.empty(*leading, field.N, field.L, dtype=first.dtype, device=device)
        for start in range(0, field.N, size):
            stop = min(start + size, field.N)
            part = first if start == 0 else quantity(torch.arange(start, stop))
            output[..., start:stop, :] = part.mT
    return output if return_tensor else output.numpy()


def marginals(field: Field, quantity: Callable[[Normal], Tensor], return_tensor: bool) -> Array:
    """Return a quantity of the marginals of q(F), (L, n) at n samples, for all samples, (N, L)."""
    return by_samples(field, lambda index: quantity(field.marginal(index)), return_tensor)
