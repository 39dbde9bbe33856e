"""Batches of counts, which are what one step of training sees, and selection along a dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor

from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.resumable import Resumable

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

# What selects along one dimension.
Index: TypeAlias = Tensor | np.ndarray | slice | Sequence[int] | Sequence[bool]


@dataclass(frozen=True)
class Batch:
    """The part of the data that one step sees; without arguments, all of it, unobserved.

    Model and guide are given the same batch, so they can never see different samples.

    Parameters
    ----------
    counts : Counts of shape (n, d), optional
        Observed counts; None to draw them from the model.
    samples, features : Tensor of int64, optional
        Numbers of the samples and features that the counts are of; None for all.
    likelihood_scale, prior_scale : float
        Factors on the log-likelihood and on the KL of each sample, beside the N/n of the plate.
    """

    counts: Counts | None = None
    samples: Tensor | None = None
    features: Tensor | None = None
    likelihood_scale: float = 1.0
    prior_scale: float = 1.0

    @property
    def dense_counts(self) -> Tensor | None:
        """The counts as a tensor of shape (n, d), for likelihoods that need every zero."""
        return None if self.counts is None else self.counts.to_dense()

    def plate(self, n_samples: int) -> pyro.plate:
        """Return the plate over samples, which scales a batch of n to all `n_samples`."""
        subsample = torch.arange(n_samples) if self.samples is None else self.samples
        return pyro.plate("samples", n_samples, subsample=subsample, dim=-1)


def take(values: MaybeTensor, index: Index | None, dim: int = -1) -> MaybeTensor:
    """Select `index` along `dim`; all of it if the index is None, None if there are no values.

    The index is a tensor of whole numbers, or a list, an array, a slice or a mask.
    """
    if index is None or values is None:
        return values
    if isinstance(index, tuple):
        index = list(index)
    if not isinstance(index, Tensor) or index.dtype == torch.bool:
        index = torch.arange(values.shape[dim], device=values.device)[index]
    return values.index_select(dim, index)


@torch.no_grad()
def put(values: Tensor, new: Tensor, index: Tensor | None) -> None:
    """Write into `values` in place, at the `index` along the last dimension; all of it if None."""
    if index is None:
        values.copy_(new)
    else:
        values.index_copy_(-1, index, new.to(values))


@dataclass
class Batches:
    """An endless stream of batches of a data set.

    A pass over the samples visits each once, and the last batch may be smaller. There is one such
    pass for each batch of features. A batch that covers everything is the data set itself.

    Parameters
    ----------
    counts : Counts of shape (N, D)
    batch_size, y_batch_size : int, optional
        Samples and features in a batch; all of them unless given.
    shuffle : bool
        Whether each pass visits in a new random order, which `generator` draws. Rows of a store
        that lie beside one another stay together, a few such runs in each batch.
    scale_ll_D, scale_kl_NM : bool
        Whether the likelihood of a batch is scaled by D/d, and its KL by N/n, as estimates of all.
    generator : torch.Generator, optional
    """

    counts: Counts
    batch_size: int | None = None
    y_batch_size: int | None = None
    shuffle: bool = False
    scale_ll_D: bool = True
    scale_kl_NM: bool = True
    generator: torch.Generator | None = None

    def __iter__(self) -> Stream:
        """Iterate without end, in each pass over every pair of a sample and a feature batch."""
        return Stream(self)

    def one_pass(self) -> Iterator[Batch]:
        """Iterate once over all samples in their order, each batch with all features."""
        for samples in _split(torch.arange(self.counts.shape[0]), self.batch_size):
            yield self.batch(samples, None)

    def batch(self, samples: Tensor | None, features: Tensor | None) -> Batch:
        """Return the batch of these samples and features."""
        counts = self.counts
        if samples is not None:
            samples = samples.to(counts.device)
            counts = counts.rows(samples)
        if features is not None:
            features = features.to(counts.device)
            counts = counts.columns(features)
        (n, d), (N, D) = counts.shape, self.counts.shape
        likelihood_scale = D / d if self.scale_ll_D else 1.0
        prior_scale = 1.0 if self.scale_kl_NM else n / N
        return Batch(counts, samples, features, likelihood_scale, prior_scale)

    def order(self, size: int, batch_size: int | None, runs: int | None = None) -> Tensor:
        """Return the order in which a pass visits that many samples or features.

        With `runs`, those beside one another stay together, so that a batch has so many runs.
        """
        if not self.shuffle or batch_size is None or batch_size >= size:
            return torch.arange(size)
        length = max(1, batch_size // (runs or batch_size))
        starts = length * torch.randperm(-(-size // length), generator=self.generator)
        order = (starts[:, None] + torch.arange(length)).flatten()
        return order[order < size]


class Stream(Resumable, Iterator[Batch]):
    """The batches of :class:`Batches`, one after another.

    Attributes
    ----------
    samples, features : Tensor of int64
        Numbers of those that are still to come: samples with the present batch of features, and
        features of this pass.
    present : Tensor of int64 or None
        The present batch of features.
    """

    carried = ("samples", "features", "present")

    def __init__(self, batches: Batches):
        self.batches = batches
        self.samples = self.features = torch.arange(0)
        self.present: Tensor | None = None

    def __next__(self) -> Batch:
        batches, (N, D) = self.batches, self.batches.counts.shape
        if not len(self.samples):
            if not len(self.features):
                self.features = batches.order(D, batches.y_batch_size)
            self.present, self.features = _cut(self.features, batches.y_batch_size, D)
            self.samples = batches.order(N, batches.batch_size, batches.counts.runs_of_batch)
        samples, self.samples = _cut(self.samples, batches.batch_size, N)
        return batches.batch(samples, self.present)


def _cut(order: Tensor, size: int | None, whole: int) -> tuple[Tensor | None, Tensor]:
    """Cut off the first `size`; a piece that is the whole is no index at all."""
    if size is None or size >= whole:
        return None, order[:0]
    return order[:size], order[size:]


def _split(order: Tensor, size: int | None) -> Sequence[Tensor | None]:
    """Cut into pieces of `size`, the last perhaps smaller; one piece is no index at all."""
    return (None,) if size is None or size >= len(order) else order.split(int(size))
