"""Priors with any kernel of Pyro, and to and from its sparse Gaussian processes."""

import numpy as np
import pyro
import pytest
import torch
from pyro.contrib.gp.kernels import RBF, Exponential, Linear, Matern32, Matern52, Periodic, Sum
from pyro.contrib.gp.likelihoods import Gaussian
from pyro.contrib.gp.models import VariationalSparseGP
from pyro.contrib.gp.util import train

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel
from pnmf_pyro.priors import LCGP, SVGP
from pnmf_pyro.priors.pyro_gp import from_pyro, to_pyro
from tests.support import dense_fields
from tests.support.kernels import periodic
from tests.support.svgp import as_numpy, assigned, observations, scattered

EXACT = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture(autouse=True)
def own_store():
    """A parameter store for each test."""
    with pyro.get_param_store().scope():
        yield


def number(value):
    return torch.tensor(value, dtype=torch.float64)


# --- any kernel


def waves_and_slope(x, z):
    """Sum of a periodic kernel and a linear one, the variance of which is different everywhere."""
    return periodic(x, z, 1.0, 2.5) + 0.5 * x @ z.T


def waving():
    """The places, the kernel of two sets of hyperparameters, and dense covariances of each."""
    kernel = Sum(Periodic(2, period=number(2.5)), Linear(2, variance=number(0.5)))
    places, new = scattered(14), scattered(6, seed=3)
    spatial = SpatialKernel(kernel, 0.9, 1.3, n_sets=2, nugget=0.2)
    spatial.lengthscale[1] = 1.2
    x, z = as_numpy(places)[0], as_numpy(new)[0]
    blocks = []
    for lengthscale in (0.9, 1.2):
        pairs = ((a / lengthscale, b / lengthscale) for a, b in ((x, x), (x, z), (z, z)))
        K, K_star, K_new = (1.3**2 * waves_and_slope(*pair) for pair in pairs)
        blocks.append((K + 0.2**2 * np.eye(14), K_star, K_new + 0.2**2 * np.eye(6)))
    return places, new, spatial, blocks


