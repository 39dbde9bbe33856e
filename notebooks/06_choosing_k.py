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
# # Choosing the number of components
#
# Counts are split at random into two tables that are independent if they are Poisson. Numbers of
# components are compared by how well a fit of the first predicts the second, and by whether fits of
# different splits find the same components.

# %%
import os

import numpy as np

import pnmf_pyro
from pnmf_pyro import plotting

small = bool(os.environ.get("PNMF_SMALL"))  # fewer samples and fits, for continuous integration
N, D, L = (60, 25, 3) if small else (150, 50, 5)
numbers = range(2, 5) if small else range(2, 10)

random = np.random.default_rng(0)
rate = np.exp(random.normal(size=(N, L))) @ random.gamma(0.3, 6.0, size=(L, D)) + 0.05
X = random.poisson(rate)
print(f"{N} x {D} counts, mean {X.mean():.1f}, {L} components in the simulation")

# %%
selection = pnmf_pyro.select_n_components(X, numbers, n_seeds=2 if small else 4, random_state=0)
selection.table().round(4)

# %%
axes = plotting.plot_selection(selection)
# %%
print(selection.summary())

# %% [markdown]
# ## The same components?
#
# Two fits number their components differently. `match_factors` pairs them by the cosine of their
# loadings: with the chosen number all have a partner, with more of them some do not.

# %%
for number in (selection.chosen, max(numbers) + 2):
    fits = [
        pnmf_pyro.fit(X, n_components=number, random_state=seed, init="random", mode="lower-bound")
        for seed in (0, 1)
    ]
    match = pnmf_pyro.match_factors(*fits)
    print(f"{number} components: {np.sort(match.similarities)[::-1].round(2)}")
