r"""Covariance of a field between two places: kernels of `pyro.contrib.gp`, alone or over groups.

At distance r the kernels are sigma^2 kappa(r / lengthscale), plus at r = 0 the square of a nugget:
what a place has for itself and does not share with the next one. Between the groups g and g' of a
multi-group field they are

.. math:: \sigma^2 v^{p/2} \kappa(\sqrt{v} r / \mathrm{lengthscale}), \qquad
    v = 1 / (1 + a d_{gg'}^2)

in p dimensions, a Gneiting construction (Li, Jones, Banerjee and Engelhardt 2021, Multi-group
Gaussian processes): a = 0 is one field for all groups, a large one independent fields.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.contrib.gp import kernels
from torch import Tensor, nn

from pnmf_pyro.data.checks import check_choice, check_positive
from pnmf_pyro.data.places import Places

KERNELS: dict[str, Any] = {
    "Matern12": kernels.Exponential,
    "Matern32": kernels.Matern32,
    "Matern52": kernels.Matern52,
    "RBF": kernels.RBF,
}


def correlation(name: str, distance: Tensor) -> Tensor:
    """Return kappa at distances of any shape, in units of the lengthscale.

    The one place that calls a kernel of Pyro: its `forward`, since a call of the module itself
    writes the kernel's own parameters into the parameter store, and a scope of the store would cut
    the caller's parameters off from a step of SVI that is under way.
    """
    kernel = KERNELS[name](input_dim=1).requires_grad_(False)
    value = kernel.forward(distance.new_zeros(1, 1), distance.reshape(-1, 1))
    return value.reshape(distance.shape)


@dataclass(frozen=True)
class Pairs:
    """Pairs of places: what a kernel asks of them, whatever its hyperparameters.

    Parameters
    ----------
    distance : Tensor of any shape
    groups : pair of Tensor of int64, optional
        Codes of the groups of either place, which broadcast to that shape.
    dimensions : int
        p, of the space.
    """

    distance: Tensor
    groups: tuple[Tensor, Tensor] | None
    dimensions: int

    @classmethod
    def between(cls, a: Places, b: Places) -> Pairs:
        """Return the pairs of places of shape (..., n) and (..., m), of shape (..., n, m)."""
        groups = None
        if a.groups is not None and b.groups is not None:
            groups = a.groups[..., :, None], b.groups[..., None, :]
        return cls(_distances(a.coordinates, b.coordinates), groups, a.coordinates.shape[-1])

    @classmethod
    def among(cls, places: Places) -> Pairs:
        """Return each pair of places of shape (..., n) once, n (n + 1) / 2 of them; see symmetric.

        Half of the pairs are half of the work.
        """
        n, x, groups = len(places), places.coordinates, places.groups
        i, j = torch.tril_indices(n, n, device=x.device)
        distance = _distances(x, x).flatten(-2).index_select(-1, n * i + j)
        pair = None if groups is None else (groups[..., i], groups[..., j])
        return cls(distance, pair, x.shape[-1])

    def after(self, values: Tensor) -> Tensor:
        """Return values of shape (C,) as (C, 1, ..., 1), to stand in front of these pairs."""
        return values.reshape(-1, *[1] * self.distance.ndim)


def symmetric(below: Tensor, n: int) -> Tensor:
    """Return matrices (..., n, n) from their values at `Pairs.among`, (..., n (n + 1) / 2)."""
    i, j = torch.tril_indices(n, n, device=below.device)
    matrices = below.new_empty(*below.shape[:-1], n * n)
    for entries in (n * i + j, n * j + i):
        matrices.index_copy_(-1, entries, below)
    return matrices.unflatten(-1, (n, n))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class SpatialKernel(nn.Module):
    """sigma^2 kappa(r / lengthscale) + nugget^2 [r = 0], for one or several components.

    Parameters
    ----------
    names : {'Matern12', 'Matern32', 'Matern52', 'RBF'} or sequence of these
        Of several, the first is meant until :meth:`choose` says otherwise.
    lengthscale, sigma : float
        In the unit of the coordinates, and of log-factors.
    n_sets : int
        C, how many sets of hyperparameters: 1 for one that all components share, or L.
    nugget : float
        Standard deviation of what a place has for itself, in log-factors; 0 for none.

    Attributes
    ----------
    lengthscale, sigma, nugget : Tensor of shape (C,), float64
    names : tuple of str
    """

    chosen: Tensor
    lengthscale: Tensor
    sigma: Tensor
    nugget: Tensor

    def __init__(
        self,
        names: str | Sequence[str] = "Matern32",
        lengthscale: float = 1.0,
        sigma: float = 1.0,
        n_sets: int = 1,
        *,
        nugget: float = 0.0,
    ):
        super().__init__()
        self.names = check_kernels(names)
        only = len(self.names) == 1  # then there is nothing to save
        self.register_buffer("chosen", torch.tensor(0), persistent=not only)
        check_positive("lengthscale", lengthscale)
        check_positive("sigma", sigma)
        for word, value in (("lengthscale", lengthscale), ("sigma", sigma), ("nugget", nugget)):
            self.register_buffer(word, torch.full((n_sets,), float(value), dtype=torch.float64))

    @property
    def name(self) -> str:
        """Name of the kernel, of several the one chosen."""
        return self.names[int(self.chosen)]

    def choose(self, name: str) -> None:
        """Take another one of the `names`."""
        self.chosen.fill_(self.names.index(name))

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """What may be learned, by name; each of shape (C,)."""
        return {"lengthscale": self.lengthscale, "sigma": self.sigma, "nugget": self.nugget}

    @property
    def variance(self) -> Tensor:
        """Variance of the field at any place, of shape (C,)."""
        return self.sigma.square() + self.nugget.square()

    def forward(self, a: Places, b: Places) -> Tensor:
        """Return the covariance between places of shape (..., n) and (..., m), (C, ..., n, m)."""
        if a is b:
            return symmetric(self._covariance(Pairs.among(a)), len(a))
        return self._covariance(Pairs.between(a, b))

    def _covariance(self, pairs: Pairs) -> Tensor:
        values = self.hyperparameters
        return self.shared(pairs, values) + self.own(pairs, values)

    def shared(self, pairs: Pairs, values: Mapping[str, Tensor]) -> Tensor:
        """Return sigma^2 kappa(r / lengthscale), (C, ...), for hyperparameters of shape (C,)."""
        v = self._closeness(pairs, values)
        scaled = v.sqrt() * pairs.distance / pairs.after(values["lengthscale"])
        height = pairs.after(values["sigma"].square()) * v ** (pairs.dimensions / 2)
        return height * correlation(self.name, scaled)

    def own(self, pairs: Pairs, values: Mapping[str, Tensor]) -> Tensor:
        """Return nugget^2 [r = 0], (C, ...), for hyperparameters of shape (C,)."""
        here = (pairs.distance == 0) & (self._closeness(pairs, values) == 1)
        return pairs.after(values["nugget"].square()) * here

    def one(self, c: int | None) -> SpatialKernel:
        """Return a kernel of one set of hyperparameters, number c, or their geometric means."""
        single = copy.deepcopy(self).cpu()
        for name, values in self.hyperparameters.items():
            chosen = values.log().mean(0, keepdim=True).exp() if c is None else values[c : c + 1]
            setattr(single, name, chosen.detach().cpu())
        return single

    def _closeness(self, pairs: Pairs, values: Mapping[str, Tensor]) -> Tensor:
        """Factor v of the groups of pairs, of a shape that broadcasts to theirs."""
        return values["sigma"].new_ones(())


class MultiGroupKernel(SpatialKernel):
    """Kernel over places in groups, see the head of this module.

    Parameters
    ----------
    names, lengthscale, sigma, n_sets, nugget
        As for :class:`SpatialKernel`.
    group_diff_param : float
        a; the larger, the less groups share.
    group_distances : array-like of shape (G, G)
        Distances d between groups.

    Attributes
    ----------
    group_diff_param : Tensor of shape (C,), float64
    """

    group_diff_param: Tensor
    group_distances: Tensor

    def __init__(
        self,
        names: str | Sequence[str] = "Matern32",
        lengthscale: float = 1.0,
        sigma: float = 1.0,
        n_sets: int = 1,
        *,
        nugget: float = 0.0,
        group_diff_param: float = 10.0,
        group_distances: Any,
    ):
        super().__init__(names, lengthscale, sigma, n_sets, nugget=nugget)
        a = torch.full((n_sets,), float(group_diff_param), dtype=torch.float64)
        self.register_buffer("group_diff_param", a)
        distances = torch.as_tensor(np.asarray(group_distances, dtype=np.float64))
        self.register_buffer("group_distances", distances)

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """What may be learned, by name; each of shape (C,)."""
        return {**super().hyperparameters, "group_diff_param": self.group_diff_param}

    def _closeness(self, pairs: Pairs, values: Mapping[str, Tensor]) -> Tensor:
        assert pairs.groups is not None
        d = self.group_distances[pairs.groups]
        return 1 / (1 + pairs.after(values["group_diff_param"]) * d.square())


def check_kernels(names: str | Sequence[str]) -> tuple[str, ...]:
    """Check the names of one kernel or several.

    Raises
    ------
    ValueError
        For an unknown name, and where there is none.
    """
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found:
        raise ValueError(f"kernel must name at least one of {list(KERNELS)}; got none.")
    return tuple(check_choice("kernel", name, KERNELS) for name in found)


def check_group_distances(group_distances: Any, n_groups: int) -> np.ndarray:
    """Check distances between groups; 1 between any two different ones where None.

    Raises
    ------
    ValueError
        For a matrix of another shape, or one that is not symmetric with a zero diagonal, or not
        the distances between points of some Euclidean space: the kernel would not be a covariance.
    """
    if group_distances is None:
        return 1.0 - np.eye(n_groups)
    distances = np.asarray(group_distances, dtype=np.float64)
    if distances.shape != (n_groups, n_groups):
        raise ValueError(
            f"group_distances must have shape ({n_groups}, {n_groups}), a row and a column for "
            f"each group in sorted order; got {distances.shape}."
        )
    valid = np.isfinite(distances).all() and (distances >= 0).all()
    if not valid or not np.allclose(distances, distances.T) or np.diag(distances).any():
        raise ValueError(
            "group_distances must be finite, not negative, symmetric and zero on the diagonal."
        )
    centre = np.eye(n_groups) - 1 / n_groups
    lowest = np.linalg.eigvalsh(-centre @ np.square(distances) @ centre)[0]
    if lowest < -1e-8 * max(np.square(distances).max(), 1):
        raise ValueError(
            "group_distances must be distances between points of a Euclidean space, or the "
            "kernel is no covariance. Place the groups at points (for example by classical "
            "scaling) and pass the distances between these."
        )
    return distances
