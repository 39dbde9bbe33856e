"""Fits in processes that are killed: whether they go on to the bits of one that was not."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

import pnmf_pyro
from benchmarks.measure import report, timed
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.archive import read_archive

# What is fitted, with the name of its prior.
FITS: dict[str, dict[str, Any]] = {
    "non-spatial": {"spatial": False},
    "SVGP": {"local": False, "num_inducing": 100},
    "LCGP": {"local": True, "K": 15},
}

# Code with which a process ends that has lost another one.
LOST = 4

# Seconds from one checkpoint to the next; what a process leaves that was killed while it wrote.
EVERY = 0.1
PART = ".part"


def fitted(name: str, N: int, D: int, L: int, **more: Any) -> PNMF:
    """Fit counts of N places and D features, simulated from smooth factors."""
    random = np.random.default_rng(0)
    places = random.uniform(size=(N, 2)) * N**0.5
    waves = places @ random.normal(size=(2, L)) / 4
    X = random.poisson(np.exp(np.sin(waves)) @ random.gamma(0.5, size=(L, D)))
    coords = None if name == "non-spatial" else places
    given = {key: value for key, value in FITS[name].items() if coords is not None}
    return pnmf_pyro.fit(X.astype("f4"), coords, n_components=L, **given, **more)


def saved(model: PNMF, path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """All that a file holds of a model, in bytes."""
    model.save(path)
    return _held(path)


def _held(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    header, arrays = read_archive(path)
    return header, {name: array.tobytes() for name, array in arrays.items()}


def killed_fits(
    name: str, times: int, N: int, D: int, L: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """Kill a process at a random moment of a fit, so many times, and go on in this one.

    A process that ends before is none of these. Each yields whether it had been `writing`, whether
    what came out has the `same` bits as a fit without a checkpoint, and whether anything is left
    (`rests`).
    """
    random, path = np.random.default_rng(0), folder / "run.ckpt"
    expected = saved(fitted(name, N, D, L), folder / "model.npz")
    seconds, _ = timed(lambda: fitted(name, N, D, L, checkpoint=path, every=EVERY))
    while times:
        path.unlink()
        if not killed_once(name, (N, D, L), path, random.uniform(0, seconds)):
            seconds *= 0.9
            continue
        times -= 1
        writing = bool(parts(folder))
        model = fitted(name, N, D, L, checkpoint=path, every=EVERY)
        same = saved(model, folder / "model.npz") == expected
        yield {"writing": writing, "same": same, "rests": bool(parts(folder))}


def killed_once(name: str, sizes: tuple[int, ...], path: Path, seconds: float) -> bool:
    """Kill a process so long after its first checkpoint; say whether it was still at work."""
    call = [sys.executable, "-m", "benchmarks.stops", name, *map(str, sizes), str(path)]
    with subprocess.Popen(call) as process:
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        at_work = process.poll() is None
        process.send_signal(signal.SIGKILL)
    return at_work


def killed_ranks(
    name: str, times: int, N: int, D: int, L: int, folder: Path
) -> list[dict[str, Any]]:
    """Kill one of two processes of a fit, or both, at a random moment, so many times.

    As :func:`killed_fits`, in a process of its own; `told` is whether a process that was left has
    said that the other one is lost, and whether the checkpoint was there.
    """
    told = map(str, (times, N, D, L, folder))
    call = [sys.executable, "-m", "benchmarks.stops", "ranks", name, *told]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = subprocess.run(call, env=env, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    return [json.loads(line) for line in lines]


def _killed_ranks(
    name: str, times: int, N: int, D: int, L: int, folder: Path
) -> Iterator[dict[str, Any]]:
    random, path, sizes = np.random.default_rng(0), folder / "run.ckpt", (name, N, D, L)
    expected = _of_two(_two(sizes, folder), folder)
    again = _two(sizes, folder, path)
    while not path.exists():
        time.sleep(0.001)
    seconds, same = timed(lambda: _of_two(again, folder) == expected)
    assert same
    while times:
        path.unlink()
        processes = _two(sizes, folder, path)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, seconds))
        killed = [processes[k] for k in ((0,), (1,), (0, 1))[random.integers(3)]]
        at_work = all(one.is_alive() for one in processes)
        for one in killed:
            one.kill()
        for one in processes:
            one.join()
        if not at_work:
            seconds *= 0.9
            continue
        times -= 1
        writing = bool(parts(folder))
        left = [one.exitcode == LOST for one in processes if one not in killed]
        told = all(left) and path.exists()
        same = _of_two(_two(sizes, folder, path), folder) == expected
        yield {"told": told, "writing": writing, "same": same, "rests": bool(parts(folder))}


def _two(sizes: tuple[Any, ...], folder: Path, path: Path | None = None) -> list[Any]:
    """Start two processes of a fit, copies of this one."""
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_be_rank, args=(k, sizes, folder, path)) for k in (0, 1)]
    for one in processes:
        one.start()
    return processes


def _be_rank(rank: int, sizes: tuple[Any, ...], folder: Path, path: Path | None) -> None:
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        model = fitted(*sizes, checkpoint=path, every=0)
    except ConnectionError:
        sys.exit(LOST)
    model.save(folder / f"model{rank}.npz")
    dist.destroy_process_group()


def _of_two(processes: list[Any], folder: Path) -> list[Any]:
    """Wait for two processes; return what each has found."""
    for one in processes:
        one.join()
    assert [one.exitcode for one in processes] == [0, 0]
    return [_held(folder / f"model{rank}.npz") for rank in (0, 1)]


def parts(folder: Path) -> list[str]:
    """Names of files that were being written."""
    return [name for name in os.listdir(folder) if name.endswith(PART)]


def stops(options: argparse.Namespace) -> None:
    """Kill fits at `repeats` random moments; count those that go on to the same bits."""
    warnings.simplefilter("ignore")
    for name in FITS:
        with tempfile.TemporaryDirectory() as folder:
            sizes = options.N, options.D, options.L
            lines = list(killed_fits(name, options.repeats, *sizes, Path(folder)))
        _report(name, lines)
        with tempfile.TemporaryDirectory() as folder:
            lines = killed_ranks(name, options.repeats, *sizes, Path(folder))
        _report(f"{name}, two processes", lines)


def _report(name: str, lines: list[dict[str, Any]]) -> None:
    counts = {key: sum(line[key] for line in lines) for key in lines[0]}
    report(benchmark="stops", fit=name, kills=len(lines), **counts)


if __name__ == "__main__":
    several = sys.argv[1] == "ranks"
    name, *told, where = sys.argv[1 + several :]
    numbers = [int(one) for one in told]
    warnings.simplefilter("ignore")
    if several:
        for line in _killed_ranks(name, *numbers, Path(where)):
            print(json.dumps(line), flush=True)
    else:
        fitted(name, *numbers, checkpoint=where, every=EVERY)
