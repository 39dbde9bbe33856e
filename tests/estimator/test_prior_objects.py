"""Priors and likelihoods as objects where the estimator has names."""

import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.base import clone
from torch import nn

import pnmf_pyro
from pnmf_pyro import PNMF, match_factors
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.anndata_bridge import settings as settings_of
from pnmf_pyro.estimator.stages import LearnHyperparameters, Settle, WarmUp
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior
from pnmf_pyro.transforms import factor_uncertainty, get_factors, log_factors
from tests.support.data import simulate, tissue
from tests.support.settings import LOCAL, NATURAL, STEPS, unconverged

pytestmark = unconverged

ADAM = {
    "mode": "expanded",
    "loadings_mode": "softplus",
    "learning_rate": 0.2,
    "init": None,
    "max_iter": 300,
    "random_state": 0,
    "tol": 0,
}


@pytest.fixture(scope="module")
def data():
    return tissue(groups=2)


def shape_of(X):
    return torch.empty(X.shape[::-1], dtype=torch.float64, device="meta")


class HeavyTailed(GaussianPrior):
    """F_il from a Student t distribution, with the same normal q."""

    def model(self, batch, samples):
        with self.local_plates(batch, samples):
            return pyro.sample("F", dist.StudentT(4.0, torch.zeros_like(self.scale_pf), 1.0))


class Dispersed(nn.Module):
    """Negative binomial with a dispersion that is learned."""

    def __init__(self, r=1.0):
        super().__init__()
        self.log_r = nn.Parameter(torch.tensor(float(r)).log())

    def forward(self, poisson, batch):
        r = self.log_r.exp()
        return dist.GammaPoisson(r, r / poisson.mean).to_event(1)


def negative_binomial(poisson, batch):
    return dist.GammaPoisson(2.0, 2.0 / poisson.mean).to_event(1)


def still_poisson(poisson, batch):
    return dist.Poisson(poisson.mean).to_event(1)


# --- priors


def test_a_prior_object_is_what_its_name_is(data):
    """A GaussianPrior, an SVGP and an LCGP that are passed, and those that parameters make."""
    X, x, *_ = data
    y, places = shape_of(X), Places(torch.from_numpy(x))
    flat = {**NATURAL, "random_state": 0, "max_iter": 40}
    own = GaussianPrior(y, 2, 1.0, use_natural_gradients=True)
    pairs = [(PNMF(2, **flat).fit(X), PNMF(2, **flat, prior=own).fit(X))]
    kernel = SpatialKernel("Matern32", 0.4)
    common = {"use_natural_gradients": True, "dtype": torch.float64}
    made = PNMF(2, **STEPS).fit(X, coordinates=x)
    own = SVGP(kernel, places, made.model_.prior.inducing, 2, **common)
    steps = {k: v for k, v in STEPS.items() if k not in ("spatial", "lengthscale")}
    pairs.append((made, PNMF(2, **steps, prior=own).fit(X)))
    made = PNMF(2, **LOCAL).fit(X, coordinates=x)
    own = LCGP(kernel, places, 2, K=12, seed=made.model_.prior.seed, **common)
    pairs.append((made, PNMF(2, **steps, prior=own).fit(X)))
    for by_name, by_object in pairs:
        # A random decomposition to start from is not the same to the last digit.
        np.testing.assert_allclose(by_object.history_, by_name.history_, rtol=1e-4)
        np.testing.assert_allclose(log_factors(by_object), log_factors(by_name), 1e-2, 1e-2)


@pytest.mark.slow
def test_a_prior_of_ones_own(counts):
    """Of a class of one's own, through the class and the recipe."""
    prior = HeavyTailed(torch.empty(counts.shape[::-1], device="meta"), 3)
    model = PNMF(3, **ADAM, prior=prior).fit(counts)
    assert isinstance(model.model_.prior, HeavyTailed)
    assert model.elbo_ > model.history_[0] + 500
    normal = PNMF(3, **ADAM).fit(counts)
    assert match_factors(model, normal).similarity > 0.95
    assert model.elbo_ != pytest.approx(normal.elbo_, rel=1e-5)
    again = pnmf_pyro.fit(counts, n_components=3, prior=prior, max_iter=300)
    assert again.training_mode == "standard"
    assert again.elbo_ == pytest.approx(model.elbo_, rel=1e-2)
    assert again.transform(counts).shape == (80, 3)


