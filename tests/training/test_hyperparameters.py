"""Hyperparameters and kernels are chosen by what they predict."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, poisson
from sklearn.exceptions import ConvergenceWarning

from pnmf_pyro import PNMF
from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.estimator.stages import LearnHyperparameters, Settle, WarmUp
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import SVGP
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.ends import warn_of_ends
from pnmf_pyro.training.hyperparameters import HyperparameterSearch, predict_without, sites
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant
from pnmf_pyro.transforms import get_factors
from tests.support import dense_fields
from tests.support.data import tissue
from tests.support.settings import STEPS, fitted_in_space, unconverged

pytestmark = unconverged


@pytest.fixture(scope="module")
def data():
    return tissue(groups=2)


def test_prediction_without_a_sample_is_the_regression_on_the_others():
    random = np.random.default_rng(0)
    x = random.uniform(size=(9, 2))
    y, noise = random.normal(size=(1, 9)), random.uniform(0.1, 1, size=(1, 9))
    everyone = torch.arange(9)
    others = torch.stack([everyone[everyone != i] for i in range(9)])
    together = Places(torch.from_numpy(x))[torch.cat([others, everyone[:, None]], 1)]
    loc, variance = predict_without(
        SpatialKernel("Matern52", 0.5, 1.4)(together, together),
        torch.tensor([0.3], dtype=torch.float64),
        everyone,
        others,
        torch.from_numpy(y),
        torch.from_numpy(noise),
    )
    K = dense_fields.covariance("Matern52", x, x, 0.5, 1.4)
    for i in range(9):
        rest = others[i].numpy()
        mean, cov = dense_fields.regression(
            K[np.ix_(rest, rest)], K[rest][:, [i]], K[[i]][:, [i]], 0.3, y[0, rest], noise[0, rest]
        )
        np.testing.assert_allclose([loc[0, i], variance[0, i]], [mean[0], cov[0, 0]], rtol=1e-5)


def test_leave_one_out_is_near_a_refit_without_the_sample(data):
    """Brute force: q fitted again to all samples but one, with the same loadings."""
    X, x, *_ = tissue(N=16, D=10)
    fit = PNMF(2, **{**STEPS, "max_iter": 60, "tol": 0}).fit(X, coordinates=x)
    module = fit.model_
    y, noise = sites(module, as_counts(X))
    everyone = torch.arange(16)
    others = torch.stack([everyone[everyone != i] for i in range(16)])
    together = module.prior.places[torch.cat([others, everyone[:, None]], 1)]
    loc, _ = predict_without(
        module.prior.kernel(together, together),
        module.prior.mean,
        everyone,
        others,
        y,
        noise,
    )
    for i in (0, 5, 11):
        rest = others[i]
        again = refit_given_loadings(X[rest], x[rest], module.W.data.detach())
        expected = again.at(Places(torch.from_numpy(x[[i]]))).marginal().loc[:, 0]
        np.testing.assert_allclose(loc[:, i], expected.detach(), atol=0.15)


def test_the_evidence_of_a_component_is_the_dense_one():
    """With all earlier samples as neighbours, the density of the sites under the whole field."""
    X, x, *_ = tissue(N=16, D=10)
    module = PNMF(2, **{**STEPS, "max_iter": 30, "tol": 0}).fit(X, coordinates=x).model_
    search = HyperparameterSearch(
        module, as_counts(X), ["lengthscale"], "leave-one-out", np.random.RandomState(0)
    )
    search.observe(module)
    y, noise = (one.numpy() for one in sites(module, as_counts(X), overlap=True))
    K = dense_fields.covariance("Matern32", x, x, STEPS["lengthscale"], 1.0)
    found = search.evidence(module.prior.kernel.hyperparameters, module.prior.mean.double())
    for l, level in enumerate(module.prior.mean.tolist()):
        field = multivariate_normal(np.full(16, level), K + np.diag(noise[l]))
        np.testing.assert_allclose(float(found[l]) * 16, -field.logpdf(y[l]), rtol=1e-4)


def test_sites_have_the_curvature_of_the_log_likelihood():
    X, x, *_ = tissue(N=16, D=10)
    module = PNMF(2, **{**STEPS, "max_iter": 30, "tol": 0}).fit(X, coordinates=x).model_
    q, W = module.prior.marginal(), module.W.data.detach().double()
    _, noise = sites(module, as_counts(X), overlap=True)
    rates = q.loc.double().exp().T[:, None, :] * W
    share = rates / rates.sum(-1, keepdim=True)
    told = torch.from_numpy(X).double()[:, :, None] * share
    expected = (q.loc + q.variance / 2).double().exp().T * W.sum(0)
    second = (told * share).sum(1)
    h = torch.maximum(expected - told.sum(1) + second, second / 2).T
    torch.testing.assert_close(1 / noise, h.detach().clamp_min(1e-6), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lengthscale", 1e9, "longer than the samples extend"),
        ("group_diff_param", 9e3, "share nothing"),
        ("sigma", 0.05, "hardly vary"),
        ("sigma", 4.0, "more than counts can"),
        ("nugget", 2.0, "no regard to space"),
    ],
)
def test_an_end_that_all_components_reach_is_said_and_that_of_one_logged(
    data, name, value, said, caplog
):
    X, x, labels, *_ = data
    settings = {**STEPS, "multigroup": True, "max_iter": 5, "tol": 0}
    module = PNMF(2, **settings).fit(X, coordinates=x, groups=labels).model_
    search = HyperparameterSearch(
        module, as_counts(X), [name], "leave-one-out", np.random.RandomState(0)
    )
    both, one = (torch.tensor([other, value], dtype=torch.float64) for other in (value, 0.3))
    with pytest.warns(ConvergenceWarning, match=f"The {name} was learned as .*{said}"):
        warn_of_ends({name: both}, search._grids(), {name: one})
    with caplog.at_level("INFO", logger="pnmf_pyro"):
        warn_of_ends({name: one}, search._grids(), {name: both})
    assert f"The {name} of components [1] was learned as" in caplog.text


def test_a_lengthscale_that_did_not_move_is_said(data):
    X, x, *_ = data
    module = PNMF(2, **{**STEPS, "max_iter": 5, "tol": 0}).fit(X, coordinates=x).model_
    search = HyperparameterSearch(
        module, as_counts(X), ["lengthscale"], "leave-one-out", np.random.RandomState(0)
    )
    search.loss = lambda values, mean: mean.sum() * 0 + values["lengthscale"].sum() * 0
    with pytest.warns(ConvergenceWarning, match="The lengthscale did not move from"):
        search.learn_from(module)


def refit_given_loadings(X, x, W):
    places = Places(torch.from_numpy(x))
    kernel = SpatialKernel("Matern32", 0.4, 1.0)
    prior = SVGP(kernel, places, places, 2, use_natural_gradients=True, dtype=torch.float64)
    y = torch.empty(X.shape[::-1], dtype=torch.float64, device="meta")
    module = PoissonFactorization(prior, y, 2, "projected", "lower-bound")
    module.W.assign(W)
    module.W.freeze()
    train(
        module,
        Batches(as_counts(X)),
        FactorizationELBO("lower-bound", newton=True),
        [(SiteSteps(prior), Constant())],
        torch_generator(0),
        max_iter=60,
        monotone=True,
        warn=False,
    )
    return prior


def learning(*names, criterion="leave-one-out"):
    """Settings of a fit that learns hyperparameters from factors that know no space."""
    stages = [WarmUp(), LearnHyperparameters(criterion), Settle()]
    return {"learn": names, "stages": stages, "scale_pf": "auto", "max_iter": 120}


@pytest.mark.parametrize("criterion", ["leave-one-out", "elbo"])
def test_learning_finds_better_hyperparameters(data, criterion):
    X, x, *_ = tissue(N=120)
    fit = fitted_in_space((X, x), **learning("lengthscale", "sigma", criterion=criterion))
    kernel = fit.model_.prior.kernel
    assert kernel.lengthscale.shape == (2,)
    assert ((kernel.lengthscale > 0.4 / 4) & (kernel.lengthscale < 0.4 * 4)).all()
    assert ((kernel.sigma > 0.3) & (kernel.sigma < 3)).all()
    search = HyperparameterSearch(
        fit.model_, as_counts(X), ["lengthscale"], criterion, np.random.RandomState(0)
    )
    profile = search.profile(fit.model_, [0.02, float(kernel.lengthscale.median()), 50.0])
    assert profile.argmin() == 1


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["leave-one-out", "elbo"])
@pytest.mark.parametrize(
    ("kernel", "names"), [("Matern12", ("RBF", "Matern12")), ("RBF", ("Matern12", "RBF"))]
)
def test_of_several_kernels_the_one_that_suits_the_fields_is_chosen(
    kernel, names, criterion, tmp_path
):
    data = tissue(N=300, kernel=kernel)
    settings = learning("lengthscale", "sigma", criterion=criterion)
    fit = fitted_in_space(data, kernel=names, **settings)
    assert fit.kernel_ == kernel
    alone = fitted_in_space(data, kernel=kernel, **settings)
    np.testing.assert_array_equal(get_factors(fit), get_factors(alone))
    fit.save(tmp_path / "model.npz")
    loaded, new = PNMF.load(tmp_path / "model.npz"), data[1][:5] + 0.01
    assert loaded.kernel_ == kernel
    np.testing.assert_array_equal(loaded.transform(None, new), fit.transform(None, new))


def leave_one_out_loss(kernel, x, X, W, y, noise, near=16):
    """Negative log-likelihood of samples, each predicted from the sites of the nearest others."""
    K = dense_fields.covariance(kernel, x, x, STEPS["lengthscale"], 1.0)
    level = (y / noise).sum(1) / (1 / noise).sum(1)
    total = 0.0
    for i in range(len(x)):
        distance = np.square(x - x[i]).sum(1)
        rest = np.argsort(distance)[1 : near + 1]
        parts = [
            dense_fields.regression(
                K[np.ix_(rest, rest)], K[rest][:, [i]], K[[i]][:, [i]], m, one[rest], spread[rest]
            )
            for m, one, spread in zip(level, y, noise, strict=True)
        ]
        factors = np.exp([mean[0] + variance[0, 0] / 2 for mean, variance in parts])
        total -= poisson.logpmf(X[i], W @ factors).sum()
    return total / len(x)


@pytest.mark.parametrize(("kernel", "share"), [("Matern12", 1), ("RBF", 1), ("Matern12", 0.15)])
def test_a_kernel_is_chosen_where_nothing_else_is_learned(kernel, share):
    """By the deviance of samples predicted without themselves, at the lengthscale that is given.

    The first, where few counts tell too little of the others.
    """
    X, x, *_ = tissue(N=80, kernel=kernel)
    X = np.random.default_rng(0).binomial(X.astype(int), share).astype(X.dtype)
    names = ("Matern32", "Matern12", "RBF")
    first = fitted_in_space((X, x), kernel=names[0]).model_
    y, noise = (one.numpy() for one in sites(first, as_counts(X)))
    W = first.W.data.detach().numpy()
    losses = {name: leave_one_out_loss(name, x, X, W, y, noise) for name in names}
    best, fit = min(losses, key=losses.get), fitted_in_space((X, x), kernel=names)
    told = len(X) * (losses[names[0]] - losses[best])
    assert 0 < told < 2 or share == 1
    assert fit.kernel_ == (best if share == 1 else names[0])
    assert best != names[0]


@pytest.mark.parametrize("kernel", [(), ("Matern32", "cubic"), 3])
def test_kernels_must_be_named(data, kernel):
    with pytest.raises(ValueError, match="kernel"):
        fitted_in_space(data, kernel=kernel)


def test_learned_group_difference_tells_shared_from_separate_fields():
    X, x, labels, *_ = tissue(N=120, groups=2)
    settings = {**STEPS, "multigroup": True, **learning("lengthscale", "group_diff_param")}
    shared = PNMF(2, **settings).fit(X, coordinates=x, groups=labels)
    flipped = x.copy()
    flipped[labels == "b"] = 1 - flipped[labels == "b"]  # the second slice is not aligned
    apart = PNMF(2, **settings).fit(X, coordinates=flipped, groups=labels)
    a, b = (one.model_.prior.kernel.group_diff_param.median() for one in (shared, apart))
    assert a < b
