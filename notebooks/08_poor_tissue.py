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
# # A poor tissue: what coarse levels find
#
# Platforms of fine resolution count few molecules at each place: 10 to 300. A single place then
# says little about which component it belongs to, and a fit that starts from single places loses
# components. `pnmf_pyro.fit` therefore starts where counts are many: it adds up the counts of
# neighbouring places, settles there, and takes what it found down to the places. Here the same
# section is fitted with these coarse levels and without them, beside the truth.

# %%
import os

import numpy as np
import pandas as pd

import pnmf_pyro
from pnmf_pyro import plotting, transforms
from pnmf_pyro.estimator.recipe import NEIGHBORS
from pnmf_pyro.estimator.stages import WarmUp

small = bool(os.environ.get("PNMF_SMALL"))  # fewer places, for continuous integration

# %% [markdown]
# ## A section with 27 counts a place
#
# Ten components are smooth at different scales. Each feature belongs to a few of them.

# %%
random = np.random.default_rng(1)
N, D, L = (2000, 100, 3) if small else (8000, 400, 10)
x = random.uniform(size=(N, 2)) * np.sqrt(N)
log_truth = np.empty((N, L))
for component in range(L):
    waves = random.standard_t(3, (200, 2)) / (4 * (1 + component / 2))
    log_truth[:, component] = np.cos(x @ waves.T + random.uniform(0, 2 * np.pi, 200)).sum(1) / 10
loadings = random.gamma(0.15, 1.0, (D, L))
loadings *= 27 / (np.exp(log_truth).mean(0) @ loadings.sum(0))
X = random.poisson(np.exp(log_truth) @ loadings.T)
print(f"{X.sum(1).mean():.0f} counts a place, {100 * (X > 0).mean():.0f}% of the table is not zero")

# %% [markdown]
# ## Both fits
#
# The stages of the recommended fit are a list. The second fit has the same ones, but its warm-up
# has no coarse levels.

# %%
without = (WarmUp(levels=0), *NEIGHBORS[1:])
settings = {"n_components": L, "local": True, "K": 16}
fits = {
    "with levels": pnmf_pyro.fit(X, x, **settings),
    "without levels": pnmf_pyro.fit(X, x, stages=without, **settings),
}


def matched(model):
    """Log-factors in the order of the true components, and the correlation of each with its own."""
    order = pnmf_pyro.match_factors(loadings, model).permutation
    found = np.log(transforms.get_factors(model, use_mgf=False))[:, order]
    return found, [np.corrcoef(log_truth[:, l], found[:, l])[0, 1] for l in range(L)]


matches = {name: matched(model) for name, model in fits.items()}
table = pd.DataFrame({name: match[1] for name, match in matches.items()}).T
table.columns = [f"component {l}" for l in range(L)]
table.round(2)

# %% [markdown]
# ## Maps
#
# The three components that the fit without levels finds worst: the truth, then both fits, as
# log-factors. The colours of each panel span its own range.

# %%
worst = np.argsort(matches["without levels"][1])[:3]
titles = [f"component {l}" for l in worst]
axes = plotting.plot_spatial(x, log_truth[:, worst], titles=[f"{t} (truth)" for t in titles])

# %%
axes = plotting.plot_spatial(x, matches["with levels"][0][:, worst], titles=titles)

# %%
axes = plotting.plot_spatial(x, matches["without levels"][0][:, worst], titles=titles)

# %% [markdown]
# The levels and their steps are in the log. They cost little: a coarse level has a small part of
# the places. Where a place has 400 counts or more there are no levels, and both fits are the same.
#
# Try next: fewer counts a place, or `pnmf_pyro.plan(X, x, n_components=10)`, which names the levels
# that a fit would go through.