@pytest.mark.parametrize("natural", [True, False])
def test_the_recipe_takes_a_prior_in_space_and_predicts(data, natural):
    X, x, _, F, _ = data
    places = Places(torch.from_numpy(x))
    dtype = {"use_natural_gradients": natural, "dtype": torch.float64}
    prior = SVGP(SpatialKernel("Matern32", 0.4), places, places[:40], 2, **dtype)
    model = pnmf_pyro.fit(X, n_components=2, prior=prior, max_iter=400)
    assert not model.spatial
    assert model.kernel_ == "Matern32"
    assert np.corrcoef(log_factors(model).T, F.T)[:2, 2:].max(1).min() > 0.85
    np.testing.assert_allclose(model.transform(None, x), get_factors(model), rtol=1e-4)
    new = x[:5] + 0.01
    assert np.isfinite(model.transform(None, coordinates=new)).all()
    assert np.isfinite(model.score(X[:5], coordinates=x[:5]))
    far = factor_uncertainty(model, coordinates=[[1e3, 1e3]])
    np.testing.assert_allclose(far, 1.0, rtol=1e-3)
    assert settings_of(model)["parameters"]["prior"] == "SVGP"


def test_a_prior_over_groups_has_codes_for_names(data):
    X, x, labels, *_ = data
    codes = (labels == "b").astype(int)
    named = PNMF(2, multigroup=True, group_diff_param=2.0, **STEPS).fit(X, None, x, codes)
    kernel = SpatialKernel("Matern32", 0.4, group_diff_param=2.0, group_distances=1 - np.eye(2))
    places = Places(torch.from_numpy(x), torch.from_numpy(codes))
    inducing = named.model_.prior.inducing
    prior = SVGP(kernel, places, inducing, 2, use_natural_gradients=True, dtype=torch.float64)
    steps = {k: v for k, v in STEPS.items() if k not in ("spatial", "lengthscale")}
    model = PNMF(2, prior=prior, **steps).fit(X)
    assert model.groups_ == [0, 1]
    for one in (codes, 1 - codes):
        np.testing.assert_allclose(
            model.transform(None, x, one), named.transform(None, x, one), rtol=1e-3
        )
    with pytest.raises(ValueError, match="groups must be among those of the fit"):
        model.transform(None, x[:1], [2])


def test_hyperparameters_of_a_prior_object_are_learned(data):
    X, x, *_ = data
    places = Places(torch.from_numpy(x))
    natural = {"use_natural_gradients": True, "dtype": torch.float64}
    steps = {k: v for k, v in STEPS.items() if k not in ("spatial", "lengthscale")}
    stages = [WarmUp(), LearnHyperparameters(), Settle()]
    for n_sets in (1, 2):
        prior = SVGP(SpatialKernel("Matern32", 5.0, 1.0, n_sets), places, places, 2, **natural)
        for how in ({"stages": stages}, {}):
            model = PNMF(2, prior=prior, learn=("lengthscale",), **how, **steps).fit(X)
            lengthscale = model.model_.prior.kernel.lengthscale
            assert lengthscale.shape == (n_sets,)
            assert ((lengthscale > 0.05) & (lengthscale < 2)).all()
        assert (prior.kernel.lengthscale == 5.0).all()
    fixed = PNMF(2, prior=prior, stages=stages, **steps).fit(X)
    assert (fixed.model_.prior.kernel.lengthscale == 5.0).all()


