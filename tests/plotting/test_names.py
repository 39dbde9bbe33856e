"""Names with signs of mathematics in plots: drawn as they are."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from pnmf_pyro import fit, plotting

NAMES = ["a$1$", r"$\x$", "$$", "plain"]


@pytest.fixture(scope="module")
def model():
    X = np.random.default_rng(0).poisson(3.0, size=(20, 4))
    return fit(pd.DataFrame(X, columns=NAMES), n_components=2)


def drawn(labels):
    """What matplotlib draws of labels, and whether as mathematics."""
    return {label._preprocess_math(label.get_text()) for label in labels}


@pytest.mark.parametrize("plot", [plotting.plot_top_features, plotting.plot_loadings])
def test_names_of_features(plot, model):
    ax = np.ravel(plot(model, 4))[0]
    ax.figure.canvas.draw()
    assert drawn(ax.get_yticklabels()) == {(name, False) for name in NAMES}


def test_long_names_of_a_volcano_stand_beside_it_and_not_on_each_other():
    rng = np.random.default_rng(1)
    W = np.kron(np.eye(2), np.full((5, 1), 4.0)) + 0.5
    X = rng.poisson(rng.gamma(1.0, 1.0, size=(200, 2)) @ W.T)
    names = [f"a species with quite a long name {j}" for j in range(10)]
    axes = plotting.plot_volcano(fit(pd.DataFrame(X, columns=names), n_components=2))
    axes[0].figure.canvas.draw()
    for ax in axes:
        written = [Text.get_window_extent(text) for text in ax.texts]  # less its line
        assert sorted(text.get_text() for text in ax.texts) in (names[:5], names[5:])
        assert all(box.x0 > ax.bbox.x1 and box.x1 < ax.figure.bbox.x1 for box in written)
        assert all(one.y0 > other.y1 for one, other in pairwise(written))
        assert ax.bbox.width > 100


def test_names_of_sections_and_panels():
    anndata = pytest.importorskip("anndata")
    rng = np.random.default_rng(0)
    adata = anndata.AnnData(rng.poisson(3.0, (20, 4)).astype("f4"))
    adata.var_names = NAMES
    adata.obsm["spatial"] = rng.uniform(size=(20, 2))
    adata.obs["slide"] = ["$1$", "$2$"] * 10
    axes = plotting.plot_spatial(adata, NAMES, groups="slide")
    axes[0].figure.canvas.draw()
    assert drawn(ax.title for ax in axes) == {(name, False) for name in NAMES}
    assert all({("$1$", False), ("$2$", False)} <= drawn(ax.texts) for ax in axes)


@pytest.mark.parametrize("n", [200, 25_000])
def test_words_are_categories_with_a_legend(n):
    """Also where pixels show the category that is most frequent in them, and not a mean."""
    pandas = pytest.importorskip("pandas")
    anndata = pytest.importorskip("anndata")
    places = np.random.default_rng(0).uniform(size=(n, 2))
    side = np.where(places[:, 0] < 0.5, "left", "right")
    adata = anndata.AnnData(np.ones((n, 1)), obsm={"spatial": places})
    adata.obs["leiden"] = pandas.Categorical(np.where(side == "left", "10", "2"), ["2", "10"])
    adata.obs["side"] = side
    axes = plotting.plot_spatial(adata, ["leiden", "side"])
    names = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in axes]
    assert names == [["2", "10"], ["left", "right"]]
    alone = plotting.plot_spatial(places, side)[0]  # without AnnData
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["left", "right"]
    mappable = (axes[1].images or axes[1].collections)[0]
    values = np.ma.compressed(np.ma.masked_invalid(mappable.get_array()))
    assert set(np.unique(values)) == {0.0, 1.0}
    assert mappable.get_clim() == (-0.5, 1.5)
