"""A fit of counts that stay in a store: equal to that in memory, and written into the store."""

import os
import sys
import warnings

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning

import pnmf_pyro
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.data import stored
from pnmf_pyro.estimator import stored_fit
from tests.support.checkpoints import differing, writes

X = (
    np.random.default_rng(0)
    .poisson(
        np.exp(np.random.default_rng(1).normal(size=(150, 3)))
        @ np.random.default_rng(2).random((3, 20))
    )
    .astype(np.float32)
)
FLAT = {"n_components": 2, "max_iter": 30}
QUICK = {**FLAT, "init": "random", "max_iter": 6}
pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge", "ignore:.*zarr v2")


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    monkeypatch.setattr(stored, "SLICE_ENTRIES", 900)


def written(tmp_path, ending="h5ad", table=None, **parts):
    path = tmp_path / f"cells.{ending}"
    if ending == "zarr":
        pytest.importorskip("zarr")
    table = sp.csr_matrix(X) if table is None else table
    getattr(anndata.AnnData(table, **parts), f"write_{ending}")(path)
    return path


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_fit_equals_that_in_memory_and_is_written(tmp_path, ending, dense):
    path = written(tmp_path, ending, X if dense else None)
    settings = {**FLAT, "mode": "lower-bound", "size_factors": "total"}
    model = pnmf_pyro.fit(path, **settings)
    memory = pnmf_pyro.fit(X if dense else sp.csr_matrix(X), **settings)
    np.testing.assert_allclose(model.history_, memory.history_, rtol=1e-6)
    np.testing.assert_allclose(model.elbo_, memory.elbo_, rtol=1e-6)
    np.testing.assert_allclose(model.components_, memory.components_, rtol=1e-2, atol=1e-3)
    adata = getattr(anndata, f"read_{ending}")(path)
    table = adata.X if dense else adata.X.toarray()
    np.testing.assert_array_equal(table, X)
    np.testing.assert_allclose(adata.varm["PNMF_loadings"].T, model.components_)
    assert adata.obsm["X_pnmf"].shape == (150, 2)
    assert adata.uns["pnmf"]["elbo"] == pytest.approx(model.elbo_)
    assert "pnmf_size_factors" in adata.obs
    assert list(model.feature_names_in_) == list(adata.var_names)


def test_fixed_points_equal_those_in_memory(tmp_path):
    model = pnmf_pyro.fit(written(tmp_path), **FLAT)
    memory = pnmf_pyro.fit(sp.csr_matrix(X), **FLAT)
    np.testing.assert_allclose(model.history_, memory.history_, rtol=1e-6)
    error = np.hypot(model.elbo_se_, memory.elbo_se_)
    assert abs(model.elbo_ - memory.elbo_) < 5 * error


def test_batches_of_a_store(tmp_path):
    settings = {**FLAT, "batch_size": 50, "shuffle": False, "E": 1}
    model = pnmf_pyro.fit(written(tmp_path), **settings)
    memory = pnmf_pyro.fit(sp.csr_matrix(X), **settings)
    np.testing.assert_allclose(model.history_[:5], memory.history_[:5], rtol=1e-5)


@pytest.mark.parametrize("settings", [FLAT, {**FLAT, "batch_size": 50}])
def test_a_stopped_fit_goes_on_to_the_same_bits(settings, tmp_path, monkeypatch):
    path, kept = written(tmp_path), tmp_path / "run.ckpt"
    expected = pnmf_pyro.fit(path, **settings)

    def go_on():
        return pnmf_pyro.fit(path, **settings, checkpoint=kept, every=0)

    assert writes(go_on, monkeypatch, 12) == 12
    assert differing(go_on(), expected) == []
    other = X.copy()
    other[-1, :2] = other[-1, 1::-1]  # with the same sums
    assert (other != X).any()
    written(tmp_path, table=sp.csr_matrix(other))
    with pytest.raises(ValueError, match=r"another fit: X has changed\. Go on"):
        go_on()


def test_a_second_fit_takes_the_place_of_the_first(tmp_path):
    path = written(tmp_path)
    pnmf_pyro.fit(path, **QUICK)
    pnmf_pyro.fit(path, **{**QUICK, "n_components": 3})
    adata = anndata.read_h5ad(path)
    assert adata.obsm["X_pnmf"].shape == (150, 3)
    assert all("~" not in name for name in adata.obsm)


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_a_failed_write_keeps_what_is_there(tmp_path, monkeypatch, ending):
    path = written(tmp_path, ending)
    pnmf_pyro.fit(path, **QUICK)
    before = getattr(anndata, f"read_{ending}")(path)
    monkeypatch.setattr(
        stored_fit, "_elements", lambda *_: {"obsm/X_pnmf": np.zeros((150, 9)), "uns/x": object()}
    )
    with pytest.raises(Exception, match="x~pnmf-new"):
        pnmf_pyro.fit(path, **QUICK)
    after = getattr(anndata, f"read_{ending}")(path)
    np.testing.assert_array_equal(after.obsm["X_pnmf"], before.obsm["X_pnmf"])
    assert set(after.obsm) == set(before.obsm)
    assert set(after.uns) == set(before.uns)


def test_places_and_what_needs_memory_are_refused(tmp_path):
    path = written(tmp_path, obsm={"spatial": np.random.default_rng(0).random((150, 2))})
    with pytest.raises(ValueError, match="knows no space"):
        pnmf_pyro.fit(path, **QUICK)
    pnmf_pyro.fit(path, spatial_key=None, **QUICK)
    with pytest.raises(ValueError, match="mask is not for a store"):
        pnmf_pyro.fit(path, mask=X > 0, **QUICK)
    with pytest.raises(ValueError, match="likelihood is not for a store"):
        pnmf_pyro.fit(path, likelihood="negative-binomial", **QUICK)


