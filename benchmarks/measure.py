"""Time, memory, and lines of JSON."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def report(**fields: Any) -> dict[str, Any]:
    """Print one measurement as a line of JSON, and return it."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()
    return fields


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, and what it returned."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def per_iteration(run: Callable[[int], Any], few: int, many: int) -> float:
    """Seconds an iteration, from two runs that differ only in their number."""
    return (timed(lambda: run(many))[0] - timed(lambda: run(few))[0]) / (many - few)


def interleaved(calls: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Take each measurement in turn, so that a machine that slows down slows all of them."""
    values: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            values[name].append(call())
    return values


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Ratios of measurements taken side by side."""
    return [a / b for a, b in zip(over, under, strict=True)]


def median(values: Sequence[float]) -> float:
    """Median as a plain number."""
    return float(np.median(values))


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def memory_above(call: Callable[[], Any]) -> tuple[float, float]:
    """Highest resident memory during a call above that before it, in MiB, and its seconds."""
    before, highest, done = resident_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds, _ = timed(call)
    done.set()
    watcher.join()
    return highest - before, seconds


def in_new_process(name: str, **arguments: Any) -> dict[str, Any]:
    """Run one benchmark in a process of its own, for its memory, and return its last line."""
    options = [f"--{key}={value}" for key, value in arguments.items() if value is not None]
    command = [sys.executable, "-m", "benchmarks", name, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first as its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
