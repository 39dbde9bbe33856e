"""AnnData objects: what is read from them, what is written, and what other packages do with it."""

import logging
import re

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pyro.contrib.gp.kernels import RBF, Matern32

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.results import ModelResults, results_of
from pnmf_pyro.estimator.stages import Settle, WarmUp
from pnmf_pyro.gp.multi_group import MultiGroupKernel
from pnmf_pyro.transforms import factor_uncertainty, get_factors, get_loadings
from tests.support.data import tissue

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

QUICK = {"n_components": 2, "max_iter": 30, "tol": 1e-2}
FLAT = {**QUICK, "spatial_key": None}


def section(groups=1, matrix=sp.csr_matrix, N=60):
    X, x, labels, _, _ = tissue(N=N, groups=groups)
    return anndata.AnnData(
        matrix(X.astype(np.float32)),
        obs=pd.DataFrame({"section": pd.Categorical(labels)}, [f"spot{i}" for i in range(N)]),
        var=pd.DataFrame(index=[f"gene{j}" for j in range(X.shape[1])]),
        obsm={"spatial": x},
        layers={"counts": matrix(X)},
    )


def assert_holds(adata, model, key="pnmf", name="PNMF"):
    """The object holds what the model found, to the last bit."""
    np.testing.assert_array_equal(adata.obsm[f"X_{key}"], get_factors(model))
    sigma = factor_uncertainty(model)
    np.testing.assert_array_equal(adata.obsm[f"X_{key}_log_sd"], sigma)
    sd = get_factors(model) * np.sqrt(np.exp(sigma**2) - 1)
    np.testing.assert_allclose(adata.obsm[f"X_{key}_sd"], sd, rtol=1e-4)
    np.testing.assert_array_equal(adata.varm[f"{name}_loadings"], get_loadings(model))
    found = adata.uns[key]
    np.testing.assert_array_equal(found["elbo_history"], model.history_)
    assert found["elbo"] == model.elbo_
    assert found["n_iter"] == model.n_iter_
    assert found["version"] == pnmf_pyro.__version__
    assert found["seed"] == found["parameters"]["random_state"] == 0
    assert found["parameters"]["n_components"] == 2


def leaves(value):
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    return [value]


@pytest.fixture(scope="module")
def spatial():
    adata = section()
    return adata, pnmf_pyro.fit(adata, **QUICK)


def test_coordinates_make_the_fit_spatial(spatial):
    adata, model = spatial
    assert isinstance(model, PNMF)
    assert model.spatial
    assert_holds(adata, model)
    assert adata.uns["pnmf"]["spatial_key"] == "spatial"
    assert not {"layer", "batch_key"} & set(adata.uns["pnmf"])
    arrays = pnmf_pyro.fit(adata.X, adata.obsm["spatial"], **QUICK)
    np.testing.assert_array_equal(get_factors(arrays), get_factors(model))
    lengthscales = adata.uns["pnmf"]["hyperparameters"]["lengthscale"]
    np.testing.assert_array_equal(lengthscales, model.model_.prior.kernel.lengthscale)
    assert len(lengthscales) == 2
    assert adata.uns["pnmf"]["kernel"] == model.kernel_


@pytest.mark.parametrize("options", [{"spatial_key": None}, {"spatial": False}])
def test_a_fit_without_space_on_request(options):
    adata = section()
    model = pnmf_pyro.fit(adata, **QUICK, **options)
    assert not model.spatial
    assert_holds(adata, model)
    assert not {"spatial_key", "hyperparameters"} & set(adata.uns["pnmf"])


def test_a_fit_without_space_where_there_are_no_coordinates(caplog):
    adata = section()
    del adata.obsm["spatial"]
    with caplog.at_level(logging.INFO, logger="pnmf_pyro"):
        assert not pnmf_pyro.fit(adata, **QUICK).spatial
    assert "knows no space" in caplog.text


