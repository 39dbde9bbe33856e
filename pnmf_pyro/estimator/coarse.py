"""Coarse levels of the places of a model, from which a warm-up goes down to the samples."""

from __future__ import annotations

import numpy as np
import torch

from pnmf_pyro.data.batches import take
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.places import Places
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.training.levels import Level, coarse_levels

# Samples that a design has at least on average where bins are of samples of one design.
ENOUGH = 100


def levels_of(model: PoissonFactorization, counts: Counts) -> list[Level]:
    """Return coarse levels of the places of a model, if it has places."""
    places, exposure = model.prior.places, model.exposure
    if places is None:
        return []
    ones = counts.values.new_ones(len(places))
    s = exposure.scaled(ones) * exposure.observed_share()
    if exposure.design is not None and exposure.codes is not None:  # bins of one design each
        if len(exposure.design) * ENOUGH > len(places):
            return []
        groups = places.groups if places.groups is not None else torch.zeros_like(exposure.codes)
        groups = groups.to(exposure.codes) * len(exposure.design) + exposure.codes
        places = Places(places.coordinates, groups.to(places.coordinates.device))
    return coarse_levels(counts, places, s, model.L)


def of_bins(exposure: Exposure, level: Level) -> Exposure:
    """Return what scales the rates of the bins of a level."""
    codes = take(exposure.codes, torch.from_numpy(level.centres).to(level.size_factors.device))
    of_design = exposure.design, codes, exposure.effects
    return Exposure(level.size_factors, *of_design, None, exposure.n_batches, exposure.learned)


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
