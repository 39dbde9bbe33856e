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
# # Fine structure: inducing points or neighbours
#
# A field can be summarised by its values at inducing points (SVGP, `local=False`), or kept at every
# place and conditioned on its neighbours (LCGP, `local=True`). Inducing points blur what is finer
# than the distance between them, and cost the third power of their number; neighbours cost in
# proportion to the number of places. `pnmf_pyro.fit` takes an inducing point at each place up to
# 1,500 places, where nothing is lost, and neighbours beyond. Here both are forced upon one section.

# %%
import os
import time

import numpy as np
import pandas as pd
from sklearn.metrics import mean_poisson_deviance

import pnmf_pyro
from pnmf_pyro import plotting, transforms

small = bool(os.environ.get("PNMF_SMALL"))  # fewer places, for continuous integration

# %% [markdown]
# ## A section with stripes
#
# Three programmes: stripes four places wide, a broad gradient, and small islands. A tenth of the
# places is held out.

# %%
random = np.random.default_rng(0)
N = 400 if small else 1600
side = np.sqrt(N)
x = random.uniform(size=(N, 2)) * side
centres = random.uniform(size=(N // 80, 2)) * side
nearest = np.linalg.norm(x[:, None] - centres, axis=-1).min(1)
truth = 0.05 + np.stack(
    [
        (1 + np.sin(2 * np.pi * (x[:, 0] + 0.3 * x[:, 1]) / 8)) / 2,
        x[:, 1] / side,
        np.exp(-((nearest / 1.5) ** 2) / 2),
    ],
    1,
)
loadings = np.kron(np.eye(3), np.ones((20, 1))) * random.gamma(2, 1, size=(60, 1))
X = random.poisson(truth @ loadings.T)
seen = random.permutation(N) >= N // 10

# %% [markdown]
# ## Both fits
#
# The inducing points are a tenth of the places.

# %%
fits, rows = {}, []
settings = {
    "inducing points": {"local": False, "num_inducing": N // 10},
    "neighbours": {"local": True, "K": 16},
}
for name, chosen in settings.items():
    started = time.perf_counter()
    model = pnmf_pyro.fit(X[seen], x[seen], n_components=3, **chosen)
    seconds = time.perf_counter() - started
    means = model.transform(None, x[~seen]) @ model.components_
    deviance = mean_poisson_deviance(X[~seen].ravel(), means.ravel())
    factors = transforms.get_factors(model)
    match = np.corrcoef(factors.T, truth[seen].T)[:3, 3:].max(0)
    rows.append([seconds, deviance, *match])
    fits[name] = model
columns = ["seconds", "held-out deviance", "stripes", "gradient", "islands"]
pd.DataFrame(rows, fits, columns).round(3)

# %% [markdown]
# The last three columns are correlations with the truth. Held-out deviance of the truth itself:

# %%
round(mean_poisson_deviance(X[~seen].ravel(), (truth[~seen] @ loadings.T).ravel()), 3)

# %% [markdown]
# ## Maps
#
# First the truth, then what inducing points and neighbours make of it.

# %%
axes = plotting.plot_spatial(
    x[seen], truth[seen], titles=["stripes (truth)", "gradient (truth)", "islands (truth)"]
)

# %%
axes = plotting.plot_factors(fits["inducing points"])

# %%
axes = plotting.plot_factors(fits["neighbours"])

# %% [markdown]
# The gradient is coarse: inducing points lose nothing of it and average more. The stripes are as
# fine as the distance between inducing points, and are lost where none lies; neighbours keep them.
