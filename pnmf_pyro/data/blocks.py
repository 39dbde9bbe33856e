"""Blocks: how much is worked on at once; less where the memory of a card ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Entries worked on at once: large enough to keep both cores busy, small enough for their caches.
BLOCK_ENTRIES = 1 << 20

_divisor = 1


def at_once(size: int, entries: int | None = None) -> int:
    """Return how many things of `size` entries are worked on at once, one at least.

    They have so many `entries` together at most, BLOCK_ENTRIES unless given.
    """
    entries = BLOCK_ENTRIES if entries is None else entries
    return max(1, entries // _divisor // max(1, size))


@contextmanager
def smaller_by(divisor: int) -> Iterator[None]:
    """Work on less at once in a block, by a divisor."""
    global _divisor
    before, _divisor = _divisor, divisor
    try:
        yield
    finally:
        _divisor = before
