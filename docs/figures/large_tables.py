"""Draw what it costs to leave counts in their file: python docs/figures/large_tables.py.

The figures are those under "Counts in a file" in docs/performance.md.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STORED, BYTES = 96.7e6, 26  # stored counts, and bytes that each takes in memory
PANELS = {
    "seconds a pass": {"in memory": 2.0, ".h5ad": 2.1, ".zarr": 2.6},
    "memory, GiB": {
        "counts alone,\nin memory": STORED * BYTES / 2**30,
        "whole fit,\ncounts in .h5ad": 1919 / 1024,
    },
    "passes until settled": {"full passes": 64, "batches of\n1% of rows": 26},
}

if __name__ == "__main__":
    figure, grid = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
    for ax, (title, bars) in zip(grid, PANELS.items(), strict=True):
        drawn = ax.barh(list(bars), list(bars.values()), color=["0.7", "C0", "C0"][: len(bars)])
        ax.bar_label(drawn, fmt="%.2g", padding=3)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=11)
        ax.set_xlim(0, 1.3 * max(bars.values()))
        ax.set_xticks([])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
