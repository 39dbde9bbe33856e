"""Coarse levels: counts and size factors of bins of places, and fits that begin on them."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import poisson

import pnmf_pyro
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.stages import LearnHyperparameters, Settle, WarmUp
from pnmf_pyro.training.levels import BINS, ENOUGH, coarse_levels


def poor(N=1500, D=12, mean=4.0, seed=0, groups=None, matrix=sp.csr_matrix):
    random = np.random.default_rng(seed)
    X = random.poisson(mean, (N, D)).astype(np.float32)
    points = random.uniform(0, 30, (N, 2))
    s = random.uniform(0.5, 2, N).astype(np.float32)
    codes = None if groups is None else torch.from_numpy(random.integers(0, groups, N))
    places = Places(torch.from_numpy(points), codes)
    return X, as_counts(matrix(X)), places, torch.from_numpy(s)


@pytest.mark.parametrize("matrix", [sp.csr_matrix, np.asarray])
@pytest.mark.parametrize("groups", [None, 3])
def test_bins_hold_the_sums_of_the_samples_nearest_to_their_centres(matrix, groups):
    X, counts, places, s = poor(groups=groups, matrix=matrix)
    levels = coarse_levels(counts, places, s, L=1)
    assert len(levels) >= 1
    points = places.coordinates.numpy()
    codes = np.zeros(len(X)) if groups is None else places.groups.numpy()
    for level in levels:
        dense = np.asarray(level.counts.to_dense())
        for number, centre in enumerate(level.centres):
            mine = level.bins == number
            np.testing.assert_allclose(dense[number], X[mine].sum(0), rtol=1e-6)
            assert float(level.size_factors[number]) == pytest.approx(
                float(s[mine].sum()), rel=1e-5
            )
            assert mine[centre]
            assert (codes[mine] == codes[centre]).all()
        for i, point in enumerate(points):
            own = level.centres[codes[level.centres] == codes[i]]
            to_own = np.linalg.norm(points[level.centres[level.bins[i]]] - point)
            assert to_own <= np.linalg.norm(points[own] - point, axis=1).min() + 1e-12


def test_levels_grow_coarser_by_fours_until_bins_have_enough_counts():
    X, counts, places, s = poor(N=4000, D=4, mean=12.0)  # 48 counts a sample
    sizes = [len(X) / len(level.centres) for level in coarse_levels(counts, places, s, L=2)]
    mean_total = X.sum() / len(X)
    finest = next(4**k for k in range(1, 20) if 4**k * mean_total >= ENOUGH)
    expected = [size for size in (4 * finest, finest) if len(X) // size >= BINS * 2]
    np.testing.assert_allclose(sizes, expected, rtol=0.05)


def test_samples_with_many_counts_have_bins_of_four_places():
    _, counts, places, s = poor(N=1000, D=50, mean=20.0)
    assert [len(level.centres) for level in coarse_levels(counts, places, s, L=2)] == [63, 250]


def test_too_few_bins_are_no_level():
    _, counts, places, s = poor(N=500)
    assert coarse_levels(counts, places, s, L=10) == []


def test_bins_have_fewer_counts_where_places_are_few():
    _, counts, places, s = poor(N=1000, D=4, mean=1.0)
    assert [len(level.centres) for level in coarse_levels(counts, places, s, L=3)] == [16, 63]


def test_repeated_places_share_a_bin():
    _, counts, places, s = poor()
    repeated = Places(places.coordinates[torch.arange(1500) % 30])
    for level in coarse_levels(counts, repeated, s, L=1):
        for number in range(30):
            assert len(np.unique(level.bins[np.arange(1500) % 30 == number])) == 1


def test_the_likelihood_of_the_sums_is_that_of_the_samples_where_factors_are_constant():
    """Given the sum, how counts divide over samples says nothing of the rates."""
    random = np.random.default_rng(1)
    s, X = random.uniform(0.5, 2, 7), random.poisson(3, (7, 4))
    lost = []
    for _ in range(2):
        rho = random.gamma(2, 1, 4)
        apart = poisson.logpmf(X, s[:, None] * rho).sum()
        lost.append(apart - poisson.logpmf(X.sum(0), s.sum() * rho).sum())
    assert lost[0] == pytest.approx(lost[1])


def tissue(N, D, counts_each, L, seed):
    """Smooth fields of lengthscales 4 to 4 + 2 L places, sparse loadings, few counts a place."""
    random = np.random.default_rng(seed)
    points = random.uniform(0, np.sqrt(N), (N, 2))
    F = np.empty((N, L))
    for l in range(L):
        waves = random.standard_normal((100, 2)) / (4 + 2 * l)
        phases = random.uniform(0, 2 * np.pi, 100)
        F[:, l] = np.sqrt(2 / 100) * np.cos(points @ waves.T + phases).sum(1)
    W = random.gamma(0.3, 1.0, (D, L))
    W += 1e-3 * W.mean()
    W *= counts_each / (np.exp(F).mean(0) @ W.sum(0))
    return sp.csr_matrix(random.poisson(np.exp(F) @ W.T).astype(np.float32)), points, F


def lowest_correlation(model, F):
    found = model.model_.prior.marginal().loc.detach().numpy()
    L = len(found)
    return np.abs(np.corrcoef(F.T, found)[:L, L:]).max(1).min()


@pytest.mark.slow
def test_a_fit_goes_through_its_levels(caplog):
    """Their steps count, and the history is that of the samples alone."""
    X, points, _ = tissue(1400, 40, 30.0, 2, seed=0)
    stages = [WarmUp(), LearnHyperparameters(), Settle()]
    numbers = []
    with caplog.at_level("INFO", logger="pnmf_pyro"):
        model = pnmf_pyro.fit(X, points, n_components=2, stages=stages, max_iter=60, tol=1e-2)
    told = [record.message.split() for record in caplog.records if " bins: " in record.message]
    bins, steps = zip(*((int(words[0]), int(words[2])) for words in told), strict=True)
    assert bins == tuple(sorted(bins))
    assert bins[-1] <= 1400 // 4
    assert [name for name, _, _ in model.history_.stages] == ["samples", "settle"]
    assert model.n_iter_ == len(model.history_) == model.history_.stages[-1][-1]
    assert sum(steps) + model.n_iter_ <= 60
    assert model.transform(None, points[:5]).shape == (5, 2)
    model.fit(
        X, coordinates=points, callback=lambda *told: numbers.append(told[1]), callback_interval=1
    )
    assert numbers == list(range(1, model.n_iter_ + 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("seed", [0, 1])
def test_no_component_of_a_poor_table_is_lost(seed):
    X, points, F = tissue(4000, 300, 27.0, 6, seed)
    model = pnmf_pyro.fit(X, points, n_components=6, K=16)
    assert lowest_correlation(model, F) > 0.8
