"""What a flagged statistic advises: an argument that exists, that the fit was not given."""

import inspect
import itertools
import re

import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro import PNMF, posterior_predictive_check
from pnmf_pyro.analysis.predictive_checks import PredictiveCheck, StatisticCheck
from pnmf_pyro.analysis.remedies import FitFacts, meanings
from pnmf_pyro.analysis.statistics import NAMES, Statistic
from pnmf_pyro.models import PoissonFactorization
from tests.support.data import simulate

KNOWN = {*inspect.signature(pnmf_pyro.fit).parameters, *PNMF().get_params()}
EVERY = [
    FitFacts(likelihood, L, *has)
    for likelihood, L, *has in itertools.product(
        ("poisson", "negative-binomial", "own"), (1, 5), *[(False, True)] * 3
    )
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", EVERY, ids=str)
def test_each_side_names_an_argument_that_exists(name, fit):
    for of in ("feature", "sample"):
        for words in meanings(name, of, fit):
            advice = words.rpartition(": ")[2]
            named = re.findall(r"([a-z_]+)=", advice) + re.findall(r"\b[a-z]+_[a-z]+\b", advice)
            assert named or "lengthscale" in advice or "no fewer" in advice, words
            assert set(named) <= KNOWN, words
            assert f'likelihood="{fit.likelihood}"' not in words
            assert not (fit.sized and "size_factors" in words)
            assert not (fit.spatial and "coords" in words)
            assert not (fit.batched and "batches" in words)


@pytest.fixture(scope="module")
def overdispersed():
    _, F, W = simulate(0, 100, 25, 3)
    rate = np.exp(F) @ W.T
    return np.random.default_rng(1).negative_binomial(1, 1 / (1 + rate))


def checked(X, **given):
    model = pnmf_pyro.fit(X, n_components=3, **given)
    return posterior_predictive_check(model, X, n_draws=120, random_state=0)


def test_what_is_advised_mends_it(overdispersed):
    found = checked(overdispersed)
    assert found["variance_to_mean", "feature"] in found.flagged
    words = found["variance_to_mean", "feature"].sentence
    assert 'fit with likelihood="negative-binomial"' in words
    mended = checked(overdispersed, likelihood="negative-binomial")
    names = [(one.statistic.name, one.statistic.of) for one in mended.flagged]
    assert ("variance_to_mean", "feature") not in names
    assert ("zero_fraction", "feature") not in names
    assert ("maximum", "feature") not in names
    assert "likelihood=" not in mended["variance_to_mean", "feature"].statistic.above


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_facts_of_fits(overdispersed):
    places = np.random.default_rng(0).uniform(size=(100, 2))
    short = {"n_components": 2, "max_iter": 3, "tol": 0}
    plain = pnmf_pyro.fit(overdispersed, size_factors="total", **short)
    how = {"likelihood": "negative-binomial", "batches": np.arange(100) % 2}
    other = pnmf_pyro.fit(overdispersed, places, **how, **short)
    assert FitFacts.of(plain.model_) == FitFacts("poisson", 2, True, False, False)
    assert FitFacts.of(other.model_) == FitFacts("negative-binomial", 2, False, True, True)

    class Own(PoissonFactorization):
        def likelihood(self, F, batch):
            return super().likelihood(F, batch)

    own = Own(plain.model_.prior, plain.model_.W.data.new_empty(25, 100), 2)
    assert FitFacts.of(own).likelihood == "own"


def result(p_smallest: bool, n_draws: int) -> PredictiveCheck:
    """One statistic that is beyond all tables, or that is among them."""
    replicated = np.random.default_rng(0).normal(size=(n_draws, 1)).astype(np.float32)
    observed = np.array([50.0 if p_smallest else 0.0])
    statistic = Statistic("any", "feature", lambda table: 0.0)
    one = StatisticCheck(statistic, [0], observed, replicated)
    return PredictiveCheck([one], n_draws, "posterior")


@pytest.mark.parametrize("n_draws", [100, 200, 1000])
def test_the_smallest_p_value_is_said_to_be_one(n_draws):
    words = result(True, n_draws).verdict()
    assert f"p = {1 / (n_draws + 1):.3g} is the smallest that {n_draws} tables can show" in words
    assert "smallest" not in result(False, n_draws).verdict()


@pytest.mark.parametrize("n_draws", [1, 50, 99])
def test_too_few_tables_say_nothing(n_draws):
    for extreme in (True, False):
        words = result(extreme, n_draws).verdict()
        assert "too few to say anything" in words
        assert "does not reproduce" not in words
        assert "None of" not in words
    default = inspect.signature(posterior_predictive_check).parameters["n_draws"].default
    assert 1 / (default + 1) < 0.01
