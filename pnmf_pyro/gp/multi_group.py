r"""A field over places in groups.

Between the groups g and g' its kernel is

.. math:: v^{p/2} \kappa(\sqrt{v} r), \qquad v = 1 / (1 + a d_{gg'}^2)

at distance r in p dimensions, where d is the distance between the groups. It is a Gneiting
construction (Li, Jones, Banerjee and Engelhardt 2021, Multi-group Gaussian processes): a = 0 is one
field for all groups, a large a an independent field for each.

Groups may be pairs (s, t), such as a section and a type of cells. Then

.. math:: v = 1 / (1 + a d_{ss'}^2 + a_2 d_{tt'}^2),

so that sections and types share each as much as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from pyro.contrib.gp.kernels import Kernel
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from pnmf_pyro.gp.correlation import KERNELS, at_distance, is_of_distance


def closeness(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Return v for each a with the distances d that go with it, of shapes that broadcast."""
    apart = (a * distances.square() for a, distances in parts)
    return 1 / sum(apart, torch.tensor(1.0))


def across_groups(
    correlation: Callable[[Tensor], Tensor], distance: Tensor, v: Tensor, dimensions: int
) -> Tensor:
    """Return v^(p/2) kappa(sqrt(v) r), with r and v of shapes that broadcast, in p dimensions."""
    return v ** (dimensions / 2) * correlation(v.sqrt() * distance)


def distances_between(X: Tensor, Z: Tensor) -> Tensor:
    """Return the distances between rows of shape (..., n, p) and (..., m, p), (..., n, m)."""
    return torch.cdist(X, Z, compute_mode="donot_use_mm_for_euclid_dist")


class MultiGroupKernel(Kernel):
    """A kernel of `pyro.contrib.gp` over places in groups, see the head of this module.

    Its inputs have one column more than those of the kernel that it wraps: the last holds codes of
    groups, which are numbers of rows of `group_distances`. The models of Pyro can train it.

    Parameters
    ----------
    kern : Kernel
        kappa, a function of distance alone, with a variance and a lengthscale of its own. It must
        be a mixture of RBF kernels, as those of the Matern family are, or there is no covariance.
    group_distances : array-like of shape (G, G)
        Distances d between groups.
    group_diff_param : float or Tensor
        a, zero or more; the larger, the less groups share. It is a parameter of the kernel.
    active_dims : sequence of int, optional
        Columns of the inputs that it acts on, the codes last; the first p + 1 unless given.

    Raises
    ------
    ValueError
        If `kern` is not a function of distance alone, or the distances are not those of points.
    """

    group_diff_param: Tensor
    group_distances: Tensor

    def __init__(
        self,
        kern: Kernel,
        group_distances: ArrayLike,
        group_diff_param: float | Tensor = 10.0,
        active_dims: Sequence[int] | None = None,
    ):
        super().__init__(kern.input_dim + 1, active_dims)
        check_of_distance(type(kern).__name__, is_of_distance(kern, kern.input_dim))
        self.kern = kern
        a = group_diff_param if isinstance(group_diff_param, Tensor) else float(group_diff_param)
        param = PyroParam(torch.as_tensor(a), constraints.nonnegative)
        self.group_diff_param = cast(Tensor, param)  # it reads as a tensor
        checked = check_group_distances(group_distances, len(np.asarray(group_distances)))
        self.register_buffer("group_distances", torch.from_numpy(checked))

    def forward(self, X: Tensor, Z: Tensor | None = None, diag: bool = False) -> Tensor:
        """Return the covariance between inputs (n, p + 1) and (m, p + 1), or the variances (n,)."""
        X = self._slice_input(X)
        if diag:
            return self.kern(X[:, :-1], diag=True)
        Z = X if Z is None else self._slice_input(Z)
        rows, columns = X[:, -1].long(), Z[:, -1].long()
        d = self.group_distances[rows[:, None], columns[None, :]].to(X)
        v = closeness((self.group_diff_param, d))
        apart = distances_between(X[:, :-1], Z[:, :-1])
        return across_groups(lambda r: at_distance(self.kern, r), apart, v, X.shape[1] - 1)


def check_of_distance(name: str, is_of_distance: bool) -> None:
    """Raise a ValueError unless the kernel called `name` is a function of distance alone."""
    if not is_of_distance:
        raise ValueError(
            f"kernel must be a function of distance alone where there are groups, and {name} is "
            f"not. Use one of {list(KERNELS)}, an isotropic kernel of pyro.contrib.gp that acts on "
            "all coordinates, or sums and products of these."
        )


def check_group_distances(group_distances: ArrayLike | None, n_groups: int) -> np.ndarray:
    """Return distances between groups, (G, G); 1 between any two different ones where None.

    A ValueError tells of another shape, and of a matrix that is not symmetric with a zero diagonal
    or not the distances between points of a Euclidean space: the kernel would be no covariance.
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
