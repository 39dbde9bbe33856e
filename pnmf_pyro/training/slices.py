"""Gradients of counts, slice by slice where they are in a store, and added up over all ranks."""

from __future__ import annotations

import math
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

    Each part estimates the whole, as batches do. What is drawn for a slice follows from its first
    row, so that it does not depend on which rank reads it.
    """
    counts = batch.counts
    if not isinstance(counts, StoredCounts):
        yield batch
        return
    seed = int(torch.randint(2**62, (1,)))
    for rows, block in counts.blocks():
        samples = torch.arange(rows.start, rows.stop)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed + counts.first + rows.start)
            yield replace(batch, counts=block, samples=samples)


def loss_and_grads(
    model: PoissonFactorization, objective: FactorizationELBO, batch: Batch
) -> float:
    """Add the gradients of the negative ELBO to those of the parameters; return its value.

    Those of the loadings, and the value, are of the samples of all ranks.

    Raises
    ------
    FloatingPointError
        If the value is NaN or infinite, on all ranks.
    """
    try:
        loss = _of_own_rows(model, objective, batch)
    except FloatingPointError:
        if model.ranks.size == 1:
            raise
        loss = math.nan
    W = model.W.raw
    slope = torch.zeros_like(W) if W.grad is None else W.grad
    value, slope = model.ranks.totals(torch.tensor(loss, dtype=torch.float64), slope)
    if not torch.isfinite(value):
        raise FloatingPointError(f"the ELBO is {-float(value)}")
    if W.grad is not None:
        W.grad = slope
    return float(value)


def _of_own_rows(model: PoissonFactorization, objective: FactorizationELBO, batch: Batch) -> float:
    """Add gradients and value up over the slices of a store.

    The prior is given the gradients of q(F) of all samples.
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