def test_batches_are_groups():
    adata = section(groups=2, N=80)
    model = pnmf_pyro.fit(adata, batch_key="section", **QUICK)
    assert model.multigroup
    assert model.groups_ == ["a", "b"]
    assert adata.uns["pnmf"]["batch_key"] == "section"
    np.testing.assert_array_equal(results_of(adata).groups, adata.obs["section"])
    np.testing.assert_array_equal(ModelResults(model).groups, adata.obs["section"])


def test_keys_derive_from_key_added_and_fits_stay_apart():
    adata = section()
    first = pnmf_pyro.fit(adata, **FLAT)
    second = pnmf_pyro.fit(adata, key_added="other", **{**FLAT, "mode": "lower-bound"})
    assert_holds(adata, first)
    assert_holds(adata, second, "other", "OTHER")
    assert (results_of(adata, "other").factors != results_of(adata).factors).any()


def test_layer_size_factors_and_names():
    adata = section()
    adata.layers["double"] = adata.X * 2
    s = np.linspace(0.5, 2, 60)
    model = pnmf_pyro.fit(adata, layer="double", size_factors=s, **FLAT)
    arrays = pnmf_pyro.fit(
        adata.layers["double"], size_factors=s, n_components=2, max_iter=30, tol=1e-2
    )
    np.testing.assert_array_equal(get_factors(arrays), get_factors(model))
    np.testing.assert_allclose(adata.obs["pnmf_size_factors"], s, rtol=1e-6)
    assert adata.uns["pnmf"]["layer"] == "double"
    assert list(model.feature_names_in_) == list(adata.var_names)
    assert model.transform(adata.layers["double"], size_factors=s).shape == (60, 2)


def test_data_frames_of_factors_have_the_names_of_the_object():
    """scikit-learn numbers the rows of what is no data frame."""
    adata = section()
    model = PNMF(2, max_iter=30).set_output(transform="pandas")
    whole, part = model.fit_transform(adata), model.transform(X=adata[20:])
    assert list(whole.index) == list(adata.obs_names)
    assert list(part.index) == list(adata.obs_names[20:])
    assert list(part.columns) == ["pnmf0", "pnmf1"]
    np.testing.assert_array_equal(whole, get_factors(model))
    assert isinstance(model.set_output(transform="default").transform(adata), np.ndarray)


def test_a_later_fit_leaves_no_columns_of_the_one_before():
    adata = section()
    adata.obs["mine"] = 1.0
    pnmf_pyro.fit(adata, non_spatial_components=1, size_factors="total", **QUICK)
    assert {"pnmf_size_factors", "pnmf_importance_of_space", "mine"} <= set(adata.obs)
    assert list(adata.var) == ["pnmf_importance_of_space"]
    pnmf_pyro.fit(adata, likelihood="negative-binomial", **FLAT)
    assert list(adata.obs) == ["section", "mine"]
    assert list(adata.var) == ["pnmf_dispersion"]
    pnmf_pyro.fit(adata, **FLAT)
    assert list(adata.obs) == ["section", "mine"]
    assert list(adata.var) == []


@pytest.mark.filterwarnings("ignore:.*zarr v2:UserWarning")
@pytest.mark.parametrize("format", ["h5ad", "zarr"])
def test_results_survive_a_file(format, spatial, tmp_path):
    if format == "zarr":
        pytest.importorskip("zarr", reason="zarr is not installed")
    adata, model = spatial
    path = tmp_path / f"section.{format}"
    getattr(adata, f"write_{format}")(path)
    read = getattr(anndata, f"read_{format}")(path)
    assert_holds(read, model)
    back = results_of(read)
    for name in ("factors", "factors_sd", "loadings", "coordinates", "elbo_history"):
        np.testing.assert_array_equal(getattr(back, name), getattr(results_of(adata), name))
    assert back.stages == results_of(adata).stages == model.history_.stages
    assert list(back.feature_names) == list(adata.var_names)


