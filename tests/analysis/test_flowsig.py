"""The layout of FlowSig, as the source of its version 0.5.5 reads it."""

import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro.analysis import to_flowsig

anndata = pytest.importorskip("anndata")


@pytest.fixture
def written(tmp_path):
    """An object that a fit and `to_flowsig` wrote to, from its file."""
    counts = np.random.default_rng(0).poisson(3, size=(30, 8)).astype(np.float32)
    adata = anndata.AnnData(counts)
    adata.var_names = [f"gene{i}" for i in range(8)]
    model = pnmf_pyro.fit(adata, n_components=3)
    to_flowsig(adata)
    adata.write_h5ad(tmp_path / "gems.h5ad")
    return anndata.read_h5ad(tmp_path / "gems.h5ad"), model


def test_expressions_of_modules_are_what_its_flows_are_made_of(written):
    """Rows divided by their sums, `gems / gems.sum(1)[:, None]`, one column for each module."""
    adata, model = written
    gems = adata.obsm["X_gem"]
    assert isinstance(gems, np.ndarray)
    assert gems.shape == (30, int(adata.uns["nsf_info"]["n_gems"])) == (30, 3)
    np.testing.assert_allclose(gems.sum(0), 1)
    scaled = gems / gems.sum(axis=1)[:, None]
    assert np.isfinite(scaled).all()
    assert (scaled >= 0).all()
    factors = pnmf_pyro.transforms.get_factors(model)
    np.testing.assert_allclose(gems, factors / factors.sum(0), rtol=1e-5)


def test_top_genes_are_read_from_loadings_by_feature(written):
    """Its `loadings.T[gem]` sorted, as names of `vars`."""
    adata, model = written
    info = adata.uns["nsf_info"]
    loadings, names = info["loadings"].T, np.array(info["vars"], dtype=object)
    assert loadings.shape == (3, 8)
    np.testing.assert_allclose(info["loadings"].sum(1), 1)
    np.testing.assert_allclose(adata.varm["H_gem"], info["loadings"])
    table = pnmf_pyro.top_features(model, 8)
    for gem in range(3):
        shares = table[table["component"] == gem].sort_values("share", ascending=False)
        first = names[np.argsort(-loadings[gem])]
        assert first[0] == shares["feature"].iloc[0]
    np.testing.assert_allclose(info["totals"], pnmf_pyro.contributions(model, "feature").sum(1))


def test_only_objects_with_a_fit_are_taken(written):
    _, model = written
    with pytest.raises(ValueError, match=r"^adata must be an AnnData object"):
        to_flowsig(model)
    with pytest.raises(ValueError, match="is not a fit in this AnnData object"):
        to_flowsig(anndata.AnnData(np.ones((3, 2))))
