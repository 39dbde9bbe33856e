"""Batches: each sample and each feature is visited, with its scales."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from pnmf_pyro.data.batches import Batch, Batches


def stream(batches: Batches, n: int) -> list[Batch]:
    return list(islice(batches, n))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 6])
def test_a_pass_visits_each_sample_once(counts, X, batch_size, shuffle):
    """Twelve samples in batches of 1, of 5 (the last has 2), and of 6."""
    generator = torch.Generator().manual_seed(0)
    batches = Batches(counts, batch_size, shuffle=shuffle, generator=generator)
    per_pass = -(-12 // batch_size)
    seen = stream(batches, 3 * per_pass)
    orders = []
    for start in range(0, 3 * per_pass, per_pass):
        parts = seen[start : start + per_pass]
        sizes = [batch.counts.shape[0] for batch in parts]
        assert sizes == [min(batch_size, 12 - batch_size * k) for k in range(per_pass)]
        orders.append(torch.cat([batch.samples for batch in parts]).tolist())
        assert sorted(orders[-1]) == list(range(12))
    for batch in seen:
        assert batch.features is None
        np.testing.assert_array_equal(batch.counts.to_dense(), X[batch.samples.numpy()])
    if shuffle:
        assert orders[0] != orders[1] != orders[2]
    else:
        assert orders == [list(range(12))] * 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_visits_each_feature_once(counts, X, shuffle):
    generator = torch.Generator().manual_seed(1)
    batches = Batches(counts, y_batch_size=3, shuffle=shuffle, generator=generator)
    seen = stream(batches, 6)
    assert [batch.counts.shape for batch in seen] == [(12, 3), (12, 3), (12, 2)] * 2
    for parts in (seen[:3], seen[3:]):
        order = torch.cat([batch.features for batch in parts]).tolist()
        assert sorted(order) == list(range(8))
        assert shuffle or order == list(range(8))
    for batch in seen:
        assert batch.samples is None
        np.testing.assert_array_equal(batch.counts.to_dense(), X[:, batch.features.numpy()])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "y_batch_size"), [(6, 4), (4, 4), (3, 2), (5, 3)])
def test_every_entry_is_visited(counts, batch_size, y_batch_size, shuffle):
    """Samples and features must not run in step, or whole blocks of X would never be seen."""
    generator = torch.Generator().manual_seed(2)
    batches = Batches(counts, batch_size, y_batch_size, shuffle=shuffle, generator=generator)
    seen = np.zeros((12, 8), dtype=int)
    for batch in stream(batches, 200):
        seen[np.ix_(batch.samples, batch.features)] += 1
    assert (seen > 0).all(), f"{(seen == 0).mean():.0%} of the entries are never in a batch"


def test_batches_repeat_with_their_generator_and_leave_the_global_one(counts):
    def orders(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        batches = Batches(counts, 5, 3, shuffle=True, generator=generator)
        return [[b.samples.tolist(), b.features.tolist()] for b in stream(batches, 9)]

    before = torch.random.get_rng_state()
    assert orders(3) == orders(3)
    assert orders(3) != orders(4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("batch_size", "y_batch_size"), [(None, None), (12, 8), (100, 100)])
def test_a_batch_of_everything_is_the_data_itself(counts, batch_size, y_batch_size):
    batches = Batches(counts, batch_size, y_batch_size, shuffle=True)
    for batch in (*stream(batches, 3), *batches.one_pass()):
        assert batch.counts is counts
        assert batch.samples is batch.features is None
        assert batch.likelihood_scale == batch.prior_scale == 1.0


def test_one_pass_goes_through_the_samples_in_order(counts):
    batches = Batches(counts, 5, 3, shuffle=True, generator=torch.Generator())
    seen = list(batches.one_pass())
    assert torch.cat([batch.samples for batch in seen]).tolist() == list(range(12))
    assert [batch.counts.shape for batch in seen] == [(5, 8), (5, 8), (2, 8)]


@pytest.mark.parametrize("scaled", [True, False])
def test_scales_of_batches(counts, scaled):
    batches = Batches(counts, 5, 3, scale_ll_D=scaled, scale_kl_NM=scaled)
    seen = stream(batches, 9)  # three batches of samples for each of three batches of features
    features = [8 / 3] * 6 + [8 / 2] * 3 if scaled else [1.0] * 9
    samples = [1.0] * 9 if scaled else [5 / 12, 5 / 12, 2 / 12] * 3
    assert [batch.likelihood_scale for batch in seen] == pytest.approx(features)
    assert [batch.prior_scale for batch in seen] == pytest.approx(samples)


def test_the_plate_of_a_batch_scales_to_all_samples(counts):
    batch = Batches(counts).batch(torch.tensor([3, 1, 8]), None)
    with batch.plate(12) as index:
        assert index.tolist() == [3, 1, 8]
    assert batch.plate(12).size == 12
    assert batch.plate(12).subsample_size == 3
    assert Batch().plate(12).subsample_size == 12


@pytest.mark.parametrize("taken", range(9))
@pytest.mark.parametrize(
    ("batch_size", "y_batch_size"), [(5, 3), (5, None), (None, 3), (None, None)]
)
def test_a_stream_goes_on_from_its_state(counts, batch_size, y_batch_size, taken):
    """With the generator where it was, which orders are drawn from as they are needed."""
    generator = torch.Generator().manual_seed(3)
    batches = Batches(counts, batch_size, y_batch_size, shuffle=True, generator=generator)
    first, other = iter(batches), iter(batches)
    for _ in range(taken):
        next(first)
    state, drawn = first.state(), generator.get_state()
    expected = stream(first, 12)
    generator.set_state(drawn)
    other.resume(state)
    for one, two in zip(stream(other, 12), expected, strict=True):
        for name in ("samples", "features"):
            a, b = getattr(one, name), getattr(two, name)
            assert (a is None and b is None) or torch.equal(a, b)
