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
# # Quick start
#
# A table of counts is factorised into a few non-negative components, and each sample's factors come
# with their uncertainty.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import pnmf_pyro
from pnmf_pyro import plotting, transforms

small = bool(os.environ.get("PNMF_SMALL"))  # fewer samples and steps, for continuous integration

# %% [markdown]
# ## Counts
#
# Each of the 1,797 handwritten digits is 8 x 8 pixels; a pixel counts how many of the 16 points of
# its cell were inked. Three pixels are blank in every image; we leave them out.

# %%
images = load_digits()
X = images.data[:300] if small else images.data
inked = X.sum(0) > 0
X = X[:, inked]
X.shape

# %% [markdown]
# ## Fit
#
# `fit` takes steps in closed form, so there is no learning rate to choose: first up a lower bound
# without noise until that has settled, then up the tighter ELBO. It returns a `PNMF`, which is a
# scikit-learn estimator.

# %%
model = pnmf_pyro.fit(X, n_components=10)
factors = transforms.get_factors(model)
print(f"ELBO {model.elbo_:.0f} nats after {model.n_iter_} steps")

# %% [markdown]
# The ELBO is a lower bound on $\log p(X \mid W)$, with all constants, so fits with different
# numbers of components or modes can be compared. It should be flat at the end; the jump is where
# the tighter bound takes over:

# %%
ax = plotting.plot_elbo(model)

# %% [markdown]
# ## Components
#
# Row $l$ of `components_` holds the loadings $W_{jl}$ of component $l$ on each pixel.

# %%
full = np.zeros((10, 64))
full[:, inked] = model.components_
axes = plotting.plot_component_images(full, (8, 8))

# %% [markdown]
# ## Factors, with uncertainty
#
# The posterior of each log-factor is normal. `get_factors` gives $E \exp F$, `factor_uncertainty`
# the standard deviation of $F$. Below, the first image with its reconstruction and its ten
# factors; bars are central 90% intervals of $\exp F$.

# %%
mean = transforms.log_factors(model)[0]
sd = transforms.factor_uncertainty(model)[0]
low, middle, high = (np.exp(mean + z * sd) for z in (-1.645, 0, 1.645))
reconstruction = np.zeros(64)
reconstruction[inked] = model.inverse_transform(factors[:1])[0]

figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), width_ratios=(1, 1, 2.2), layout="constrained")
highest = images.data[0].max()
axes[2].errorbar(range(10), middle, (middle - low, high - middle), fmt="o", capsize=3)
axes[2].set(xlabel="component", ylabel="factor exp F", yscale="log", xticks=range(10))
for ax, pixels, title in zip(
    axes, (images.data[0], reconstruction), ("counts", "expected counts"), strict=False
):
    ax.imshow(pixels.reshape(8, 8), vmin=0, vmax=highest)
    ax.set_title(title)
    ax.set_axis_off()

# %% [markdown]
# New samples get factors from the fitted loadings; `score` is a bound on their mean
# log-likelihood, the number to compare on samples that were held out.

# %%
print(model.transform(X[:2]).round(2))
print(f"{model.score(X[:200]):.1f} nats per sample")

# %% [markdown]
# ## Change the model
#
# The model is a few lines of Pyro. [Change the model](07_modify_the_model.ipynb) exchanges the
# likelihood, adds a covariate and writes another prior.
