"""Kernels of `pyro.contrib.gp` and of one's own as correlations of fields, and ours as theirs."""

import numpy as np
import pyro
import pytest
import torch
from pyro.contrib.gp import kernels as pyro_kernels
from pyro.contrib.gp.kernels import RBF, Exponential, Matern32, Matern52, Periodic, Product, Sum
from pyro.contrib.gp.likelihoods import Gaussian
from pyro.contrib.gp.models import GPRegression, VariationalSparseGP
from pyro.contrib.gp.util import train
from pyro.distributions import LogNormal
from pyro.nn import PyroSample

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import ComponentKernel, SpatialKernel, as_spatial_kernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel
from tests.support import dense_fields
from tests.support.dense_fields import kappa
from tests.support.kernels import PlainMatern32, Wendland, gaps, periodic, wendland
from tests.support.svgp import as_numpy, scattered

GROUP_DISTANCES = np.array([[0, 1, 2.0], [1, 0, 1.5], [2, 1.5, 0]])


@pytest.fixture(autouse=True)
def own_store():
    """A parameter store for each test: Pyro's models of one name share what is in it."""
    with pyro.get_param_store().scope():
        yield


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def norms(x, z):
    return np.linalg.norm(gaps(x, z), axis=-1)


def rise(X):
    return 1 + X[:, 0]


