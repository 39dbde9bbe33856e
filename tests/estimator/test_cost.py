"""What a fit will do and cost: the plan against the fit, and fits that memory cannot hold."""

import logging
import warnings

import anndata
import numpy as np
import pyro
import pytest
import scipy.sparse as sp
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data.tables import number_stored
from pnmf_pyro.estimator import calibration, inputs, size
from pnmf_pyro.estimator.inputs import read_data
from pnmf_pyro.estimator.size import Size
from pnmf_pyro.estimator.stages import Settle
from pnmf_pyro.priors import GaussianPrior

KINDS = {
    "no space": {},
    "few places": {"n": 60},
    "neighbours": {"n": 60, "local": True, "K": 7},
    "inducing points": {"n": 60, "num_inducing": 20},
    "groups": {"n": 60, "groups": True},
    "levels": {"n": 700, "mean": 120.0, "local": True, "K": 7},
    "Adam": {"training_mode": "standard", "loadings_mode": "softplus", "max_iter": 30},
    "another likelihood": {
        "likelihood": lambda poisson, batch: pyro.distributions.Poisson(poisson.mean).to_event(1)
    },
}


def data(n=80, mean=60.0, space=True, groups=False):
    random = np.random.default_rng(0)
    X = sp.csr_matrix(random.poisson(mean / 12, (n, 12)).astype(np.float32))
    coords = random.uniform(0, 20, (n, 2)) if space else None
    return X, coords, random.integers(2, size=n) if groups else None


@pytest.fixture(params=KINDS)
def case(request):
    given = dict(KINDS[request.param])
    shape = {name: given.pop(name) for name in ("n", "mean", "groups") if name in given}
    return data(space="n" in shape, **shape), {"n_components": 2, "max_iter": 60, **given}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Time each stage for a moment."""
    monkeypatch.setattr(calibration, "SECONDS", 0.02)


def quietly(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def test_the_plan_says_what_the_fit_does(case, caplog):
    (X, coords, groups), parameters = case
    plan = quietly(lambda: pnmf_pyro.plan(X, coords, groups, **parameters))
    with caplog.at_level(logging.INFO, logger="pnmf_pyro"):
        model = quietly(lambda: pnmf_pyro.fit(X, coords, groups, **parameters))
    prior = model.model_.prior
    assert (plan.n_samples, plan.n_features) == X.shape
    assert (plan.n_stored, plan.n_components) == (X.nnz, 2)
    assert plan.prior == type(prior).__name__
    assert plan.n_inducing == getattr(prior, "M", 0)
    assert plan.n_neighbours == (prior.neighborhoods.K if plan.prior == "LCGP" else 0)
    bins = [line.message.split()[0] for line in caplog.records if " bins: " in line.message]
    assert list(plan.levels) == [int(number) for number in bins]
    trained = [name for name, *_ in model.history_.stages]
    known = ("start", "hyperparameters", "correlation", "spread", "ELBO")
    names = [stage.name for stage in plan.stages]
    assert [name for name in names if name not in known and "bins" not in name] == trained
    assert names[0] == "start"
    assert names[-1] == "ELBO"
    assert plan.seconds > 0
    assert plan.minutes == plan.seconds / 60


def test_levels_are_planned():
    X, coords, _ = data(n=700, mean=120.0)
    plan = pnmf_pyro.plan(X, coords, n_components=1, local=True, K=7)
    assert plan.levels == (44, 175)
    assert [stage.name for stage in plan.stages][1:4] == ["44 bins", "175 bins", "samples"]
    assert "44 and 175 bins of places first" in str(plan)


def test_the_steps_of_all_stages_are_at_most_max_iter():
    X, coords, _ = data()
    plan = pnmf_pyro.plan(X, coords, n_components=2, max_iter=9, init="random")
    assert sum(s.steps for s in plan.stages if s.name != "hyperparameters") <= 9


def test_the_plan_leaves_the_settings_and_their_seed_alone():
    X, coords, _ = data()
    random = np.random.RandomState(3)
    before = random.get_state()[1].copy()
    pnmf_pyro.plan(X, coords, n_components=2, random_state=random)
    assert (random.get_state()[1] == before).all()
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    pnmf_pyro.plan(X, n_components=2)
    assert torch.equal(torch.rand(1), wanted)


def test_a_fit_is_the_same_with_a_plan_and_without(capsys):
    X, coords, _ = data()
    shown, silent = (
        pnmf_pyro.fit(X, coords, n_components=2, verbose=verbose) for verbose in (1, 0)
    )
    assert shown.history_ == silent.history_
    np.testing.assert_array_equal(shown.components_, silent.components_)


def test_a_fit_says_its_plan_and_shows_one_bar(capsys):
    X, coords, _ = data()
    pnmf_pyro.fit(X, coords, n_components=2, verbose=1)
    said = capsys.readouterr()
    assert said.out == ""
    plan, _, bar = said.err.partition("\n\r")
    assert plan.startswith("table    80 samples x 12 features")
    assert "fields through 80 inducing points (SVGP)" in plan
    for name in ("warm-up:", "hyperparameters:", "settle:", "loadings:", "ELBO: 100%"):
        assert name in bar
    assert "ELBO -" in bar
    assert bar.count("\n") == 1


def test_the_plan_reads_anndata_as_fit_does():
    X, coords, _ = data()
    adata = anndata.AnnData(X, obsm={"spatial": coords})
    adata.layers["large"] = X.multiply(X > 3).tocsr()
    plan = quietly(lambda: pnmf_pyro.plan(adata, n_components=2, layer="large"))
    assert plan.prior == "SVGP"
    assert plan.n_stored == (X > 3).nnz
    assert pnmf_pyro.plan(adata, n_components=2, spatial_key=None).prior == "GaussianPrior"
    assert list(adata.obsm) == ["spatial"]
    with pytest.raises(ValueError, match="leave coords and groups out"):
        pnmf_pyro.plan(adata, coords)
    with pytest.raises(ValueError, match="layer is for AnnData"):
        pnmf_pyro.plan(X, layer="large")


def test_a_prior_that_is_an_object_is_planned():
    X, _, _ = data()
    prior = GaussianPrior(torch.empty(12, 80), 3, use_natural_gradients=True)
    plan = pnmf_pyro.plan(X, n_components=3, prior=prior)
    assert plan.prior == "GaussianPrior"
    assert "no space" in str(plan)


def test_time_grows_with_the_work_that_is_known():
    X, coords, _ = data(n=400)
    plan = pnmf_pyro.plan(X, coords, n_components=8, local=True, K=30)
    saved = {saving.change: saving for saving in plan.savings}
    assert saved["n_components=4"].seconds < 0.9 * plan.seconds
    assert saved["n_components=4"].memory < plan.memory
    assert "n_components=4: " in str(plan).partition("cheaper")[2]


def test_memory_grows_with_each_number():
    base = Size(1000, 100, 5000, 8, "LCGP", 0, 20, 8, 0)
    for change in ("samples", "features", "stored", "components", "neighbours", "sets"):
        assert Size(**{**vars(base), change: 10**5}).memory > base.memory
    inducing = Size(1000, 100, 5000, 8, "SVGP", 100, 0, 8)
    assert Size(**{**vars(inducing), "inducing": 1000}).memory > inducing.memory


@pytest.fixture
def little(monkeypatch):
    """A machine with 200 MB left, on which nothing of a fit's data may be allocated."""
    monkeypatch.setattr(size, "available_memory", lambda: 200e6)

    def touched(*given, **named):
        raise AssertionError("the table was looked at")

    monkeypatch.setattr(inputs, "check_table", touched)