def test_stores_that_cannot_be_used(tmp_path, monkeypatch):
    path = written(tmp_path)
    with pytest.raises(ValueError, match="There is no"):
        pnmf_pyro.fit(tmp_path / "other.h5ad")
    with pytest.raises(ValueError, match="has no layers/raw"):
        pnmf_pyro.fit(path, layer="raw")
    short = tmp_path / "short.h5ad"
    short.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot be read"):
        pnmf_pyro.fit(short)
    with h5py.File(path, "r+") as file:
        del file["X"]
    with pytest.raises(ValueError, match="has no X"):
        pnmf_pyro.fit(path)
    columns = written(tmp_path, table=sp.csc_matrix(X))
    with pytest.raises(ValueError, match="stored by columns"):
        pnmf_pyro.fit(columns)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="read-only"):
        pnmf_pyro.fit(columns)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(ImportError, match="pip install anndata"):
        pnmf_pyro.fit(columns)


def test_a_negative_count_in_the_last_slice_leaves_the_store_as_it_was(tmp_path):
    table = X.copy()
    table[-1, -1] = -2
    path = written(tmp_path, table=sp.csr_matrix(table))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rows \d+ to 149: .*negative"):
        pnmf_pyro.fit(path, **QUICK)
    assert path.read_bytes() == before


def test_a_backed_table_that_is_too_large_is_read_by_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_fit, "available_memory", lambda: 1000)
    backed = anndata.read_h5ad(written(tmp_path), backed="r")
    model = pnmf_pyro.fit(backed, **FLAT)
    memory = pnmf_pyro.fit(sp.csr_matrix(X), **FLAT)
    np.testing.assert_allclose(model.history_, memory.history_, rtol=1e-6)
    assert backed.isbacked
    assert backed.obsm["X_pnmf"].shape == (150, 2)
    backed.file.close()


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("available", [None, 1000])
def test_a_lazy_table_is_that_in_memory(available, tmp_path, monkeypatch):
    """It is read whole where memory suffices, and by slices where not."""
    for name in ("dask", "xarray", "zarr"):
        pytest.importorskip(name)
    if available is not None:
        monkeypatch.setattr(stored_fit, "available_memory", lambda: available)
    lazy = anndata.experimental.read_lazy(written(tmp_path, "zarr"))
    model = pnmf_pyro.fit(lazy, **FLAT)
    expected = pnmf_pyro.fit(sp.csr_matrix(X), **FLAT)
    np.testing.assert_allclose(model.components_, expected.components_, atol=1e-5)


def test_the_command_reads_a_large_file_by_slices(tmp_path, monkeypatch, capsys):
    path = written(tmp_path)
    monkeypatch.setattr(stored_fit, "available_memory", lambda: 1000)
    assert main(["fit", str(path), "--components", "2", "--out", str(tmp_path / "o.npz")]) != 0
    assert "--out must be" in capsys.readouterr().err
    told = ["fit", str(path), "--components", "2", "--out", str(path)]
    told += ["--checkpoint", str(tmp_path / "run.ckpt")]
    assert main(told) == 0
    assert "read by slices" in capsys.readouterr().out
    assert main([*told, "--seed", "1"]) == 2
    assert "random_state was 0, and is 1" in capsys.readouterr().err
    few = ["--set", "max_iter=3"]
    with warnings.catch_warnings():
        warnings.simplefilter("always", ConvergenceWarning)
        assert main(["fit", str(path), "--components", "2", "--out", str(path), *few]) == 1
    assert "X_pnmf" in anndata.read_h5ad(path).obsm


@pytest.mark.slow
def test_batches_come_as_high_as_full_steps_in_fewer_passes():
    """Within 0.3% of the ELBO; an early end, or loadings of single batches, lose far more."""
    r = np.random.default_rng(0)
    rates = np.exp(r.normal(size=(400, 2))) @ r.gamma(0.3, 2.0, (2, 20))
    table = sp.csr_matrix(r.poisson(rates).astype("f4"))
    settings = {"n_components": 2, "mode": "lower-bound", "init": "nndsvda"}
    full = pnmf_pyro.fit(table, **settings)
    batches = pnmf_pyro.fit(table, batch_size=20, shuffle=False, **settings)
    assert batches.elbo_ > full.elbo_ - 0.003 * abs(full.elbo_)
    assert batches.n_iter_ * 20 / 400 < full.n_iter_


@pytest.mark.slow
def test_batches_of_a_file_in_which_kinds_lie_together(tmp_path, monkeypatch):
    """Within 0.5% of the ELBO of full steps, which batches in its order miss by 2%."""
    monkeypatch.setattr(stored, "SLICE_ENTRIES", 1 << 20)
    r = np.random.default_rng(0)
    F = r.normal(size=(600, 4))
    F[np.arange(600), np.arange(600) // 150] += 2.5
    table = sp.csr_matrix(r.poisson(np.exp(F) @ r.gamma(0.3, 0.5, (4, 40))).astype("f4"))
    settings = {"n_components": 4, "mode": "lower-bound", "init": "nndsvda"}
    full = pnmf_pyro.fit(table, **settings)
    batches = pnmf_pyro.fit(written(tmp_path, table=table), batch_size=30, **settings)
    assert batches.elbo_ > full.elbo_ - 0.005 * abs(full.elbo_)
