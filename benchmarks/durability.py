"""Processes that are killed while they write: what is then in the file, and beside it."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from benchmarks.measure import timed
from pnmf_pyro import PNMF
from pnmf_pyro.command_line.outputs import write_results
from pnmf_pyro.command_line.pages import Page, Text
from pnmf_pyro.command_line.tables import read_counts
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys

# How a file of each kind is written, and read; what is read must be whole.
Kind = tuple[Callable[[Path], Any], Callable[[Path], Any]]


def kinds(folder: Path, N: int, D: int, L: int) -> dict[str, Kind]:
    """What the package writes, by name, with a model of N samples, D features, L components."""
    X = np.random.default_rng(0).poisson(3.0, (N, D)).astype(np.float32)
    counts = folder / "counts.h5ad"
    anndata.AnnData(X).write_h5ad(counts)
    table = read_counts(counts)
    model = PNMF(L, max_iter=2, tol=0, random_state=0).fit(X)
    page = Page("A page", [Text("Words", "word " * 100 * N)])

    def results(path: Path, source: Path = counts) -> None:
        options = {"counts": str(source), "out": str(path), "save_model": None}
        options |= {"transpose": False, **asdict(AnnDataKeys())}
        write_results(argparse.Namespace(**options), model, table)

    def into(path: Path) -> None:
        if not path.exists():
            path.write_bytes(counts.read_bytes())
        results(path, path)

    def whole(path: Path) -> None:
        found = anndata.read_h5ad(path)
        assert found.obsm["X_pnmf"].shape == (N, L)
        assert len(found.uns["pnmf"]["elbo_history"]) == 2

    def with_counts(path: Path) -> None:
        whole(path)
        assert (anndata.read_h5ad(path).X == X).all()

    def page_ends(path: Path) -> None:
        assert path.read_text().endswith("</html>")

    return {
        "model.npz": (model.save, PNMF.load),
        "results.npz": (results, np.load),
        "results.h5ad": (results, whole),
        "both.h5ad": (into, with_counts),
        "report.html": (page.write, page_ends),
    }


def killed(path: Path, kind: Kind, times: int, random: np.random.Generator) -> dict[str, Any]:
    """Kill a process `times` times while it writes to `path`.

    Returns
    -------
    dict
        `lost`: how often the file could not be read afterwards; `interrupted`: how often something
        lay beside it; `rests`: how often still after it was written once more.
    """
    write, read = kind
    write(path)
    seconds, _ = timed(lambda: write(path))
    found = {"seconds": seconds, "kills": times, "lost": 0, "interrupted": 0, "rests": 0}
    before = set(os.listdir(path.parent))
    for number in range(times):
        child = os.fork()
        if child == 0:
            write(path)
            os._exit(0)
        if number % 2:  # at any time, or soon after the file is begun
            time.sleep(random.uniform(0, 1.1 * seconds))
        else:
            last = time.perf_counter() + 3 * seconds
            while set(os.listdir(path.parent)) == before and time.perf_counter() < last:
                pass
            time.sleep(random.uniform(0, 0.05 * seconds))
        os.kill(child, signal.SIGKILL)  # one that has ended waits for its parent
        os.waitpid(child, 0)
        try:
            read(path)
        except Exception:
            found["lost"] += 1
        found["interrupted"] += set(os.listdir(path.parent)) != before
        write(path)
        found["rests"] += set(os.listdir(path.parent)) != before
    return found


def all_killed(times: int, N: int, D: int, L: int) -> Iterator[dict[str, Any]]:
    """Kill processes while they write files of each kind."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, kind in kinds(folder, N, D, L).items():
            yield {"file": file, **killed(folder / file, kind, times, random)}
