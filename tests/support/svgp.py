"""Inducing-point fields of given observations, and their exact Gaussian processes."""

import numpy as np
import torch
from pyro import poutine

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import SVGP
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant, Decreasing
from tests.support import dense_fields

TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def scattered(n, p=2, seed=0, groups=None):
    random = np.random.default_rng(seed)
    codes = None if groups is None else torch.from_numpy(random.integers(groups, size=n))
    return Places(torch.from_numpy(random.uniform(size=(n, p)) * 3), codes)


def as_numpy(places):
    return places.coordinates.numpy(), None if places.groups is None else places.groups.numpy()


def make_prior(N=12, M=None, L=2, natural=True, dtype=torch.float64, places=None, **settings):
    places = scattered(N) if places is None else places
    inducing = places if M is None else places[torch.arange(M)]
    kernel = SpatialKernel("Matern32", 0.8, 1.3, n_sets=L)
    with torch.no_grad():
        kernel.lengthscale.copy_(torch.linspace(0.5, 1.2, L))
    settings = {"jitter": 1e-10, **settings}
    prior = SVGP(
        kernel, places, inducing, L, use_natural_gradients=natural, dtype=dtype, **settings
    )
    prior.mean.copy_(torch.linspace(-0.3, 0.4, L))
    return prior


def observations(prior, seed=1):
    random = np.random.default_rng(seed)
    shape = (prior.L, prior.N)
    return random.normal(size=shape), random.uniform(0.2, 1.5, size=shape)


def assigned(**settings):
    prior = make_prior(**settings)
    y, scale = observations(prior)
    prior.assign(torch.from_numpy(y), torch.from_numpy(scale))
    return prior


def dense_prior(prior, component, x, z):
    lengthscale, sigma = float(prior.kernel.lengthscale[component]), float(prior.kernel.sigma[0])
    return dense_fields.covariance("Matern32", x, z, lengthscale, sigma)


def factorization(prior, D=15, seed=0, **settings):
    random = np.random.default_rng(seed)
    X = random.poisson(4.0, size=(prior.N, D)).astype(np.float64)
    y = torch.empty(D, prior.N, dtype=torch.float64, device="meta")
    settings = {"loadings_mode": "multiplicative", "mode": "lower-bound", **settings}
    model = PoissonFactorization(prior, y, prior.L, random_state=0, **settings)
    return model, as_counts(X)


def trained(model, counts, objective, steps, max_iter, monotone=False):
    """Train; by natural-gradient steps that shrink where draws make them noisy."""
    noisy = objective.newton and objective.mode != "lower-bound"
    schedule = Decreasing() if noisy else Constant()
    return train(
        model,
        Batches(counts),
        objective,
        [(step, schedule) for step in steps],
        torch_generator(0),
        max_iter=max_iter,
        monotone=monotone,
        warn=False,
    )


def drawn_from(program, prior, index=None):
    """Distributions of the latent sample statements of a program of a prior, by name."""
    batch = Batch(samples=index)
    trace = poutine.trace(program).get_trace(batch, batch.plate(prior.N))
    return {name: trace.nodes[name]["fn"] for name in ("u", "F") if name in trace.nodes}


def covariance_of(q):
    """Covariance of q(u), (L, M, M), from the variances of u_i and u_i + u_j."""
    L, M = q.event_shape
    unit = torch.eye(M, dtype=torch.float64)
    sums = (unit[:, :, None] + unit[:, None, :]).reshape(1, M, M * M).expand(L, -1, -1)
    _, variance = q.marginals(sums)
    both, own = variance.reshape(L, M, M), variance.reshape(L, M, M).diagonal(dim1=1, dim2=2) / 4
    return (both - own[:, :, None] - own[:, None, :]) / 2