def test_the_settings_are_plain(spatial):
    adata, _ = spatial
    plain = (bool, int, float, str, list, np.ndarray)
    for leaf in leaves(adata.uns["pnmf"]):
        assert isinstance(leaf, plain), leaf
        assert np.asarray(leaf).dtype != object
    with_objects = section()
    kernels = (MultiGroupKernel(Matern32(2), np.zeros((1, 1))), [RBF(2), "Matern12"])
    for kernel, name in zip(kernels, ("MultiGroupKernel", ["RBF", "Matern12"]), strict=True):
        groups = "section" if kernel is kernels[0] else None
        stages = [WarmUp(), Settle(kl_weight=0.5)]
        pnmf_pyro.fit(with_objects, batch_key=groups, kernel=kernel, stages=stages, **QUICK)
        parameters = with_objects.uns["pnmf"]["parameters"]
        assert parameters["kernel"] == name
        assert parameters["stages"] == [
            *("WarmUp(kl_weight=1.0, levels=None)", "Settle(mode=None, kl_weight=0.5)"),
        ]


@pytest.mark.parametrize("matrix", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_a_file_that_stays_on_disk(matrix, tmp_path):
    path = tmp_path / "section.h5ad"
    section(matrix=matrix).write_h5ad(path)
    backed = anndata.read_h5ad(path, backed="r+")
    model = pnmf_pyro.fit(backed, **FLAT)
    assert backed.isbacked
    assert_holds(backed, model)
    backed.write()
    backed.file.close()
    assert_holds(anndata.read_h5ad(path), model)


@pytest.mark.parametrize("matrix", [sp.csr_matrix, np.asarray])
def test_views(matrix, tmp_path):
    adata = section(matrix=matrix)
    view = adata[:40]
    model = pnmf_pyro.fit(view, **FLAT)
    assert not view.is_view
    assert_holds(view, model)
    assert "X_pnmf" not in adata.obsm
    path = tmp_path / "section.h5ad"
    adata.write_h5ad(path)
    backed = anndata.read_h5ad(path, backed="r")[:40]
    with pytest.raises(ValueError, match="copy=True"):
        pnmf_pyro.fit(backed, **FLAT)
    again, copied = pnmf_pyro.fit(backed, copy=True, **FLAT)
    assert_holds(copied, again)
    np.testing.assert_array_equal(get_factors(again), get_factors(model))


def test_copy_leaves_the_object_alone():
    adata = section()
    model, copied = pnmf_pyro.fit(adata, copy=True, **FLAT)
    assert_holds(copied, model)
    assert not adata.uns
    assert set(adata.obsm) == {"spatial"}
    assert not adata.varm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "raw"}, r"layer='raw' is not there; its layers are \['counts'\]"),
        ({"spatial_key": "xy"}, r"spatial_key='xy' is not in adata.obsm, which has \['spatial'\]"),
        ({"batch_key": "slice"}, r"batch_key='slice' .* which has \['section'\]"),
        ({"batch_key": "section", "spatial_key": None}, "name the coordinates with spatial_key"),
        ({"coords": np.zeros((60, 2))}, "named by spatial_key"),
        ({"groups": ["a"] * 60}, "named by spatial_key"),
    ],
)
def test_keys_that_cannot_be_read(options, message):
    with pytest.raises(ValueError, match=message):
        pnmf_pyro.fit(section(), **options)


def test_more_keys_that_cannot_be_read():
    adata = section()
    del adata.obsm["spatial"]
    with pytest.raises(ValueError, match=r"spatial_key='spatial' is not in adata.obsm"):
        pnmf_pyro.fit(adata, spatial=True)
    adata.X = None
    with pytest.raises(ValueError, match=r"adata has no X; name a layer.*\['counts'\]"):
        pnmf_pyro.fit(adata)
    for name, value in {"layer": "counts", "batch_key": "section", "copy": True}.items():
        with pytest.raises(ValueError, match=f"{name} is for AnnData objects"):
            pnmf_pyro.fit(np.ones((60, 5)), **{name: value})


def test_results_that_are_not_there(spatial):
    adata, _ = spatial
    with pytest.raises(ValueError, match=r"the fits in it are \['pnmf'\]"):
        results_of(adata, "other")
    with pytest.raises(ValueError, match=r"fit must be a fitted PNMF, an AnnData .* got ndarray"):
        results_of(np.ones((2, 2)))


