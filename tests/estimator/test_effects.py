"""Parameters without an effect are warned of, and no others."""

import warnings

import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.effects import ACTS, without_effect
from pnmf_pyro.estimator.stages import Settle
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.transforms import get_factors

NATURAL = {"training_mode": "natural", "loadings_mode": "multiplicative"}
SPACE = {"spatial": True, "num_inducing": 6}
LOCAL = {"spatial": True, "local": True, "K": 4}


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, []),
        (NATURAL, []),
        (SPACE, []),
        (LOCAL, []),
        ({"scheduler": None, **NATURAL}, []),
        ({"learning_rate": 0.5, "optimizer": "SGD", **NATURAL}, ["learning_rate", "optimizer"]),
        ({"learning_rate": 0.5, "training_mode": "natural"}, []),
        ({"min_lr": 0.1}, ["min_lr"]),
        ({"scheduler_pct_start": 0.5, "scheduler": "plateau"}, ["scheduler_pct_start"]),
        ({"E": 9, "mode": "lower-bound"}, ["E"]),
        ({"E": 9, "mode": "lower-bound", "stages": (Settle("expanded"),)}, []),
        (
            {"shuffle": False, "scale_kl_NM": False, "scale_ll_D": False, "batch_size": 3},
            ["scale_ll_D"],
        ),
        ({"local": True, "lengthscale": 3.0}, ["local", "lengthscale"]),
        ({"multigroup": True, "learn": ("sigma",)}, ["multigroup", "learn"]),
        ({**SPACE, "lengthscale": 3.0, "train_lengthscale": True}, ["lengthscale"]),
        (
            {**SPACE, "lengthscale": 3.0, "sigma": 2.0, "kernel": SpatialKernel()},
            ["lengthscale", "sigma"],
        ),
        ({**LOCAL, "num_inducing": 7, "jitter": 0.1}, ["num_inducing", "jitter"]),
        ({**SPACE, "K": 7, "neighbors": "probabilistic"}, ["K", "neighbors"]),
        (
            {**SPACE, "group_diff_param": 3.0, "inducing_allocation": "equal"},
            ["group_diff_param", "inducing_allocation"],
        ),
        ({**SPACE, "cholesky_mode": "softplus", **NATURAL}, ["cholesky_mode"]),
        ({**SPACE, "scale_pf": 3.0}, ["scale_pf"]),
        ({"tol": 0.3, "max_iter": 5}, ["tol"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict | list) else None,
)
def test_the_table_says_which_act(settings, idle):
    assert sorted(without_effect(PNMF(2, **settings))) == sorted(idle)


def test_the_table_knows_parameters_alone():
    assert set(ACTS) <= set(PNMF().get_params())


def test_a_warning_says_where_it_acts(counts):
    with pytest.warns(UserWarning, match="K=7 has no effect here: it acts where spatial=True and"):
        PNMF(2, K=7, max_iter=2).fit(counts)


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [("lengthscale", 0.05, 5.0), ("learning_rate", 1e-3, 0.5), ("K", 3, 9), ("scale_pf", 0.3, 3.0)],
)
def test_a_parameter_of_the_recipe_acts_or_is_warned_of(name, a, b):
    random = np.random.default_rng(0)
    X, places = random.poisson(3.0, (20, 6)), random.uniform(size=(20, 2))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        first, second = (
            pnmf_pyro.fit(X, places, n_components=2, max_iter=24, **{name: value})
            for value in (a, b)
        )
    acts = not np.array_equal(get_factors(first), get_factors(second))
    assert acts != any(str(one.message).startswith(f"{name}=") for one in heard)


def test_the_recipe_warns_of_nothing_by_itself():
    random = np.random.default_rng(0)
    X, places = random.poisson(3.0, (20, 6)), random.uniform(size=(20, 2))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        pnmf_pyro.fit(X, n_components=2, max_iter=24)
        for where in ((places,), (places, ["a", "b"] * 10)):
            pnmf_pyro.fit(X, *where, n_components=2, max_iter=24)
            pnmf_pyro.fit(X, *where, n_components=2, max_iter=24, local=True)
    assert not [one for one in heard if "no effect" in str(one.message)]
