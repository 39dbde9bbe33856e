"""Fits in processes that are killed: whether they go on to the bits of one that was not."""

from __future__ import annotations

import argparse
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
        counts = {key: sum(line[key] for line in lines) for key in lines[0]}
        report(benchmark="stops", fit=name, kills=len(lines), **counts)


if __name__ == "__main__":
    kind, *numbers, where = sys.argv[1:]
    warnings.simplefilter("ignore")
    fitted(kind, *map(int, numbers), checkpoint=where, every=EVERY)
