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
# # Change the model
#
# The model is a Pyro program of a few lines. A subclass overrides its likelihood, or the prior
# writes another `model` for the factors; `fit_model` trains what comes out, and so does Pyro's own
# SVI. Three changes, each on data simulated from it: a likelihood with overdispersion, the effect
# of a covariate, and a prior that knows of conditions. The page
# [The model as a Pyro program](../pyro.md) has more.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import nn

from pnmf_pyro import deviance, fit_model, match_factors, transforms
from pnmf_pyro.analysis.hold_out import thin_counts
from pnmf_pyro.data import take
from pnmf_pyro.models import ALL, FactorizationELBO, PoissonFactorization
from pnmf_pyro.priors import GaussianPrior

small = bool(os.environ.get("PNMF_SMALL"))  # fewer samples and steps, for continuous integration
steps = 300 if small else 1000
random = np.random.default_rng(0)

# %% [markdown]
# ## A likelihood: counts that vary more than a Poisson
#
# Counts from a negative binomial with dispersion 2: the variance is $\mu + \mu^2 / 2$.

# %%
N, D, L = (100, 40, 3) if small else (300, 60, 3)
F = random.normal(size=(N, L))
rate = np.exp(F) @ random.gamma(0.5, 8.0, size=(L, D))
X = random.negative_binomial(2, 2 / (2 + rate))

# %% [markdown]
# `likelihood` returns the distribution of the counts given F, for the samples and features of a
# batch. The Poisson that `PoissonFactorization` has there knows its mean, which is all that the
# other likelihood needs. The dispersion is a `pyro.param`, and is learned with the rest.


# %%
class NegativeBinomialFactorization(PoissonFactorization):
    def likelihood(self, F, batch=ALL):
        mean, r = super().likelihood(F, batch).mean, pyro.param("log_r", torch.tensor(0.0)).exp()
        return dist.GammaPoisson(r, r / mean).to_event(1)


# %% [markdown]
# The objective sees that it has no closed form for this likelihood, averages it over draws, and
# says so in the log. The shape is all that a model is told of the data before it is trained, so a
# tensor without memory will do. A fit has a parameter store of its own, which is that inside
# `model.apart()`.

# %%
y = torch.empty(D, N, device="meta")
fits = {}
for kind in (PoissonFactorization, NegativeBinomialFactorization):
    model = kind(GaussianPrior(y, L), y, L)
    result = fit_model(model, X, max_iter=steps)
    fits[kind.__name__] = model
    print(f"{result.elbo:10.0f} nats  {kind.__name__}")
with model.apart():
    print(f"dispersion {pyro.param('log_r').detach().exp():.2f}, 2 in the simulation")

# %% [markdown]
# The bounds are on one scale, constants included, so the difference says how much better these
# counts are described. What is it good for? The Poisson takes the extra variance for structure, and
# is far too sure of its factors. On the left the variance of tables that each fit makes, on the
# right how often a central interval of a log-factor holds the true one.

# %%
from pnmf_pyro.analysis.replicates import replicated_counts


def coverage(model, levels):
    """Share of true log-factors, up to the level of a component, within central intervals."""
    found = transforms.log_factors(model)
    order = match_factors(np.exp(F), np.exp(found)).permutation
    away = (found - found.mean(0))[:, order] - (F - F.mean(0))
    z = np.abs(away) / transforms.factor_uncertainty(model)[:, order]
    probability = 2 * dist.Normal(0, 1).cdf(torch.from_numpy(z)).numpy() - 1
    return [(probability < level).mean() for level in levels]


levels = np.linspace(0.1, 0.95, 18)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(X.mean(0), X.var(0), "k.", label="data")
for color, (name, model) in zip(("C1", "C0"), fits.items(), strict=True):
    tables = np.stack(list(replicated_counts(model, 20, random_state=0)))
    variance = tables.var(1).mean(0)
    left.plot(tables.mean((0, 1)), variance, "o", mfc="none", color=color, label=name)
    right.plot(levels, coverage(model, levels), color=color, label=name)
left.legend(fontsize=8)
left.set(xscale="log", yscale="log", xlabel="mean of a feature", ylabel="variance")
right.axline((0, 0), slope=1, color="0.6", lw=1, zorder=0)
right.set(xlabel="level of the interval", ylabel="holds the true log-factor")

