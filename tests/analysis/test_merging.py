"""Two components that become one, by singular values of dense tables."""

import numpy as np
import pytest

from pnmf_pyro.analysis.merging import SOFTENING, losses, merged


def factorisation(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.gamma(0.5, size=(12, 4)), random.gamma(0.5, size=(30, 4))


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_second_singular_values(seed):
    W, A = factorisation(seed)
    M = A @ W.T
    expected = np.outer(M.sum(1), M.sum(0)) / M.sum()
    found = losses(W, A)
    for k in range(4):
        for l in range(k):
            pair = A[:, [k, l]] @ W[:, [k, l]].T
            second = np.linalg.svd(pair / np.sqrt(expected))[1][1]
            assert found[k, l] == pytest.approx(second**2, rel=1e-8)
            assert found[l, k] == pytest.approx(found[k, l])
    assert np.isinf(np.diag(found)).all()


def unsoftened(W: np.ndarray, start: np.ndarray, A: np.ndarray) -> np.ndarray:
    """Undo the step to the mean profile."""
    profile = W @ A.sum(0) / (W @ A.sum(0)).sum()
    return (start - SOFTENING * start.sum(0) * profile[:, None]) / (1 - SOFTENING)


def test_a_component_in_two_parts_is_one_again():
    W, A = factorisation(0)
    split = np.random.default_rng(1).uniform(0.2, 0.8, 30)
    W_split = np.column_stack([W, 3 * W[:, 1]])
    A_split = np.column_stack([A, A[:, 1] * split / 3])
    A_split[:, 1] *= 1 - split
    found = unsoftened(W, merged(W_split, A_split, 4), A)
    assert losses(W_split, A_split)[1, 4] == pytest.approx(0, abs=1e-12)
    shapes = [found / found.sum(0), W[:, [0, 2, 3, 1]] / W[:, [0, 2, 3, 1]].sum(0)]
    np.testing.assert_allclose(*shapes, rtol=1e-6, atol=1e-12)


def test_an_absent_component_goes_first():
    W, A = factorisation(2)
    W[:, 2] = 0
    found = unsoftened(W, merged(W, A, 3), A)
    kept = W[:, [0, 1, 3]] / W[:, [0, 1, 3]].sum(0)
    cosine = (found / np.linalg.norm(found, axis=0)).T @ (kept / np.linalg.norm(kept, axis=0))
    assert cosine.max(0).min() > 0.999


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_number_is_left(number):
    W, A = factorisation(3)
    found = merged(W.astype(np.float32), A.astype(np.float32), number)
    assert found.shape == (12, number)
    assert (found > 0).all()
    assert np.isfinite(found).all()


def test_one_component_is_the_mean_profile():
    W, A = factorisation(4)
    found, profile = merged(W, A, 1)[:, 0], W @ A.sum(0)
    np.testing.assert_allclose(found / found.sum(), profile / profile.sum())
