"""Memory that this process holds and may still have, as Linux tells it."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

# Where a kind of control group has its limit, its use, and of that what can be given back at once.
UNIFIED = ("sys/fs/cgroup", "memory.max", "memory.current")
OLDER = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")


def held_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process holds now; 0 where that is unknown."""
    return _field(root / "proc/self/status", "VmRSS:", 1024) or 0


def available_memory(root: Path = Path("/")) -> float:
    """Return the bytes that this process may have beside those it holds.

    That is what the machine has left, or any of the control groups that the process is in, such as
    those of a container or of a job on a cluster. It is infinite where nothing says it.
    """
    machine = _field(root / "proc/meminfo", "MemAvailable:", 1024)
    left: list[float] = [inf if machine is None else machine]
    for folder, (_, most, used) in _control_groups(root):
        limit, now = _number(folder / most), _number(folder / used)
        if limit is not None and now is not None:
            # Files that are kept in memory make room when it is needed.
            files = _field(folder / "memory.stat", "inactive_file", 1) or 0
            left.append(max(0, limit - now + files))
    return min(left)


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the control groups of this process, each with those around it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        kind = UNIFIED if not controllers else OLDER
        if kind is UNIFIED or "memory" in controllers.split(","):
            own = Path(path.strip("/"))
            for part in (own, *own.parents):
                yield root / kind[0] / part, kind


def _field(path: Path, name: str, unit: int) -> int | None:
    """The number after a name at the start of a line of a file."""
    for line in _lines(path):
        if line.split()[:1] == [name]:
            return int(line.split()[1]) * unit
    return None


def _number(path: Path) -> int | None:
    """The number that a file holds; None for another word, such as `max`."""
    words = " ".join(_lines(path)).split()
    return int(words[0]) if words and words[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
