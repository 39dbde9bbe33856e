"""The prior that the parameters of an estimator name."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from pyro.contrib.gp.kernels import Kernel
from torch import Tensor

from pnmf_pyro.data.places import GroupCodes, Places, typical_lengthscale
from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.parameters import Settings, learned, n_spatial
from pnmf_pyro.gp.correlation import check_kernels
from pnmf_pyro.gp.inducing import inducing_points
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel, check_group_distances
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior, Prior, SideBySide

logger = logging.getLogger("pnmf_pyro")


def make_prior(settings: Settings, data: Data, random: np.random.RandomState) -> Prior:
    """Make the prior of a fit, or copy that which was passed as an object."""
    if settings.prior is not None:
        return _own_prior(settings.prior, settings.n_components, data)
    y = torch.empty(data.counts.shape[::-1], dtype=data.counts.dtype, device="meta")
    if data.places is None:
        return plain_prior(settings, y, settings.n_components)
    field = spatial_prior(settings, data.places, data.groups, y.dtype, random)
    return beside_plain(settings, field, y)


def beside_plain(settings: Settings, field: Prior, y: Tensor) -> Prior:
    """Put the components that know no space beside those of a field, where there are any."""
    if settings.non_spatial_components == 0:
        return field
    return SideBySide(field, plain_prior(settings, y, settings.non_spatial_components))


def plain_prior(settings: Settings, y: Tensor, L: int) -> GaussianPrior:
    """Make the prior of L components that know no space; of y (D, N) only the shape is used."""
    scale = 1.0 if isinstance(settings.scale_pf, str) else settings.scale_pf
    return GaussianPrior(y, L, scale, settings.training_mode == "natural")


def _own_prior(given: Prior, L: int, data: Data) -> Prior:
    """Copy a prior that was passed as an object: a fit leaves what it was given alone."""
    prior, n = copy.deepcopy(given), data.counts.shape[0]
    if (n, L) != (prior.N, prior.L):
        raise ValueError(
            f"prior must be over n_components={L} components and the {n} samples of X; it is over "
            f"L={prior.L} and N={prior.N}."
        )
    return prior.to(data.counts.device)


def spatial_prior(
    settings: Settings,
    places: Places,
    groups: GroupCodes | None,
    dtype: torch.dtype,
    random: np.random.RandomState,
    inducing: Places | None = None,
) -> LCGP | SVGP:
    """Make the prior of a spatial model; `inducing` points are chosen unless given."""
    L = n_spatial(settings)
    kernel = _kernel(settings, places, groups)
    common: dict[str, Any] = {
        "cholesky_mode": settings.cholesky_mode,
        "use_natural_gradients": settings.training_mode == "natural",
        "dtype": dtype,
    }
    if settings.local:
        return LCGP(
            kernel,
            places,
            L,
            K=settings.K,
            neighbors=settings.neighbors,
            precompute_knn=settings.precompute_knn,
            seed=int(random.randint(2**31 - 1)),
            **common,
        )
    if inducing is None:
        allocation = settings.inducing_allocation
        inducing = inducing_points(places, settings.num_inducing, allocation, random)
    return SVGP(
        kernel,
        places,
        inducing,
        L,
        jitter=settings.jitter,
        diagonal_only=settings.diagonal_only,
        **common,
    )


def _kernel(settings: Settings, places: Places, groups: GroupCodes | None) -> SpatialKernel:
    """The covariance of the fields, with hyperparameters for each component where learned."""
    if isinstance(settings.kernel, SpatialKernel):
        return _own_kernel(settings.kernel, settings, places, groups)
    kernels, a = settings.kernel, settings.group_diff_param
    distances: list[Tensor | np.ndarray | None] = [None, None]
    if isinstance(kernels, MultiGroupKernel):
        a, distances[0] = float(kernels.group_diff_param.detach()), kernels.group_distances
        kernels = kernels.kern
        if groups is None:
            raise ValueError(
                "kernel is one over groups, and multigroup=False. Set multigroup=True and pass "
                "groups to fit, or pass the kernel that it wraps, kernel.kern."
            )
    for number, size in enumerate(groups.sizes if groups is not None else ()):
        distances[number] = check_group_distances(distances[number], size)
    start = settings.lengthscale
    if "lengthscale" in learned(settings):
        start = typical_lengthscale(places)
    kernel = SpatialKernel(
        kernels,
        start,
        settings.sigma,
        n_spatial(settings) if learned(settings) else 1,
        group_diff_param=a,
        group_distances=distances[0],
        group_distances_2=distances[1],
    )
    kernel.check(places)
    for one in check_kernels(kernels):
        if isinstance(one, Kernel):
            logger.info(
                "kernel %s: a function of coordinates divided by the lengthscale, times sigma^2; "
                "hyperparameters of its own stay as they are given",
                type(one).__name__,
            )
    return kernel


def _own_kernel(
    given: SpatialKernel, settings: Settings, places: Places, groups: GroupCodes | None
) -> SpatialKernel:
    """Copy a covariance that was passed with all its hyperparameters."""
    kernel = copy.deepcopy(given)
    if kernel.is_grouped != settings.multigroup:
        raise ValueError(
            f"kernel has {'' if kernel.is_grouped else 'no '}group_distances, and multigroup="
            f"{settings.multigroup}. A kernel over groups needs both multigroup=True and "
            "group_distances, any other kernel neither."
        )
    if groups is not None and kernel.sizes_of_groups != groups.sizes:
        raise ValueError(
            f"kernel is one over {' x '.join(map(str, kernel.sizes_of_groups))} groups, and groups "
            f"has {' x '.join(map(str, groups.sizes))}. Give it group_distances of these, and "
            "group_distances_2 where groups has two columns."
        )
    L, n_sets = n_spatial(settings), len(kernel.sigma)
    if n_sets not in (1, L):
        beside = " - non_spatial_components" if settings.non_spatial_components else ""
        raise ValueError(
            f"kernel must have one set of hyperparameters, or one for each of n_components{beside}="
            f"{L}; it has n_sets={n_sets}."
        )
    kernel.check(places)
    return kernel
