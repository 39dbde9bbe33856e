r"""Which components of a start go to which of several priors side by side.

Components that are found without knowing places come in any order. Those whose factors are alike at
places that are close belong to fields, the others to priors that know no places. How much they are
alike is their spatial autocorrelation: with z the log-factors of a component, centred in each
group,

.. math:: I = \frac{\sum_i z_i \bar z_i}{\sum_i z_i^2}, \qquad
    \bar z_i = \text{mean of the nearest neighbours}

(Moran 1950). It is near 0 for factors that are independent over places, however much they vary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.neighbors import neighbours_of
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import Prior


def autocorrelation(values: Tensor, places: Places) -> Tensor:
    """Return the autocorrelation of each component over nearest neighbours, (L,).

    Parameters
    ----------
    values : Tensor of shape (L, N)
        Log-factors of the components.
    places : Places of shape (N,)
        Places of the samples. Neighbours are of the same group.
    """
    z, own = values.double(), torch.arange(len(places), device=values.device)
    groups = own.new_zeros(len(own)) if places.groups is None else places.groups
    for group in groups.unique():
        mine = groups == group
        z = torch.where(mine, z - z[:, mine].mean(1, keepdim=True), z)
    near = neighbours_of(places, own, "leave-one-out")
    near = near.masked_fill(groups[near] != groups[:, None], -1)
    counted = ((near != own[:, None]) & (near >= 0)).double()
    means = (z[:, near] * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    return (z * means).sum(1) / z.square().sum(1).clamp_min(torch.finfo(z.dtype).tiny)


def arrangement(prior: Prior, log_factors: Tensor) -> Tensor | None:
    """Return the order of components in which those that are smooth in space are where fields are.

    Within fields, and within the rest, components keep their order. None where all components, or
    none, are of fields.

    Parameters
    ----------
    prior : Prior
        Prior of the components in their new order.
    log_factors : Tensor of shape (L, N)
        Log-factors of the components in the order that they have.
    """
    places = prior.places
    if places is None or not prior.is_mixed:
        return None
    of_field = torch.cat(
        [torch.full((part.L,), part.places is not None) for part in prior.parts]
    ).to(log_factors.device)
    smoothest = autocorrelation(log_factors, places).argsort(descending=True)
    n_fields = int(of_field.sum())
    order = torch.empty_like(smoothest)
    order[of_field] = smoothest[:n_fields].sort().values
    order[~of_field] = smoothest[n_fields:].sort().values
    return order


@torch.no_grad()
def arrange(model: PoissonFactorization, prior: Prior) -> None:
    """Put the components of a model that knows no space in the order that a prior wants.

    Parameters
    ----------
    model : PoissonFactorization
        Trained model of the samples, whose loadings and q(F) are put in order.
    prior : Prior
        Prior of the components to come.
    """
    q = model.prior.marginal()
    order = arrangement(prior, q.loc)
    if order is not None:
        model.W.assign(model.W.data[:, order])
        model.prior.assign(q.loc[order], q.scale[order])
