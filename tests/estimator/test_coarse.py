"""Bins of places whose samples have batches and covariates."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.coarse import levels_of, of_bins, places_of_bins
from pnmf_pyro.training.levels import coarse_levels

N, D = 1200, 5


@pytest.fixture(params=[0, 2], ids=["no batches", "2 batches"])
def binned(request):
    """A level, the exposure of the samples and of its bins, and the dense parts of the former."""
    random, B = np.random.default_rng(0), request.param
    of_batches = np.eye(max(B, 1))[random.integers(0, max(B, 1), N)][:, :B]
    Z = np.c_[of_batches, random.normal(size=(N, 2))]
    s, effects = random.uniform(0.5, 2, N), 0.1 * random.normal(size=(D, B + 2))
    counts = as_counts(sp.csr_matrix(random.poisson(6.0, (N, D)).astype(np.float64)))
    s, Z_, beta = (torch.from_numpy(part) for part in (s, Z, effects))
    exposure = Exposure(s, Z_, torch.arange(N), beta, None, B, True)
    places = Places(torch.from_numpy(random.uniform(0, 30, (N, 2))))
    level = coarse_levels(counts, places_of_bins(places, Z_[:, :B]), s, L=1)[-1]
    return level, of_bins(exposure, level, counts), s.numpy(), Z, effects, B


def test_bins_have_samples_of_one_batch_and_mean_covariates(binned):
    level, found, s, Z, _, B = binned
    assert found.learned
    assert found.n_batches == B
    design = found.design[found.codes].numpy()
    for number in range(len(level.centres)):
        mine = level.bins == number
        assert (Z[mine, :B] == design[number, :B]).all()
        np.testing.assert_allclose(design[number], np.average(Z[mine], 0, s[mine]), rtol=1e-9)


def test_exposures_of_bins_are_sums_but_for_what_a_bin_varies(binned):
    """Added exposures of the samples: s_b exp(z_b^T beta) times the half variance's exponential."""
    level, found, s, Z, effects, B = binned
    each, of_bin = s[:, None] * np.exp(Z @ effects.T), found.block(slice(None)).numpy()
    for number in range(len(level.centres)):
        mine = level.bins == number
        within = np.cov(Z[mine, B:].T, aweights=s[mine], ddof=0)
        half = np.einsum("jp,pq,jq->j", effects[:, B:], within, effects[:, B:]) / 2
        ratio = each[mine].sum(0) / of_bin[number] / np.exp(half)
        np.testing.assert_allclose(ratio, 1, atol=0.01)


def test_batches_alone_are_added_up_exactly():
    random = np.random.default_rng(1)
    of_batches, s = torch.eye(3)[random.integers(0, 3, N)].double(), torch.rand(N).double() + 0.5
    effects = torch.from_numpy(random.normal(size=(D, 3)))
    counts = as_counts(random.poisson(6.0, (N, D)).astype(np.float64))
    exposure = Exposure(s, of_batches, torch.arange(N), effects, None, 3, True)
    places = Places(torch.from_numpy(random.uniform(0, 30, (N, 2))))
    level = coarse_levels(counts, places_of_bins(places, of_batches), s, L=1)[-1]
    added = np.zeros((len(level.centres), D))
    np.add.at(added, level.bins, exposure.block(slice(None)).numpy())
    found = of_bins(exposure, level, counts)
    np.testing.assert_allclose(found.block(slice(None)).numpy(), added, rtol=1e-9)
    assert len(found.design) == 3


def test_batches_of_few_samples_have_no_bins():
    places = Places(torch.rand(N, 2, generator=torch.Generator().manual_seed(0)).double())
    assert places_of_bins(places, torch.eye(13)[torch.arange(N) % 13]) is None


def test_covariates_leave_the_bins_as_they_are():
    random = np.random.default_rng(2)
    counts = as_counts(random.poisson(6.0, (N, D)).astype(np.float64))
    places = Places(torch.from_numpy(random.uniform(0, 30, (N, 2))))
    Z, effects = torch.from_numpy(random.normal(size=(N, 1))), torch.zeros(D, 1).double()
    given = [Exposure(), Exposure(None, Z, torch.arange(N), effects, learned=True)]
    prior = SimpleNamespace(places=places)
    (*_, without), (*_, with_them) = (
        levels_of(SimpleNamespace(prior=prior, exposure=one, L=1), counts) for one in given
    )
    np.testing.assert_array_equal(without.bins, with_them.bins)
