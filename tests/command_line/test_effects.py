"""--batches and --covariates: columns of obs, and files of samples."""

import pathlib

import anndata
import numpy as np
import pandas as pd
import pytest

import pnmf_pyro
from pnmf_pyro.command_line.cli import main

N, D = 60, 12


def run(*arguments):
    return main([*map(str, arguments), "--components", "2", "--quiet"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Counts as .h5ad with obs and as .csv, and a table of their samples in another order."""
    folder, r = tmp_path_factory.mktemp("effects"), np.random.default_rng(0)
    names = [f"s{i}" for i in range(N)]
    labels, age = r.choice(["x", "y"], N), r.normal(size=N)
    F, W = r.normal(size=(N, 2)), r.gamma(0.5, 20.0, (D, 2)) + 1
    X = r.poisson(np.exp(F) @ W.T * np.exp(0.8 * (labels == "x")[:, None] * np.linspace(-1, 1, D)))
    obs = pd.DataFrame({"age": age, "run": labels}, index=names)
    genes = [f"g{j}" for j in range(D)]
    adata = anndata.AnnData(X.astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))
    adata.write(folder / "counts.h5ad")
    pd.DataFrame(X, index=names, columns=genes).to_csv(folder / "counts.csv")
    obs.iloc[::-1].to_csv(folder / "samples.csv")
    obs[["age"]].to_csv(folder / "ages.tsv", sep="\t", index=False)
    return folder


def test_columns_of_obs(folder, tmp_path):
    out, model = tmp_path / "out.h5ad", tmp_path / "model.npz"
    given = ("--batches", "run", "--covariates", "age", "--out", out, "--save-model", model)
    assert run("fit", folder / "counts.h5ad", *given) == 0
    found = anndata.read_h5ad(out)
    assert list(found.varm["PNMF_batch_effects"].columns) == ["x", "y"]
    back = pnmf_pyro.PNMF.load(model)
    np.testing.assert_allclose(found.varm["PNMF_batch_effects"], back.batch_effects_)
    assert back.covariates_ == ["age"]


def test_files_give_the_same_whatever_their_order(folder, tmp_path):
    models = []
    for number, (table, batches, covariates) in enumerate(
        (("counts.h5ad", "run", "age"), ("counts.csv", "samples.csv", "ages.tsv"))
    ):
        model = tmp_path / f"{number}.npz"
        if number:
            batches, covariates = folder / batches, folder / covariates
        given = ("--batches", batches, "--covariates", covariates, "--save-model", model)
        assert run("fit", folder / table, *given, "--out", tmp_path / f"{number}.out.npz") == 0
        models.append(pnmf_pyro.PNMF.load(model))
    one, other = (model.batch_effects_ for model in models)
    np.testing.assert_allclose(one, other, atol=1e-3)
    with np.load(tmp_path / "1.out.npz") as arrays:
        np.testing.assert_array_equal(arrays["batch_effects"], other)
        assert "dispersion" not in arrays


@pytest.mark.slow
def test_a_later_fit_without_batches_leaves_no_effects_behind(folder, tmp_path):
    path = tmp_path / "counts.h5ad"
    path.write_bytes((folder / "counts.h5ad").read_bytes())
    assert run("fit", path, "--out", path, "--batches", "run") == 0
    assert "PNMF_batch_effects_se" in anndata.read_h5ad(path).varm
    assert run("fit", path, "--out", path) == 0
    assert list(anndata.read_h5ad(path).varm) == ["PNMF_loadings"]


SOME = ("batch_effects", "batch_effects_se", "covariate_effects", "covariate_effects_se")


@pytest.mark.slow
@pytest.mark.parametrize("out", ["results/", "results.csv"])
def test_tables_of_effects_and_dispersion(out, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = out if out.endswith("/") else "results_"
    given = ("--out", out, "--save-model", "model.npz", "--set", "likelihood=negative-binomial")
    counts = folder / "counts.h5ad"
    assert run("fit", counts, *given, "--batches", "run", "--covariates", "age") == 0
    model = pnmf_pyro.PNMF.load("model.npz")
    columns = {"batch": ["x", "y"], "covar": ["age"], "dispe": ["dispersion"]}
    for name in (*SOME, "dispersion"):
        table = pd.read_csv(f"{start}{name}.csv", index_col=0, float_precision="round_trip")
        assert list(table.index) == [f"g{j}" for j in range(D)]
        assert list(table) == columns[name[:5]]
        expected = np.asarray(getattr(model, f"{name}_")).reshape(D, -1)
        np.testing.assert_array_equal(table.to_numpy(), expected)
    assert main(["fit", str(counts), "--out", out, "--components", "1"]) in (0, 1)
    for name in (*SOME, "dispersion"):
        assert not pathlib.Path(f"{start}{name}.csv").exists()
    assert pathlib.Path(f"{start}loadings.csv").exists()
    said = capsys.readouterr().out
    assert f"{start}loadings.csv" in said
    assert "dispersion" not in said


@pytest.mark.slow
def test_a_table_of_the_users_own_beside_results_stays(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    own = tmp_path / "results" / "dispersion.csv"
    own.write_text("mine")
    assert main(["fit", str(folder / "counts.h5ad"), "--out", "results/"]) in (0, 1)
    assert own.read_text() == "mine"
    assert "dispersion.csv" not in capsys.readouterr().out


def test_a_table_of_effects_that_is_an_input_is_not_lost(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "batch_effects.csv"
    path.write_bytes((folder / "samples.csv").read_bytes())
    assert run("fit", folder / "counts.csv", "--out", "results/", "--batches", path) == 2
    assert "--out would overwrite --batches" in capsys.readouterr().err
    assert path.exists()


def test_dispersions_in_an_archive(folder, tmp_path):
    out, model = tmp_path / "out.npz", tmp_path / "model.npz"
    given = ("--out", out, "--save-model", model, "--set", "likelihood=negative-binomial")
    assert run("fit", folder / "counts.h5ad", *given) == 0
    with np.load(out) as arrays:
        expected = pnmf_pyro.PNMF.load(model).dispersion_
        np.testing.assert_array_equal(arrays["dispersion"], expected)


def test_a_later_fit_without_dispersions_leaves_none_behind(folder, tmp_path):
    path = tmp_path / "counts.h5ad"
    path.write_bytes((folder / "counts.h5ad").read_bytes())
    assert run("fit", path, "--out", path, "--set", "likelihood=negative-binomial") == 0
    assert len(anndata.read_h5ad(path).var["pnmf_dispersion"]) == D
    assert run("fit", path, "--out", path) == 0
    assert "pnmf_dispersion" not in anndata.read_h5ad(path).var


def test_what_names_no_samples_is_refused(folder, tmp_path, capsys):
    out = ("--out", tmp_path / "out.npz")
    assert run("fit", folder / "counts.h5ad", *out, "--batches", "lane") == 2
    assert "--batches must name columns of obs" in capsys.readouterr().err
    (tmp_path / "few.csv").write_text("name,run\ns1,x\n")
    assert run("fit", folder / "counts.csv", *out, "--batches", tmp_path / "few.csv") == 2
    assert "one row for each of the 60 samples" in capsys.readouterr().err


@pytest.mark.parametrize("decimal", [".", ","])
def test_files_of_other_signs_are_read_alike(decimal, folder, tmp_path):
    """Semicolons, decimal commas and a comment above, as spreadsheets and programs write them."""
    ages = pd.read_csv(folder / "ages.tsv", sep="\t")
    mean = ages.assign(age=ages["age"] + 0.5, run=["x", "y"] * 30)
    text = "# from a spreadsheet\n" + mean.to_csv(index=False, sep=";", decimal=decimal)
    (tmp_path / "other.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    mean.to_csv(tmp_path / "plain.csv", index=False)
    found = []
    for name in ("other.csv", "plain.csv"):
        out = tmp_path / f"{name}.npz"
        given = ("--covariates", tmp_path / name)
        assert run("fit", folder / "counts.csv", "--out", out, *given) == 0
        with np.load(out) as arrays:
            found.append(arrays["covariate_effects"])
    assert found[0].shape[1] == 2
    np.testing.assert_array_equal(*found)


def test_a_missing_batch_is_said(folder, tmp_path, capsys):
    rows = ["run", *["x", "NA"], *["y"] * 58]
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    out = ("--out", tmp_path / "out.npz", "--batches", tmp_path / "runs.csv")
    assert run("fit", folder / "counts.csv", *out) == 2
    assert "batches must not be missing" in capsys.readouterr().err


def test_a_plan_takes_them(folder):
    assert run("fit", folder / "counts.h5ad", "--plan", "--batches", "run") == 0
