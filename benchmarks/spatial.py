"""Prediction at places that were held out: one protocol for every data set and method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.spatial import cKDTree

import pnmf_pyro
from benchmarks import ours, tables
from pnmf_pyro.data.checks import library_size_factors
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.estimator.drafts import Stage
from pnmf_pyro.estimator.recipe import CLOSER, NEIGHBORS, RECIPE
from pnmf_pyro.estimator.stages import Settle, SettleLoadings, WarmUp
from pnmf_pyro.transforms import get_factors

# Numbers of neighbours over which the factors of a model without space are averaged.
NEIGHBOURS = (4, 8, 16)


@dataclass
class Task:
    """Counts at places, and what is done with them.

    Attributes
    ----------
    X : CSR matrix of shape (N, D)
    coordinates : ndarray of shape (N, p)
    groups : ndarray of shape (N,) or None
    size_factors : ndarray of shape (N,)
        Library sizes over their mean where depth varies by design, else 1.
    L : int
    totals_given : bool
        Whether size factors are library sizes, held-out ones as well.
    """

    X: sp.csr_matrix
    coordinates: np.ndarray
    groups: np.ndarray | None
    size_factors: np.ndarray
    L: int = 10
    totals_given: bool = False

    def rows(self, index: np.ndarray) -> Task:
        """Return the task of some of the samples."""
        return replace(
            self,
            X=self.X[index],
            coordinates=self.coordinates[index],
            groups=None if self.groups is None else self.groups[index],
            size_factors=self.size_factors[index],
        )


def task(name: str) -> Task:
    """One of the spatial data sets, as the performance page describes it."""
    file, _, part = name.partition(":")
    adata = tables.adata(file)
    if part:
        adata = adata[adata.obs["section"].astype(str) == part]
    X = tables.counts_of(adata)
    if X.shape[1] > 1_000:
        X = X[:, np.sort(np.argsort(-np.asarray(X.sum(0)).ravel(), kind="stable")[:1_000])]
    raw = file in ("sim_nsf_S1", "eco_mite")
    s = np.ones(X.shape[0]) if raw else library_size_factors(as_counts(X))
    grouped = file == "st_breast_4sections" and not part
    groups = adata.obs["section"].astype(str).to_numpy() if grouped else None
    few = X.shape[0] < 100
    return Task(
        X,
        np.asarray(adata.obsm["spatial"], dtype=float),
        groups,
        s,
        4 if file == "sim_nsf_S1" else 3 if few else 10,
        totals_given=not raw,
    )


def splits(name: str, whole: Task, number: int) -> Iterator[tuple[Task, Task]]:
    """Training and held-out samples: 10% at random, or the given ones of the simulation."""
    N = whole.X.shape[0]
    for seed in range(1 if name == "sim_nsf_S1" else number):
        order = np.random.default_rng(seed).permutation(N)
        share = int(0.95 * N) if name == "sim_nsf_S1" else N - round(0.1 * N)
        if name == "sim_nsf_S1":
            order = np.arange(N)
        train, test = whole.rows(order[:share]), whole.rows(order[share:])
        seen = seen_features(train)
        yield replace(train, X=train.X[:, seen]), replace(test, X=test.X[:, seen])


def seen_features(train: Task) -> np.ndarray:
    """Features with counts in each group, which separate fits can learn of."""
    codes = np.zeros(train.X.shape[0]) if train.groups is None else train.groups
    parts = [train.X[codes == code] for code in np.unique(codes)]
    return np.all([np.asarray(part.sum(0)).ravel() > 0 for part in parts], axis=0)


def held_out_deviance(test: Task, factors: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Mean Poisson deviance over all entries of held-out samples.

    Returns
    -------
    ndarray of shape (1,) or (2,)
        Of the means as they are, and where totals are given also of those scaled to the total of
        each sample, as `PNMF.inverse_transform(factors, totals=...)` does.
    """
    scales = [test.size_factors]
    if test.totals_given:
        rates = factors.astype(float) @ components.sum(1)
        scales.append(np.asarray(test.X.sum(1)).ravel() / rates)
    W = torch.from_numpy(components.T.copy()).float()
    means = (torch.from_numpy(factors * scale[:, None]).float() for scale in scales)
    return np.array([pnmf_pyro.deviance(test.X, (mean, W)) for mean in means])


def spatial(train: Task, test: Task, **settings: Any) -> tuple[np.ndarray, Any]:
    """Deviance of `pnmf_pyro.fit(X, coords)` at the held-out places, and the fit."""
    model = ours.quietly(
        lambda: pnmf_pyro.fit(
            train.X,
            train.coordinates,
            train.groups,
            n_components=train.L,
            size_factors=train.size_factors,
            **settings,
        )
    )
    predicted = model.transform(None, test.coordinates, test.groups)
    return held_out_deviance(test, predicted, model.components_), model


def weighted(kl_weight: float, local: bool) -> list[Stage]:
    """The stages of `fit` in space, with another weight on the divergence."""
    stages = NEIGHBORS if local else CLOSER
    return [
        replace(stage, kl_weight=kl_weight) if isinstance(stage, WarmUp | Settle) else stage
        for stage in stages
    ]


def neighbour_averages(train: Task, test: Task, shrunk: bool) -> dict[int, np.ndarray]:
    """The same from factors without space, averaged over the nearest places of the group."""
    stages = [*RECIPE["stages"], *[SettleLoadings(shrink=True)] * shrunk]
    model = ours.quietly(
        lambda: pnmf_pyro.fit(
            train.X, n_components=train.L, size_factors=train.size_factors, stages=stages
        )
    )
    factors = np.asarray(get_factors(model))
    return {
        K: held_out_deviance(test, _near(train, test, K, factors), model.components_)
        for K in NEIGHBOURS
    }


def _near(train: Task, test: Task, K: int, factors: np.ndarray) -> np.ndarray:
    codes, new = (
        np.zeros(len(one.coordinates)) if one.groups is None else one.groups
        for one in (train, test)
    )
    result = np.empty((len(test.coordinates), train.L))
    for code in np.unique(new):
        pool = np.flatnonzero(codes == code)
        rows = new == code
        nearest = cKDTree(train.coordinates[pool]).query(test.coordinates[rows], k=K)[1]
        result[rows] = factors[pool[nearest]].mean(1)
    return result


def separately(train: Task, test: Task, **settings: Any) -> np.ndarray:
    """Deviance of one spatial fit for each group."""
    total: Any = 0.0
    for group in np.unique(train.groups):
        parts = [one.rows(np.flatnonzero(one.groups == group)) for one in (train, test)]
        for part in parts:
            part.groups = None
        total += spatial(parts[0], parts[1], **settings)[0] * parts[1].X.shape[0]
    return total / test.X.shape[0]


def pooled(train: Task, test: Task, **settings: Any) -> np.ndarray:
    """Deviance of one spatial fit that knows nothing of groups."""
    return spatial(replace(train, groups=None), replace(test, groups=None), **settings)[0]