# A kernel of Pyro, its formula at coordinates x and z, and whether distance alone decides.
CASES = {
    "RBF": (
        lambda: RBF(2, number(2.0), number(0.7)),
        lambda x, z: 2 * kappa("RBF", norms(x, z) / 0.7),
        True,
    ),
    "rational": (
        lambda: pyro_kernels.RationalQuadratic(2, scale_mixture=number(1.5)),
        lambda x, z: (1 + norms(x, z) ** 2 / 3) ** -1.5,
        True,
    ),
    "sum": (
        lambda: Sum(RBF(2), Matern32(2, number(3.0), number(2.0))),
        lambda x, z: kappa("RBF", norms(x, z)) + 3 * kappa("Matern32", norms(x, z) / 2),
        True,
    ),
    "product": (
        lambda: Product(Sum(Exponential(2), 0.5), Matern52(2)),
        lambda x, z: (kappa("Matern12", norms(x, z)) + 0.5) * kappa("Matern52", norms(x, z)),
        True,
    ),
    "exponent": (
        lambda: pyro_kernels.Exponent(RBF(2)),
        lambda x, z: np.exp(kappa("RBF", norms(x, z))),
        True,
    ),
    "polynomial of a kernel": (
        lambda: pyro_kernels.Warping(RBF(2), owarping_coef=[1, 0, 2]),
        lambda x, z: 1 + 2 * kappa("RBF", norms(x, z)) ** 2,
        True,
    ),
    "own, of distance": (lambda: Wendland(2), wendland, True),
    "own": (lambda: PlainMatern32(2), lambda x, z: kappa("Matern32", norms(x, z)), False),
    "ARD": (
        lambda: RBF(2, lengthscale=number([0.5, 2.0])),
        lambda x, z: np.exp(-np.square(gaps(x, z) / [0.5, 2]).sum(-1) / 2),
        False,
    ),
    "one dimension": (
        lambda: Sum(Exponential(1, active_dims=[1]), RBF(2)),
        lambda x, z: np.exp(-np.abs(gaps(x, z)[..., 1])) + kappa("RBF", norms(x, z)),
        False,
    ),
    "periodic": (
        lambda: Periodic(2, lengthscale=number(0.8), period=number(1.7)),
        lambda x, z: periodic(x, z, 0.8, 1.7),
        False,
    ),
    "linear": (lambda: pyro_kernels.Linear(2), lambda x, z: x @ z.T, False),
    "scaled by place": (
        lambda: pyro_kernels.VerticalScaling(RBF(2), rise),
        lambda x, z: rise(x)[:, None] * kappa("RBF", norms(x, z)) * rise(z),
        False,
    ),
    "matrix of numbers": (
        lambda: pyro_kernels.Coregionalize(2, components=torch.tensor([[1.0], [2.0]])),
        lambda x, z: x @ (np.array([[1, 2], [2, 4]]) + np.eye(2) / 2) @ z.T,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_of_pyro_is_its_formula(case):
    make, formula, of_distance = CASES[case]
    kernel = SpatialKernel(make(), 0.6, 1.3, n_sets=2, nugget=0.4)
    kernel.lengthscale[1] = 0.9
    assert kernel.correlation.is_of_distance(2) is of_distance
    a, b = scattered(5), scattered(4, seed=1)
    x, z = as_numpy(a)[0], as_numpy(b)[0]
    for c, lengthscale in enumerate((0.6, 0.9)):
        within = 1.3**2 * formula(x / lengthscale, x / lengthscale) + 0.4**2 * np.eye(5)
        between = 1.3**2 * formula(x / lengthscale, z / lengthscale)
        np.testing.assert_allclose(kernel(a, a)[c], within, rtol=2e-6)
        np.testing.assert_allclose(kernel(a, b)[c], between, rtol=2e-6)
        np.testing.assert_allclose(kernel.variance(a)[c], np.diag(within), rtol=2e-6)
        np.testing.assert_allclose(kernel.select(c)(a, b)[0], between, rtol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_many_sets_of_places_at_once_are_those_one_by_one(case):
    """As of the neighbours of each place; gradients in the lengthscale too."""
    kernel = SpatialKernel(CASES[case][0](), 0.6, 1.3, nugget=0.4)
    places = scattered(6)
    sets = places[torch.tensor([[0, 1, 2, 3], [5, 2, 4, 0], [1, 3, 5, 4]])]
    others = places[torch.tensor([[5], [1], [2]])]
    found, cross = kernel(sets, sets)[0], kernel(others, sets)[0]
    for i in range(3):
        torch.testing.assert_close(found[i], kernel(sets[i], sets[i])[0])
        torch.testing.assert_close(cross[i], kernel(others[i], sets[i])[0])
    torch.testing.assert_close(
        kernel.variance(sets)[0], found.diagonal(dim1=-2, dim2=-1), rtol=2e-6, atol=0
    )

    def values(lengthscale):
        return kernel.covariance(sets, None, {**kernel.hyperparameters, "lengthscale": lengthscale})

    assert torch.autograd.gradcheck(values, number([0.6]).requires_grad_())


def test_a_kernel_of_distance_is_called_once_for_many_sets_of_places():
    kernel, places = SpatialKernel(Wendland(2), n_sets=3), scattered(40)
    before = Wendland.calls
    sets = places[torch.arange(40).reshape(10, 4)]
    kernel(sets, sets)
    assert Wendland.calls == before + 1


@pytest.mark.parametrize("name", ["Matern12", "Matern32", "Matern52", "RBF"])
def test_a_name_is_the_kernel_of_pyro(name):
    kernel = {"Matern12": Exponential}.get(name) or getattr(pyro_kernels, name)
    a, b = scattered(5), scattered(4, seed=1)
    found, expected = SpatialKernel(name, 0.7)(a, b), SpatialKernel(kernel(2), 0.7)(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_kernel_that_is_given_stays_as_it_is():
    """Also where Pyro has trained it and holds its parameters."""
    kernel = Sum(RBF(2), Periodic(2))
    x = as_numpy(scattered(8))[0]
    gp = GPRegression(torch.tensor(x, dtype=torch.float32), torch.arange(8.0), kernel)
    train(gp, num_steps=3)
    store = pyro.get_param_store()
    before = {name: value.clone() for name, value in store.items()}
    own = {name: value.clone() for name, value in kernel.named_parameters()}
    assert len(own) == 5
    with pyro.poutine.trace() as trace:
        spatial, a = SpatialKernel(kernel), scattered(5)
        first = spatial(a, a)
    assert not trace.trace.nodes
    assert not list(spatial.parameters())
    assert set(spatial.state_dict()) == {"lengthscale", "sigma", "nugget"}
    assert store.keys() == before.keys()
    assert all(torch.equal(store[name], value) for name, value in before.items())
    assert all(torch.equal(value, own[name]) for name, value in kernel.named_parameters())
    train(gp, num_steps=3)
    assert torch.equal(spatial(a, a), first)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda: RBF(3), "kernel RBF must act on columns of the coordinates, of which there are 2"),
        (lambda: pyro_kernels.Linear(1, active_dims=[2]), "kernel Linear.*acts on columns \\[2\\]"),
        (lambda: Wrong(2), "kernel Wrong must return values of shape \\(2, 2\\)"),
    ],
)
def test_a_kernel_that_does_not_suit_the_coordinates_is_refused(kernel, message):
    with pytest.raises(ValueError, match=message):
        SpatialKernel(kernel()).check(scattered(5))


class Wrong(pyro_kernels.Kernel):
    def forward(self, X, Z=None, diag=False):
        return X.sum(1)


def test_a_kernel_with_a_prior_is_refused():
    kernel = Sum(RBF(2), Periodic(2))
    kernel.kern1.period = PyroSample(LogNormal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"kernel Sum must have numbers.*\['period'\] have priors"):
        SpatialKernel(kernel)


def test_over_groups_a_kernel_must_be_one_of_distance():
    places = scattered(5, groups=2)
    kernel = SpatialKernel(("Matern32", Periodic(2)), group_distances=1 - np.eye(2))
    kernel(places, places)
    kernel.choose(1)
    for evaluate in (lambda: kernel(places, places), lambda: kernel.check(places)):
        with pytest.raises(ValueError, match=r"kernel must be a function of distance.*Periodic"):
            evaluate()
    with pytest.raises(ValueError, match=r"kernel must be a function of distance.*RBF"):
        MultiGroupKernel(RBF(2, lengthscale=torch.ones(2)), np.zeros((1, 1)))


# --- the multi-group kernel as a kernel of Pyro


def with_groups(n=30, seed=0):
    """Inputs with codes of groups in the last column, and observations that differ by group."""
    places = scattered(n, groups=3, seed=seed)
    x, g = as_numpy(places)
    y = np.sin(2 * x[:, 0]) + np.cos(x[:, 1]) + 0.3 * g
    return places.inputs, torch.from_numpy(y), x, g


def make(name="Matern52", lengthscale=0.7, sigma=1.5, a=2.5):
    kind = {"Matern12": Exponential, "Matern32": Matern32, "Matern52": Matern52, "RBF": RBF}[name]
    kern = kind(2, number(sigma**2), number(lengthscale))
    return MultiGroupKernel(kern, GROUP_DISTANCES, number(a))


def dense(kernel, x, z, gx, gz, name="Matern52"):
    """The same covariance from its definition, at the present hyperparameters."""
    a, kern = float(kernel.group_diff_param.detach()), kernel.kern
    lengthscale, sigma = float(kern.lengthscale.detach()), float(kern.variance.detach()) ** 0.5
    return dense_fields.covariance(name, x, z, lengthscale, sigma, gx, gz, a, GROUP_DISTANCES)


@pytest.mark.parametrize("name", ["Matern12", "Matern32", "Matern52", "RBF"])
def test_multi_group_kernel_is_its_formula(name):
    kernel = make(name)
    X, _, x, g = with_groups(8)
    Z, _, z, h = with_groups(6, seed=1)
    with torch.no_grad():
        np.testing.assert_allclose(kernel(X, Z), dense(kernel, x, z, g, h, name), rtol=1e-6)
        np.testing.assert_allclose(kernel(X), dense(kernel, x, x, g, g, name), rtol=2e-6)
        np.testing.assert_allclose(kernel(X, diag=True), np.full(8, 1.5**2), rtol=1e-12)
        moved = torch.cat([X[:, [2]], torch.zeros(8, 1), X[:, [1, 0]]], 1).double()
        at = MultiGroupKernel(kernel.kern, GROUP_DISTANCES, number(2.5), active_dims=[3, 2, 0])
        torch.testing.assert_close(at(moved), kernel(X))


def test_multi_group_kernel_is_that_of_a_spatial_kernel():
    X, *_ = with_groups(8)
    places = Places.of_inputs(X, grouped=True)
    spatial = SpatialKernel(
        "Matern52", 0.7, 1.5, group_diff_param=2.5, group_distances=GROUP_DISTANCES
    )
    for other in (as_spatial_kernel(make()), spatial):
        with torch.no_grad():
            torch.testing.assert_close(other(places, places)[0], make()(X))


def test_multi_group_kernel_trains_in_gp_regression():
    """Predictions are those of the regression by dense matrices, at what was learned."""
    X, y, x, g = with_groups()
    new, _, z, h = with_groups(7, seed=1)
    kernel = make()
    gp = GPRegression(X, y, kernel, noise=number(0.1))
    losses = train(gp, num_steps=60)
    assert losses[-1] < losses[0] - 1
    learned = [kernel.group_diff_param, kernel.kern.variance, kernel.kern.lengthscale]
    assert all(
        abs(float(v.detach()) - w) > 0.05 for v, w in zip(learned, (2.5, 2.25, 0.7), strict=True)
    )
    np.testing.assert_array_equal(kernel.group_distances, GROUP_DISTANCES)
    with torch.no_grad():
        loc, cov = gp(new, full_cov=True)
        noise = np.full(30, float(gp.noise) + gp.jitter)
    blocks = (dense(kernel, *pair) for pair in ((x, x, g, g), (x, z, g, h), (z, z, h, h)))
    mean, expected = dense_fields.regression(*blocks, 0.0, y.numpy(), noise)
    np.testing.assert_allclose(loc, mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(cov, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("whiten", [True, False])
def test_multi_group_kernel_trains_in_a_sparse_gp(whiten):
    X, y, _, g = with_groups()
    new, _, z, h = with_groups(7, seed=1)
    kernel, M = make(), 10
    gp = VariationalSparseGP(X, y, kernel, X[:M].clone(), Gaussian(number(0.1)), whiten=whiten)
    losses = train(gp, torch.optim.Adam(gp.parameters(), lr=0.02), num_steps=60)
    assert losses[-1] < losses[0] - 10
    moved = gp.Xu.detach() - X[:M]
    assert moved[:, :2].abs().max() > 0.05
    assert (moved[:, 2] == 0).all()  # codes of groups have no gradient
    with torch.no_grad():
        loc, variance = gp(new)
        m, S = gp.u_loc.numpy(), gp.u_scale_tril.numpy()
    u = gp.Xu.detach().numpy()[:, :2]
    K = dense(kernel, u, u, g[:M], g[:M]) + gp.jitter * np.eye(M)
    root = np.linalg.cholesky(K) if whiten else np.eye(M)
    weights = np.linalg.solve(K, dense(kernel, u, z, g[:M], h))
    spread = root @ S @ S.T @ root.T - K
    expected = dense(kernel, z, z, h, h) + weights.T @ spread @ weights
    np.testing.assert_allclose(loc, weights.T @ root @ m, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(variance, np.diag(expected), rtol=1e-5, atol=1e-7)


# --- the covariance of a component as a kernel of Pyro


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("kernels", ["Matern32", Sum(RBF(2), 0.5), Periodic(2)])
def test_component_kernel_is_the_spatial_one_and_trains(kernels, groups):
    if groups and isinstance(kernels, Periodic):
        kernels = Wendland(2)
    distances = GROUP_DISTANCES if groups else None
    spatial = SpatialKernel(kernels, 0.7, 1.2, nugget=0.3, group_distances=distances)
    kernel = ComponentKernel(spatial, dimensions=2)
    a, b = scattered(20, groups=groups), scattered(6, seed=1, groups=groups)
    with torch.no_grad():
        torch.testing.assert_close(kernel(a.inputs), spatial(a, a)[0])
        torch.testing.assert_close(kernel(a.inputs, b.inputs), spatial(a, b)[0])
        torch.testing.assert_close(kernel(a.inputs, diag=True), spatial.variance(a)[0])
    gp = GPRegression(a.inputs, a.coordinates.sin().sum(1), kernel, noise=number(0.1))
    losses = train(gp, num_steps=20)
    assert losses[-1] < losses[0]
    again = as_spatial_kernel(kernel)
    assert again.is_grouped is bool(groups)
    assert abs(float(again.lengthscale) - 0.7) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(again(a, b)[0], kernel(a.inputs, b.inputs))
