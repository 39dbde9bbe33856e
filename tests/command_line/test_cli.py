"""The command line, from files of every kind to results that reopen."""

import gzip
import subprocess
import sys

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

import pnmf_pyro
from pnmf_pyro import plotting
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.command_line.tables import read_counts
from pnmf_pyro.estimator.archive import read_archive
from pnmf_pyro.transforms import factor_samples, factor_uncertainty, get_factors
from tests.support.data import simulate

SAMPLES = [f"spot{i}" for i in range(80)]
FEATURES = [f"gene{j}" for j in range(25)]


@pytest.fixture
def files(counts, tmp_path):
    """The same counts in every format that is read, by suffix."""
    sparse = sp.csr_matrix(counts)
    adata = anndata.AnnData(
        sparse,
        obs=pd.DataFrame({"region": np.repeat(["a", "b"], 40)}, index=SAMPLES),
        var=pd.DataFrame(index=FEATURES),
        obsm={"spatial": simulate(0, 80, 25, 3)[1][:, :2]},
        layers={"counts": sparse * 2},
    )
    paths = {kind: tmp_path / f"counts.{kind}" for kind in ("h5ad", "npz", "mtx", "csv", "tsv")}
    adata.write_h5ad(paths["h5ad"])
    sp.save_npz(paths["npz"], sparse)
    scipy.io.mmwrite(paths["mtx"], sparse)
    frame = pd.DataFrame(counts.astype(int), index=SAMPLES, columns=FEATURES)
    frame.to_csv(paths["csv"])
    frame.to_csv(paths["tsv"], sep="\t", header=False, index=False)
    paths["csv.gz"] = tmp_path / "counts.csv.gz"
    paths["csv.gz"].write_bytes(gzip.compress(paths["csv"].read_bytes()))
    return paths


def test_fit_in_space_over_sections(files, tmp_path):
    out = tmp_path / "factors.h5ad"
    assert fit(files["h5ad"], "--out", out, "--batch-key", "region", "--set", "tol=0.05") == 0
    found = anndata.read_h5ad(out).uns["pnmf"]
    assert found["batch_key"] == "region"  # without it plot would draw them on top of each other
    parameters = found["parameters"]
    assert parameters["spatial"]
    assert parameters["multigroup"]


@pytest.mark.parametrize("kind", ["h5ad", "npz", "mtx", "csv", "tsv", "csv.gz"])
def test_every_format_is_read(kind, files, counts):
    table = read_counts(files[kind])
    X = table.X.toarray() if sp.issparse(table.X) else table.X
    np.testing.assert_array_equal(X, counts)
    if kind in ("h5ad", "csv", "csv.gz"):
        assert (table.sample_names, table.feature_names) == (SAMPLES, FEATURES)
    turned = read_counts(files[kind], transpose=True)
    assert turned.X.shape == (25, 80)
    assert turned.feature_names == table.sample_names


def fit(*arguments):
    return main(["fit", *map(str, arguments), "--components", "3", "--quiet"])


def test_fit_h5ad(files, tmp_path):
    out = tmp_path / "factors.h5ad"
    options = ("--layer", "counts", "--size-factors", "total", "--no-space")
    assert fit(files["h5ad"], "--out", out, *options) == 0
    adata = anndata.read_h5ad(out)
    assert adata.obsm["X_pnmf"].shape == (80, 3)
    assert adata.obsm["X_pnmf_sd"].shape == (80, 3)
    assert adata.varm["PNMF_loadings"].shape == (25, 3)
    assert list(adata.obs_names) == SAMPLES
    assert list(adata.var_names) == FEATURES
    assert adata.obs["region"].eq(np.repeat(["a", "b"], 40)).all()
    assert adata.obsm["spatial"].shape == (80, 2)
    settings = adata.uns["pnmf"]
    assert settings["parameters"]["n_components"] == 3
    assert len(settings["elbo_history"]) == settings["n_iter"]
    assert np.isfinite(settings["elbo"])


def test_fit_npz_and_set_parameters(files, tmp_path):
    out = tmp_path / "factors.npz"
    extra = ["--set", "mode=expanded", "--set", "tol=0.05"]
    assert fit(files["csv"], "--out", out, *extra, "--set", "init=None") == 0
    header, arrays = read_archive(out)
    assert header["settings"]["parameters"]["mode"] == "expanded"
    assert header["settings"]["parameters"]["tol"] == 0.05
    assert arrays["factors"].shape == arrays["factors_sd"].shape == (80, 3)
    assert arrays["loadings"].shape == (25, 3)
    assert list(arrays["feature_names"]) == FEATURES


