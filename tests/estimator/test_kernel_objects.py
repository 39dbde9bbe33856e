"""Kernels of Pyro and of one's own where the estimator takes names."""

import json
import logging
import pickle

import numpy as np
import pyro
import pytest
import torch
from pyro.contrib.gp.kernels import RBF, Exponential, Matern32, Periodic, Product, Sum
from sklearn.base import clone

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.anndata_bridge import settings
from pnmf_pyro.estimator.stages import LearnHyperparameters, Settle, WarmUp
from pnmf_pyro.gp.multi_group import MultiGroupKernel
from pnmf_pyro.transforms import get_factors
from tests.support.data import tissue
from tests.support.kernels import PlainMatern32, Wendland
from tests.support.settings import LOCAL, STEPS, fitted_in_space, unconverged

pytestmark = unconverged

HALF = torch.tensor(0.5, dtype=torch.float64)
LEARNING = {"train_lengthscale": True, "learn": ("sigma", "nugget"), "max_iter": 40}
PRIORS = {"SVGP": STEPS, "LCGP": LOCAL}


@pytest.fixture(scope="module")
def data():
    return tissue(groups=2)


@pytest.fixture(scope="module", params=PRIORS)
def named(request, data):
    """A fit with Matern32 by name that learns its hyperparameters, and its settings."""
    how = {**PRIORS[request.param], **LEARNING}
    return fitted_in_space(data, **how), how


@pytest.mark.parametrize(
    "kernel",
    [
        Matern32(2),
        PlainMatern32(2),
        Sum(Matern32(2, HALF), Product(PlainMatern32(2), 0.5)),
        Product(Sum(Matern32(2, HALF), Matern32(2, HALF)), 1.0),
    ],
)
def test_a_kernel_object_is_what_its_formula_is(kernel, named, data):
    """Matern32 as an object, of one's own, and as a sum and a product."""
    model, how = named
    found = fitted_in_space(data, **{**how, "kernel": kernel})
    assert found.kernel_ == type(kernel).__name__
    assert found.elbo_ == pytest.approx(model.elbo_, rel=1e-6)
    np.testing.assert_allclose(get_factors(found), get_factors(model), rtol=1e-3)
    new = data[1][:7] + 0.02
    there = (fit.transform(None, coordinates=new) for fit in (found, model))
    np.testing.assert_allclose(*there, rtol=1e-3)


@pytest.mark.parametrize("local", [False, True])
def test_the_recommended_fit_takes_a_kernel_of_ones_own(data, local, caplog):
    """It reaches as high a bound as one with a kernel of the package that is alike."""
    X, x, *_ = data
    with caplog.at_level(logging.INFO, logger="pnmf_pyro"):
        own = pnmf_pyro.fit(X, x, n_components=2, kernel=Wendland(2), local=local, max_iter=100)
    assert "kernel Wendland: a function of coordinates divided by the lengthscale" in caplog.text
    assert "hyperparameters of its own stay as they are given" in caplog.text
    named = pnmf_pyro.fit(X, x, n_components=2, kernel="Matern52", local=local, max_iter=100)
    assert own.kernel_ == "Wendland"
    assert own.elbo_ == pytest.approx(named.elbo_, rel=0.01)
    longer = own.model_.prior.kernel.lengthscale / named.model_.prior.kernel.lengthscale
    assert (longer > 1.5).all()  # where it is zero, the other is not yet small


def test_a_kernel_stays_as_it_is_and_the_store_too(data):
    kernel = Sum(RBF(2, lengthscale=torch.tensor(0.5)), Periodic(2))
    before = {name: value.clone() for name, value in kernel.named_parameters()}
    stored = set(pyro.get_param_store())
    fit = fitted_in_space(data, kernel=kernel)
    assert fit.kernel is kernel
    assert all(torch.equal(value, before[name]) for name, value in kernel.named_parameters())
    assert all(value.requires_grad and value.grad is None for value in kernel.parameters())
    assert set(pyro.get_param_store()) == stored
    assert not [name for name in fit.model_.state_dict() if "correlation" in name]


def test_kernels_of_several_kinds_are_chosen_by_prediction(data):
    """Of two kernels of one class as well."""
    far = Matern32(2, lengthscale=torch.tensor(1e3))
    kernels = (far, "Matern12", Matern32(2))
    stages = [WarmUp(), LearnHyperparameters(), Settle()]
    fit = fitted_in_space(tissue(N=150), kernel=kernels, stages=stages, max_iter=80)
    assert fit.kernel_ == "Matern32"
    assert int(fit.model_.prior.kernel.chosen) == 2


def test_an_estimator_with_a_kernel_is_cloned_and_pickled(data):
    model = PNMF(2, kernel=(RBF(2), "Matern32"), **STEPS)
    again = clone(model)
    assert again.kernel[0] is not model.kernel[0]
    assert isinstance(again.get_params()["kernel"][0], RBF)
    assert "RBF()" in repr(model)
    fits = [one.fit(data[0], coordinates=data[1]) for one in (model, again)]
    np.testing.assert_array_equal(get_factors(fits[0]), get_factors(fits[1]))
    loaded = pickle.loads(pickle.dumps(fits[0]))
    new = data[1][:5] + 0.01
    np.testing.assert_array_equal(loaded.transform(None, new), fits[0].transform(None, new))


def test_what_is_written_beside_a_fit_is_plain(data):
    written = settings(fitted_in_space(data, kernel=Product(RBF(2), Exponential(2))))
    assert written["kernel"] == "Product"
    assert "Product" in json.dumps(written["parameters"]["kernel"])


@pytest.mark.parametrize("kernel", [RBF(2), ("Matern32", RBF(2))])
def test_a_kernel_object_is_not_saved(data, kernel, tmp_path):
    fit = fitted_in_space(data, kernel=kernel)
    with pytest.raises(ValueError, match=r"kernel=.*RBF.* cannot be saved: it is an object"):
        fit.save(tmp_path / "model.npz")
    assert not list(tmp_path.iterdir())


def test_a_multi_group_kernel_brings_its_groups(data):
    """A distance of 2 with a = 2 is one of 1 with a = 8, which is how a fit by names has it."""
    X, x, labels, *_ = data
    d = [[0, 2], [2, 0]]
    kernel = MultiGroupKernel(Matern32(2), d, group_diff_param=2.0)
    fit = PNMF(2, multigroup=True, kernel=kernel, **STEPS).fit(X, None, x, labels)
    same = PNMF(2, multigroup=True, group_diff_param=8.0, **STEPS)
    same.fit(X, None, x, labels)
    np.testing.assert_allclose(get_factors(fit), get_factors(same), rtol=1e-9)
    with pytest.raises(ValueError, match="kernel is one over groups, and multigroup=False"):
        fitted_in_space(data, kernel=kernel)


@pytest.mark.parametrize(
    ("kernel", "settings", "message"),
    [
        (lambda x, z: x @ z.T, {}, "kernel"),
        (RBF, {}, "kernel"),
        (("Matern32", 3), {}, "kernel must be one of"),
        (RBF(3), {}, "kernel RBF must act on columns of the coordinates"),
        (Periodic(2), {"multigroup": True}, "kernel must be a function of distance alone"),
    ],
)
def test_kernels_that_cannot_be_used_are_refused(data, kernel, settings, message):
    X, x, labels, *_ = data
    groups = labels if settings else None
    with pytest.raises(ValueError, match=message):
        PNMF(2, kernel=kernel, **settings, **STEPS).fit(X, coordinates=x, groups=groups)
