"""Inducing points: where they stand, and how many each group gets."""

from __future__ import annotations

import numpy as np
import torch

from pnmf_pyro.data.checks import check_choice
from pnmf_pyro.data.places import Places

ALLOCATIONS = ("proportional", "equal", "derived")

# Neighbours that vote for the group of a centre under the allocation 'derived'.
VOTERS = 5


def inducing_points(
    places: Places, num_inducing: int, allocation: str, random: np.random.RandomState
) -> Places:
    """Choose inducing points: all distinct places if few enough, and centres of clusters otherwise.

    Groups share the largest number of points in proportion to their distinct places
    ('proportional') or equally ('equal'), but each has at least one; or centres are found without
    regard to groups, and each gets the group of the places nearest to it ('derived').
    """
    check_choice("inducing_allocation", allocation, ALLOCATIONS)
    distinct = places.distinct()
    if len(distinct) <= num_inducing:
        return distinct
    points = distinct.coordinates.cpu().numpy()
    if distinct.groups is None:
        return Places(torch.from_numpy(_centres(points, num_inducing, random)))
    groups = distinct.groups.cpu().numpy()
    if allocation == "derived":
        return _derived(points, groups, num_inducing, random)
    sizes = np.bincount(groups)
    weights = sizes if allocation == "proportional" else (sizes > 0).astype(int)
    return _within_groups(points, groups, _shares(weights, sizes, num_inducing), random)


def _centres(points: np.ndarray, n: int, random: np.random.RandomState) -> np.ndarray:
    if n >= len(points):
        return points
    from sklearn.cluster import MiniBatchKMeans  # slow to import, and seldom needed

    clusters = MiniBatchKMeans(n, n_init=1, random_state=random, batch_size=max(1024, 2 * n))
    return clusters.fit(points).cluster_centers_


def _shares(weights: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """Split `total` by weight, at least 1 to each group and no more than it has places."""
    shares = (sizes > 0).astype(int)
    while (left := total - shares.sum()) > 0 and (open_groups := shares < sizes).any():
        wanted = np.where(open_groups, weights, 0)
        parts = np.floor(left * wanted / wanted.sum()).astype(int)
        if not parts.any():
            parts[np.argsort(-wanted, kind="stable")[:left]] = 1
        shares = np.minimum(shares + parts, sizes)
    return shares


def _within_groups(
    points: np.ndarray, groups: np.ndarray, shares: np.ndarray, random: np.random.RandomState
) -> Places:
    parts = []
    for group in np.flatnonzero(shares):
        centres = torch.from_numpy(_centres(points[groups == group], shares[group], random))
        parts.append(Places(centres, torch.full((len(centres),), int(group))))
    return Places.concatenate(parts)


def _derived(
    points: np.ndarray, groups: np.ndarray, n: int, random: np.random.RandomState
) -> Places:
    from sklearn.neighbors import KNeighborsClassifier

    centres = _centres(points, n, random)
    voters = KNeighborsClassifier(min(VOTERS, len(points)), weights="distance")
    codes = voters.fit(points, groups).predict(centres)
    sizes = np.bincount(groups)
    missing = np.where(np.isin(np.arange(len(sizes)), codes), 0, sizes)
    found = Places(torch.from_numpy(centres), torch.from_numpy(codes))
    if not missing.any():
        return found
    shares = np.ceil(missing * n / len(points)).astype(int)
    more = _within_groups(points, groups, np.minimum(shares, missing), random)
    return Places.concatenate([found, more])
