"""--mask: a file that says what is observed, in fit, check and select."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.special import xlogy

import pnmf_pyro
from pnmf_pyro import PNMF, select_n_components
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.command_line.tables import read_counts
from tests.support.data import simulate

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:.*have no counts at all:UserWarning"),
]
SAMPLES, FEATURES = [f"s{i}" for i in range(60)], [f"f{j}" for j in range(12)]
SHORT = ("--set", "max_iter=20", "--set", "init=null", "--components", 2, "--quiet")


def run(*arguments):
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def X():
    return simulate(0, 60, 12, 2)[0].astype(float)


@pytest.fixture(scope="module")
def seen():
    return np.random.default_rng(0).random((60, 12)) < 0.85


@pytest.fixture(scope="module")
def folder(X, seen, tmp_path_factory):
    """Counts with and without missing cells, and masks of all kinds."""
    folder = tmp_path_factory.mktemp("masks")
    frame = pd.DataFrame(X.astype(int), index=SAMPLES, columns=FEATURES)
    frame.to_csv(folder / "counts.csv")
    frame.where(seen).to_csv(folder / "missing.csv")
    frame.where(seen).to_csv(
        folder / "missing.tsv", sep="\t", na_rep="NA", header=False, index=False
    )
    np.save(folder / "missing.npy", np.where(seen, X, np.nan))
    sp.save_npz(folder / "counts.npz", sp.csr_matrix(X))
    names = {"obs": pd.DataFrame(index=SAMPLES), "var": pd.DataFrame(index=FEATURES)}
    anndata.AnnData(X, **names).write_h5ad(folder / "counts.h5ad")
    ones = pd.DataFrame(seen.astype(int), index=SAMPLES, columns=FEATURES)
    ones.to_csv(folder / "mask.csv")
    ones.rename(columns={"f3": "g3"}).to_csv(folder / "other.csv")
    ones.T.to_csv(folder / "turned.csv")
    np.save(folder / "mask.npy", seen)
    sp.save_npz(folder / "mask.npz", sp.csr_matrix(seen))
    np.save(folder / "small.npy", seen[:-1])
    np.save(folder / "half.npy", seen * 0.5)
    return folder


@pytest.mark.parametrize("mask", ["mask.csv", "mask.npy", "mask.npz"])
@pytest.mark.parametrize(
    "counts",
    ["counts.csv", "counts.npz", "counts.h5ad", "missing.csv", "missing.tsv", "missing.npy"],
)
def test_counts_and_masks_of_all_kinds(counts, mask, X, seen, folder):
    table = read_counts(folder / counts, mask=folder / mask)
    found = table.X.toarray() if sp.issparse(table.X) else table.X
    np.testing.assert_array_equal(found, np.where(seen, X, 0))
    np.testing.assert_array_equal(table.mask, seen)


def test_a_mask_is_turned_as_the_counts_are(X, seen, folder):
    pd.DataFrame(X.T.astype(int), index=FEATURES, columns=SAMPLES).to_csv(folder / "t.csv")
    table = read_counts(folder / "t.csv", transpose=True, mask=folder / "turned.csv")
    np.testing.assert_array_equal(table.mask, seen)
    np.testing.assert_array_equal(table.X, np.where(seen, X, 0))


def test_a_mask_that_hides_nothing_is_none(folder, tmp_path):
    np.save(tmp_path / "ones.npy", np.ones((60, 12)))
    assert read_counts(folder / "counts.csv", mask=tmp_path / "ones.npy").mask is None


def test_fit_and_check(X, seen, folder, tmp_path, capsys):
    model = tmp_path / "model.npz"
    out = ("--out", tmp_path / "a.npz", "--save-model", model)
    masked = (folder / "missing.csv", "--mask", folder / "mask.npy")
    assert run("fit", *masked, *out, *SHORT) in (0, 1)
    known = pnmf_pyro.fit(X, n_components=2, mask=seen, max_iter=20, init=None)
    np.testing.assert_allclose(PNMF.load(model).components_, known.components_, rtol=1e-4)
    given = ("--draws", 100, "--quiet")
    assert run("check", model, *masked, *given) == run(
        "check", model, folder / "counts.csv", *given
    )
    capsys.readouterr()
    assert run("check", model, folder / "missing.csv", *given) == 2
    assert "say by --mask what is observed" in capsys.readouterr().err
    known.save(tmp_path / "known.npz")
    less = seen.copy()
    less[np.argwhere(seen)[0][0], np.argwhere(seen)[0][1]] = False
    np.save(tmp_path / "less.npy", less)
    other = ("--mask", tmp_path / "less.npy", *given)
    assert run("check", tmp_path / "known.npz", folder / "counts.csv", *other) == 2
    assert "hides 1 entries that the fit observed" in capsys.readouterr().err


def test_deviance_explained_is_that_of_what_is_observed(X, seen, folder, tmp_path, capsys):
    short = [one for one in SHORT if one != "--quiet"]
    masked = (folder / "counts.csv", "--mask", folder / "mask.npy", "--size-factors", "total")
    run("fit", *masked, "--out", tmp_path / "a.npz", *short)
    out = capsys.readouterr().out
    model = pnmf_pyro.fit(
        X, n_components=2, mask=seen, size_factors="total", max_iter=20, init=None
    )
    totals = np.where(seen, X, 0).sum(1)
    s = totals / totals.mean()
    means = np.where(seen, X, 0).sum(0) / (seen * s[:, None]).sum(0)

    def total(rate):
        return (xlogy(X, X) - xlogy(X, np.maximum(rate, 1e-30)) - X + rate)[seen].sum()

    rate = s[:, None] * pnmf_pyro.transforms.get_factors(model) @ model.components_
    explained = 1 - total(rate) / total(s[:, None] * means)
    assert f"deviance explained {explained:.1%}" in out


def test_select(X, seen, folder, capsys):
    options = ("--range", "1,2", "--thinnings", 2, "--hold-out", "entries", "--set", "max_iter=20")
    run("select", folder / "missing.csv", "--mask", folder / "mask.npz", *options)
    found = select_n_components(
        X, [1, 2], mask=seen, hold_out="entries", n_seeds=2, random_state=0, max_iter=20
    )
    out = capsys.readouterr().out
    assert "sets of hidden entries" in " ".join(out.split())
    assert f"{found.mean_deviance[0]:.4g}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("counts.csv", "--mask", "small.npy"), "mask must have the shape of X, (60, 12)"),
        (("counts.csv", "--mask", "half.npy"), "mask must be True where an entry is observed"),
        (("counts.csv", "--mask", "other.csv"), "--mask must have the features of COUNTS"),
        (("counts.csv", "--mask", "no.npy"), "--mask must be a file"),
        (("counts.csv", "--mask", "counts.doc"), "--mask must be a file"),
        (("missing.csv",), "say by --mask what is observed"),
        (("missing.npy",), "name what is observed by --mask"),
    ],
)
def test_errors_name_the_mask(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run("fit", *arguments, "--out", "a.npz", *SHORT) == 2
    assert message in capsys.readouterr().err


def test_a_mask_is_not_overwritten(folder, seen, tmp_path, capsys):
    sp.save_npz(tmp_path / "mask.npz", sp.csr_matrix(seen))
    masked = (folder / "counts.csv", "--mask", tmp_path / "mask.npz")
    assert run("fit", *masked, "--out", tmp_path / "mask.npz", *SHORT) == 2
    assert "--out would overwrite --mask" in capsys.readouterr().err


def test_missing_cells_that_are_not_hidden_are_refused(folder, seen, tmp_path, capsys):
    more = seen.copy()
    more[np.argwhere(~seen)[0][0], np.argwhere(~seen)[0][1]] = True
    np.save(tmp_path / "more.npy", more)
    masked = (folder / "missing.csv", "--mask", tmp_path / "more.npy")
    assert run("fit", *masked, "--out", tmp_path / "a.npz", *SHORT) == 2
    assert "counts must not be negative or missing" in capsys.readouterr().err


@pytest.mark.filterwarnings("always:mask hides")
def test_what_is_hidden_all_over_is_named(folder, seen, tmp_path, capsys):
    less = seen.copy()
    less[7] = False
    np.save(tmp_path / "less.npy", less)
    masked = (folder / "counts.csv", "--mask", tmp_path / "less.npy")
    assert run("fit", *masked, "--out", tmp_path / "a.npz", *SHORT) in (0, 1)
    assert "mask hides all entries of 1 samples: 7" in capsys.readouterr().err
