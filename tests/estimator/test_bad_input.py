"""Input that cannot be used says so, and extreme input that can gives a finite fit."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from pnmf_pyro import PNMF
from pnmf_pyro.transforms import get_factors
from tests.support.data import with_entry
from tests.support.settings import NATURAL

X = np.random.default_rng(0).poisson(3, size=(20, 8))


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_matrix, torch.as_tensor])
@pytest.mark.parametrize(
    ("entry", "message"), [(-2.0, "Negative values"), (np.nan, "NaN"), (np.inf, "infinity")]
)
def test_entries(convert, entry, message):
    with pytest.raises(ValueError, match=message):
        PNMF(3).fit(convert(with_entry(entry, X)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.empty((0, 5)), "0 sample"),
        (np.empty((5, 0)), "0 feature"),
        (np.ones(5), r"got ndarray of shape \(5,\)"),
        (np.full((4, 3), "gene"), "strings|text"),
        ("counts.csv", "array"),
        (None, "array|None"),
        (np.full((4, 3), 1j, dtype=object), "X must hold numbers"),
        (pd.DataFrame(), "a sample and a feature at least"),
        (pd.DataFrame.sparse.from_spmatrix(sp.csr_matrix((0, 0))), "a sample and a feature"),
    ],
    ids=["no samples", "no features", "vector", "words", "path", "none", "complex", "frame", "sp"],
)
def test_tables(table, message):
    with pytest.raises(ValueError, match=message):
        PNMF(2).fit(table)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("n_components", 0),
        ("n_components", "ten"),
        ("loadings_mode", "relu"),
        ("mode", "upper-bound"),
        ("training_mode", "newton"),
        ("optimizer", "LBFGS"),
        ("scheduler", "cosine"),
        ("init", "pca"),
        ("device", "tpu"),
        ("E", 0),
        ("max_iter", 0),
        ("tol", -1),
        ("learning_rate", 0),
        ("scale_pf", 1e-30),
        ("scale_pf", float("inf")),
        ("batch_size", 0),
        ("y_batch_size", 0.5),
        ("scheduler_pct_start", 2),
        ("random_state", "seed"),
        ("random_state", -1),
        ("group_diff_param", float("inf")),
    ],
)
def test_parameters(parameter, value):
    with pytest.raises(ValueError, match=parameter):
        PNMF(**{parameter: value}).fit(X)


def test_numbers_of_a_small_type_and_no_places():
    places = np.random.default_rng(0).uniform(size=(20, 2))
    settings = {"spatial": True, "num_inducing": 8, "lengthscale": 0.3, "max_iter": 5, "tol": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = PNMF(np.uint8(3), **settings).fit(X, coordinates=places)
    assert get_factors(model).shape == (20, 3)
    assert model.transform(None, places[:0]).shape == (0, 3)


def test_too_many_components_names_both_sizes():
    with pytest.raises(ValueError, match=r"n_components=21 .*n_samples=20 and n_features=8"):
        PNMF(21).fit(X)


def test_nndsvd_needs_no_more_components_than_features():
    with pytest.raises(ValueError, match=r"nndsvda.*random"):
        PNMF(9, init="nndsvda").fit(X)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_absent_device():
    with pytest.raises(ValueError, match=r"cuda.*auto"):
        PNMF(2, device="cuda").fit(X)


def test_places_need_a_spatial_model():
    with pytest.raises(ValueError, match="spatial=False"):
        PNMF(2).fit(X, coordinates=np.zeros((20, 2)))


@pytest.mark.parametrize(
    "size_factors", [np.ones(3), np.zeros(20), -np.ones(20), np.full(20, np.nan), ["a"] * 20]
)
def test_size_factors(size_factors):
    with pytest.raises(ValueError, match="size_factors"):
        PNMF(2).fit(X, size_factors=size_factors)


@pytest.mark.parametrize("use", ["transform", "score", "inverse_transform", "save"])
def test_unfitted(use, tmp_path):
    with pytest.raises(NotFittedError):
        getattr(PNMF(2), use)(tmp_path / "model.npz" if use == "save" else X)


def test_wrong_number_of_features(fitted):
    with pytest.raises(ValueError, match="25 features"):
        fitted.transform(X)
    with pytest.raises(ValueError, match=r"\(n_samples, 3\)"):
        fitted.inverse_transform(np.ones((4, 2)))


def test_empty_rows_and_columns_are_counted_and_named():
    table = X.copy()
    table[[4, 7]] = 0
    table[:, 5] = 0
    with (
        pytest.warns(UserWarning, match=r"2 of 20 samples .*: 4, 7\."),
        pytest.warns(UserWarning, match=r"1 of 8 features .*: 5\."),
    ):
        model = PNMF(2, tol=0.05, random_state=0).fit(table)
    assert np.isfinite(model.elbo_)
    assert np.isfinite(model.components_).all()
    assert np.isfinite(model.fit_transform(X)).all()


def test_fractions_are_accepted_with_one_warning():
    table = np.random.default_rng(0).random((30, 6))
    with pytest.warns(UserWarning, match="not made of counts") as caught:
        PNMF(2, tol=0.05, random_state=0).fit(table)
    assert sum("not made of counts" in str(one.message) for one in caught) == 1


def extreme_tables():
    random = np.random.default_rng(1)
    single = np.zeros((12, 9))
    single[3, 4] = 1
    rows = random.poisson(np.logspace(0, 6, 30)[:, None] * random.gamma(1.0, 1.0, (1, 12)))
    return {
        "one single count": single,
        "counts of a million": random.poisson(1e6, size=(15, 10)),
        "10 x 100,000": sp.random(10, 100_000, 0.01, "csr", random_state=0).ceil(),
        "100,000 x 10": sp.random(100_000, 10, 0.1, "csr", random_state=0).ceil(),
        "one sample": random.poisson(4, size=(1, 20)),
        "one feature": random.poisson(4, size=(20, 1)),
        "one entry": np.array([[3]]),
        "all zero": np.zeros((6, 5)),
        "rows over six orders": rows,
    }


SETTINGS = {
    "default": {"max_iter": 8},
    "softplus": {"loadings_mode": "softplus", "mode": "simple", "max_iter": 8},
    "exp": {"loadings_mode": "exp", "mode": "lower-bound", "max_iter": 8, "learning_rate": 0.1},
    "natural": {**NATURAL, "max_iter": 8},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", extreme_tables())
def test_extreme_tables_give_a_finite_fit(name, settings):
    table = extreme_tables()[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no counts at all")
        warnings.filterwarnings("ignore", message=".*did not converge", category=ConvergenceWarning)
        model = PNMF(1, random_state=0, **settings)
        factors = model.fit_transform(table)
    transformed = model.transform(table)
    for quantity in (model.elbo_, model.history_, model.components_, factors, transformed):
        assert np.isfinite(quantity).all()
    assert (model.components_ >= 0).all()
    assert (factors > 0).all()


def test_a_diverging_fit_keeps_its_last_finite_state():
    with pytest.warns(ConvergenceWarning, match=r"iteration .*not finite.*smaller learning_rate"):
        model = PNMF(2, loadings_mode="exp", learning_rate=1e4, scheduler=None, random_state=0).fit(
            X
        )
    assert np.isfinite(model.elbo_)
    assert np.isfinite(model.components_).all()
    assert bool(model.model_.prior.mean.isfinite().all())
    assert len(model.history_) == model.n_iter_ < 200
