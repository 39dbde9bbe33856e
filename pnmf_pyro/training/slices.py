"""Gradients of counts, slice by slice where they are in a store, and added up over all ranks.

Of counts that all ranks hold each takes a part of the rows, and is given the gradients of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from pyro.distributions import Normal
from torch import Tensor

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.parallel import Ranks, together
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import PoissonFactorization


def parts(batch: Batch) -> Iterator[Batch]:
    """Iterate over the slices of a batch in a store; over the batch itself where it is in memory.

    Each part estimates the whole, as batches do. What is drawn for a slice follows from its first
    row, so that it does not depend on which rank reads it. Of ranks that work together each has the
    rows that are its own.
    """
    counts = batch.counts
    if not isinstance(counts, StoredCounts):
        yield batch if together().size == 1 or counts is None else _own_part(batch, counts)
        return
    seed = int(torch.randint(2**62, (1,)))
    for rows, block in counts.blocks():
        samples = torch.arange(rows.start, rows.stop)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed + counts.first + rows.start)
            yield replace(batch, counts=block, samples=samples)


def _own_part(batch: Batch, counts: Counts) -> Batch:
    """Return the rows of this rank, which are kept with the counts."""
    rows = together().part(counts.shape[0])
    if "of_rank" not in vars(counts):
        vars(counts)["of_rank"] = counts.rows(rows)
    samples = torch.arange(counts.shape[0]) if batch.samples is None else batch.samples
    return replace(batch, counts=vars(counts)["of_rank"], samples=samples[rows])


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
        if ranks_of(model).size == 1:
            raise
        loss = math.nan
    W = model.W.raw
    slope = torch.zeros_like(W) if W.grad is None else W.grad
    ranks = ranks_of(model)
    value, slope = ranks.totals(torch.tensor(loss, dtype=torch.float64), slope)
    if not torch.isfinite(value):
        raise FloatingPointError(f"the ELBO is {-float(value)}")
    if W.grad is not None:
        W.grad = slope
    return float(value)


def ranks_of(model: PoissonFactorization) -> Ranks:
    """Return the ranks over which sums over the rows of a model go."""
    return model.ranks if together().size == 1 else together()


def _of_own_rows(model: PoissonFactorization, objective: FactorizationELBO, batch: Batch) -> float:
    """Add gradients and value up over the slices of a store, or of the rows of this rank.

    The prior is given the gradients of q(F) of all samples that it holds.
    """
    ranks = together()
    if ranks.size == 1 and not isinstance(batch.counts, StoredCounts):
        return objective.loss_and_grads(model.model, model.guide, batch)
    assert batch.counts is not None
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
        loc, scale, of_loc, of_scale = (
            ranks.stacked(torch.cat(part, -1), -1) for part in zip(*seen, strict=True)
        )
        loc.grad, scale.grad = of_loc, of_scale
        model.prior.watched = Normal(loc, scale, validate_args=False)
    return total
