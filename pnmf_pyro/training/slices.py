"""Gradients of counts in a store, slice by slice: one pass over the store for each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from pyro.distributions import Normal
from torch import Tensor

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import PoissonFactorization


def parts(batch: Batch) -> Iterator[Batch]:
    """Iterate over the slices of a batch in a store; over the batch itself where it is in memory.

    Each part estimates the whole, as batches do.
    """
    if not isinstance(batch.counts, StoredCounts):
        yield batch
        return
    for rows, counts in batch.counts.blocks():
        samples = torch.arange(rows.start, rows.stop)
        yield replace(batch, counts=counts, samples=samples)


def loss_and_grads(
    model: PoissonFactorization, objective: FactorizationELBO, batch: Batch
) -> float:
    """Add the gradients of the negative ELBO to those of the parameters; return its value.

    Of a store they are added up over its slices, and the prior is given the gradients of q(F) of
    all samples.
    """
    if not isinstance(batch.counts, StoredCounts):
        return objective.loss_and_grads(model.model, model.guide, batch)
    N, total = batch.counts.shape[0], 0.0
    seen: list[tuple[Tensor, ...]] = []
    for part in parts(batch):
        assert part.counts is not None
        share = part.counts.shape[0] / N
        loss = share * objective.differentiable_loss(model.model, model.guide, part)
        total += (value := float(loss.detach()))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the ELBO is {-value}")
        loss.backward()
        q = model.prior.watched
        if q is not None and q.loc.grad is not None and q.scale.grad is not None:
            seen.append((q.loc.detach(), q.scale.detach(), q.loc.grad, q.scale.grad))
    if seen:
        loc, scale, of_loc, of_scale = (torch.cat(part, -1) for part in zip(*seen, strict=True))
        loc.grad, scale.grad = of_loc, of_scale
        model.prior.watched = Normal(loc, scale, validate_args=False)
    return total