# %% [markdown]
# A posterior predictive check takes these models as it takes any other, and says in numbers what
# the left panel shows.

# %%
from pnmf_pyro import posterior_predictive_check

for name, model in fits.items():
    check = posterior_predictive_check(
        model, X, statistics=["variance_to_mean"], n_draws=100, random_state=0
    )
    print(f"{name}\n{check.verdict()}\n")

# %% [markdown]
# Nothing here is bound to `fit_model`. Programs and objective are Pyro's, and so may be the
# training: the parameters are then in the parameter store of the session.

# %%
torch.manual_seed(0)
model = NegativeBinomialFactorization(GaussianPrior(y, L), y, L, random_state=0)
svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.05}), FactorizationELBO())
losses = [svi.step(X) for _ in range(steps)]
print(f"{-np.mean(losses[-50:]):10.0f} nats by plain SVI, from a random start")
print(f"dispersion {pyro.param('log_r').detach().exp():.2f}")

# %% [markdown]
# ## A covariate: two laboratories
#
# Half of the samples come from a second laboratory, which sees some features more and others less
# than the first:
#
# $$X_{ij} \sim \operatorname{Poisson}\Bigl(
# s_i \sum_l W_{jl} e^{F_{il}} \cdot e^{z_i^\top B_{\cdot j}}\Bigr).$$

# %%
N, D, L = (120, 40, 3) if small else (400, 100, 3)
z = (random.random((N, 1)) < 0.5).astype(np.float32)
z -= z.mean(0)  # so that W is the middle of both
B = random.normal(0, 0.8, size=(1, D))
F = random.normal(size=(N, L))
rate = np.exp(F) @ random.gamma(0.5, 4.0, size=(L, D)) * np.exp(z @ B)
train, test = thin_counts(random.poisson(rate), 0.5, np.random.RandomState(0))

# %% [markdown]
# Counts are thinned: each event goes to the training or to the test table, so a fit to the one can
# be judged by the deviance of the other. `take` selects what belongs to a batch, so the same
# program trains on minibatches. The fit starts at random, since a decomposition of the counts would
# already put the laboratories into the factors.


