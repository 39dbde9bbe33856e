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
# # Ants in the desert
#
# A table of species at sites is a table of counts. This notebook asks of one: which species go
# together, where, what a treatment did to each of them, and what changed between two periods. The
# page Sites by species goes another way, to ordination and associations.

# %%
import os
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import pnmf_pyro
from pnmf_pyro import plotting

small = bool(os.environ.get("PNMF_SMALL"))  # a simulated desert, for continuous integration

# %% [markdown]
# ## The data
#
# Colonies of 20 species of ants around stakes in the Chihuahuan desert (Ernest and others, The
# Portal Project, doi:10.1101/332783). 24 plots have 49 stakes each. Colonies of 1988 to 1994 and of
# 1998 to 2009 are summed up. On some plots ants were poisoned, on others rodents were kept out.
# Where the file is not there, or for a quick run, we simulate a desert of the same form.


# %%
def simulated(random):
    """Stakes of four plots in two eras; species of two communities, of which poison takes half."""
    grid = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 6.25
    x = np.concatenate([np.add(grid, [80 * plot, 0]) for plot in range(4)] * 2)
    poisoned, late = x[:, 0] > 150, np.arange(len(x)) >= len(x) // 2
    activity = np.stack([np.exp(-x[:, 0] / 150), (1 + late) * np.exp((x[:, 0] - 270) / 150)], 1)
    rates = (activity @ random.gamma(2, 2, (2, 8))) * np.where(poisoned[:, None], 0.5, 1.0)
    obs = {
        "era": np.where(late, "1998-2009", "1988-1994"),
        "ant_treatment": np.where(poisoned, "all_ants", "none"),
        "rodent_treatment": random.choice(["control", "exclosure"], len(x)),
    }
    return anndata.AnnData(
        random.poisson(random.gamma(2, rates / 2)).astype(np.float32),
        obs=pd.DataFrame(obs, [f"stake{i}" for i in range(len(x))]),
        var=pd.DataFrame(index=[f"species {j}" for j in range(8)]),
        obsm={"spatial": x},
    )


file = Path(os.environ.get("PNMF_DATA", "../../shared/data")) / "eco_portal_ants.h5ad"
if small or not file.is_file():
    ants, L = simulated(np.random.default_rng(0)), 2
else:
    ants, L = anndata.read_h5ad(file), 4
ants.obsm["spatial"] = ants.obsm["spatial"] - ants.obsm["spatial"].min(0)  # metres, from the corner
ants.obs.value_counts(["era", "ant_treatment"]).unstack()

# %% [markdown]
# ## The fit
#
# The same stakes were visited in both eras. `batch_key="era"` gives each era a map of its own, and
# the fit learns how much they share. `covariates` are what was done to a plot. Colonies come in
# clumps, so we take the negative binomial.

# %%
model = pnmf_pyro.fit(
    ants,
    n_components=L,
    batch_key="era",
    covariates=["ant_treatment", "rodent_treatment"],
    likelihood="negative-binomial",
    random_state=0,
)
axes = plotting.plot_top_features(ants, 4, by="specificity")

# %% [markdown]
# What is said of results here and below is of the file. There are four communities: *Pheidole
# xerophila* alone, *Pogonomyrmex desertorum* with *Novomessor cockerelli*, *Conomyrma insana* with
# *Solenopsis*, and the honey ants, *Myrmecocystus*.
#
# ## Where they live
#
# `y_down=False` puts north at the top. Each panel has both eras on one scale.

# %%
axes = plotting.plot_factors(ants, unit="m", y_down=False)

# %% [markdown]
# Component 1 hardly lived here before 1995. After that it is strong in the north and on some plots
# in the west. Component 2 went the other way. Component 0 changes from stake to stake.
#
# ## What changed
#
# `group_levels` takes both eras at the same places, so that what differs is the era. A component is
# *specific* to one of them if it is twice as high there.

# %%
levels = pnmf_pyro.group_levels(model)
ax = plotting.plot_group_levels(levels)

# %% [markdown]
# Component 1 is more than three times as high in the second era. Component 2 has lost a third. The
# other two stayed.

# %% [markdown]
# ## What the poison did
#
# The effect of the treatment on each species, with two standard errors: that of no poison, beside
# plots where it was laid. An effect of 1 means 2.7 times as many colonies.

# %%
effects = pnmf_pyro.effects_table(model)
poison = effects[effects["name"].str.startswith("ant_treatment")].sort_values("effect")
poison = poison[poison["se"] < 0.5]  # of rare species nothing is known
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
ax.errorbar(poison["effect"], poison["feature"], xerr=2 * poison["se"], fmt="o", ms=4)
ax.axvline(0, color="0.6", linewidth=1)
label = ax.set_xlabel("log ratio of colonies, no poison to poison")

# %% [markdown]
# Most species have more colonies where no poison was laid. Two have surely fewer, `cono insa` and
# `sole xylo`: perhaps they gain where others are gone. This compares ten plots with fourteen. What
# else differs between them is in it as well.
#
# ## Does the model fit?

# %%
check = pnmf_pyro.posterior_predictive_check(model, ants.X, n_draws=100, random_state=0)
print(check.verdict())

# %% [markdown]
# Neighbouring stakes are more alike than the model makes them, and rare species are absent more or
# less often. More components are the first thing to try.
#
# ## What to try next
#
# - `select_n_components` compares numbers of communities (notebook 06).
# - `mask=` for visits that were not made: a zero says that somebody looked.
# - `size_factors=` for effort that differs between sites, such as hours or trap area.
# - `pnmf_pyro.domains(model, 5)` divides the sites by their communities, and says how sure it is.
