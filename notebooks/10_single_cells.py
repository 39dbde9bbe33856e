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
# # Single cells
#
# A cell has no place here. It has a kind, and programmes that it runs more or less of: it divides,
# it is active. Clusters give each cell one label. Components say how much of each programme a cell
# runs, with an error. This notebook fits cells of two runs, says which genes mark each programme
# and how sure that is, and adds new cells to the fit.

# %%
import os

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import pnmf_pyro
from pnmf_pyro import plotting, transforms

small = bool(os.environ.get("PNMF_SMALL"))  # fewer cells, for continuous integration

# %% [markdown]
# ## The data
#
# Four programmes make the counts. T cells, B cells and monocytes run one each. Some cells of each
# kind also divide. Cells differ in depth, and the second run catches each gene better or worse than
# the first. Yours come from `anndata.read_h5ad`, or `scanpy.read_10x_h5`.

# %%
random = np.random.default_rng(0)
N, D = (500, 120) if small else (3000, 400)
programmes = ["T", "B", "monocyte", "division"]
kind = random.choice(3, N, p=[0.5, 0.2, 0.3])
divides = random.uniform(size=N) < 0.15
activity = np.concatenate([np.eye(3)[kind], divides[:, None] * random.gamma(4, 0.3, (N, 1))], 1)
activity = (activity + 0.02) * random.lognormal(0, 0.3, (N, 4))
loadings = random.gamma(0.3, 1.0, (D, 4)) + 0.02
for k in range(4):  # ten genes that mark each programme
    loadings[10 * k : 10 * k + 10, k] += random.gamma(4, 2, 10)
run = random.choice(["May", "June"], N)
effect = np.where(run[:, None] == "June", random.normal(0, 0.4, D), 0.0)
depth = random.lognormal(0, 0.4, N)
genes = [f"{programmes[j // 10]}-{j % 10}" if j < 40 else f"gene{j}" for j in range(D)]
adata = anndata.AnnData(
    random.poisson(depth[:, None] * (activity @ loadings.T) * np.exp(effect)).astype(np.float32),
    obs=pd.DataFrame({"run": run}, [f"cell{i}" for i in range(N)]),
    var=pd.DataFrame(index=genes),
)
print(f"{N} cells x {D} genes, {adata.X.sum(1).mean():.0f} counts a cell")

# %% [markdown]
# ## The fit
#
# A fifth of the cells is kept for later. `size_factors="total"` takes out the depth of each cell,
# and `batches="run"` what a run does to each gene. Rows are cells, counts are raw: no logarithm, no
# scaling.

# %%
new = random.uniform(size=N) < 0.2
cells = adata[~new].copy()
model = pnmf_pyro.fit(cells, n_components=4, size_factors="total", batches="run", random_state=0)
pnmf_pyro.top_features(model, 5, by="specificity")

# %% [markdown]
# Each list is of one programme. `specificity` puts genes first that are frequent in one component
# and rare in the others.

# %%
axes = plotting.plot_top_features(model, 6, by="specificity")

# %% [markdown]
# ## Which genes mark a programme, and how sure is it?
#
# `differential_features` compares the share of a gene in a component with that in the others. It
# gives the logarithm of the ratio to base 2, its standard error, and the local false sign rate: the
# probability that the gene does not mark the component at all.

# %%
table = pnmf_pyro.differential_features(model)
marks = table[(table["lfsr"] < 0.01) & (table["mean"] > 1)]
marks.groupby("component").size().rename("genes").to_frame().T

# %%
axes = plotting.plot_volcano(model)

# %% [markdown]
# Genes far to the right and high up mark the component. A gene near the bottom may be frequent in
# it, but so it is in another one.
#
# ## Cells that do two things
#
# Which component is which programme? Correlate the two. In your own data the lists of genes say so.

# %%
factors = transforms.get_factors(model)
found = np.corrcoef(factors.T, activity[~new].T)[:4, 4:]
which = dict(zip(programmes, found.argmax(0), strict=True))
pd.DataFrame(found, [f"component {k}" for k in range(4)], programmes).round(2)

# %%
shares = factors / factors.sum(1, keepdims=True)
T, division = shares[:, which["T"]], shares[:, which["division"]]
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
ax.scatter(T, division, s=4, c=np.where(divides[~new], "tab:red", "0.6"))
labels = ax.set(xlabel="share of the component of T cells", ylabel="share of division")

# %% [markdown]
# Red cells divide in truth. T cells that divide lie on the line between the two corners, and other
# cells that divide on the left. A clustering would have put each in one corner, or made a cluster
# of them.
#
# ## New cells
#
# `transform` gives their factors with the loadings as they are. The run must be one of the fit.

# %%
later = adata[new].copy()
of_new = model.transform(later, size_factors="total", batches="run")
agreement = [
    np.corrcoef(of_new[:, which[name]], activity[new, k])[0, 1] for k, name in enumerate(programmes)
]
pd.Series(agreement, programmes).round(2).to_frame("correlation with the truth").T

# %% [markdown]
# ## What to try next
#
# - Leave `batches=` out: a component may then stand for a run.
# - `likelihood="auto"` takes the negative binomial where counts need it.
# - `select_n_components` compares numbers of components by counts that were held out
#   (notebook 06).
# - `pnmf_pyro.posterior_predictive_check` says what the fit does not describe (notebook 05).
