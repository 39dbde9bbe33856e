"""Coarse levels of the places of a model, from which a warm-up goes down to the samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.places import Places
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.training.levels import Level, coarse_levels

# Samples that a batch has at least on average where there are levels.
ENOUGH = 100


def levels_of(model: PoissonFactorization, counts: Counts) -> list[Level]:
    """Return coarse levels of the places of a model, if it has places."""
    places, exposure = model.prior.places, model.exposure
    if places is not None and exposure.design is not None and exposure.codes is not None:
        of_batches = exposure.design[:, : exposure.n_batches]
        places = places_of_bins(places, of_batches[exposure.codes])
    if places is None:
        return []
    return coarse_levels(counts, places, _sizes(exposure, counts), model.L)


def places_of_bins(places: Places, of_batches: Tensor) -> Places | None:
    """Return places in groups of which a bin has one alone, given the batch of each as (N, B) ones.

    None where batches have too few samples for bins of their own.
    """
    B = of_batches.shape[1]
    if not B:
        return places
    if len(places) < B * ENOUGH:
        return None
    batch = of_batches.argmax(1)
    groups = torch.zeros_like(batch) if places.groups is None else places.groups.to(batch)
    return Places(places.coordinates, (groups * B + batch).to(places.coordinates.device))


def of_bins(exposure: Exposure, level: Level, counts: Counts) -> Exposure:
    """Return what scales the rates of the bins of a level.

    A bin has samples of one batch, and of each covariate the mean of its samples, weighted by their
    size factors.
    """
    s = level.size_factors
    if exposure.design is None or exposure.codes is None:
        return Exposure(s)
    bins, weights = torch.from_numpy(level.bins).to(s.device), _sizes(exposure, counts)
    mean = s.new_zeros(len(s), exposure.design.shape[1])
    mean.index_add_(0, bins, weights[:, None] * exposure.design[exposure.codes])
    mean.div_(s.clamp_min(torch.finfo(s.dtype).tiny)[:, None])
    mean[:, : exposure.n_batches].round_()  # 0 or 1, but for rounding
    design, codes = mean.unique(dim=0, return_inverse=True)
    effects, learned = exposure.effects, exposure.learned
    return Exposure(s, design, codes, effects, None, exposure.n_batches, learned)


def _sizes(exposure: Exposure, counts: Counts) -> Tensor:
    """Size factors of samples, of which hidden entries take their share, (N,)."""
    return exposure.scaled(counts.values.new_ones(counts.shape[0])) * exposure.observed_share()


@torch.no_grad()
def hand_down(
    source: PoissonFactorization,
    level: Level,
    target: PoissonFactorization,
    samples: np.ndarray,
) -> None:
    """Start q(F) of a finer level from that of the bins in which its samples are."""
    q = source.prior.marginal(torch.from_numpy(level.bins[samples]).to(source.W.device))
    target.prior.assign(q.loc, q.scale)