def test_a_kernel_with_all_its_hyperparameters(data):
    """As named by parameters, where there are parameters; it starts what is learned."""
    X, x, *_ = data
    kernel = SpatialKernel("Matern12", 0.3, 0.8)
    own = PNMF(2, kernel=kernel, **STEPS).fit(X, coordinates=x)
    named = {**STEPS, "kernel": "Matern12", "lengthscale": 0.3, "sigma": 0.8}
    same = PNMF(2, **named).fit(X, coordinates=x)
    np.testing.assert_array_equal(get_factors(own), get_factors(same))
    rough = PNMF(2, kernel=SpatialKernel("Matern12", 0.3, 0.8, nugget=0.5), **STEPS)
    uncertain = factor_uncertainty(rough.fit(X, coordinates=x), coordinates=x + 1e-3)
    assert (uncertain > factor_uncertainty(own, coordinates=x + 1e-3)).all()
    shared = PNMF(2, kernel=kernel, learn=("sigma",), **STEPS).fit(X, coordinates=x)
    apart = PNMF(2, kernel=SpatialKernel("Matern12", 0.3, 0.8, 2), learn=("sigma",), **STEPS)
    learned = [m.model_.prior.kernel for m in (shared, apart.fit(X, coordinates=x))]
    assert [len(one.sigma) for one in learned] == [1, 2]
    assert all((one.lengthscale == 0.3).all() for one in learned)
    assert all((one.sigma != 0.8).all() for one in learned)
    assert float(kernel.sigma) == 0.8


# --- likelihoods


def overdispersed(rate):
    """Counts with a variance of rate + rate^2 / 2, without features that have none."""
    X = np.random.default_rng(0).negative_binomial(2, 2 / (2 + rate)).astype(np.float64)
    return X[:, X.sum(0) > 0]


def dispersion(model):
    return float(model.model_.observation.log_r.detach().exp())


@pytest.fixture(scope="module")
def dispersed():
    """Counts with a variance of mu + mu^2 / 2, and the factors that made them."""
    _, F, W = simulate(3, 150, 30, 2, mean=8.0)
    return overdispersed(np.exp(F) @ W.T), F


def test_a_likelihood_that_is_the_poisson_is_the_poisson(counts):
    """In expectation: its terms are averaged over draws instead of taken in closed form."""
    own = PNMF(3, **ADAM, likelihood=still_poisson).fit(counts)
    poisson = PNMF(3, **ADAM).fit(counts)
    assert own.elbo_ == pytest.approx(poisson.elbo_, rel=0.01)
    assert match_factors(own, poisson).similarity > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 50])
def test_a_dispersion_is_learned(dispersed, batch_size):
    X, F = dispersed
    given = Dispersed()
    model = PNMF(2, **{**ADAM, "max_iter": 400}, batch_size=batch_size, likelihood=given).fit(X)
    assert dispersion(model) == pytest.approx(2, rel=0.25)
    assert float(given.log_r.detach()) == 0
    assert given.log_r.grad is None
    poisson = PNMF(2, **{**ADAM, "max_iter": 400}).fit(X)
    assert model.elbo_ > poisson.elbo_ + 1000
    fixed = PNMF(2, **{**ADAM, "max_iter": 400}, likelihood=negative_binomial).fit(X)
    assert fixed.elbo_ == pytest.approx(model.elbo_, rel=0.01)

    def right(one):
        return np.corrcoef(log_factors(one).T, F.T)[:2, 2:].max(1).mean()

    assert right(model) > right(poisson) - 0.02


@pytest.mark.slow
def test_the_recipe_takes_a_likelihood(dispersed, caplog):
    X = dispersed[0]
    model = pnmf_pyro.fit(X, n_components=2, likelihood=Dispersed())
    assert (model.training_mode, model.loadings_mode) == ("standard", "softplus")
    assert dispersion(model) == pytest.approx(2, rel=0.25)
    assert model.elbo_ > pnmf_pyro.fit(X, n_components=2).elbo_ + 1000
    assert settings_of(model)["parameters"]["likelihood"] == "Dispersed"


