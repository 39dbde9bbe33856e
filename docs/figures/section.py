"""Draw the first picture of README: python docs/figures/section.py osmfish_cortex.h5ad.

The file holds the cells of Codeluppi et al. (2018, doi:10.1038/s41592-018-0175-z), counts in X.
"""

import sys
from pathlib import Path

import anndata
import matplotlib
import numpy as np

import pnmf_pyro
from pnmf_pyro import transforms

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = (1, 2, 3, 4)  # from the surface of the cortex to the white matter
GENES = 3


def panel(axes, places, values, title, colours):
    """Draw the cells, the largest values last."""
    order = np.argsort(values)
    low, high = np.quantile(values, [0.01, 0.99])
    dots = axes.scatter(
        *places[order].T, c=values[order], s=1.3, cmap=colours, vmin=low, vmax=high, linewidths=0
    )
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, fontsize=9)
    return dots


def draw(adata, model, path):
    """Save maps of factors, of their uncertainty, and the genes of each."""
    places = adata.obsm["spatial"][:, ::-1]  # the long side across
    factors = transforms.get_factors(model)
    spread = transforms.factor_uncertainty(model)
    table = pnmf_pyro.top_features(adata, GENES, by="specificity")
    fig, grid = plt.subplots(
        3, len(SHOWN), figsize=(11, 4.6), layout="constrained", height_ratios=[1, 1, 0.55]
    )
    for column, component in enumerate(SHOWN):
        title = f"component {component}"
        dots = panel(grid[0, column], places, factors[:, component], title, "magma")
        sds = panel(grid[1, column], places, spread[:, component], "", "cividis")
        for row, mappable in ((0, dots), (1, sds)):
            bar = fig.colorbar(mappable, ax=grid[row, column], shrink=0.8, aspect=20)
            bar.ax.tick_params(labelsize=7)
        genes = table[table["component"] == component]
        axes = grid[2, column]
        axes.barh(genes["feature"].astype(str), genes["specificity"], color="0.45")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0, table["specificity"].max())
    for row, name in enumerate(("factor", "sd of log-factor", "specificity of\ntop genes")):
        fig.text(0.008, (0.8, 0.46, 0.15)[row], name, rotation=90, va="center", fontsize=9)
    fig.get_layout_engine().set(rect=(0.035, 0, 0.965, 1))
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    section = anndata.read_h5ad(sys.argv[1])
    section = section[section.obs["valid"]].copy()
    fitted = pnmf_pyro.fit(section, n_components=8, size_factors="total")
    draw(section, fitted, Path(__file__).with_suffix(".png"))
