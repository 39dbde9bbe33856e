"""Fits with components in space and others beside them, and how much is due to space."""

import anndata
import numpy as np
import pytest
import torch

import pnmf_pyro
from pnmf_pyro import PNMF, importance_of_space
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.stages import Settle
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior, SideBySide
from pnmf_pyro.training.arrangement import arrangement, autocorrelation
from pnmf_pyro.transforms import factor_uncertainty, get_factors, log_factors
from tests.support.settings import LOCAL, STEPS, unconverged

pytestmark = unconverged


def mixed(side=14, free=2, seed=0, D=60, total=400.0):
    """Counts of three smooth components and some free ones, places, log-factors and loadings."""
    random = np.random.default_rng(seed)
    x = random.uniform(0, side, (side**2, 2))
    F = np.empty((len(x), 3 + free))
    for l in range(3):
        w, b = random.normal(size=(100, 2)) / (3 + l), random.uniform(0, 2 * np.pi, 100)
        F[:, l] = np.sqrt(2 / 100) * np.cos(x @ w.T + b).sum(1)
    F[:, 3:] = random.normal(size=(len(x), free))
    W = random.gamma(0.2, size=(D, 3 + free))
    W *= total / (np.exp(F).mean(0) @ W.sum(0))
    return random.poisson(np.exp(F) @ W.T).astype(np.float32), x, F, W


@pytest.fixture(scope="module")
def data():
    return mixed()


@pytest.fixture(scope="module", params=["inducing points", "neighbours"])
def fitted(request, data):
    local = {} if request.param == "inducing points" else {"local": True}
    return pnmf_pyro.fit(data[0], data[1], n_components=5, non_spatial_components=2, **local)


def correlations(model, F):
    return np.abs(np.corrcoef(F.T, log_factors(model).T)[: F.shape[1], F.shape[1] :])


@pytest.mark.slow
def test_each_component_is_found_in_its_block(fitted, data):
    C = correlations(fitted, data[2])
    assert (C.argmax(1)[:3] < 3).all()
    assert (C.argmax(1)[3:] >= 3).all()
    assert len(set(C.argmax(1))) == 5
    assert C.max(1)[:3].min() > 0.9
    assert C.max(1)[3:].min() > 0.85


def test_parts_are_those_that_were_asked_for(fitted):
    field, rest = fitted.model_.prior.parts
    assert isinstance(field, LCGP if fitted.local else SVGP)
    assert isinstance(rest, GaussianPrior)
    assert (field.L, rest.L) == (3, 2)
    assert len(field.kernel.sigma) == 3
    assert fitted.kernel_ == field.kernel.name


def test_new_places_samples_and_files(fitted, data, tmp_path):
    X, x, *_ = data
    new = fitted.transform(None, x[:4] + 0.1)
    scale = float(fitted.model_.prior.parts[1].scale_pf)
    np.testing.assert_allclose(new[:, 3:], np.exp(scale**2 / 2), rtol=1e-5)
    near = get_factors(fitted)[:4, :3]
    np.testing.assert_allclose(new[:, :3], near, rtol=0.5)
    assert np.isfinite(fitted.score(X[:4], coordinates=x[:4]))
    assert (factor_uncertainty(fitted) > 0).all()
    assert fitted.model_.prior.joint_covariance.shape == (len(X), 15)
    fitted.save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(again.transform(None, x[:4] + 0.1), new)
    np.testing.assert_array_equal(get_factors(again), get_factors(fitted))


def test_importance_of_space_is_the_share_of_expected_counts(fitted, data):
    f, W = get_factors(fitted).astype(float), fitted.components_.T.astype(float)
    rates = f[:, :, None] * W.T[None]  # samples, components, features
    for of, kept in (("features", 2), ("samples", 0)):
        others = tuple(axis for axis in range(3) if axis not in (1, kept))
        by = rates.sum(others)
        by = by if kept == 0 else by.T
        wanted = by[:, :3].sum(1) / by.sum(1)
        table = importance_of_space(fitted, of)
        np.testing.assert_allclose(table["importance"], wanted, rtol=1e-5)
    table = importance_of_space(fitted, "components")
    np.testing.assert_allclose(table["share"], rates.sum((0, 2)) / rates.sum(), rtol=1e-5)
    assert table["in_space"].tolist() == [True] * 3 + [False] * 2
    expected = np.exp(data[2]) * data[3].sum(0)
    true = expected[:, :3].sum(1) / expected.sum(1)
    found = importance_of_space(fitted, "samples")["importance"]
    assert np.corrcoef(true, found)[0, 1] > 0.9


def test_importance_needs_both_kinds(data):
    X, x, *_ = data
    without = PNMF(2, random_state=0, max_iter=3).fit(X)
    within = PNMF(2, **{**STEPS, "max_iter": 3}).fit(X, coordinates=x)
    for model, words in ((without, "know no space"), (within, "are fields")):
        with pytest.raises(ValueError, match=words):
            importance_of_space(model)
    with pytest.raises(ValueError, match="of must be"):
        importance_of_space(within, "genes")


