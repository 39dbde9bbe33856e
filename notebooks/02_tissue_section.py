# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tissue section
#
# From an AnnData object to maps of spatial programmes, how certain they are, their genes, which of
# them are spatial at all, and a prediction at places that were not measured.

# %%
import os
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

import pnmf_pyro
from pnmf_pyro import plotting, transforms

small = bool(os.environ.get("PNMF_SMALL"))  # fewer places, for continuous integration

# %% [markdown]
# ## The data
#
# With a file of your own this section is one line, `adata = anndata.read_h5ad("section.h5ad")`: raw
# counts in `X` or a layer, coordinates in `obsm["spatial"]`. Here we simulate a round section with
# 100 µm between places, so that we know the truth: three layers and a niche, each with twelve genes
# of its own, and twelve genes that follow a process without any spatial order, such as the cell
# cycle. The sequencing depth differs between samples.

# %%
random = np.random.default_rng(0)
side = 14 if small else 24
x = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 1.0
x[:, 0] += (x[:, 1] % 2) / 2
radius = np.linalg.norm(x - (side - 0.5) / 2, axis=1) / (side / 2)
x, radius = x[radius < 1.05], radius[radius < 1.05]
N = len(x)


def activities(radius, x, cycle):
    """Activity of the five programmes at places x, 1 apart."""
    niche = np.linalg.norm(x - side * np.array([0.25, 0.75]), axis=1) / side
    rings = ((0, 0.3), (0.55, 0.15), (1, 0.2))
    layers = [np.exp(-((radius - at) ** 2) / (2 * width**2)) for at, width in rings]
    return 0.03 + np.stack([*layers, np.exp(-((niche / 0.1) ** 2) / 2), cycle], 1)


programmes = ["core", "middle", "rim", "niche", "cycle"]
truth = activities(radius, x, random.gamma(0.5, 0.8, size=N))
loadings = np.kron(np.eye(5), np.ones((12, 1))) * (0.3 + random.gamma(2, 2, size=(60, 1)))
depth = random.gamma(10, 0.1, size=N)
adata = anndata.AnnData(
    random.poisson(depth[:, None] * (truth @ loadings.T)).astype(np.float32),
    obs=pd.DataFrame(index=[f"place{i}" for i in range(N)]),
    var=pd.DataFrame(index=[f"{name}-{i + 1}" for name in programmes for i in range(12)]),
    obsm={"spatial": 100 * x},
)
adata.obs["depth"] = depth
adata

# %%
axes = plotting.plot_spatial(adata, ["core-1", "niche-2", "cycle-1"], unit="µm")

# %% [markdown]
# ## Fit
#
# Coordinates are there, so the factors are smooth fields over space; how smooth is learned for each
# component, by predicting samples from their neighbours. What a sample has of each programme should
# not depend on how deep it was sequenced: that is what size factors are for. With real data one
# would take them from total counts; here the depth is known. The fit goes through stages, which the
# ELBO's course shows. First come factors that know no space, from which the fields then start.
# These follow each sample a little more closely than the prior likes: the divergence counts with a
# weight of 0.6. For the last stage the uncertainty of the fields is set as with a weight of 1,
# hence the step, and loadings are drawn towards those of the other components as far as they rest
# on few counts.

# %%
model = pnmf_pyro.fit(adata, n_components=5, size_factors=adata.obs["depth"])
adata

# %%
axes = plotting.plot_elbo(adata)

# %% [markdown]
# ## Maps
#
# Each factor is on a scale of its own, from 0.

# %%
axes = plotting.plot_factors(adata, unit="µm")

# %% [markdown]
# Do they match what was simulated? Here is the correlation of each component with each programme:

# %%
match = np.corrcoef(adata.obsm["X_pnmf"].T, truth.T)[:5, 5:]
pd.DataFrame(match, [f"component {l}" for l in range(5)], programmes).round(2)

# %% [markdown]
# ## Uncertainty
#
# The standard deviation of a log-factor is about the relative error of the factor: small where
# there are counts that tell, larger where a programme is nearly absent.

# %%
axes = plotting.plot_uncertainty(adata, unit="µm")

# %% [markdown]
# ## Genes
#
# Ranked by how far a gene is in a component beyond its share in all: `specificity`.

# %%
axes = plotting.plot_top_features(adata, 8, by="specificity")

# %%
pnmf_pyro.top_features(adata, 3, by="specificity").round(3)

# %% [markdown]
# ## Which of them are spatial?
#
# The score is the share of the variance beyond Poisson noise that a sample has in common with its
# nearest neighbours. The layers and the niche are smooth. The cycle is not: samples differ in it,
# but not by their place, and a smooth field is no good description of it. The score sees that
# because it estimates each sample's factor from its own counts, whatever the field says.

# %%
scores = pnmf_pyro.spatial_scores(adata)
scores.assign(programme=[programmes[m] for m in match.argmax(1)]).round(2)

# %% [markdown]
# Genes have a score too, which asks no model at all. It is NaN where counts vary no more than a
# Poisson would by itself.

# %%
genes = pnmf_pyro.spatial_scores(adata, of="features").set_index("feature")["score"]
print(f"{genes.isna().sum()} of 60 genes do not vary beyond noise")
genes.groupby(lambda name: name.split("-")[0], sort=False).median().round(2)

# %% [markdown]
# ## Prediction at other places
#
# The fields are there between the measured places as well. On a finer grid, with their uncertainty,
# which is larger in the corners, where there is no tissue:

# %%
line = np.arange(-100, 100 * side + 100, 50.0)
grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
predicted = model.transform(None, grid)
spread = transforms.factor_uncertainty(model, coordinates=grid)
niche = int(match[:, 3].argmax())
axes = plotting.plot_spatial(
    grid,
    np.stack([predicted[:, niche], spread[:, niche]], 1),
    titles=["niche, predicted", "sd of its log-factor"],
    unit="µm",
)

# %% [markdown]
# Held to the truth: the programme at the grid's places within the section, predicted from counts at
# the measured places alone.

# %%
at = grid / 100
from_centre = np.linalg.norm(at - (side - 0.5) / 2, axis=1) / (side / 2)
inside = from_centre < 1
there = activities(from_centre, at, np.zeros(len(at)))[inside]
for number, name in enumerate(programmes[:4]):
    component = match[:, number].argmax()
    agreement = np.corrcoef(there[:, number], predicted[inside, component])[0, 1]
    print(f"{name:>6}: correlation {agreement:.2f} at {inside.sum()} places")

# %% [markdown]
# ## Keep it
#
# Everything is in the AnnData object, in plain types; `model.save` keeps the model itself.

# %%
with tempfile.TemporaryDirectory() as folder:
    adata.write_h5ad(Path(folder) / "section.h5ad")
    again = anndata.read_h5ad(Path(folder) / "section.h5ad")
    model.save(Path(folder) / "model.npz")
    reopened = pnmf_pyro.PNMF.load(Path(folder) / "model.npz")
axes = plotting.plot_factors(again, niche, unit="µm")
print(np.array_equal(reopened.transform(None, grid), predicted))
