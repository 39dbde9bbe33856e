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
from pnmf_pyro.data.parallel import ALONE, Ranks, together
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import PoissonFactorization

# Stored entries below which each rank takes all rows: an exchange takes as long as that.
LEAST_SHARED = 500_000


def shared_by(counts: Counts | None) -> Ranks:
    """Return the ranks that share out the rows of counts which all of them hold."""
    few = counts is None or counts.values.numel() < LEAST_SHARED
    return ALONE if few or isinstance(counts, StoredCounts) else together()


def parts(batch: Batch) -> Iterator[Batch]:
    """Iterate over the slices of a batch in a store; over the batch itself where it is in memory.

    Each part estimates the whole, as batches do. What is drawn for a slice follows from its first
    row, so that it does not depend on which rank reads it. Ranks that share rows have their own.
    """
    counts = batch.counts
    if not isinstance(counts, StoredCounts):
        yield _own_part(batch, shared_by(counts))
        return
    seed = int(torch.randint(2**62, (1,)))
    for rows, block in counts.blocks():
        samples = torch.arange(rows.start, rows.stop)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed + counts.first + rows.start)
            yield replace(batch, counts=block, samples=samples)


def _own_part(batch: Batch, ranks: Ranks) -> Batch:
    """Return the rows of this rank, which are kept with the counts."""
    counts = batch.counts
    if ranks.size == 1 or counts is None:
        return batch
    rows = ranks.part(counts.shape[0])
    held = vars(counts).setdefault("of_ranks", {})
    if str(rows) not in held:
        held[str(rows)] = counts.rows(rows)
    samples = torch.arange(counts.shape[0]) if batch.samples is None else batch.samples
    return replace(batch, counts=held[str(rows)], samples=samples[rows])


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
    shared, ranks = shared_by(batch.counts), sums_over(model, batch.counts)
    try:
        loss = _of_own_rows(model, objective, batch)
    except FloatingPointError:
        if ranks.size == 1:
            raise
        loss = math.nan
    W = model.W.raw
    slope = torch.zeros_like(W) if W.grad is None else W.grad
    value, slope = ranks.totals(torch.tensor(loss, dtype=torch.float64), slope)
    if not torch.isfinite(value):
        raise FloatingPointError(f"the ELBO is {-float(value)}")
    if W.grad is not None:
        W.grad = slope
    q = model.prior.watched
    if shared.size > 1 and q is not None and q.loc.grad is not None and q.scale.grad is not None:
        own = torch.stack([q.loc.detach(), q.scale.detach(), q.loc.grad, q.scale.grad])
        _let_watch(model, *shared.stacked(own, 2))
    return float(value)


def sums_over(model: PoissonFactorization, counts: Counts | None) -> Ranks:
    """Return the ranks over which sums over the rows of a model go."""
    return model.ranks if model.ranks.size > 1 else shared_by(counts)


def _let_watch(model: PoissonFactorization, loc: Tensor, scale: Tensor, *of: Tensor) -> None:
    """Let a prior have seen q(F), with the gradients of its mean and scale."""
    loc.grad, scale.grad = of
    model.prior.watched = Normal(loc, scale, validate_args=False)


def _of_own_rows(model: PoissonFactorization, objective: FactorizationELBO, batch: Batch) -> float:
    """Add gradients and value up over the slices of a store, or take those of own rows.

    The prior is given the gradients of q(F) of all samples of these.
    """
    if shared_by(batch.counts).size == 1 and not isinstance(batch.counts, StoredCounts):
        return objective.loss_and_grads(model.model, model.guide, batch)
    assert batch.counts is not None
    N, total = batch.counts.shape[0], 0.0
    seen: list[Tensor] = []
    stop = 0
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
            told = (q.loc.detach(), q.scale.detach(), q.loc.grad, q.scale.grad)
            seen = seen or [one.new_empty(len(one), N) for one in told]
            start, stop = stop, stop + part.counts.shape[0]
            for whole, one in zip(seen, told, strict=True):
                whole[:, start:stop] = one
    if seen:
        _let_watch(model, *(whole[:, :stop] for whole in seen))
    return total
