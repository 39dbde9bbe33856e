"""Randomness that comes from `random_state` alone, and leaves every global seed where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

RandomState = int | np.random.RandomState | np.random.Generator | None


def check_random_state(random_state: RandomState) -> np.random.RandomState:
    """Turn a seed, a RandomState, a Generator or None into a numpy RandomState.

    Unlike scikit-learn's function of this name, None gives a fresh, unpredictable state and not
    numpy's global one, so that the global seed is never moved.
    """
    if isinstance(random_state, np.random.RandomState):
        return random_state
    if isinstance(random_state, np.random.Generator):
        return np.random.RandomState(int(random_state.integers(2**32)))
    seeds = isinstance(random_state, (int, np.integer)) and 0 <= random_state < 2**32
    if random_state is None or seeds:
        return np.random.RandomState(random_state)
    raise ValueError(
        "random_state must be None, an int from 0 to 2**32 - 1, a numpy RandomState or a numpy "
        f"Generator; got {random_state!r}."
    )


def torch_generator(random_state: RandomState) -> torch.Generator:
    """Return a CPU generator of torch, seeded with one draw from `random_state`."""
    seed = check_random_state(random_state).randint(2**31 - 1)
    return torch.Generator().manual_seed(int(seed))


@contextmanager
def drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let torch's and Pyro's samplers draw from `generator` within the block.

    They read torch's global state; it is lent to `generator` here and put back afterwards.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        for one in cuda:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            torch.cuda.default_generators[one.index or 0].manual_seed(seed)
        torch.random.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.random.get_rng_state())
