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
# # A posterior predictive check finds a misfit, and one argument mends it
#
# Two tables with the same expected counts are fitted: one is Poisson, as the model says, the other
# negative binomial and so more variable. A posterior predictive check tells them apart, and says
# which argument of `fit` mends the second.

# %%
import os

import numpy as np

import pnmf_pyro
from pnmf_pyro import plotting

small = bool(os.environ.get("PNMF_SMALL"))  # fewer samples and draws, for continuous integration
N, D, L = (60, 20, 3) if small else (200, 60, 3)
n_draws = 120 if small else 200

random = np.random.default_rng(0)
rate = np.exp(random.normal(size=(N, L))) @ random.gamma(0.3, 5.0, size=(L, D)) + 0.05
tables = {
    "Poisson": random.poisson(rate),
    "negative binomial": random.negative_binomial(1, 1 / (1 + rate)),
}
fits = {name: pnmf_pyro.fit(X, n_components=L) for name, X in tables.items()}

# %% [markdown]
# ## The verdicts
#
# A check draws factors from their posterior, counts from these, and compares statistics of the
# replicated tables with those of the data.

# %%
checks = {
    name: pnmf_pyro.posterior_predictive_check(fits[name], X, n_draws=n_draws, random_state=0)
    for name, X in tables.items()
}
for name, check in checks.items():
    print(f"{name}\n{check.verdict()}\n")

# %% [markdown]
# Totals have p = 1 for both: every fit reproduces them, so they say nothing. The p-values of the
# other statistics are conservative, since the data served to fit as well as to check; the misfit is
# far beyond that.

# %%
checks["negative binomial"].table().round(3)

# %% [markdown]
# ## One argument
#
# The verdict names it: `likelihood="negative-binomial"`. All else stays as it was.

# %%
mended = pnmf_pyro.fit(tables["negative binomial"], n_components=L, likelihood="negative-binomial")
checks["mended"] = pnmf_pyro.posterior_predictive_check(
    mended, tables["negative binomial"], n_draws=n_draws, random_state=0
)
print(checks["mended"].verdict())
assert not checks["mended"].flagged

# %% [markdown]
# The counts were drawn with a dispersion of 1. What the fit has learned:

# %%
np.quantile(mended.dispersion_, [0.1, 0.5, 0.9]).round(2)

# %% [markdown]
# ## Pictures
#
# Each point is a feature, a sample or a pair of features. On the line the model is right: for the
# Poisson fit of the table that varies more it is not, and with the argument it is.

# %%
axes = plotting.plot_predictive_check(checks["negative binomial"])
# %%
axes = plotting.plot_predictive_check(checks["mended"])

# %% [markdown]
# ## A statistic of one's own
#
# Any function of a table will do. How many features does a typical sample show?


# %%
def features_of_a_sample(table):
    return (table > 0).sum(axis=1)


check = pnmf_pyro.posterior_predictive_check(
    fits["negative binomial"],
    tables["negative binomial"],
    statistics=features_of_a_sample,
    n_draws=n_draws,
    random_state=0,
)
print(check.verdict())
