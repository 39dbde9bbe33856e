r"""Prior and posterior of a field at some of its N spots, in the shape that plates take.

A batch of both is (L, n), components by spots, so that a plate scales each spot. The divergence
of the posterior from the prior is a sum of one term for each spot, see
:mod:`pnmf_pyro.priors.vecchia_normal`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from pnmf_pyro.data.batches import take
from pnmf_pyro.gp.neighborhoods import Neighborhoods
from pnmf_pyro.priors.fields import FieldMarginals, OneShape
from pnmf_pyro.priors.vecchia_normal import (
    VecchiaNormal,
    kl_terms,
    kl_terms_given_weights,
    residuals,
)


class LocalPrior(OneShape, TorchDistribution):
    """N(level, Q^-1) at some spots; Q is the precision that neighbourhoods give.

    Parameters
    ----------
    neighborhoods : Neighborhoods
        Of L components at N spots.
    level : Tensor of shape (L,)
    spots : Tensor of int64, shape (n,), optional
        All unless given.
    dtype : torch.dtype
        Of draws.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own interface
    support = constraints.real
    has_rsample = False

    def __init__(
        self,
        neighborhoods: Neighborhoods,
        level: Tensor,
        spots: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.neighborhoods, self.level, self.spots, self.dtype = neighborhoods, level, spots, dtype
        n = len(neighborhoods.places) if spots is None else len(spots)
        super().__init__(torch.Size((len(level), n)), validate_args=False)

    @property
    def joint(self) -> VecchiaNormal:
        """The same distribution over all spots, with batch shape (L,)."""
        return VecchiaNormal(self.neighborhoods.factor, self.level[:, None])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw jointly, of shape sample_shape + (L, n)."""
        with torch.no_grad():
            return take(self.joint.rsample(torch.Size(sample_shape)), self.spots).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each spot given its neighbours, of the shape of the value.

        Raises
        ------
        ValueError
            For some of the spots: those that they are conditioned on are not there.
        """
        if self.spots is not None:
            raise ValueError(
                "the density of some spots of a field is not known without the others. Use all "
                "samples (batch_size=None) with a model that needs it."
            )
        joint = self.joint
        deviation = (value - joint.loc).reshape(-1, *self.batch_shape).movedim(0, -1)
        squares = residuals(joint.factor, deviation).square().movedim(-1, 0)
        variance = joint.conditional_variance
        density = -0.5 * (squares / variance + (2 * torch.pi * variance).log())
        return density.reshape(value.shape)


class LocalPosterior(FieldMarginals):
    """Marginals of N(m, V V^T + diag(d)) at some spots.

    Parameters
    ----------
    mean, diagonal : Tensor of shape (L, N)
        m and d at all spots.
    low_rank : Tensor of shape (L, N, R)
        V; taken as fixed.
    spots : Tensor of int64, shape (n,), optional
        All unless given.
    dtype : torch.dtype
        Of the marginals and draws.
    """

    def __init__(
        self,
        mean: Tensor,
        diagonal: Tensor,
        low_rank: Tensor,
        spots: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.moments, self.low_rank, self.spots = (mean, diagonal), low_rank, spots
        loc, own, V = take(mean, spots), take(diagonal, spots), take(low_rank, spots, dim=1)
        variance = own + V.double().square().sum(-1)

        def draw(n: int) -> Tensor:
            return draw_given(torch.randn(n, len(V), V.shape[-1]).to(V), loc, own, V)

        super().__init__(loc.to(dtype), variance.sqrt().to(dtype), draw)


def draw_given(shared: Tensor, mean: Tensor, diagonal: Tensor, low_rank: Tensor) -> Tensor:
    """Draw from N(m, V V^T + diag(d)), given the standard normals that go with V.

    Parameters
    ----------
    shared : Tensor of shape (E, L, R)
    mean, diagonal : Tensor of shape (L, n)
    low_rank : Tensor of shape (L, n, R)

    Returns
    -------
    Tensor of shape (E, L, n)
    """
    smooth = torch.einsum("lnr,elr->eln", low_rank, shared)
    return mean + smooth + diagonal.sqrt() * torch.randn(smooth.shape).to(mean)


@register_kl(LocalPosterior, LocalPrior)
def _kl_of_spots(q: LocalPosterior, p: LocalPrior) -> Tensor:
    (mean, diagonal), neighborhoods = q.moments, p.neighborhoods
    V = q.low_rank if q.low_rank.shape[-1] else None
    if neighborhoods.kept:
        rough = None if V is None else neighborhoods.roughness(V).to(mean.device)
        index = None if q.spots is None else q.spots.cpu().numpy()
        return kl_terms(p.joint, mean, diagonal, V, index, roughness=rough)
    numbers = np.arange(len(neighborhoods.places)) if q.spots is None else q.spots.cpu().numpy()
    near, weights, variances = neighborhoods.weights_of(numbers)
    weights, variances = weights.to(mean.device), variances.to(mean.device)
    level = p.level[:, None]
    return kl_terms_given_weights(weights, variances, near, numbers, mean, diagonal, V, level)
