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
# # Several sections
#
# Sections of one tissue are alike, but not the same. `batch_key` makes them groups: each has fields
# of its own, which are correlated with those of the others at the same place as strongly as the
# data say. A section then borrows from the others where it was measured badly or not at all. This
# is for sections in a common frame of coordinates; where they are not aligned, little is shared.

# %%
import os

import anndata
import numpy as np
import pandas as pd
from sklearn.metrics import mean_poisson_deviance

import pnmf_pyro
from pnmf_pyro import plotting, transforms

small = bool(os.environ.get("PNMF_SMALL"))  # fewer places, for continuous integration

# %% [markdown]
# ## The data
#
# Three sections in one frame of coordinates, as after alignment. Two layers are the same in all of
# them; a niche fades from the first section to the last. In a file of your own, a column of `obs`
# says which section a sample is from.

# %%
random = np.random.default_rng(1)
side = 10 if small else 15
grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 1.0
grid[:, 0] += (grid[:, 1] % 2) / 2
x = np.concatenate([grid] * 3)
section = np.repeat([0, 1, 2], len(grid))
radius = np.linalg.norm(x - (side - 0.5) / 2, axis=1) / (side / 2)
x, section, radius = (values[radius < 1.05] for values in (x, section, radius))
N = len(x)

niche = np.exp(-np.sum((x - side * np.array([0.25, 0.75])) ** 2, 1) / (2 * (0.12 * side) ** 2))
programmes = ["core", "rim", "niche"]
truth = 0.05 + np.stack(
    [
        np.exp(-((radius / 0.5) ** 2) / 2),
        np.exp(-(((radius - 1) / 0.25) ** 2) / 2),
        niche * np.array([1.0, 0.5, 0.0])[section],
    ],
    1,
)
loadings = np.kron(np.eye(3), np.ones((15, 1))) * (0.3 + random.gamma(2, 2, size=(45, 1)))
adata = anndata.AnnData(
    random.poisson(truth @ loadings.T).astype(np.float32),
    obs=pd.DataFrame(
        {"section": pd.Categorical([f"section {i + 1}" for i in section])},
        index=[f"place{i}" for i in range(N)],
    ),
    var=pd.DataFrame(index=[f"{name}-{i + 1}" for name in programmes for i in range(15)]),
    obsm={"spatial": 100 * x},
)
adata

# %% [markdown]
# ## Fit

# %%
model = pnmf_pyro.fit(adata, batch_key="section", n_components=3)
match = np.corrcoef(adata.obsm["X_pnmf"].T, truth.T)[:3, 3:]
pd.DataFrame(match, [f"component {l}" for l in range(3)], programmes).round(2)

# %% [markdown]
# One panel for each component, the sections side by side on one scale: the niche fades.

# %%
axes = plotting.plot_factors(adata, unit="µm", columns=1)

# %% [markdown]
# ## How much do the sections share?
#
# Two fields of different groups at one place are correlated by $(1 + a d^2)^{-p/2}$, with the
# distance $d = 1$ between groups, $p = 2$ coordinates and the learned $a$, `group_diff_param`: here
# $1 / (1 + a)$.

# %%
learned = adata.uns["pnmf"]["hyperparameters"]
between = 1 / (1 + np.array(learned["group_diff_param"]))
pd.DataFrame(
    {
        "programme": [programmes[m] for m in match.argmax(1)],
        "lengthscale (µm)": learned["lengthscale"],
        "correlation between sections": between,
    }
).round(2)

# %% [markdown]
# ## A section with a hole
#
# Suppose that the left half of section 2 was lost. A fit of all that is left predicts it, from the
# rest of the section and from what the others have there. Beside it, a fit of section 2 alone.

# %%
lost = ((section == 1) & (x[:, 0] < side / 2)).astype(bool)
kept, missing = adata[~lost].copy(), adata[lost]
together = pnmf_pyro.fit(kept, batch_key="section", n_components=3)
alone_data = kept[kept.obs["section"] == "section 2"].copy()
alone = pnmf_pyro.fit(alone_data, n_components=3)

places, labels = missing.obsm["spatial"], missing.obs["section"].to_numpy()
predictions = {
    "all sections": together.inverse_transform(together.transform(None, places, labels)),
    "section 2 alone": alone.inverse_transform(alone.transform(None, places)),
    "gene means": np.broadcast_to(kept.X.mean(0), missing.shape),
}
for name, mean in predictions.items():
    deviance = mean_poisson_deviance(missing.X.ravel(), np.maximum(mean, 1e-3).ravel())
    print(f"mean Poisson deviance {deviance:.3f}  {name}")
expected = truth[lost] @ loadings.T
deviance = mean_poisson_deviance(missing.X.ravel(), expected.ravel())
print(f"mean Poisson deviance {deviance:.3f}  the truth")

# %% [markdown]
# The uncertainty knows of the hole: it is larger there than in the rest of the section.

# %%
everywhere = adata.obsm["spatial"], adata.obs["section"].to_numpy()
spread = transforms.factor_uncertainty(together, coordinates=everywhere[0], groups=everywhere[1])
hole = int(np.corrcoef(together.transform(None, *everywhere).T, truth.T)[:3, 3:][:, 2].argmax())
axes = plotting.plot_spatial(
    everywhere[0],
    spread[:, hole],
    everywhere[1],
    titles=["sd of the niche's log-factor, with half of section 2 lost"],
    unit="µm",
    cmap="cividis",
)
for name, where in (("in the hole", lost), ("in the rest of section 2", (section == 1) & ~lost)):
    print(f"{spread[where, hole].mean():.2f} {name}")