# %%
class CovariateFactorization(PoissonFactorization):
    """Rates times exp(z_i^T B_j): covariates z of shape (N, p), effects B of shape (p, D)."""

    def __init__(self, *args, covariates, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("z", torch.as_tensor(covariates))
        self.B = nn.Parameter(torch.zeros(self.z.shape[1], self.D))

    def likelihood(self, F, batch=ALL):
        effect = take(self.z, batch.samples, dim=0) @ take(self.B, batch.features)
        return dist.Poisson(super().likelihood(F, batch).mean * effect.exp()).to_event(1)


# %%
def expected_counts(model):
    """Posterior mean of the rates, which are linear in exp F: those at E exp F."""
    F = transforms.get_factors(model, return_tensor=True).log().T
    return model.likelihood(F).mean.detach().numpy()


def train_and_judge(model, train, test, **options):
    result = fit_model(model, train, max_iter=steps, **options)
    judged = deviance(test, expected_counts(model))
    names = f"{type(model).__name__}, {type(model.prior).__name__}"
    print(f"{result.elbo:10.0f} nats, held-out deviance {judged:.3f}  {names}")


y = torch.empty(D, N, device="meta")
plain = PoissonFactorization(GaussianPrior(y, L), y, L)
adjusted = CovariateFactorization(GaussianPrior(y, L), y, L, covariates=z)
for model in (plain, adjusted):
    train_and_judge(model, train, test, init="random")
print(f"{'':17}held-out deviance {deviance(test, rate / 2):.3f} of the true rates")

# %% [markdown]
# The effects are found. Without them the factors have to tell the laboratories apart, and are worth
# less for anything else: the first log-factor and its estimates, one point for each sample, and
# above them the correlations of all three.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
found = adjusted.B.detach().numpy()[0]
axes[0].plot(B[0], found, "k.")
axes[0].axline((0, 0), slope=1, color="0.6", lw=1, zorder=0)
axes[0].set(xlabel="true effect", ylabel="learned effect", title="effects B")
for ax, model, title in zip(axes[1:], (plain, adjusted), ("without", "with B"), strict=True):
    order = match_factors(np.exp(F), transforms.get_factors(model)).permutation
    estimates = transforms.log_factors(model)[:, order]
    r = [np.corrcoef(F[:, l], estimates[:, l])[0, 1] for l in range(L)]
    for lab, name in ((z[:, 0] < 0, "first laboratory"), (z[:, 0] > 0, "second")):
        ax.plot(F[lab, 0], estimates[lab, 0], ".", label=name)
    correlations = ", ".join(f"{one:.2f}" for one in r)
    ax.set(xlabel="true log-factor", ylabel="estimate", title=f"{title}: r = {correlations}")
    ax.legend(fontsize=8)

# %% [markdown]
# One thing the data cannot tell: an effect common to all features could as well be a shift of all
# log-factors of that laboratory. Only the prior, which is centred at 0 for both, decides, so read
# differences between features, or give size factors.
#
# ## A prior: samples of several conditions
#
# Which components differ between conditions? Comparing averages of fitted log-factors
# underestimates it, because the prior has pulled every sample towards one common mean. A prior that
# knows the conditions has a latent level for each,
#
# $$F_{il} \sim N(m_{c(i)\,l}, \sigma_p^2), \qquad m_{cl} \sim N(0, 1),$$
#
# with a posterior of its own.


# %%
class ConditionPrior(GaussianPrior):
    """F_il ~ N(level of the sample's condition, scale_pf^2), with levels that are latent too."""

    def __init__(self, y, L, condition):
        super().__init__(y, L)
        self.register_buffer("condition", torch.as_tensor(condition))
        levels = torch.zeros(L, int(self.condition.max()) + 1)
        self.level_mean = nn.Parameter(levels)
        self.level_log_sd = nn.Parameter(levels - 2)

    def model(self, batch, samples):
        standard = dist.Normal(torch.zeros_like(self.level_mean), 1.0).to_event(2)
        level = pyro.sample("level", standard)
        mean = take(level, take(self.condition, batch.samples))
        with self.local_plates(batch, samples):
            return pyro.sample("F", dist.Normal(mean, self.scale_pf))

    def guide(self, batch, samples):
        q = dist.Normal(self.level_mean, self.level_log_sd.exp()).to_event(2)
        pyro.sample("level", q)
        return super().guide(batch, samples)


# %% [markdown]
# q(F) is that of `GaussianPrior`, and both divergences have a closed form given a draw of the
# levels, which the objective finds by itself. With other one-line priors, such as
# `dist.StudentT(4.0, 0.0, self.scale_pf)` for outlying samples, it averages over draws.

# %%
N, D, L, n_conditions = (150, 40, 3, 4) if small else (400, 60, 4, 5)
condition = random.integers(n_conditions, size=N)
levels = random.normal(size=(n_conditions, L))
F = levels[condition] + random.normal(size=(N, L))
W = random.gamma(0.5, 0.5, size=(D, L))
train, test = thin_counts(random.poisson(np.exp(F) @ W.T), 0.5, np.random.RandomState(0))

y = torch.empty(D, N, device="meta")
plain = PoissonFactorization(GaussianPrior(y, L), y, L)
prior = ConditionPrior(y, L, condition)
model = PoissonFactorization(prior, y, L)
for one in (plain, model):
    train_and_judge(one, train, test)

# %% [markdown]
# Levels of conditions against the mean of all conditions, true and estimated; bars are two standard
# deviations of the posterior. They are somewhat too short: q takes levels, log-factors and loadings
# for independent of each other.

# %%
order = match_factors(W, plain).permutation
log_factors = transforms.log_factors(plain)[:, order]
averages = np.stack([log_factors[condition == c].mean(0) for c in range(n_conditions)])
order = match_factors(W, model).permutation
posterior = prior.level_mean.detach().numpy().T[:, order]
sd = prior.level_log_sd.exp().detach().numpy().T[:, order]

truth = levels - levels.mean(0)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), sharey=True, layout="constrained")
for ax, estimate, bars, title in (
    (axes[0], averages, None, "averages of a plain fit"),
    (axes[1], posterior, 2 * sd.ravel(), "levels of the prior"),
):
    contrast = estimate - estimate.mean(0)
    ax.errorbar(truth.ravel(), contrast.ravel(), bars, fmt="o", ms=4)
    ax.axline((0, 0), slope=1, color="0.6", lw=1, zorder=0)
    error = np.sqrt(np.mean((contrast - truth) ** 2))
    ax.set(xlabel="true level", ylabel="estimated level", title=f"{title}, error {error:.2f}")
