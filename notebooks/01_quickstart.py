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
# A table of counts is factorised into a few non-negative components, each sample's factors come
# with their uncertainty, and in the last section the likelihood is exchanged for another one by
# writing a few lines of Pyro.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
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
# ## Your own likelihood
#
# Real counts often vary more than a Poisson. Here are some from a negative binomial with
# dispersion 2: the variance is $\mu + \mu^2 / 2$.

# %%
N, D, L = (100, 40, 3) if small else (400, 100, 3)
random = np.random.default_rng(0)
true_rate = np.exp(random.normal(size=(N, L))) @ random.gamma(0.5, 8.0, size=(L, D))
Y = random.negative_binomial(2, 2 / (2 + true_rate)).astype(np.float32)

# %% [markdown]
# The package's model is ten lines of Pyro, and a subclass may write others. Only the likelihood
# differs below; the prior, the guide and the training stay. The dispersion is a parameter of the
# module, learned with the rest.

# %%
from pnmf_pyro.counts import as_counts
from pnmf_pyro.data import Batch, Batches
from pnmf_pyro.elbo import FactorizationELBO
from pnmf_pyro.initialization import initialize_factors
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.optimizers import OneCycle
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.random_state import torch_generator
from pnmf_pyro.training import evaluate_elbo, train


class NegativeBinomialFactorization(PoissonFactorization):
    """X_ij ~ NegativeBinomial with mean sum_l W_jl exp F_il and a common dispersion."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_dispersion = torch.nn.Parameter(torch.tensor(0.0))

    def model(self, batch=Batch()):  # noqa: B008 - a batch cannot be changed
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        rate = F.exp().mT @ self.W.data.T
        dispersion = self.log_dispersion.exp()
        with samples:
            likelihood = dist.GammaPoisson(dispersion, dispersion / rate).to_event(1)
            observed = None if batch.counts is None else batch.counts.to_dense()
            return pyro.sample("X", likelihood, obs=observed)


# %% [markdown]
# The objective sees that it has no closed form for this likelihood and averages it over draws.

# %%
y = torch.from_numpy(Y.T)
data = Batches(as_counts(Y))
W0, exp_F0 = initialize_factors(Y, L, "nndsvda", random_state=0)
bounds = {}
for kind in (PoissonFactorization, NegativeBinomialFactorization):
    fitted = kind(GaussianPrior(y, L), y, L)
    fitted.assign(torch.from_numpy(W0), torch.from_numpy(exp_F0))
    train(
        fitted,
        data,
        FactorizationELBO("expanded", n_draws=3),
        [torch.optim.Adam(fitted.parameters(), lr=0.05)],
        torch_generator(0),
        max_iter=300 if small else 1000,
        schedules=[OneCycle()],
    )
    bounds[kind.__name__] = evaluate_elbo(
        fitted, data, FactorizationELBO("expanded", n_draws=50), torch_generator(1)
    )

for name, bound in bounds.items():
    print(f"{bound:10.0f} nats  {name}")
print(f"dispersion {float(fitted.log_dispersion.detach().exp()):.2f}, 2 in the simulation")

# %% [markdown]
# The bounds are on the same scale, constants included: the negative binomial describes these counts
# far better. `pyro.infer.Predictive(fitted.model, guide=fitted.guide)` draws replicated counts from
# it for a posterior predictive check.

# %%
with torch.random.fork_rng():
    torch.manual_seed(0)
    predictive = pyro.infer.Predictive(fitted.model, guide=fitted.guide, num_samples=20)
    replicated = predictive()["X"].reshape(20, N, D).numpy()
for name, table in (("observed", Y), ("replicated", replicated[0])):
    print(f"{name:>10}: mean {table.mean():.2f}, variance {table.var():.1f}")
