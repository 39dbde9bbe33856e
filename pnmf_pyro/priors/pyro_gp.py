"""An SVGP from a sparse Gaussian process of Pyro, and the other way, with the same predictions."""

from __future__ import annotations

from itertools import count
from typing import cast

import torch
from pyro.contrib.gp.likelihoods import Likelihood
from pyro.contrib.gp.models import VariationalSparseGP
from pyro.nn import PyroModule
from torch import Tensor

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.cholesky import jittered_cholesky
from pnmf_pyro.gp.kernels import ComponentKernel, as_spatial_kernel
from pnmf_pyro.priors.svgp import SVGP
from pnmf_pyro.priors.svgp_posterior import CholeskyInducing

_numbers = count()


@torch.no_grad()
def from_pyro(gp: VariationalSparseGP) -> SVGP:
    """Return the prior that makes the predictions of a sparse Gaussian process of Pyro.

    It takes over the kernel, the inducing points, q(u), the jitter and the mean, and its samples
    are at the inputs X. Each latent function is a component.

    Parameters
    ----------
    gp : VariationalSparseGP
        Process, whitened or not. Inputs of a
        :class:`~pnmf_pyro.gp.multi_group.MultiGroupKernel` become places in groups.

    Raises
    ------
    ValueError
        If its mean function is not constant, or a hyperparameter of its kernel has a prior.
    """
    kernel, M = as_spatial_kernel(gp.kernel), len(gp.Xu)
    places, inducing = (
        Places.of_inputs(inputs.double().reshape(len(inputs), -1), kernel.is_grouped)
        for inputs in (gp.X, gp.Xu.detach())
    )
    loc = gp.u_loc.detach().double().reshape(-1, M)
    tril = cast(Tensor, gp.u_scale_tril).detach().double().reshape(-1, M, M)
    covariance = kernel(inducing, inducing)
    jitter = gp.jitter / float(covariance.diagonal(dim1=-2, dim2=-1).mean())
    prior = SVGP(kernel, places, inducing, len(loc), jitter=jitter, dtype=gp.Xu.dtype)
    q = cast(CholeskyInducing, prior.q)
    if not gp.whiten:
        Lz = jittered_cholesky(covariance, jitter)
        loc = torch.linalg.solve_triangular(Lz, loc[..., None], upper=False)[..., 0]
        tril = torch.linalg.solve_triangular(Lz, tril, upper=False)
    prior.mean.fill_(_constant_mean(gp))
    q.u_loc.copy_(loc)
    q.u_scale.assign(tril.diagonal(dim1=-2, dim2=-1))
    q.u_below.copy_(tril)
    return prior


@torch.no_grad()
def to_pyro(
    prior: SVGP, component: int = 0, likelihood: Likelihood | None = None
) -> VariationalSparseGP:
    """Return a sparse Gaussian process of Pyro that makes the predictions of one component.

    It is whitened, in float64, and its kernel is a
    :class:`~pnmf_pyro.gp.kernels.ComponentKernel`. It holds no observations: `set_data` takes some.

    Parameters
    ----------
    prior : SVGP
        Prior with any family of q(u).
    component : int
        Number of the component.
    likelihood : Likelihood of pyro.contrib.gp, optional
        Likelihood of observations to come; predictions need none.
    """
    kernel = prior.kernel.select(component % len(prior.kernel.sigma))
    places, inducing = (p.to(torch.device("cpu")) for p in (prior.places, prior.inducing))
    height = kernel(inducing, inducing).diagonal(dim1=-2, dim2=-1).mean()
    level = float(prior.mean[component])
    gp = VariationalSparseGP(
        places.inputs,
        None,
        ComponentKernel(kernel, places.coordinates.shape[-1]),
        inducing.inputs.clone(),
        likelihood,
        mean_function=lambda inputs: level,
        whiten=True,
        jitter=prior.jitter * float(height),
    )
    # A module above it gives its parameters names of their own in the parameter store.
    PyroModule(f"svgp_{next(_numbers)}").gp = gp
    q = prior._posterior()
    gp.u_loc.copy_(q.mean[component])
    gp.u_scale_tril = torch.linalg.cholesky(_covariance(q)[component])
    return gp


def _covariance(q: torch.distributions.Distribution) -> Tensor:
    """Return the covariance matrices of q(u), (L, M, M), of any family."""
    normal = getattr(q, "base_dist", q)
    if hasattr(normal, "covariance_matrix"):
        return normal.covariance_matrix
    return torch.diag_embed(normal.variance)


def _constant_mean(gp: VariationalSparseGP) -> float:
    values = torch.as_tensor(gp.mean_function(gp.X), dtype=torch.float64).flatten()
    if not (values == values[0]).all():
        raise ValueError(
            "gp must have a constant mean_function, which becomes the mean of a component; its "
            f"values at X go from {float(values.min()):g} to {float(values.max()):g}. Subtract "
            "the function from the observations instead."
        )
    return float(values[0])