def test_annotated_data_and_the_command_line(data, tmp_path):
    X, x, *_ = data
    adata = anndata.AnnData(X, obsm={"spatial": x})
    model = pnmf_pyro.fit(adata, n_components=4, non_spatial_components=1, max_iter=30)
    assert list(adata.uns["pnmf"]["in_space"]) == [True] * 3 + [False]
    np.testing.assert_allclose(
        adata.obs["pnmf_importance_of_space"], importance_of_space(model, "samples")["importance"]
    )
    path = tmp_path / "section.h5ad"
    adata.write_h5ad(path)
    read = anndata.read_h5ad(path)
    np.testing.assert_allclose(
        importance_of_space(read)["importance"], adata.var["pnmf_importance_of_space"]
    )
    out, saved = str(tmp_path / "factors.h5ad"), str(tmp_path / "model.npz")
    options = ["--components", "4", "--non-spatial-components", "1", "--quiet"]
    options += ["--set", "max_iter=30", "--out", out, "--save-model", saved]
    main(["fit", str(path), *options])
    again = PNMF.load(saved)
    assert again.non_spatial_components == 1
    np.testing.assert_allclose(again.components_, model.components_, rtol=1e-4)


@pytest.mark.parametrize("kind", [STEPS, LOCAL])
def test_the_estimator_arranges_components_as_well(data, kind):
    X, x, F, _ = data
    model = PNMF(5, **{**kind, "lengthscale": 3.0, "max_iter": 200}, non_spatial_components=2)
    model.fit(X, coordinates=x)
    found = correlations(model, F).argmax(1)
    assert (found[3:] >= 3).all()


def test_a_prior_of_priors_as_an_object(data):
    X, x, F, _ = data
    places, y = Places(torch.from_numpy(x)), torch.empty(X.T.shape, device="meta")
    field = LCGP("Matern32", places, 3, K=20, use_natural_gradients=True)
    prior = SideBySide(field, GaussianPrior(y, 2, use_natural_gradients=True))
    model = pnmf_pyro.fit(X, n_components=5, prior=prior)
    C = correlations(model, F).argmax(1)
    assert (C[:3] < 3).all()
    assert (C[3:] >= 3).all()


def test_of_one_prior_fits_as_that_prior(data):
    X, x, *_ = data
    places = Places(torch.from_numpy(x))

    def field():
        return SVGP("Matern32", places, places, 2, use_natural_gradients=True)

    given = {"n_components": 2, "stages": [Settle()], "max_iter": 15, "init": "nndsvda"}
    one, other = (pnmf_pyro.fit(X, prior=p, **given) for p in (field(), SideBySide(field())))
    assert one.elbo_ == pytest.approx(other.elbo_, rel=1e-6)
    np.testing.assert_allclose(get_factors(one), get_factors(other), rtol=1e-4)


def test_bad_numbers_of_components(data):
    X, x, *_ = data
    for wrong in (3, 7):
        with pytest.raises(ValueError, match="must be smaller than n_components=3"):
            pnmf_pyro.fit(X, x, n_components=3, non_spatial_components=wrong)
    for wrong in (-1, 1.5, "2", None):
        with pytest.raises(ValueError, match="non_spatial_components"):
            pnmf_pyro.fit(X, x, n_components=3, non_spatial_components=wrong)
    with pytest.warns(UserWarning, match="non_spatial_components=1 has no effect"):
        pnmf_pyro.fit(X, n_components=3, non_spatial_components=1, max_iter=3)


# --- the arrangement


def dense_autocorrelation(F, x, groups, K=16):
    """Moran's I over the K nearest samples of the same group, sample by sample."""
    found = []
    for values in F:
        z = values.copy()
        for group in np.unique(groups):
            z[groups == group] -= z[groups == group].mean()
        products = 0.0
        for i in range(len(x)):
            mine = [k for k in range(len(x)) if k != i and groups[k] == groups[i]]
            nearest = sorted(mine, key=lambda k: np.linalg.norm(x[k] - x[i]))[:K]
            products += z[i] * z[nearest].mean()
        found.append(products / (z**2).sum())
    return np.array(found)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_autocorrelation_is_morans(n_groups):
    _, x, F, _ = mixed(side=8)
    groups = np.arange(len(x)) % n_groups
    F = F.T + groups
    places = Places(torch.from_numpy(x), torch.from_numpy(groups) if n_groups > 1 else None)
    found = autocorrelation(torch.from_numpy(F), places)
    np.testing.assert_allclose(found, dense_autocorrelation(F, x, groups), atol=1e-9)
    assert found[:3].min() > found[3:].max()


def test_the_smoothest_go_to_fields_in_the_order_they_had():
    _, x, F, _ = mixed(side=8)
    y = torch.empty(5, len(x), device="meta")
    places = Places(torch.from_numpy(x))
    field, rest = LCGP("Matern32", places, 3, K=5), GaussianPrior(y, 2)
    shuffled = torch.from_numpy(F.T[[3, 1, 4, 0, 2]])
    assert arrangement(SideBySide(field, rest), shuffled).tolist() == [1, 3, 4, 0, 2]
    assert arrangement(SideBySide(rest, field), shuffled).tolist() == [0, 2, 1, 3, 4]
    assert arrangement(field, shuffled) is None
    assert arrangement(rest, shuffled) is None