LARGE = sp.csr_matrix((400_000, 50), dtype=np.float32)


@pytest.mark.parametrize(
    "fit",
    [
        lambda: pnmf_pyro.fit(LARGE, n_components=20),
        lambda: PNMF(20).fit(LARGE),
        lambda: PNMF(20).fit_transform(anndata.AnnData(LARGE)),
        lambda: pnmf_pyro.fit(LARGE, np.zeros((400_000, 2)), n_components=20),
        lambda: PNMF(20, spatial=True).fit(LARGE, coordinates=np.zeros((400_000, 2))),
    ],
)
def test_a_fit_that_memory_cannot_hold_is_refused_with_numbers(fit, little):
    with pytest.raises(ValueError, match="400,000 samples x 50 features, 0 stored") as refusal:
        fit()
    said = str(refusal.value)
    assert "n_components=20 takes about " in said
    assert "0.2 GB are available" in said
    assert "n_components=10 takes " in said
    assert "fewer samples" in said


def test_a_refused_fit_leaves_the_estimator_as_it_was(monkeypatch):
    X, _, _ = data()
    model = quietly(lambda: PNMF(2, max_iter=5, random_state=0).fit(X))
    before = dict(vars(model))
    monkeypatch.setattr(size, "available_memory", lambda: 1e6)
    with pytest.raises(ValueError, match="memory"):
        model.fit(X)
    assert vars(model) == before


def test_the_plan_of_a_fit_that_memory_cannot_hold_says_so(monkeypatch):
    X, _, _ = data()
    for module in (size, pnmf_pyro.estimator.cost):
        monkeypatch.setattr(module, "available_memory", lambda: 1e6)
    plan = pnmf_pyro.plan(X, n_components=2)
    assert not plan.fits
    assert "too much, fit will refuse it" in str(plan)


def test_stored_counts_are_those_of_every_kind_of_table():
    X, _, _ = data()
    dense = X.toarray()
    settings = PNMF(2)
    for table in (X, dense, torch.from_numpy(dense), torch.from_numpy(dense).to_sparse()):
        counts = read_data(settings, table, None, None).counts
        assert number_stored(table) == counts.values.numel()


def test_stages_of_ones_own_are_planned():
    X, _, _ = data()
    plan = pnmf_pyro.plan(X, n_components=2, stages=[Settle(mode="lower-bound"), Settle()])
    assert [stage.name for stage in plan.stages] == ["start", "settle", "settle", "ELBO"]
