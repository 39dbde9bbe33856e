r"""Covariance of the fields of several components: one correlation, hyperparameters of each.

Between the places x and x' the field of a component has the covariance

.. math:: \sigma^2 \kappa(x / \ell, x' / \ell) + \mathrm{nugget}^2 [x = x'],

where the correlation kappa is a kernel of `pyro.contrib.gp` (:mod:`pnmf_pyro.gp.correlation`), and
the nugget is the part of a place that it shares with no other. Between groups of places kappa is
that of :mod:`pnmf_pyro.gp.multi_group`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from pyro.contrib.gp.kernels import Kernel
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn

from pnmf_pyro.data.checks import check_positive
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.correlation import Correlation, check_kernels
from pnmf_pyro.gp.multi_group import (
    MultiGroupKernel,
    across_groups,
    check_of_distance,
    closeness,
    distances_between,
)

Hyperparameters = Mapping[str, Tensor]

# Hyperparameters of a kernel over groups, with the distances that go with each; of groups that are
# pairs, the second is of the second of the pair.
OF_GROUPS = {"group_diff_param": "group_distances", "group_diff_param_2": "group_distances_2"}


@dataclass(frozen=True)
class Pairs:
    """Pairs of places, with what does not change with the hyperparameters of a kernel.

    Distances of any shape; codes of the groups of either place, which broadcast to it; and
    coordinates (..., n, p) and (..., m, p), without the latter for pairs among the former, each of
    them once.
    """

    distance: Tensor
    groups: tuple[Tensor, Tensor] | None
    first: Tensor
    second: Tensor | None = None

    @classmethod
    def between(cls, a: Places, b: Places) -> Pairs:
        """Return the pairs of places of shape (..., n) and (..., m), of shape (..., n, m)."""
        groups = None
        if a.groups is not None and b.groups is not None:
            groups = a.groups[..., :, None], b.groups[..., None, :]
        distance = distances_between(a.coordinates, b.coordinates)
        return cls(distance, groups, a.coordinates, b.coordinates)

    @classmethod
    def within(cls, places: Places) -> Pairs:
        """Return each pair of places of shape (..., n) once, of shape (..., n (n + 1) / 2).

        This is half of the work; :func:`fill_symmetric` makes matrices of them.
        """
        x, groups = places.coordinates, places.groups
        i, j = torch.tril_indices(len(places), len(places), device=x.device)
        pair = None if groups is None else (groups[..., i], groups[..., j])
        return cls(_lower_entries(distances_between(x, x)), pair, x)

    @property
    def dimensions(self) -> int:
        """Number of coordinates p."""
        return self.first.shape[-1]

    def lead(self, values: Tensor) -> Tensor:
        """Return values of shape (C,) as (C, 1, ..., 1), which broadcasts with these pairs."""
        return values.reshape(-1, *[1] * self.distance.ndim)

    def correlate(self, correlation: Correlation, lengthscale: Tensor) -> Tensor:
        """Return the values of a correlation of inputs at these pairs, for one lengthscale."""
        if self.second is None:
            return _lower_entries(correlation.between(self.first / lengthscale))
        return correlation.between(self.first / lengthscale, self.second / lengthscale)


def fill_symmetric(below: Tensor, n: int) -> Tensor:
    """Return matrices (..., n, n) from their values at `Pairs.within`, (..., n (n + 1) / 2)."""
    i = torch.arange(n, device=below.device)
    large, small = torch.maximum(i[:, None], i), torch.minimum(i[:, None], i)
    entries = (large * (large + 1) // 2 + small).flatten()
    lists = below.reshape(-1, below.shape[-1])
    return lists.gather(1, entries.expand(len(lists), -1)).reshape(*below.shape[:-1], n, n)


def _lower_entries(matrices: Tensor) -> Tensor:
    n = matrices.shape[-1]
    i, j = torch.tril_indices(n, n, device=matrices.device)
    return matrices.flatten(-2).index_select(-1, n * i + j)


class SpatialKernel(nn.Module):
    """Covariance of fields, see the head of this module, for C sets of hyperparameters.

    Parameters
    ----------
    kernels : {'Matern12', 'Matern32', 'Matern52', 'RBF'}, Kernel of pyro.contrib.gp, or several
        Correlation; of several, the first until :meth:`choose` says otherwise. Hyperparameters of a
        kernel that is passed as an object stay as they are.
    lengthscale : float
        Length that the coordinates are divided by, in their unit.
    sigma : float
        Standard deviation that multiplies the correlation, in log-factors.
    n_sets : int
        C, 1 for hyperparameters that all components share, or their number L.
    nugget : float
        Standard deviation of the part that a place shares with no other, in log-factors.
    group_diff_param : float
        a, zero or more; the larger, the less groups share.
    group_distances : array-like of shape (G, G), optional
        Distances d between the groups of places; None for places that are in no groups.
    group_distances_2 : array-like of shape (H, H), optional
        The same between the second of groups that are pairs, in G H combinations. The code of the
        pair (s, t) is s H + t. Its a begins with `group_diff_param` as well.

    Attributes
    ----------
    lengthscale, sigma, nugget, group_diff_param, group_diff_param_2 : Tensor of shape (C,), float64
        The last two only of a kernel over groups, and over pairs.
    names : tuple of str
        Names of the correlations, the class for a kernel that is passed as an object.
    """

    chosen: Tensor
    lengthscale: Tensor
    sigma: Tensor
    nugget: Tensor
    group_distances: Tensor | None
    group_distances_2: Tensor | None

    def __init__(
        self,
        kernels: str | Kernel | Sequence[str | Kernel] = "Matern32",
        lengthscale: float = 1.0,
        sigma: float = 1.0,
        n_sets: int = 1,
        *,
        nugget: float = 0.0,
        group_diff_param: float = 10.0,
        group_distances: ArrayLike | None = None,
        group_distances_2: ArrayLike | None = None,
    ):
        super().__init__()
        correlations = [Correlation(kernel) for kernel in check_kernels(kernels)]
        self.correlations = nn.ModuleList(correlations)
        self.names = tuple(correlation.name for correlation in correlations)
        only = len(self.names) == 1  # then there is nothing to save
        self.register_buffer("chosen", torch.tensor(0), persistent=not only)
        check_positive("lengthscale", lengthscale)
        check_positive("sigma", sigma)
        values = {"lengthscale": lengthscale, "sigma": sigma, "nugget": nugget}
        for name, distances in zip(OF_GROUPS, (group_distances, group_distances_2), strict=True):
            if distances is not None:
                values[name] = group_diff_param
                distances = torch.tensor(np.asarray(distances, dtype=np.float64))
            self.register_buffer(OF_GROUPS[name], distances)
        for name, value in values.items():
            self.register_buffer(name, torch.full((n_sets,), float(value), dtype=torch.float64))
        self._learnable = tuple(values)

    @property
    def correlation(self) -> Correlation:
        """The correlation, of several the one chosen."""
        return cast(Correlation, self.correlations[int(self.chosen)])

    @property
    def name(self) -> str:
        """Name of the correlation, of several the one chosen."""
        return self.names[int(self.chosen)]

    def choose(self, number: int) -> None:
        """Take another one of the correlations, by its number among `names`."""
        self.chosen.fill_(number)

    @property
    def is_grouped(self) -> bool:
        """Whether it is a kernel over places in groups."""
        return self.group_distances is not None

    @property
    def sizes_of_groups(self) -> tuple[int, ...]:
        """G, or G and H where groups are pairs; none for places in no groups."""
        found = (getattr(self, name) for name in OF_GROUPS.values())
        return tuple(len(distances) for distances in found if distances is not None)

    def group_parts(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Return distances d between groups of these codes, by the name of the a of each."""
        distances, of_second = self.group_distances, self.group_distances_2
        assert distances is not None
        if of_second is None:
            return {"group_diff_param": distances[first, second]}
        H = len(of_second)
        return {
            "group_diff_param": distances[first // H, second // H],
            "group_diff_param_2": of_second[first % H, second % H],
        }

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """What may be learned, by name; each of shape (C,)."""
        return {name: getattr(self, name) for name in self._learnable}

    def forward(self, a: Places, b: Places) -> Tensor:
        """Return the covariance between places of shape (..., n) and (..., m), (C, ..., n, m)."""
        return self.covariance(a, None if a is b else b, self.hyperparameters)

    def covariance(self, a: Places, b: Places | None, values: Hyperparameters) -> Tensor:
        """Return the covariance between places, or among `a` if b is None, (C, ..., n, m).

        The values are those of the hyperparameters by name, each of shape (C,).
        """
        pairs = Pairs.within(a) if b is None else Pairs.between(a, b)
        found = self.smooth_part(pairs, values) + self.nugget_part(pairs, values)
        return fill_symmetric(found, len(a)) if b is None else found

    def smooth_part(self, pairs: Pairs, values: Hyperparameters) -> Tensor:
        """Return sigma^2 kappa, (C, ...), for hyperparameters of shape (C,)."""
        height = pairs.lead(values["sigma"].square())
        return height * self._correlate(self.correlation, pairs, values)

    def nugget_part(self, pairs: Pairs, values: Hyperparameters) -> Tensor:
        """Return nugget^2 [x = x'], (C, ...), for hyperparameters of shape (C,)."""
        here = pairs.distance == 0
        if self.is_grouped:
            here = here & (self._closeness(pairs, values) == 1)
        return pairs.lead(values["nugget"].square()) * here

    def variance(self, places: Places, values: Hyperparameters | None = None) -> Tensor:
        """Return the variance of the field at places of shape (..., n), (C, ..., n)."""
        values = self.hyperparameters if values is None else values
        scaled = (places.coordinates / lengthscale for lengthscale in values["lengthscale"])
        height = torch.stack([self.correlation.variance(inputs) for inputs in scaled])
        trailing = [1] * (height.ndim - 1)
        sigma, nugget = (values[name].reshape(-1, *trailing) for name in ("sigma", "nugget"))
        return sigma.square() * height + nugget.square()

    def select(self, c: int | None) -> SpatialKernel:
        """Return a kernel of one set of hyperparameters, number c, or their geometric means."""
        single = copy.deepcopy(self).cpu()
        for name, values in self.hyperparameters.items():
            chosen = values.log().mean(0, keepdim=True).exp() if c is None else values[c : c + 1]
            setattr(single, name, chosen.detach().cpu())
        return single

    def check(self, places: Places) -> None:
        """Raise a ValueError where a correlation cannot be evaluated at such places."""
        two = places[:2]
        for correlation in cast(Iterable[Correlation], self.correlations):
            self._correlate(correlation, Pairs.within(two), self.hyperparameters)
            correlation.variance(two.coordinates)

    def _correlate(self, correlation: Correlation, pairs: Pairs, values: Hyperparameters) -> Tensor:
        """Return kappa at pairs, (C, ...)."""
        of_distance = correlation.is_of_distance(pairs.dimensions)
        if not of_distance and not self.is_grouped:
            return torch.stack([pairs.correlate(correlation, l) for l in values["lengthscale"]])
        check_of_distance(correlation.name, of_distance)
        scaled = pairs.distance / pairs.lead(values["lengthscale"])
        if not self.is_grouped:
            return correlation.at_distance(scaled)
        v = self._closeness(pairs, values)
        return across_groups(correlation.at_distance, scaled, v, pairs.dimensions)

    def _closeness(self, pairs: Pairs, values: Hyperparameters) -> Tensor:
        parts = self.group_parts(*cast(tuple[Tensor, Tensor], pairs.groups))
        return closeness(*((pairs.lead(values[name]), d) for name, d in parts.items()))


class ComponentKernel(Kernel):
    """A :class:`SpatialKernel` of one set of hyperparameters, as a kernel of `pyro.contrib.gp`.

    Its inputs are coordinates and, of a kernel over groups, in a last column the code of the group.
    The models of Pyro can train its hyperparameters, which bear the names they have there.

    Parameters
    ----------
    spatial : SpatialKernel
        Kernel with one set of hyperparameters.
    dimensions : int
        Number of coordinates p.
    """

    def __init__(self, spatial: SpatialKernel, dimensions: int):
        super().__init__(dimensions + spatial.is_grouped)
        self.spatial = spatial
        for name, value in spatial.hyperparameters.items():
            setattr(self, name, PyroParam(value.clone(), constraints.nonnegative))

    def forward(self, X: Tensor, Z: Tensor | None = None, diag: bool = False) -> Tensor:
        """Return the covariance between inputs (n, q) and (m, q), or the variances (n,)."""
        spatial = self.spatial
        values = {name: getattr(self, name) for name in spatial.hyperparameters}
        a = Places.of_inputs(X, spatial.is_grouped)
        if diag:
            return spatial.variance(a, values)[0]
        b = None if Z is None else Places.of_inputs(Z, spatial.is_grouped)
        return spatial.covariance(a, b, values)[0]


def as_spatial_kernel(kernel: SpatialKernel | Kernel | str) -> SpatialKernel:
    """Return the covariance of fields that a kernel of any kind stands for."""
    if isinstance(kernel, SpatialKernel):
        return kernel
    if isinstance(kernel, ComponentKernel):
        spatial = copy.deepcopy(kernel.spatial)
        for name, value in spatial.hyperparameters.items():
            value.copy_(getattr(kernel, name).detach())
        return spatial
    if isinstance(kernel, MultiGroupKernel):
        a = float(kernel.group_diff_param.detach())
        distances = kernel.group_distances
        return SpatialKernel(kernel.kern, group_diff_param=a, group_distances=distances)
    return SpatialKernel(kernel)