def test_inducing_points_with_a_kernel_of_inputs_are_the_exact_gp():
    places, new, kernel, blocks = waving()
    prior = SVGP(
        kernel, places, places, 2, jitter=1e-10, use_natural_gradients=True, dtype=torch.float64
    )
    prior.mean.copy_(number([-0.3, 0.4]))
    y, scale = observations(prior)
    prior.assign(torch.from_numpy(y), torch.from_numpy(scale))
    with torch.no_grad():
        at_samples, at_new = prior.marginal(), prior.at(new).marginal()
    for l, (K, K_star, K_new) in enumerate(blocks):
        for q, part in ((at_samples, (K, K, K)), (at_new, (K, K_star, K_new))):
            args = (float(prior.mean[l]), y[l], scale[l] ** 2)
            mean, cov = dense_fields.regression(*part, *args)
            np.testing.assert_allclose(q.loc[l], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(q.variance[l], np.diag(cov), rtol=1e-5, atol=1e-6)


def test_neighbours_with_a_kernel_of_inputs_are_the_exact_gp():
    places, new, kernel, blocks = waving()
    prior = LCGP(kernel, places, 2, K=13, use_natural_gradients=True, dtype=torch.float64)
    prior.mean.copy_(number([-0.3, 0.4]))
    y, scale = observations(prior)
    prior.assign(torch.from_numpy(y), torch.from_numpy(scale))
    precision = prior.neighborhoods.factor.precision(np.stack([np.eye(14)] * 2))
    with torch.no_grad():
        m, at_new = prior.marginal().loc.numpy(), prior.at(new).marginal().loc
    for l, (K, K_star, _) in enumerate(blocks):
        np.testing.assert_allclose(np.linalg.inv(precision[l]), K, rtol=1e-6, atol=1e-8)
        for i, near in enumerate(torch.cdist(new.coordinates, places.coordinates).argsort()):
            near, level = near[:13].numpy(), float(prior.mean[l])
            weights = np.linalg.solve(K[np.ix_(near, near)], K_star[near, i])
            np.testing.assert_allclose(at_new[l, i], level + weights @ (m[l, near] - level))


@pytest.mark.parametrize("make", [lambda k, p: SVGP(k, p, p, 2), lambda k, p: LCGP(k, p, 2, K=5)])
def test_a_prior_takes_a_kernel_of_pyro_or_a_name(make):
    places = scattered(12)
    priors = [make(kernel, places) for kernel in ("RBF", RBF(2), SpatialKernel("RBF"))]
    for prior in priors:
        prior.assign(torch.ones(2, 12), torch.ones(2, 12))
    found = [prior.at(scattered(5, seed=1)).marginal().loc.detach() for prior in priors]
    assert all(torch.equal(found[0], other) for other in found[1:])


# --- to and from Pyro

KERNELS = {
    "Matern32": lambda: Matern32(2, number(1.3), number(0.7)),
    "Exponential": lambda: Exponential(2, number(1.3)),
    "sum": lambda: Sum(RBF(2), Periodic(2, period=number(4.0))),
    "linear": lambda: Sum(RBF(2), Linear(2)),
    "groups": lambda: MultiGroupKernel(Matern52(2), [[0, 1, 2], [1, 0, 1.5], [2, 1.5, 0]]),
}


def sparse_gp(kernel="Matern32", N=30, M=8, latent_shape=None, steps=40, **settings):
    """A process of Pyro, trained a little, and new inputs."""
    groups = 3 if kernel == "groups" else None
    X, new = (scattered(n, seed=seed, groups=groups).inputs for n, seed in ((N, 0), (7, 5)))
    y = (2 * X[:, 0]).sin() + X[:, 1].cos()
    if latent_shape:
        y = torch.stack([y, -y])
    gp = VariationalSparseGP(
        X,
        y,
        KERNELS[kernel]().double(),
        X[:M].clone(),
        Gaussian(number(0.1)),
        latent_shape=latent_shape,
        **settings,
    )
    train(gp, torch.optim.Adam(gp.parameters(), lr=0.02), num_steps=steps)
    return gp, new


def of_pyro(gp, new):
    with torch.no_grad():
        return gp(new)


def of_prior(prior, new):
    with torch.no_grad():
        q = prior.at(Places.of_inputs(new, prior.kernel.is_grouped)).marginal()
    return q.loc, q.variance


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_prior_from_pyro_predicts_the_same_and_so_does_the_way_back(kernel, whiten):
    gp, new = sparse_gp(kernel, whiten=whiten, jitter=1e-5, mean_function=lambda x: 0.4)
    prior = from_pyro(gp)
    assert (prior.L, prior.N, prior.M) == (1, 30, 8)
    assert prior.kernel.is_grouped is (kernel == "groups")
    loc, variance = of_pyro(gp, new)
    assert loc.std() > 0.1
    assert_same(of_prior(prior, new), (loc[None], variance[None]))
    back = to_pyro(prior)
    assert_same(of_pyro(back, new), (loc, variance))
    assert_same(of_prior(from_pyro(back), new), (loc[None], variance[None]))


def test_each_latent_function_is_a_component():
    gp, new = sparse_gp(latent_shape=torch.Size([2]))
    prior = from_pyro(gp)
    assert prior.L == 2
    assert_same(of_prior(prior, new), of_pyro(gp, new))


@pytest.mark.parametrize(
    "family",
    [
        {"natural": True, "M": 5},
        {"natural": True},
        {"natural": False, "M": 5},
        {"natural": False, "diagonal_only": True},
    ],
)
def test_a_component_in_pyro_predicts_the_same(family):
    prior, new = assigned(**{"N": 12, "jitter": 1e-6, **family}), scattered(7, seed=5)
    loc, variance = of_prior(prior, new.inputs)
    for component in range(2):
        gp = to_pyro(prior, component)
        assert_same(of_pyro(gp, new.inputs), (loc[component], variance[component]))


def test_nugget_and_groups_go_to_pyro():
    places, new = scattered(12, groups=2), scattered(7, seed=5, groups=2)
    kernel = SpatialKernel(
        "Matern32", 0.8, 1.3, n_sets=2, nugget=0.5, group_distances=1 - np.eye(2)
    )
    kernel.group_diff_param[1] = 0.3
    prior = assigned(places=places, jitter=1e-6)
    prior.kernel = kernel
    loc, variance = of_prior(prior, new.inputs)
    for component in range(2):
        gp = to_pyro(prior, component)
        assert_same(of_pyro(gp, new.inputs), (loc[component], variance[component]))
        assert float(gp.kernel.nugget.detach()) == pytest.approx(0.5)


def test_what_comes_from_a_prior_trains_in_pyro():
    gp = to_pyro(assigned(M=6, jitter=1e-6), 1, Gaussian(number(0.1)))
    gp.set_data(gp.X, gp.X.sin().sum(1))
    before = {name: value.detach().clone() for name, value in gp.named_pyro_params()}
    losses = train(gp, num_steps=30)
    assert losses[-1] < losses[0] - 1
    moved = {name for name, value in gp.named_pyro_params() if not torch.equal(value, before[name])}
    assert moved >= {"u_loc", "u_scale_tril", "Xu", "kernel.lengthscale", "kernel.sigma"}


def test_processes_from_priors_do_not_share_parameters():
    """Pyro looks parameters up by name, and would find those of the one that came first."""
    gps = [to_pyro(assigned(M=6, jitter=1e-6), component) for component in range(2)]
    first = of_pyro(gps[0], gps[0].X)
    assert not torch.equal(of_pyro(gps[1], gps[0].X)[0], first[0])
    assert torch.equal(of_pyro(gps[0], gps[0].X)[0], first[0])


def test_a_mean_that_is_not_constant_is_refused():
    gp, _ = sparse_gp(steps=0, mean_function=lambda X: X[:, 0])
    with pytest.raises(ValueError, match="gp must have a constant mean_function"):
        from_pyro(gp)