@pytest.mark.slow
@pytest.mark.parametrize("local", [None, False])
def test_the_recipe_takes_a_likelihood_in_space(local):
    """Over-dispersed counts of two fields: fields and dispersion are found."""
    _, x, _, F, W = tissue(N=150)
    X = overdispersed(np.exp(F) @ W.T)
    how = {} if local is None else {"local": local, "num_inducing": 30}
    model = pnmf_pyro.fit(X, x, n_components=2, likelihood=Dispersed(), max_iter=600, **how)
    assert model.local == (local is None)  # neighbours, unless it is said otherwise
    assert model.K == 50
    names = [name for name, *_ in model.history_.stages]
    assert names[:2] == ["warm-up", "settle"]
    rough = 0.3 if local is None else 0.5
    assert dispersion(model) == pytest.approx(2, rel=rough)
    assert np.corrcoef(log_factors(model).T, F.T)[:2, 2:].max(1).min() > 0.85
    assert len(set(model.model_.prior.kernel.lengthscale.tolist())) == 2
    poisson = pnmf_pyro.fit(X, x, n_components=2)
    assert model.elbo_ > poisson.elbo_ + 1000
    assert np.isfinite(model.transform(None, x[:4] + 0.01)).all()


def test_a_warm_up_is_by_the_poisson(dispersed):
    stages = [WarmUp(), Settle()]
    model = PNMF(2, **ADAM, likelihood=negative_binomial, stages=stages).fit(dispersed[0])
    alone = PNMF(2, **{**ADAM, "mode": "lower-bound", "max_iter": 150}).fit(dispersed[0])
    assert model.history_.stages == [("warm-up", 0, 150), ("settle", 150, 300)]
    np.testing.assert_allclose(model.history_[:150], alone.history_, rtol=1e-6)
    assert model.history_[150] > alone.history_[-1] + 500


# --- what was given stays as it was


def test_a_fit_leaves_what_it_was_given_alone(data):
    X, x, *_ = data
    places = Places(torch.from_numpy(x))
    svgp = SVGP(SpatialKernel("Matern32", 0.4), places, places[:20], 2, dtype=torch.float64)
    given = {"prior": svgp, "likelihood": Dispersed()}
    before = copy.deepcopy({name: one.state_dict() for name, one in given.items()})
    model = PNMF(2, **{**ADAM, "max_iter": 10}, **given).fit(X)
    for name, one in given.items():
        assert model.get_params()[name] is one
        state = one.state_dict()
        assert state.keys() == before[name].keys()
        assert all(torch.equal(state[key], before[name][key]) for key in state)
        assert all(parameter.grad is None for parameter in one.parameters())
    again = PNMF(2, **{**ADAM, "max_iter": 10}, **given).fit(X)
    assert again.history_ == model.history_


def test_an_estimator_with_objects_is_cloned_and_pickled(data):
    X, x, *_ = data
    places = Places(torch.from_numpy(x))
    svgp = SVGP(SpatialKernel("Matern32", 0.4), places, places[:20], 2, dtype=torch.float64)
    model = PNMF(2, **{**ADAM, "max_iter": 10}, prior=svgp, likelihood=Dispersed())
    other = clone(model)
    assert other.prior is not svgp
    assert isinstance(other.likelihood, Dispersed)
    assert "Dispersed" in repr(model)
    fits = [one.fit(X) for one in (model, other)]
    assert fits[0].history_ == fits[1].history_
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded.transform(None, x[:4]), model.transform(None, x[:4]))
    function = clone(PNMF(2, likelihood=negative_binomial))
    assert function.likelihood is negative_binomial


@pytest.mark.parametrize("name", ["prior", "likelihood"])
def test_a_model_with_an_object_is_not_saved(data, name, tmp_path):
    X = data[0]
    given = {"prior": GaussianPrior(shape_of(X), 2), "likelihood": Dispersed()}[name]
    model = PNMF(2, **{**ADAM, "max_iter": 5}, **{name: given}).fit(X)
    with pytest.raises(ValueError, match=f"^{name}=.*cannot be saved: it is an object") as caught:
        model.save(tmp_path / "model.npz")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# --- what cannot be


