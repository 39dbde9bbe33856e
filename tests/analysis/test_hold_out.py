"""What is held out, and what is judged, where entries are hidden."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import mean_poisson_deviance

import pnmf_pyro
from pnmf_pyro import select_n_components
from pnmf_pyro.analysis.hold_out import HOLD_OUT, thin_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.estimator.stages import Settle
from pnmf_pyro.transforms import get_factors
from tests.support.data import simulate

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:.*have no counts at all:UserWarning"),
]
FEW = {"max_iter": 12, "tol": 0, "scale_pf": 1.0, "stages": [Settle()], "init": None}
FAST = {"mode": "lower-bound", **FEW}


@pytest.fixture(scope="module")
def X():
    return simulate(0, 30, 12, 2)[0].astype(float)


def twin(X, seen, hold_out, number, seed, fraction, s):
    """By a loop over the entries, and scikit-learn."""
    random = np.random.RandomState(seed)
    fitted, judged = np.zeros(X.shape, bool), np.zeros(X.shape, bool)
    form, X = type(X), X.toarray() if sp.issparse(X) else X
    if hold_out == "entries":
        drawn = random.random_sample(X.shape)
        train = test = X
        for i, j in np.ndindex(X.shape):
            fitted[i, j] = seen[i, j] and drawn[i, j] < fraction
            judged[i, j] = seen[i, j] and drawn[i, j] >= fraction
        growth = 1.0
    else:
        observed = np.where(seen, X, 0)
        observed = observed if form is np.ndarray else form(observed)
        parts = thin_counts(observed, fraction, random)  # in the order in which they are stored
        train, test = (p.toarray() if sp.issparse(p) else p for p in parts)
        fitted = judged = seen
        growth = (1 - fraction) / fraction
    given = {"n_components": number, "random_state": seed, "size_factors": s, **FAST}
    model = pnmf_pyro.fit(train, mask=fitted, **given)
    mean = growth * get_factors(model).astype(float) @ model.components_
    mean = mean if s is None else mean * s[:, None]
    return mean_poisson_deviance(test[judged], mean[judged])


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hold_out", ["thinning", "entries"])
def test_held_out_deviances(X, hold_out, masked, form):
    random = np.random.default_rng(0)
    seen = random.random(X.shape) < 0.85 if masked else np.ones(X.shape, bool)
    s = random.uniform(0.5, 2, 30)
    given = {"hold_out": hold_out, "train_fraction": 0.7, "size_factors": s, "mask": seen}
    given |= {"n_seeds": 2, "random_state": 4} | FEW
    found = select_n_components(form(X), [1, 2], **given)
    for number, row in zip((1, 2), found.deviance, strict=True):
        for seed, value in zip(
            np.random.RandomState(4).randint(2**31 - 1, size=2), row, strict=True
        ):
            expected = twin(form(X), seen, hold_out, number, int(seed), 0.7, s)
            assert value == pytest.approx(expected, rel=1e-3)
    other = select_n_components(form(np.where(seen, X, 77)), [1, 2], **given)
    np.testing.assert_array_equal(found.deviance, other.deviance)


@pytest.mark.parametrize("hold_out", ["thinning", "entries"])
def test_missing_counts_are_hidden_by_a_mask(X, hold_out):
    seen = np.random.default_rng(0).random(X.shape) < 0.9
    given = {"hold_out": hold_out, "n_seeds": 2, "random_state": 0} | FEW
    missing = np.where(seen, X, np.nan)
    with pytest.raises(ValueError, match="X must be finite"):
        select_n_components(missing, [1], **given)
    one = select_n_components(missing, [1], mask=seen, **given)
    two = select_n_components(np.ma.masked_array(X, ~seen), [1], **given)
    np.testing.assert_array_equal(one.deviance, two.deviance)


def test_what_is_hidden_all_over_is_named(X):
    seen = np.ones(X.shape, bool)
    seen[:, 3] = False
    with pytest.warns(UserWarning, match="mask hides all entries of 1 features: 3"):
        found = select_n_components(X, [1, 2], mask=seen, n_seeds=2, random_state=0, **FEW)
    rest = select_n_components(np.delete(X, 3, 1), [1, 2], n_seeds=2, random_state=0, **FEW)
    assert found.deviance.shape == rest.deviance.shape
    assert np.isfinite(found.deviance).all()


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_each_entry_is_fitted_or_judged(X, form):
    seen = np.random.default_rng(0).random(X.shape) < 0.9
    parts = HOLD_OUT["entries"].split(form(X), seen, 0.8, np.random.RandomState(0))
    assert not (parts.seen & parts.judged).any()
    np.testing.assert_array_equal(parts.seen | parts.judged, seen)
    train = parts.train.toarray() if sp.issparse(parts.train) else parts.train
    np.testing.assert_array_equal(train[parts.seen], X[parts.seen])
    assert not train[parts.judged].any()
    few = parts.of_features(np.array([2, 5]))
    np.testing.assert_array_equal(few.judged, parts.judged[:, [2, 5]])
    assert few.test.shape == (30, 2)


def test_effects_scale_what_is_predicted(X):
    random = np.random.default_rng(0)
    A, W, beta = (
        random.gamma(1.0, size=(30, 2)),
        random.gamma(1.0, size=(12, 2)),
        random.normal(size=(12, 3)),
    )
    codes = random.integers(0, 3, 30)
    exposure = Exposure(
        torch.ones(30), torch.eye(3).double(), torch.from_numpy(codes), torch.from_numpy(beta)
    )
    parts = HOLD_OUT["entries"].split(X, None, 0.8, np.random.RandomState(0))
    mean = (A @ W.T) * np.exp(beta[:, codes].T)
    expected = mean_poisson_deviance(X[parts.judged], mean[parts.judged])
    assert parts.deviance(A, W, exposure) == pytest.approx(expected)


def test_words_say_what_was_held_out(X):
    given = {"n_seeds": 2, "random_state": 0} | FEW
    thinned = select_n_components(X, [1], **given).summary()
    entries = select_n_components(X, [1], hold_out="entries", **given).summary()
    assert "of different thinnings match" in thinned
    assert "It takes the counts for Poisson" in thinned
    assert "of different sets of hidden entries match" in entries
    assert "Poisson" not in entries


def test_numbers_that_are_not_whole_have_entries_too(X):
    with pytest.warns(UserWarning, match="not made of counts"):
        found = select_n_components(
            X + 0.5, [1], hold_out="entries", n_seeds=2, random_state=0, **FEW
        )
    assert np.isfinite(found.deviance).all()


@pytest.mark.slow
def test_entries_do_not_share_their_noise():
    """Counts that vary more than Poisson ones: thinning goes on falling, entries stop."""
    X, F, W = simulate(0, 100, 30, 3)
    rate = np.exp(F) @ W.T
    X = np.random.default_rng(1).negative_binomial(1, 1 / (1 + rate))
    given = {"n_seeds": 2, "random_state": 0}
    thinned = select_n_components(X, [3, 6], **given)
    entries = select_n_components(X, [3, 6], hold_out="entries", **given)
    assert thinned.best == 6
    assert entries.best == 3
