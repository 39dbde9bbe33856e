"""Plots of what the benchmarks printed: python -m benchmarks.plots FOLDER FILE..."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np


def lines(files: Iterable[str]) -> list[dict[str, Any]]:
    """Measurements in the files; other lines are tables."""
    text = "\n".join(Path(file).read_text() for file in files)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def growth(measured: list[dict[str, Any]], path: Path) -> None:
    """Step time as each size grows, with the line of proportional growth."""
    names = {"stored": "stored counts", "N": "samples", "D": "features", "L": "components"}
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True, layout="constrained")
    for (name, label), ax in zip(names.items(), axes, strict=True):
        found = [one for one in measured if one.get("grows") == name]
        x, y = ([one[key] for one in found] for key in (name, "median_seconds"))
        ax.loglog(x, y, "o-")
        ax.loglog(x, y[-1] * np.asarray(x) / x[-1], ":", color="grey")
        ax.set_xticks(x, [f"{value:.2g}".replace("e+0", "e") for value in x])
        ax.minorticks_off()
        ax.set_xlabel(label)
    axes[0].set_ylabel("seconds of a natural step")
    figure.savefig(path, dpi=120)


def steps(measured: list[dict[str, Any]], path: Path) -> None:
    """Seconds of one full-data step, ours and the peers', each repetition a point."""
    found = [one for one in measured if one["benchmark"] == "step"]
    figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for row, one in enumerate(reversed(found)):
        seconds = one["seconds"]
        ax.plot(seconds, [row] * len(seconds), "o", alpha=0.6)
    ax.set_yticks(range(len(found)), [one["what"] for one in reversed(found)])
    ax.set_xscale("log")
    ax.set_xlabel("seconds of one full-data step")
    ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draw every plot."""
    folder, *files = sys.argv[1:]
    measured = lines(files)
    Path(folder).mkdir(exist_ok=True)
    growth(measured, Path(folder) / "growth.png")
    steps(measured, Path(folder) / "steps.png")


if __name__ == "__main__":
    main()
