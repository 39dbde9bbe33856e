"""Draw domains and regions of a real section: python docs/figures/domains.py osmfish_cortex.h5ad.

The file holds the cells of Codeluppi et al. (2018, doi:10.1038/s41592-018-0175-z), counts in X.
"""

import sys
from pathlib import Path

import anndata
import matplotlib

import pnmf_pyro
from pnmf_pyro import plotting

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if __name__ == "__main__":
    section = anndata.read_h5ad(sys.argv[1])
    section = section[section.obs["valid"]].copy()
    model = pnmf_pyro.fit(section, n_components=10, size_factors="total")
    found = pnmf_pyro.domains(model, 12, contiguous=True)
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    plotting.plot_domains(found, axes=axes[:2], scale_bar=False)
    plotting.plot_spatial(
        section, "region", axes=axes[2:], titles=["regions of the authors"], scale_bar=False
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)
