"""Processes that torchrun has started for one command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from pnmf_pyro.data.parallel import Ranks, processes

# What torchrun tells each of its processes.
TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun has started, if it has, for the block."""
    begun = all(name in os.environ for name in TOLD) and not dist.is_initialized()
    if begun:
        dist.init_process_group("gloo")
    try:
        yield processes()
    finally:
        if begun:
            dist.destroy_process_group()