def test_the_standard_deviation_is_that_of_exp_F(fitted):
    """Of a normal log F; draws are skewed a little, as posteriors of few counts are."""
    sigma = factor_uncertainty(fitted)
    sd = get_factors(fitted) * np.sqrt(np.expm1(sigma**2))
    draws = factor_samples(fitted, 20000, return_exp=True, random_state=0)
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.2)
    assert 0.9 < np.median(draws.std(0) / sd) < 1.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv", "--out", "{}/a.npz"], "there is no absent.csv"),
        (["{h5ad}", "--out", "{}/a.txt"], "must end in .h5ad or .npz"),
        (["{h5ad}", "--out", "{}/absent/a.npz"], "no "),
        (["{h5ad}", "--out", "{}/a.npz", "--layer", "raw"], "its layers are ['counts']"),
        (["{csv}", "--out", "{}/a.npz", "--layer", "raw"], "is for AnnData files"),
        (["{csv}", "--out", "{}/a.npz", "--batch-key", "region"], "are for .h5ad files"),
        (["{h5ad}", "--out", "{}/a.npz", "--spatial-key", "um"], "which has ['spatial']"),
        (["{h5ad}", "--out", "{}/a.npz", "--batch-key", "lab"], "which has ['region']"),
        (["{bad}", "--out", "{}/a.npz"], "bad.csv cannot be read: row 2, column 'b' holds 'x'"),
        (["{h5ad}", "--out", "{}/a.npz", "--set", "tol=-1"], "tol"),
    ],
)
def test_errors_are_one_line(arguments, message, files, tmp_path, capsys):
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n3,x\n")
    places = {"h5ad": files["h5ad"], "csv": files["csv"], "bad": bad}
    assert fit(*(a.format(tmp_path, **places) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "said"),
    [("tol", "of PNMF\n"), ("colour=3", "of PNMF\n"), ("mdoe=expanded", "of PNMF; is it mode?\n")],
)
def test_set_needs_a_parameter(text, said, files, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(files["csv"], "--out", "a.npz", "--set", text)
    assert stop.value.code == 2
    assert f"{text!r} is not NAME=VALUE with a parameter {said}" in capsys.readouterr().err


def test_the_version_and_the_package_as_a_program():
    call = [sys.executable, "-m", "pnmf_pyro", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout == f"pnmf-pyro {pnmf_pyro.__version__}\n"


@pytest.mark.slow
def test_demo_reports_and_draws(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--components", "4"]) == 0
    report = capsys.readouterr().out
    assert "ELBO -" in report
    deviance = {
        line.split("  ")[-1]: float(line.split()[0])
        for line in report.splitlines()
        if line.startswith("  ")
    }
    assert deviance["pnmf_pyro"] < 0.9 * deviance["feature means only"]
    assert (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eco_mite", "st_mob_rep11", "iss_ca1_cells"])
def test_real_data(name, data_file, tmp_path):
    out = tmp_path / "factors.h5ad"
    arguments = [data_file(name), "--out", out, "--set", "tol=0.01"]
    assert fit(*arguments) == 0
    adata = anndata.read_h5ad(out)
    assert all(np.isfinite(values).all() for values in adata.obsm.values())
    assert np.isfinite(adata.varm["PNMF_loadings"]).all()


def test_plots_take_axes_and_check_shapes(fitted):
    figure = plotting.new_figure((4, 3))
    ax = figure.subplots()
    assert plotting.plot_elbo(fitted, ax) is ax
    assert len(ax.lines[0].get_xdata()) == fitted.n_iter_
    axes = plotting.plot_component_images(fitted, (5, 5), figure.subplots(1, 3))
    assert len(axes) == 3
    with pytest.raises(ValueError, match="64"):
        plotting.plot_component_images(fitted, (8, 8))


def test_missing_extras_say_what_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pnmf-pyro\[plot\]"):
        plotting.plot_elbo([1.0, 2.0])
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(ImportError, match=r"pnmf-pyro\[anndata\]"):
        read_counts(files["h5ad"])


def test_plot_writes_a_report(files, tmp_path, capsys):
    out, report = tmp_path / "factors.h5ad", tmp_path / "report.html"
    assert fit(files["h5ad"], "--out", out) == 0
    adata = anndata.read_h5ad(out)
    adata.obsm["spatial"] = simulate(0, 80, 25, 3)[1][:, :2]
    adata.write_h5ad(out)
    assert main(["plot", str(out), "-o", str(report), "--unit", "mm"]) == 0
    assert f"wrote {report}" in capsys.readouterr().out
    text = report.read_text()
    assert text.count("data:image/png;base64,") == 6
    assert "<td>80</td>" in text
    assert not plt.get_fignums()


def test_plot_takes_saved_models_without_places(fitted, tmp_path):
    fitted.save(tmp_path / "model.npz")
    assert main(["plot", str(tmp_path / "model.npz"), "--out", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_text().count("<img") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.npz", "-o", "{}/a.html"], "there is no absent.npz"),
        (["{csv}", "-o", "{}/a.html"], "FIT must end in .h5ad or .npz"),
        (["{h5ad}", "-o", "{}/a.html"], "the fits in it are []"),
        (["{npz}", "-o", "{}/a.html"], "not a model saved by pnmf_pyro"),
        (["{h5ad}", "-o", "{}/a.png"], "--out must end in .html"),
        (["{h5ad}", "-o", "{}/absent/a.html"], "there is no"),
    ],
)
def test_errors_of_plot_are_one_line(arguments, message, files, tmp_path, capsys):
    assert main(["plot", *(a.format(tmp_path, **files) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
