"""Processes that share the work on one table, by `torch.distributed`: its rows, or what is sent.

Each process, a rank, holds rows that lie beside one another. Of the rows of the others a fit needs
sums alone. Each rank adds up its share of such a sum in the order of the ranks, and all gather the
shares, so that one number of ranks always gives the same bits, and all ranks the same ones. Each
sends less than two sums, however many ranks there are.

A fit in space is held whole by each rank. They share out what takes long in it, and hand each other
what each has found, so that all go on with the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Thing = TypeVar("Thing")
Found = TypeVar("Found")


class Ranks:
    """The processes of a fit; this one is alone unless others are named.

    Parameters
    ----------
    rank, size : int
        Number of this process, and of all.

    Attributes
    ----------
    n_rows : int
        Number of rows of all ranks.
    rows : slice
        Those of this one.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.n_rows, self.rows = 0, slice(0, 0)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and speaks, the first."""
        return self.rank == 0

    def whole(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the table of all ranks, given that of the rows of this one."""
        return shape if self.size == 1 else (self.n_rows, shape[1])

    def sharing(self, cuts: Sequence[int]) -> tuple[Ranks, list[int]]:
        """Share out the slices of rows between cuts; return the ranks, and the cuts of this one.

        Where there are fewer slices than ranks, rows are shared out. A rank without rows is a
        ValueError.
        """
        n_rows = cuts[-1]
        if n_rows < self.size:
            raise ValueError(
                f"X has {n_rows} samples for {self.size} ranks, and each needs one at least. Start "
                "fewer processes."
            )
        if len(cuts) <= self.size:
            cuts = [n_rows * rank // self.size for rank in range(self.size + 1)]
        first, last = ((len(cuts) - 1) * (self.rank + k) // self.size for k in (0, 1))
        own = copy.copy(self)
        own.n_rows, own.rows = n_rows, slice(cuts[first], cuts[last])
        return own, list(cuts[first : last + 1])

    def part(self, n: int) -> slice:
        """Return which of n things are for this rank to work on."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def mapped(self, call: Callable[[Thing], Found], things: Sequence[Thing]) -> list[Found]:
        """Return what a call makes of each thing; each rank calls it for some of them, alone."""
        with working_together(ALONE):
            own = [call(one) for one in things[self.part(len(things))]]
        return [one for of_rank in self.gathered(own) for one in of_rank]

    def totals(self, *parts: Tensor) -> list[Tensor]:
        """Return the sums of tensors over all ranks, added in float64."""
        if self.size == 1:
            return list(parts)
        sizes = [part.numel() for part in parts]
        length = -(-sum(sizes) // self.size)
        given = torch.zeros(self.size * length, dtype=torch.float64)
        given[: sum(sizes)] = torch.cat([part.detach().reshape(-1).double() for part in parts])
        received = torch.empty_like(given)
        shares = list(torch.empty_like(given).split(length))
        with _in_plain_words():
            dist.all_to_all_single(received, given)
            own, *others = received.split(length)
            for other in others:
                own += other
            dist.all_gather(shares, own)
        found = torch.cat(shares)[: sum(sizes)].split(sizes)
        return [one.reshape(part.shape).to(part) for one, part in zip(found, parts, strict=True)]

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        return self.totals(part)[0]

    def any(self, here: bool) -> bool:
        """Say whether something is so on one rank at least."""
        return bool(self.total(torch.tensor(float(here))) > 0)

    def gathered(self, thing: Found) -> list[Found]:
        """Return what each rank has for something small."""
        found: list[Any] = [thing] * self.size
        if self.size > 1:
            with _in_plain_words():
                dist.all_gather_object(found, thing)
        return found

    def at_first(self, thing: Found) -> list[Found]:
        """Return what each rank has, on the first rank; on the others nothing."""
        found: list[Any] = [thing] * (self.size if self.leads else 0)
        if self.size > 1:
            with _in_plain_words():
                dist.gather_object(thing, found if self.leads else None)
        return found

    def stacked(self, part: Tensor, dim: int) -> Tensor:
        """Return the rows of all ranks, along a dimension, in their order."""
        if self.size == 1:
            return part
        rows = part.movedim(dim, 0)
        lengths = list(torch.zeros(self.size, dtype=torch.int64).split(1))
        with _in_plain_words():
            dist.all_gather(lengths, torch.tensor([len(rows)]))
            given = rows.new_zeros(int(max(lengths)), *rows.shape[1:])
            given[: len(rows)] = rows
            found = [torch.empty_like(given) for _ in lengths]
            dist.all_gather(found, given)
        whole = torch.cat([one[: int(n)] for one, n in zip(found, lengths, strict=True)])
        return whole.movedim(0, dim).contiguous()

    def normals(self, like: Tensor) -> Tensor:
        """Return standard normals of the shape (L, n) of rows, those that one process would draw.

        All ranks draw those of all rows, so that their generators stay together.
        """
        if self.size == 1:
            return torch.randn_like(like)
        return torch.randn(len(like), self.n_rows, dtype=like.dtype)[:, self.rows].contiguous()

    def all_or_none(self, call: Callable[[], Found], error: type[Exception]) -> Found:
        """Return what a call of this rank returns; an error of a type on one rank is one on all."""
        found, failed = None, False
        try:
            found = call()
        except error:
            failed = True
        if self.any(failed):
            raise error("on one of the ranks" if self.size > 1 else "failed")
        return found  # type: ignore[return-value]

    def by_first(self, call: Callable[[], object]) -> None:
        """Let the first rank do something while the others wait; if it fails, all do."""
        failure: Exception | None = None
        if self.leads:
            try:
                call()
            except Exception as error:
                failure = error
        said = self.gathered(None if failure is None else str(failure))[0]
        if failure is not None:
            raise failure
        if said is not None:
            raise OSError(f"Rank 0 failed: {said}")

    def agree(self, **named: Any) -> None:
        """Raise a ValueError on all ranks that says what differs, of things by their names."""
        all_of = self.gathered(named)
        told = []
        for rank, other in enumerate(all_of):
            for name in sorted(all_of[0].keys() | other.keys()):
                one, two = (str(of.get(name, "not there"))[:60] for of in (all_of[0], other))
                if all_of[0].get(name) != other.get(name):
                    told.append(f"{name} is {one} on rank 0 and {two} on rank {rank}")
        if told:
            raise ValueError(
                f"The ranks of one fit must be given the same; {'; '.join(told[:5])}. Run the same "
                "program on all of them."
            )


ALONE = Ranks()

_together = ALONE


def together() -> Ranks:
    """Return the ranks that do the same at present, and may share it out."""
    return _together


def by_components(make: Callable[[slice], Tensor], L: int) -> Tensor:
    """Return a tensor of L components, (L, ...); each rank makes that of some of them."""
    ranks = together()
    return ranks.stacked(make(ranks.part(L)), 0)


@contextmanager
def working_together(ranks: Ranks) -> Iterator[None]:
    """Let ranks that hold the same share what takes long, in a block that all of them run."""
    global _together
    before, _together = _together, ranks
    try:
        yield
    finally:
        _together = before


def processes() -> Ranks:
    """Return the ranks of `torch.distributed`, where it is initialised, as a fit begins."""
    if alone():
        return ALONE
    if "cpu:" not in str(dist.get_backend_config()):
        raise ValueError(
            "torch.distributed must have a backend for tensors on the CPU, as with "
            f"init_process_group('gloo'); it is initialised with {dist.get_backend()!r}."
        )
    return Ranks(dist.get_rank(), dist.get_world_size())


def alone() -> bool:
    """Say whether this process is the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def leads() -> bool:
    """Say whether this process may write and warn: it is alone, or the first rank."""
    return alone() or dist.get_rank() == 0


@contextmanager
def _in_plain_words() -> Iterator[None]:
    """Turn what a lost process makes of a connection into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("] ")[2].partition(". This is typically")[0] or str(error)
        raise ConnectionError(
            "Another rank of this fit has ended, or cannot be reached, so that the fit cannot go "
            f"on ({reason.strip()[:200]}). See what it said, and start all ranks again."
        ) from error