NO_CLOSED_FORM = "likelihood: another likelihood than the named ones has no steps in closed form"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_mode": "natural", "likelihood": still_poisson}, NO_CLOSED_FORM),
        ({"loadings_mode": "multiplicative", "likelihood": still_poisson}, NO_CLOSED_FORM),
        ({"mode": "lower-bound", "likelihood": still_poisson}, NO_CLOSED_FORM),
        (
            {"likelihood": still_poisson, "stages": [Settle(mode="lower-bound")]},
            r"stages: Settle\(mode='lower-bound'\) has no closed form of another likelihood",
        ),
        ({"likelihood": "gaussian"}, "likelihood must be among 'poisson', 'negative-binomial'"),
        ({"prior": "gaussian"}, "prior must be a pnmf_pyro.priors.Prior"),
        ({"prior": GaussianPrior}, "prior must be a pnmf_pyro.priors.Prior"),
        (
            {"prior": lambda y: GaussianPrior(y, 3)},
            "prior must be over n_components=2 components and the 60 samples of X; it is over L=3",
        ),
        (
            {"prior": lambda y: GaussianPrior(torch.ones(20, 7), 2)},
            "prior must be over n_components=2 .* N=7",
        ),
        (
            {"prior": lambda y: GaussianPrior(y, 2, use_natural_gradients=True)},
            r"prior: q\(F\) of this one is held in sites.*training_mode='natural'",
        ),
        (
            {"prior": lambda y: GaussianPrior(y, 2), "training_mode": "natural"},
            r"prior: q\(F\) of this one is not held in sites.*training_mode='standard'",
        ),
        (
            {
                "prior": lambda y: HeavyTailed(y, 2, use_natural_gradients=True),
                "training_mode": "natural",
            },
            "prior: HeavyTailed has a `model` of its own",
        ),
        ({"prior": lambda y: GaussianPrior(y, 2), "spatial": True}, "prior: an object knows"),
    ],
)
def test_combinations_that_cannot_work_are_refused_in_one_sentence(data, settings, message):
    X, x, *_ = data
    prior = settings.get("prior")
    if callable(prior) and not isinstance(prior, type):
        settings = {**settings, "prior": prior(shape_of(X))}
    places = x if settings.get("spatial") else None
    with pytest.raises(ValueError, match=message) as caught:
        PNMF(2, **{**ADAM, **settings}).fit(X, coordinates=places)
    assert "\n" not in str(caught.value)


def test_the_recipe_refuses_a_prior_beside_coordinates(data):
    X, x, *_ = data
    prior = GaussianPrior(shape_of(X), 2, use_natural_gradients=True)
    with pytest.raises(ValueError, match="prior: an object knows its places by itself"):
        pnmf_pyro.fit(X, x, n_components=2, prior=prior)
    with pytest.raises(ValueError, match="coordinates and groups are used by spatial models only"):
        PNMF(2, prior=prior, **NATURAL).fit(X, coordinates=x)


def test_score_needs_a_closed_form(data):
    model = PNMF(2, **{**ADAM, "max_iter": 5}, likelihood=negative_binomial).fit(data[0])
    with pytest.raises(ValueError, match="score is a bound in closed form"):
        model.score(data[0])


@pytest.mark.parametrize(
    ("kernel", "settings", "message"),
    [
        (SpatialKernel(n_sets=3), {}, "kernel must have one set of hyperparameters.*n_sets=3"),
        (SpatialKernel(), {"multigroup": True}, "kernel has no group_distances, and multigroup"),
        (SpatialKernel(group_distances=1 - np.eye(2)), {}, "kernel has group_distances, and multi"),
    ],
)
def test_kernels_that_do_not_fit_the_model(data, kernel, settings, message):
    X, x, labels, *_ = data
    groups = labels if settings else None
    with pytest.raises(ValueError, match=message):
        PNMF(2, kernel=kernel, **settings, **STEPS).fit(X, coordinates=x, groups=groups)


def test_a_warning_of_a_lengthscale_is_of_the_kernel_that_was_given(data):
    X, x, *_ = data
    steps = {**STEPS, "lengthscale": 1e-4}
    PNMF(2, kernel=SpatialKernel("Matern32", 0.4), **steps).fit(X, coordinates=x)
    with pytest.warns(UserWarning, match="lengthscale"):
        PNMF(2, kernel=SpatialKernel("Matern32", 1e-4), **STEPS).fit(X, coordinates=x)
