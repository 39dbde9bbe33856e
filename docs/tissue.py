"""A section of tissue, simulated: the data of the pages on AnnData, plots and interpretation."""

import anndata
import numpy as np
import pandas as pd

PROGRAMMES = ("Core", "Middle", "Rim", "Niche")


def simulated_section(side=16, sections=1, seed=0):
    """Return counts of 60 genes at places 100 µm apart, in round sections of three layers.

    Each of four programmes, of which the last is active around one place, has twelve genes of its
    own; the last twelve genes are expressed everywhere.
    """
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 1.0
    grid[:, 0] += (grid[:, 1] % 2) / 2
    x = np.concatenate([grid] * sections)
    label = np.repeat(np.arange(sections), len(grid))
    away = np.linalg.norm(x - (side - 0.5) / 2, axis=1) / (side / 2)
    x, label, away = x[away < 1.05], label[away < 1.05], away[away < 1.05]
    niche = np.linalg.norm(x - side * np.array([0.35, 0.65]), axis=1) / side
    levels = np.stack([away / 0.25, (away - 0.55) / 0.18, (away - 1) / 0.18, niche / 0.1], 1)
    activity = 0.05 + np.exp(-(levels**2) / 2)
    activity[:, 3] *= 1 - label / max(2 * (sections - 1), 1)  # weaker from section to section
    loadings = np.zeros((60, 4))
    for programme in range(4):
        loadings[12 * programme : 12 * (programme + 1), programme] = random.gamma(2, 2, size=12)
    loadings[48:] = random.gamma(2, 0.5, size=(12, 1))
    genes = [f"{name}{i}" for name in (*PROGRAMMES, "Common") for i in range(1, 13)]
    return anndata.AnnData(
        random.poisson(activity @ loadings.T).astype(np.float32),
        obs=pd.DataFrame(
            {"section": pd.Categorical([f"section {i + 1}" for i in label])},
            index=[f"place{i}" for i in range(len(x))],
        ),
        var=pd.DataFrame(index=genes),
        obsm={"spatial": 100 * x, "activity": activity},
    )
