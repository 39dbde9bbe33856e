"""SpatialData in: the table that is fitted, and places from the elements that its rows are of."""

import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.transforms import get_factors

sd = pytest.importorskip(
    "spatialdata", reason="spatialdata is not installed: pip install '.[spatialdata]'"
)
models = pytest.importorskip("spatialdata.models")
transformations = pytest.importorskip("spatialdata.transformations")
anndata = pytest.importorskip("anndata")

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours

N, D = 48, 12
QUICK = {"n_components": 2, "random_state": 0, "max_iter": 20}
SHIFT = transformations.Translation([100.0, 0.0], axes=("x", "y"))


def table(regions, instances):
    random = np.random.default_rng(0)
    adata = anndata.AnnData(random.poisson(4.0, size=(N, D)).astype("float32"))
    adata.obs["region"] = np.asarray(regions)
    adata.obs["region"] = adata.obs["region"].astype("category")
    adata.obs["cell"] = instances
    names = list(dict.fromkeys(regions))
    keys = {"region": names, "region_key": "region", "instance_key": "cell"}
    return models.TableModel.parse(adata, **keys)


def circles(xy, index, system="global"):
    shapes = models.ShapesModel.parse(
        xy, geometry=0, radius=1.0, transformations={system: transformations.Identity()}
    )
    shapes.index = index
    return shapes


@pytest.fixture
def places():
    return np.random.default_rng(1).uniform(0, 30, size=(N, 2))


@pytest.fixture
def sdata(places):
    """Cells in another order than that of the shapes."""
    order = np.random.default_rng(2).permutation(N)
    shapes = circles(places[order], 1000 + order)
    annotated = table(["cells"] * N, 1000 + np.arange(N))
    return sd.SpatialData(shapes={"cells": shapes}, tables={"table": annotated})


def test_a_fit_is_that_of_the_table_at_the_centroids(sdata, places):
    before = sdata["cells"].copy()
    model = pnmf_pyro.fit(sdata, **QUICK)
    assert sdata["cells"].equals(before)
    found = sdata["table"]
    np.testing.assert_allclose(found.obsm["spatial"], places)
    expected = pnmf_pyro.fit(found.X, places, **QUICK)
    np.testing.assert_allclose(model.components_, expected.components_)
    np.testing.assert_allclose(found.obsm["X_pnmf"], get_factors(expected), rtol=1e-5)
    assert pnmf_pyro.plan(sdata, **QUICK).prior == "SVGP"


def test_the_command_line_reads_a_store_and_writes_into_its_table(sdata, places, tmp_path):
    sdata.write(tmp_path / "section.zarr")
    quick = ["--components", "2", "--set", "max_iter=20", "--quiet"]
    store = str(tmp_path / "section.zarr")
    assert main(["fit", store, "--out", store, *quick]) in (0, 1)
    found = sd.read_zarr(store)
    np.testing.assert_allclose(found["table"].obsm["spatial"], places)
    assert found["table"].obsm["X_pnmf"].shape == (N, 2)
    assert found["cells"].equals(sdata["cells"])


def test_results_are_written_and_read_with_the_object(sdata, tmp_path):
    pnmf_pyro.fit(sdata, **QUICK)
    sdata.write(tmp_path / "section.zarr")
    again = sd.read_zarr(tmp_path / "section.zarr")["table"]
    np.testing.assert_allclose(again.obsm["X_pnmf"], sdata["table"].obsm["X_pnmf"])
    assert again.uns["pnmf"]["kernel"] == sdata["table"].uns["pnmf"]["kernel"]


def test_coordinates_of_the_table_count_first(sdata, places):
    sdata["table"].obsm["spatial"] = 2 * places
    pnmf_pyro.fit(sdata, **QUICK)
    np.testing.assert_array_equal(sdata["table"].obsm["spatial"], 2 * places)


def test_a_fit_without_space_leaves_no_coordinates(sdata):
    pnmf_pyro.fit(sdata, spatial_key=None, **QUICK)
    pnmf_pyro.fit(sdata, spatial=False, **QUICK)
    assert "spatial" not in sdata["table"].obsm


def test_sections_with_a_transformation_and_labels(places):
    """Half of the cells are shapes that stand elsewhere, half are labels of a picture."""
    half = N // 2
    moved = models.ShapesModel.parse(
        places[:half], geometry=0, radius=1.0, transformations={"global": SHIFT}
    )
    picture = np.zeros((40, 40), dtype=np.int32)
    rows, columns = np.divmod(np.arange(half), 6)
    for label, (i, j) in enumerate(zip(rows, columns, strict=True), 1):
        picture[6 * i : 6 * i + 3, 6 * j : 6 * j + 5] = label
    labels = models.Labels2DModel.parse(picture, dims=("y", "x"))
    regions = ["a"] * half + ["b"] * half
    annotated = table(regions, np.r_[np.arange(half), 1 + np.arange(half)])
    sdata = sd.SpatialData(shapes={"a": moved}, labels={"b": labels}, tables={"cells": annotated})
    with pytest.warns(UserWarning, match=r"2 sections, by uns\['spatialdata_attrs'\]"):
        pnmf_pyro.fit(sdata, **QUICK)
    found = sdata["cells"].obsm["spatial"]
    np.testing.assert_allclose(found[:half], places[:half] + np.array([100, 0]))
    np.testing.assert_allclose(found[half:], np.c_[6 * columns + 2.5, 6 * rows + 1.5])
    model = pnmf_pyro.fit(sdata, table="cells", batch_key="region", **QUICK)
    assert list(model.groups_) == ["a", "b"]


def test_the_only_system_of_the_elements_will_do(places):
    shapes = circles(places, np.arange(N), system="slide")
    sdata = sd.SpatialData(
        shapes={"cells": shapes}, tables={"table": table(["cells"] * N, np.arange(N))}
    )
    pnmf_pyro.fit(sdata, **QUICK)
    np.testing.assert_allclose(sdata["table"].obsm["spatial"], places)


def test_what_cannot_be_read(sdata, places):
    with pytest.raises(ValueError, match=r"table must name .*\['table'\]; got 'cells'"):
        pnmf_pyro.fit(sdata, table="cells", **QUICK)
    with pytest.raises(ValueError, match="table is for SpatialData"):
        pnmf_pyro.fit(sdata["table"], table="table", **QUICK)
    short = sd.SpatialData(
        shapes={"cells": circles(places[2:], 1002 + np.arange(N - 2))},
        tables={"table": sdata["table"]},
    )
    with pytest.raises(ValueError, match=r"2 rows of the table, such as 1000, are not in .*cells"):
        pnmf_pyro.fit(short, **QUICK)
    alone = sd.SpatialData(tables={"table": sdata["table"], "other": sdata["table"].copy()})
    with pytest.raises(ValueError, match="none was named"):
        pnmf_pyro.fit(alone, **QUICK)
    with pytest.raises(ValueError, match="'cells', which is no element"):
        pnmf_pyro.fit(alone, table="other", **QUICK)
    for name in ("one", "two"):
        transformations.set_transformation(sdata["cells"], SHIFT, name)
    transformations.remove_transformation(sdata["cells"], "global")
    with pytest.raises(ValueError, match=r"coordinate systems \['one', 'two'\]"):
        pnmf_pyro.fit(sdata, **QUICK)
