"""Stages of a fit, and parts that are passed as objects."""

import copy
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from sklearn.base import clone
from torch import nn

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.stages import (
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleLoadings,
    WarmUp,
)
from pnmf_pyro.priors import SVGP, GaussianPrior
from pnmf_pyro.transforms import get_factors
from tests.support.data import tissue
from tests.support.settings import NATURAL

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SPACE = {"spatial": True, "lengthscale": 2.0}


@pytest.fixture(scope="module")
def X():
    random = np.random.default_rng(0)
    rates = np.exp(random.normal(size=(60, 2))) @ random.gamma(1.0, 3.0, (2, 20))
    return random.poisson(rates + 0.1).astype(float)


@pytest.fixture(scope="module")
def field():
    return tissue(N=80)


@pytest.mark.parametrize("max_iter", [2, 7, 50, 61])
def test_max_iter_bounds_the_whole_fit(field, max_iter):
    counts, x, *_ = field
    model = pnmf_pyro.fit(counts, x, n_components=2, max_iter=max_iter)
    assert model.n_iter_ == len(model.history_) <= max_iter


def test_stages_cover_the_history_without_gaps(field):
    counts, x, *_ = field
    history = pnmf_pyro.fit(counts, x, n_components=2, max_iter=60).history_
    names, firsts, lasts = zip(*history.stages, strict=True)
    assert names == ("warm-up", "settle", "loadings")
    assert (firsts[0], lasts[-1]) == (0, len(history))
    assert firsts[1:] == lasts[:-1]
    assert copy.deepcopy(history).stages == pickle.loads(pickle.dumps(history)).stages


def test_no_stages_are_one_that_settles(X):
    plain, named = (
        PNMF(2, random_state=0, max_iter=30, **NATURAL, stages=stages).fit(X)
        for stages in (None, [Settle()])
    )
    assert plain.history_ == named.history_


def test_stages_are_copied_pickled_and_saved(X, tmp_path):
    stages = [WarmUp(kl_weight=0.7), Settle(kl_weight=0.7), RestoreSpread(), SettleLoadings(True)]
    model = PNMF(2, random_state=0, max_iter=60, **NATURAL, stages=stages)
    assert clone(model).stages == stages
    model.fit(X).save(tmp_path / "model.npz")
    loaded = PNMF.load(tmp_path / "model.npz")
    assert list(loaded.stages) == stages
    assert loaded.history_.stages == model.history_.stages


def test_restored_spread_is_that_of_the_posterior_with_whole_weight(X):
    """A Gaussian posterior: the precision of a site grows by the weight, the mean stays."""
    common = {"random_state": 0, "max_iter": 400, "tol": 1e-9, **NATURAL}
    tight = PNMF(2, stages=[Settle(kl_weight=0.25)], **common).fit(X).model_.prior
    wide = PNMF(2, stages=[Settle(kl_weight=0.25), RestoreSpread()], **common).fit(X)
    prior = wide.model_.prior
    torch.testing.assert_close(prior.mean, tight.mean)
    sites = 1 / tight.scale**2 - 1
    torch.testing.assert_close(1 / prior.scale**2, 1 + 0.25 * sites)


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        ([], {}, "stages must begin with a stage that trains"),
        ([RestoreSpread(), Settle()], NATURAL, "stages must begin with a stage that trains"),
        ([Settle(), LearnHyperparameters()], {}, "LearnHyperparameters.* needs a spatial model"),
        ([Settle(), Correlate()], {}, "set local=True"),
        ([Settle(), RestoreSpread()], {}, "held in sites"),
        ([Settle(), SettleLoadings(shrink=True)], {}, "needs loadings in closed form"),
        (["settle"], {}, "stages must be None or a list of stages"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_one_sentence(X, stages, settings, message):
    with pytest.raises(ValueError, match=message):
        PNMF(2, stages=stages, max_iter=5, **settings).fit(X)


# --- parts as objects


def test_a_prior_of_ones_own_is_trained_as_a_copy(X):
    class Wide(GaussianPrior):
        pass

    prior = Wide(torch.empty(20, 60, dtype=torch.float64), 2, scale_pf=2.0)
    before = prior.mean.detach().clone()
    model = PNMF(2, prior=prior, max_iter=20, random_state=0)
    assert isinstance(clone(model).prior, Wide)
    model.fit(X)
    assert isinstance(model.model_.prior, Wide)
    assert model.model_.prior is not prior
    torch.testing.assert_close(prior.mean, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot be saved: it is an object"):
        model.save("model.npz")


def test_a_spatial_prior_predicts_at_new_places(field):
    counts, x, *_ = field
    places = Places(torch.from_numpy(np.asarray(x, dtype=float)))
    prior = SVGP("Matern32", places, places, 2, use_natural_gradients=True, dtype=torch.float64)
    prior.kernel.lengthscale.fill_(2.0)
    own = PNMF(2, prior=prior, max_iter=40, random_state=0, **NATURAL).fit(counts.astype(float))
    named = PNMF(2, max_iter=40, random_state=0, **SPACE, **NATURAL)
    named.fit(counts.astype(float), coordinates=x)
    np.testing.assert_allclose(get_factors(own), get_factors(named), rtol=1e-6)
    new = own.transform(None, coordinates=x[:5])
    np.testing.assert_allclose(new, named.transform(None, coordinates=x[:5]), rtol=1e-6)


def test_a_prior_of_another_size_is_refused(X):
    with pytest.raises(ValueError, match="prior must be over n_components=2"):
        PNMF(2, prior=GaussianPrior(torch.empty(20, 59), 2)).fit(X)


class NegativeBinomial(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_r = nn.Parameter(torch.tensor(0.0))

    def forward(self, poisson, batch):
        r = self.log_r.exp()
        return dist.GammaPoisson(r, r / poisson.mean).to_event(1)


def test_a_likelihood_with_a_parameter_is_learned(X):
    random = np.random.default_rng(1)
    r = 2.0
    F = random.normal(size=(150, 2)) / 2
    rate = np.exp(F) @ random.gamma(1.0, 5.0, (2, 30))
    counts = random.poisson(rate * random.gamma(r, 1 / r, rate.shape))
    likelihood = NegativeBinomial()
    over = pnmf_pyro.fit(counts, n_components=2, likelihood=likelihood, max_iter=400)
    assert float(likelihood.log_r.detach()) == 0.0  # what was passed stays as it was
    assert 1.4 < float(over.model_.observation.log_r.detach().exp()) < 3.0
    assert over.elbo_ > pnmf_pyro.fit(counts, n_components=2).elbo_ + 100
    with pytest.raises(ValueError, match="score is the likelihood of Poisson counts"):
        over.score(counts)


def test_a_likelihood_in_space_is_trained(field):
    counts, x, *_ = field

    def likelihood(poisson, batch):
        return dist.GammaPoisson(5.0, 5.0 / poisson.mean).to_event(1)

    model = pnmf_pyro.fit(counts, x, n_components=2, likelihood=likelihood, max_iter=120)
    assert model.model_.prior.places is not None
    assert np.isfinite(model.elbo_)
    assert model.transform(None, coordinates=x[:3]).shape == (3, 2)


def test_a_likelihood_without_closed_forms_is_refused_where_they_are_named(X):
    with pytest.raises(ValueError, match=r"likelihood: .*training_mode='standard'"):
        PNMF(2, likelihood=lambda poisson, batch: poisson, **NATURAL).fit(X)
