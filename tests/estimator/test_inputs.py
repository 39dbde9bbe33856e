"""What fit takes, everything takes; what has no meaning is refused by name."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data.tables import check_order
from pnmf_pyro.transforms import factor_samples, get_factors, transform_F, transform_W

anndata = pytest.importorskip("anndata")

random = np.random.default_rng(0)
N, D = 20, 6
X = random.poisson(4.0, (N, D)) + 1
PLACES = random.uniform(size=(N, 2))
SECTIONS = np.array(["a", "b"] * (N // 2))
QUICK = {"n_components": 2, "max_iter": 6}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def adata_of(table=X):
    found = anndata.AnnData(table.astype("f4"))
    found.var_names = [f"gene{j}" for j in range(D)]
    found.layers["raw"] = table.astype("f4")
    found.obsm["where"], found.obs["section"] = PLACES, SECTIONS
    return found


@pytest.fixture(scope="module")
def flat():
    return PNMF(2, max_iter=6, random_state=0).fit(X)


def forms(table):
    return {
        "list": table.tolist(),
        "tensor": torch.from_numpy(table),
        "frame": pd.DataFrame(table),
        "sparse": sp.csr_matrix(table.astype("f4")),
        "AnnData": anndata.AnnData(table.astype("f4")),
    }


FRAME = pd.DataFrame(X, [f"s{i}" for i in range(N)], [f"gene{j}" for j in range(D)])
PLACES_OF = pd.DataFrame(PLACES, FRAME.index)
RUNS = pd.Series(SECTIONS, FRAME.index)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        *[("coordinates", PLACES_OF), ("groups", RUNS), ("size_factors", FRAME["gene0"])],
        *[("mask", FRAME > 0), ("batches", RUNS), ("covariates", PLACES_OF)],
    ],
)
def test_tables_beside_X_have_its_order(flat, name, table):
    """They are taken row by row; so the same names in another order are refused by every door."""
    turned = [table[::-1]] if name != "mask" else [table[::-1], table.iloc[:, ::-1]]
    adata = anndata.AnnData(FRAME.astype("f4"))
    for other in turned:
        for data in (FRAME, adata):
            with pytest.raises(ValueError, match=f"{name} names what X has in another order"):
                PNMF(2, spatial=True, multigroup=True).fit(data, **{name: other})
        with pytest.raises(ValueError, match=name):
            pnmf_pyro.select_n_components(FRAME, [2, 3], **{name: other})
        for method in () if name == "mask" else (flat.score, flat.transform):
            with pytest.raises(ValueError, match=name):
                method(FRAME, **{name: other})
    check_order(FRAME, **{name: table})
    check_order(FRAME, **{name: table[::-1].to_numpy()})
    check_order(FRAME, **{name: table[::-1].reset_index(drop=True)})


TAKERS = {
    "PNMF.fit": lambda m, X: PNMF(2, max_iter=6, random_state=0).fit(X).components_,
    "fit": lambda m, X: pnmf_pyro.fit(X, **QUICK).components_,
    "transform": lambda m, X: m.transform(X),
    "score": lambda m, X: m.score(X),
    "transform_F": lambda m, X: transform_F(X, m.components_.T, max_iter=5),
    "transform_W": lambda m, X: transform_W(X, get_factors(m), max_iter=5),
    "check": lambda m, X: (
        pnmf_pyro.posterior_predictive_check(m, X, n_draws=3, random_state=0)["total"].observed
    ),
    "spatial_scores": lambda m, X: pnmf_pyro.spatial_scores(m, X, coordinates=PLACES)["variance"],
}


@pytest.mark.parametrize("form", forms(X))
@pytest.mark.parametrize("name", TAKERS)
def test_every_form_of_a_table_is_taken(name, form, flat):
    found = TAKERS[name](flat, forms(X)[form])
    np.testing.assert_allclose(found, TAKERS[name](flat, X), rtol=1e-4)


@pytest.mark.parametrize("form", forms(X))
def test_numbers_of_components_are_compared_for_every_form(form):
    how = {"n_seeds": 2, "random_state": 0, "max_iter": 5}
    found = pnmf_pyro.select_n_components(forms(X)[form], [1], **how)
    assert np.isfinite(found.deviance).all()


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (None, "NoneType|X must be given"), (3, "int"), ({"a": [1]}, "dict"), ({1}, "set"),
        (len, "builtin"),
        ("counts.csv", "Read a file first"), (Path("counts.csv"), "Read a file first"),
        (type("SpatialData", (), {})(), r"X\.tables\['table'\]"),
        ([[1], [1, 2]], "rows of one length"), (X + 1j, "X|omplex"), (X.astype("M8[s]"), "X|date"),
        (torch.ones(3, 2, device="meta"), "meta tensor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_table_is_refused_by_name(name, thing, said, flat):
    with pytest.raises((ValueError, TypeError), match=said):
        TAKERS[name](flat, thing)


MASKED = np.ma.masked_equal(X, X.max())


def test_masked_entries_are_hidden_ones():
    seen = ~np.ma.getmaskarray(MASKED)
    masked, told = (PNMF(2, max_iter=6, random_state=0) for _ in range(2))
    masked.fit(MASKED)
    told.fit(X, mask=seen)
    np.testing.assert_array_equal(masked.components_, told.components_)
    np.testing.assert_array_equal(masked.transform(MASKED), told.transform(X, mask=seen))
    assert masked.score(MASKED) == told.score(X, mask=seen)
    for table in (MASKED, X):
        check = pnmf_pyro.posterior_predictive_check(masked, table, n_draws=3, random_state=0)
        np.testing.assert_array_equal(check["total", "sample"].observed, MASKED.sum(1))


@pytest.mark.parametrize("name", ["transform_F", "transform_W", "check", "spatial_scores"])
def test_masked_entries_are_refused_by_what_hides_none(name, flat):
    with pytest.raises(ValueError, match="X has masked entries"):
        TAKERS[name](flat, MASKED)


BAD_NUMBERS = {
    "masked": lambda values: (
        np.ma.masked_array(values, np.arange(values.size) == 3)
        if values.ndim == 1
        else np.ma.masked_less(values, np.sort(values.ravel())[3])
    ),
    "complex": lambda values: values + 1j,
    "dates": lambda values: (values * 1e6).astype("M8[s]"),
    "NA": lambda values: pd.DataFrame(values).astype("Float64").mask(pd.DataFrame(values) > 0.5),
    "words": lambda values: np.full(values.shape, "left"),
}


@pytest.mark.parametrize("kind", BAD_NUMBERS)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("coordinates", lambda m, bad: pnmf_pyro.fit(X, bad(PLACES), **QUICK)),
        ("size_factors", lambda m, bad: m.score(X, size_factors=bad(PLACES[:, 0]))),
        ("W", lambda m, bad: transform_F(X, bad(m.components_.T))),
        ("F", lambda m, bad: transform_W(X, bad(get_factors(m)))),
        ("transformed", lambda m, bad: m.inverse_transform(bad(get_factors(m)))),
        ("b", lambda m, bad: pnmf_pyro.match_factors(m, bad(m.components_.T))),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(name, call, kind, flat):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(flat, BAD_NUMBERS[kind])


@pytest.mark.parametrize(
    "groups",
    [
        [np.nan if g == "a" else g for g in SECTIONS],
        [None if g == "a" else g for g in SECTIONS],
        pd.Series(SECTIONS, dtype="string").mask(pd.Series(SECTIONS) == "a"),
        np.ma.masked_array(np.arange(N) % 2, np.arange(N) == 3),
        np.arange(N) % 2 + 1j,
    ],
    ids=["NaN", "None", "NA", "masked", "complex"],
)
def test_labels_that_are_none_are_refused(groups):
    with pytest.raises(ValueError, match="groups"):
        pnmf_pyro.fit(X, PLACES, groups, **QUICK)


def test_an_anndata_object_is_read_as_the_fit_read_its_own(tmp_path):
    adata = adata_of()
    keys = {"layer": "raw", "spatial_key": "where", "batch_key": "section"}
    model = pnmf_pyro.fit(adata, **keys, **QUICK)
    plain = pnmf_pyro.fit(X, PLACES, SECTIONS, **QUICK)
    model.save(tmp_path / "m.npz")
    adata.X = np.log1p(adata.X)
    new = adata[:7]
    for one in (model, PNMF.load(tmp_path / "m.npz")):
        np.testing.assert_allclose(
            one.transform(new), plain.transform(None, PLACES[:7], SECTIONS[:7]), rtol=1e-4
        )
        expected = plain.score(X[:7], coordinates=PLACES[:7], groups=SECTIONS[:7])
        assert one.score(new) == pytest.approx(expected, rel=1e-4)
    check = pnmf_pyro.posterior_predictive_check(model, adata, n_draws=3, random_state=0)
    np.testing.assert_array_equal(check["total", "sample"].observed, X.sum(1))
    assert list(check["total", "sample"].labels) == list(adata.obs_names)
    chosen = pnmf_pyro.select_n_components(
        adata, [1], n_seeds=2, random_state=0, max_iter=5, **keys
    )
    alone = pnmf_pyro.select_n_components(
        X, [1], coordinates=PLACES, groups=SECTIONS, n_seeds=2, random_state=0, max_iter=5
    )
    np.testing.assert_allclose(chosen.deviance, alone.deviance, rtol=1e-4)


def test_features_in_another_order_are_refused():
    adata = adata_of()
    model = PNMF(2, max_iter=4, random_state=0).fit(adata)
    assert list(model.feature_names_in_) == list(adata.var_names)
    for function in (model.transform, model.score):
        with pytest.raises(ValueError, match="their order differs"):
            function(adata[:, ::-1])
        with pytest.raises(ValueError, match="feature names"):
            function(adata.to_df().iloc[:, ::-1])
    adata.var_names = [f"other{j}" for j in range(D)]
    with pytest.raises(ValueError, match="other0, other1"):
        model.transform(adata)


def test_a_spatial_model_predicts_from_places_alone():
    model = pnmf_pyro.fit(X, PLACES, **QUICK)
    for call in (lambda: model.transform(X[:4]), lambda: model.score(X[:4])):
        with pytest.raises(ValueError, match="coordinates must be given"):
            call()
    with pytest.raises(ValueError, match="one row for each of the 4 samples of X; got 5"):
        model.transform(X[:4], PLACES[:5])
    np.testing.assert_array_equal(
        model.transform(X[:4], PLACES[:4]), model.transform(None, PLACES[:4])
    )
    for places in ({"x": 1}, 3.0, "spatial", (row for row in PLACES)):
        with pytest.raises(ValueError, match="coordinates"):
            factor_samples(model, 2, coordinates=places)


def test_total_counts_keep_the_scale_of_the_fit(tmp_path):
    depth = random.lognormal(0, 0.8, 60)
    counts = random.poisson(np.outer(depth, [3.0, 8.0, 2.0, 9.0])) + 1
    model = pnmf_pyro.fit(counts, n_components=1, size_factors="total")
    assert model.mean_total_ == pytest.approx(counts.sum(1).mean())
    few, s = counts[:5], counts[:5].sum(1) / counts.sum(1).mean()
    expected = model.transform(few, size_factors=s)
    model.save(tmp_path / "m.npz")
    for one in (model, PNMF.load(tmp_path / "m.npz")):
        np.testing.assert_allclose(one.transform(few), expected, rtol=1e-5)
        np.testing.assert_allclose(one.transform(few, size_factors="total"), expected, rtol=1e-5)
        assert one.score(few) == pytest.approx(one.score(few, size_factors=s), rel=1e-6)
    given = PNMF(1, max_iter=5, random_state=0).fit(counts, size_factors=depth)
    for function in (given.transform, given.score):
        with pytest.raises(ValueError, match="size_factors must be given"):
            function(few)
    with pytest.raises(ValueError, match="size_factors must be one of 'total'"):
        given.transform(few, size_factors="mean")
