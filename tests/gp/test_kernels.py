"""Kernels and their multi-group forms against their formulas."""

import numpy as np
import pyro
import pytest
import torch

from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.correlation import KERNELS
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import check_group_distances
from tests.support import dense_fields
from tests.support.svgp import TIGHT, as_numpy, scattered


def test_of_several_kernels_one_is_meant():
    names, a = ("Matern32", "RBF"), scattered(5)
    several, other = SpatialKernel(names, 0.7), SpatialKernel(names, 0.7)
    for number in (0, 1, 0):
        several.choose(number)
        name = names[number]
        assert several.name == several.select(0).name == name
        assert torch.equal(several(a, a), SpatialKernel(name, 0.7)(a, a))
        other.load_state_dict(several.state_dict())
        assert other.name == name
    assert "chosen" not in SpatialKernel("RBF").state_dict()
    with pytest.raises(ValueError, match="kernel must be one of"):
        SpatialKernel(("Matern32", "cubic"))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_kernel_is_its_formula(name, p):
    a, b = scattered(5, p), scattered(4, p, seed=1)
    b.coordinates[1] = a.coordinates[2]
    found = SpatialKernel(name, 0.7, 1.5, nugget=0.4)(a, b)
    expected = dense_fields.covariance(name, as_numpy(a)[0], as_numpy(b)[0], 0.7, 1.5, nugget=0.4)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_multi_group_kernel_is_its_formula_and_a_covariance(name):
    places = scattered(14, groups=3)
    d = np.array([[0, 1, 2.0], [1, 0, 1.5], [2, 1.5, 0]])
    kernel = SpatialKernel(name, 0.7, 1.5, nugget=0.4, group_diff_param=2.5, group_distances=d)
    places.coordinates[1] = places.coordinates[0]
    x, g = as_numpy(places)
    expected = dense_fields.covariance(name, x, x, 0.7, 1.5, g, g, 2.5, d, nugget=0.4)
    found = kernel(places, places)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.linalg.eigvalsh(found)[0] > -1e-8


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_kernel_of_pairs_is_its_formula_and_a_covariance(name, p):
    """1 / v = 1 + a d^2 + a2 d2^2: one construction over points in the product of both spaces."""
    places, of = scattered(40, p, groups=6), np.array([[0, 1, 2.0], [1, 0, 1.5], [2, 1.5, 0]])
    apart = {"group_distances": 1 - np.eye(2), "group_distances_2": of}
    kernel = SpatialKernel(name, 0.7, 1.5, nugget=0.4, **apart)
    kernel.group_diff_param.fill_(2.5)
    kernel.group_diff_param_2.fill_(0.8)
    places.coordinates[1] = places.coordinates[0]
    x, g = as_numpy(places)
    square = np.array(
        [
            [2.5 * (s != u) + 0.8 * of[t, w] ** 2 for u in (0, 1) for w in range(3)]
            for s in (0, 1)
            for t in range(3)
        ]
    )
    expected = dense_fields.covariance(name, x, x, 0.7, 1.5, g, g, 1.0, np.sqrt(square), nugget=0.4)
    found = kernel(places, places)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.linalg.eigvalsh(found)[0] > -1e-8


def test_pairs_that_differ_in_one_part_alone_are_groups_of_that_part():
    places = scattered(12, groups=3)
    one = SpatialKernel("Matern32", 0.7, group_diff_param=0.4, group_distances=1 - np.eye(3))
    here = {"group_diff_param": 0.4, "group_distances": 1 - np.eye(2)}
    two = SpatialKernel("Matern32", 0.7, group_distances_2=1 - np.eye(3), **here)
    second = Places(places.coordinates, places.groups + 3)  # all of the second first part
    torch.testing.assert_close(two(second, second), one(places, places))
    first = Places(places.coordinates, 3 * (places.groups > 0))
    grouped = Places(places.coordinates, (places.groups > 0).long())
    one = SpatialKernel("Matern32", 0.7, **here)
    torch.testing.assert_close(two(first, first), one(grouped, grouped))


def test_limits_of_the_group_difference():
    places = scattered(10, groups=2)
    plain = SpatialKernel("Matern52", 0.7, 1.5)(places, places)[0]
    same = places.groups[:, None] == places.groups
    for a, expected in ((0.0, plain), (1e12, plain * same)):
        kernel = SpatialKernel(
            "Matern52", 0.7, 1.5, group_diff_param=a, group_distances=1 - np.eye(2)
        )
        np.testing.assert_allclose(kernel(places, places)[0], expected, atol=1e-6)
    one = Places(places.coordinates, torch.zeros(10, dtype=torch.int64))
    kernel = SpatialKernel("Matern52", 0.7, 1.5, group_distances=np.zeros((1, 1)))
    np.testing.assert_allclose(kernel(one, one)[0], plain, **TIGHT)


def test_kernels_leave_the_parameter_store_alone():
    store = pyro.get_param_store()
    before = dict(store.items())
    with pyro.poutine.trace() as trace:
        SpatialKernel()(scattered(3), scattered(3))
    assert dict(store.items()) == before
    assert not trace.trace.nodes


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.zeros((3, 3)), "shape"),
        (np.array([[0, 1.0], [2, 0]]), "symmetric"),
        (np.array([[0, np.nan], [np.nan, 0]]), "finite"),
    ],
)
def test_group_distances_are_checked(distances, message):
    with pytest.raises(ValueError, match=f"group_distances.*{message}"):
        check_group_distances(distances, 2)


def test_group_distances_must_be_euclidean():
    with pytest.raises(ValueError, match="Euclidean"):
        check_group_distances([[0, 1, 5.0], [1, 0, 1], [5.0, 1, 0]], 3)