@pytest.mark.filterwarnings("ignore:X is not made of counts:UserWarning")
def test_warnings_of_what_may_be_a_mistake():
    adata = section()
    adata.X = adata.X / 2.5
    with pytest.warns(UserWarning, match="layer='counts'") as caught:
        pnmf_pyro.fit(adata, **FLAT)
    assert caught[0].filename == __file__
    adata = section()
    adata.uns["spatial"] = {"one": {}, "two": {}}
    with pytest.warns(UserWarning, match="2 sections") as caught:
        pnmf_pyro.fit(adata, **QUICK)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("column", ["section", "library_id", "Tissue_Section", "Sample ID"])
def test_sections_over_one_another_are_told_with_what_to_pass(column):
    adata = section()
    adata.obs = pd.DataFrame({"type": ["a", "b"] * 30, column: ["s1", "s2"] * 30}, adata.obs_names)
    said = (
        f"adata holds 2 sections over one another, by obs['{column}'] (pass batch_key='{column}')"
    )
    with pytest.warns(UserWarning, match=re.escape(said)):
        AnnDataKeys().places(adata)
    AnnDataKeys(batch_key=column).places(adata)
    AnnDataKeys(spatial_key=None).places(adata)
    AnnDataKeys().where(adata, None, adata.obs[column])
    adata.obsm["spatial"][1::2, 0] += 2 * np.ptp(adata.obsm["spatial"][:, 0])  # side by side
    AnnDataKeys().places(adata)


def test_a_view_of_real_sections(data_file):
    adata = anndata.read_h5ad(data_file("st_breast_4sections"))
    totals = np.ravel(adata.X.sum(0))
    part = adata[::5, np.argsort(-totals)[:30]]
    model = pnmf_pyro.fit(part, batch_key="section", size_factors="total", **QUICK)
    assert_holds(part, model)
    assert model.groups_ == sorted(adata.obs["section"].unique())
    score = pnmf_pyro.spatial_scores(part, of="features")["score"]
    assert score.notna().mean() > 0.9


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
def test_scanpy_reads_the_factors(spatial):
    sc = pytest.importorskip("scanpy", reason="scanpy is not installed: pip install '.[scverse]'")
    adata = spatial[0].copy()
    sc.pp.neighbors(adata, use_rep="X_pnmf", n_neighbors=8)
    assert adata.obsp["connectivities"].nnz > 60
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2)
    axes = sc.pl.embedding(adata, "pnmf", color="leiden", show=False)
    assert axes.get_xlabel() == "pnmf1"
    sc.tl.umap(adata, maxiter=5)
    frame = sc.get.obs_df(adata, obsm_keys=[("X_pnmf", 0)])
    np.testing.assert_allclose(frame["X_pnmf-0"], adata.obsm["X_pnmf"][:, 0])


def morans_i(values, near):
    """Moran's I of each column; each sample weighs its neighbours alike."""
    weights = near / near.sum(1, keepdims=True)
    z = values - values.mean(0)
    return (z * (weights @ z)).sum(0) / (z**2).sum(0)


@pytest.mark.filterwarnings("ignore")
def test_squidpy_reads_the_factors(spatial):
    sq = pytest.importorskip("squidpy", reason="squidpy is not installed: pip install '.[scverse]'")
    adata = spatial[0].copy()
    sq.gr.spatial_neighbors(adata, coord_type="generic", n_neighs=6)
    wide = sq.pl.extract(adata, "X_pnmf", prefix="pnmf")
    sq.gr.spatial_autocorr(wide, mode="moran", attr="obs", genes=["pnmf_0", "pnmf_1"])
    found = wide.uns["moranI"]["I"][["pnmf_0", "pnmf_1"]]
    near = adata.obsp["spatial_connectivities"].toarray() > 0
    np.testing.assert_allclose(found, morans_i(adata.obsm["X_pnmf"], near), rtol=1e-4)
    assert (found > 0.3).all()
    sq.pl.spatial_scatter(wide, color=["pnmf_0", "pnmf_1"], shape=None)
