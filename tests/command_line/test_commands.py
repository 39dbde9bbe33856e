"""pnmf-pyro check and select, their reports and exit codes; what --help says."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pnmf_pyro import PNMF, posterior_predictive_check, select_n_components
from pnmf_pyro.analysis.calibration import FEWEST
from pnmf_pyro.analysis.hold_out import HOLD_OUT
from pnmf_pyro.analysis.predictive_checks import FLAGGED
from pnmf_pyro.command_line import fit
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.command_line.parsers import parser
from pnmf_pyro.command_line.tables import read_counts
from pnmf_pyro.estimator.checkpoints import EVERY
from tests.support.data import simulate

ROOT = Path(__file__).parents[2]
SAMPLES = [f"site{i}" for i in range(90)]
FEATURES = [f"species{j}" for j in range(25)]


def run(*arguments):
    return main([*map(str, arguments)])


def words(text):
    """The text without its lines."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def tables():
    """Counts that are Poisson given three factors, and counts that vary more; the same means."""
    X, F, W = simulate(0, 90, 25, 3)
    rate = np.exp(F) @ W.T
    return {
        "poisson": X,
        "overdispersed": np.random.default_rng(1).negative_binomial(1, 1 / (1 + rate)),
    }


@pytest.fixture(scope="module")
def folder(tables, tmp_path_factory):
    """Both tables as .csv with names, and models of them; the first also as .h5ad with places."""
    folder = tmp_path_factory.mktemp("commands")
    for name, X in tables.items():
        pd.DataFrame(X, index=SAMPLES, columns=FEATURES).to_csv(folder / f"{name}.csv")
        model = ("--out", folder / f"{name}.results.npz", "--save-model", folder / f"{name}.npz")
        assert run("fit", folder / f"{name}.csv", *model, "--components", 3, "--quiet") == 0
    adata = anndata.AnnData(
        sp.csr_matrix(tables["poisson"].astype(np.float32)),
        obs=pd.DataFrame(index=SAMPLES),
        var=pd.DataFrame(index=FEATURES),
        obsm={"spatial": simulate(0, 90, 25, 3)[1][:, :2]},  # factors are smooth in these
    )
    adata.write_h5ad(folder / "places.h5ad")
    return folder


@pytest.mark.parametrize(("name", "code"), [("poisson", 0), ("overdispersed", 1)])
def test_check_says_what_python_says(name, code, folder, tables, capsys):
    arguments = (folder / f"{name}.npz", folder / f"{name}.csv", "--draws", 120, "--seed", 3)
    assert run("check", *arguments) == code
    out = capsys.readouterr().out
    check = posterior_predictive_check(
        PNMF.load(folder / f"{name}.npz"), tables[name], n_draws=120, random_state=3
    )
    assert bool(check.flagged) == bool(code)
    assert out.startswith("None of the 9" if code == 0 else "The model does not reproduce")
    assert words(check.verdict()) in words(out)
    for row in check.table().itertuples():
        assert re.search(
            rf"^{row.statistic.replace('_', ' ')} +{row.of} +{row.observed:.4g} +"
            rf"{row.replicated:.4g} .* {round(row.p_value, 4):.4g}$",
            out,
            re.MULTILINE,
        )


def test_check_writes_a_page(folder, tmp_path, capsys):
    report = tmp_path / "check.html"
    arguments = (folder / "overdispersed.npz", folder / "overdispersed.csv", "--draws", 100)
    assert run("check", *arguments, "-o", report, "--quiet") == 1
    assert capsys.readouterr() == ("", "")
    text = report.read_text()
    assert "overdispersion" in text
    assert text.count("data:image/png;base64,") == 1
    assert re.search(r"<td>site\d+</td>", text)
    assert re.search(r"<td>species\d+</td>", text)
    assert "<h2>variance to mean of each feature</h2>" in text
    assert re.search(r"<td>species\d+ – species\d+</td>", text)
    fine = tmp_path / "fine.html"
    arguments = (folder / "poisson.npz", folder / "poisson.csv", "--draws", 100)
    assert run("check", *arguments, "-o", fine, "--quiet") == 0
    assert "no proof" in fine.read_text()
    assert not plt.get_fignums()


def test_check_looks_at_places_where_there_are_any(folder, tmp_path, capsys):
    check = ("check", folder / "poisson.npz", folder / "places.h5ad", "--draws", 100)
    run(*check)
    assert re.search("^moran +feature", capsys.readouterr().out, re.MULTILINE)
    run(*check, "--no-space")
    assert "moran" not in capsys.readouterr().out
    model = tmp_path / "spatial.npz"
    results = ("--out", tmp_path / "a.h5ad", "--save-model", model, "--set", "tol=0.05")
    assert run("fit", folder / "places.h5ad", *results, "--components", 3, "--quiet") == 0
    run("check", model, folder / "poisson.csv", "--draws", 100)
    assert re.search("^moran +feature", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.npz", "poisson.csv"], "MODEL must be a file; there is no"),
        (["poisson.npz", "absent.csv"], "COUNTS must be a file; there is no"),
        (["places.h5ad", "places.h5ad"], "MODEL must end in .npz"),
        (["poisson.results.npz", "poisson.csv"], "is not a saved PNMF model"),
        (["sparse.npz", "poisson.csv"], "is not a model saved by pnmf_pyro"),
        (["poisson.npz", "narrow.csv"], "of shape (90, 25); got (90, 24)"),
        (["poisson.npz", "renamed.csv"], "25 of 25 differ, the first is 'b0' where the fit has"),
        (["poisson.npz", "poisson.csv", "--transpose"], "of shape (90, 25); got (25, 90)"),
        (["poisson.npz", "poisson.csv", "--draws", "99"], "--draws must be at least 100"),
        (["poisson.npz", "poisson.csv", "-o", "a.png"], "--out must end in .html"),
        (["poisson.npz", "poisson.csv", "-o", "absent/a.html"], "--out must be in an existing"),
        (["poisson.npz", "poisson.csv", "--batch-key", "lab"], "are for .h5ad files"),
        (["poisson.npz", "places.h5ad", "--spatial-key", "um"], "which has ['spatial']"),
    ],
)
def test_errors_of_check(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    counts = pd.read_csv("poisson.csv", index_col=0)
    counts.iloc[:, :-1].to_csv("narrow.csv")
    counts.set_axis([f"b{j}" for j in range(25)], axis=1).to_csv("renamed.csv")
    sp.save_npz("sparse.npz", sp.csr_matrix(counts.to_numpy()))
    assert run("check", *arguments) == 2
    one_line(capsys.readouterr(), message)


def one_line(captured, message):
    *notes, error = captured.err.splitlines()
    assert captured.out == ""
    assert message in error
    assert error.startswith("pnmf-pyro: ")
    assert all(note.startswith("pnmf-pyro: took ") for note in notes)


@pytest.mark.slow
def test_select_says_what_python_says(folder, tmp_path, capsys):
    report = tmp_path / "select.html"
    arguments = ("--range", "2:4", "--thinnings", 2, "--seed", 1, "--out", report)
    assert run("select", folder / "poisson.csv", *arguments) == 0
    out = capsys.readouterr().out
    X = read_counts(folder / "poisson.csv").X
    selection = select_n_components(X, [2, 3, 4], n_seeds=2, random_state=1)
    assert selection.chosen == 3
    assert words(selection.summary()) in words(out)
    for row in selection.table().itertuples():
        chosen = " +yes" if row.chosen else ""
        pattern = f"^ *{row.n_components} +{row.deviance:.4g} .*{row.stability:.4g}{chosen}$"
        assert re.search(pattern, out, re.MULTILINE)
    text = report.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "components of different thinnings match" in text
    assert text.count("<tr>") == 4


def test_select_at_the_end_of_the_range(folder, tmp_path, capsys):
    options = ("--thinnings", 2, "--out", tmp_path / "a.html")
    assert run("select", folder / "poisson.csv", "--range", "1,2", *options) == 1
    assert "try more components" in words(capsys.readouterr().out)
    assert run("select", folder / "poisson.csv", "--range", "3:3", *options, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert "<img" in (tmp_path / "a.html").read_text()


@pytest.mark.slow
def test_select_fits_as_fit_does(folder, tables, capsys):
    """In space, with size factors and parameters; without space on demand."""
    arguments = ("--range", "2,3", "--thinnings", 2, "--set", "tol=0.05")
    run("select", folder / "places.h5ad", *arguments, "--size-factors", "total")
    X = read_counts(folder / "places.h5ad").X
    total = tables["poisson"].sum(1)
    selection = select_n_components(
        X,
        [2, 3],
        coordinates=simulate(0, 90, 25, 3)[1][:, :2],
        size_factors=total / total.mean(),
        n_seeds=2,
        random_state=0,
        tol=0.05,
    )
    assert f"2 {selection.mean_deviance[0]:9.4g}" in capsys.readouterr().out
    run("select", folder / "places.h5ad", *arguments, "--no-space")
    flat = select_n_components(X, [2, 3], n_seeds=2, random_state=0, tol=0.05)
    assert f"2 {flat.mean_deviance[0]:9.4g}" in capsys.readouterr().out
    assert abs(flat.mean_deviance[0] - selection.mean_deviance[0]) > 0.005


@pytest.mark.parametrize(
    "text", ["", "2-12", "2:", "12:2", "0:4", "2:12:0", "1:2:3:4", "2,x", "-1"]
)
def test_ranges_that_are_none(text, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        run("select", folder / "poisson.csv", f"--range={text}")
    assert stop.value.code == 2
    assert "is no range of numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "numbers"), [("2:5", [2, 3, 4, 5]), ("2:9:3", [2, 5, 8]), ("8,2", [8, 2]), ("4", [4])]
)
def test_ranges(text, numbers):
    assert list(parser().parse_args(["select", "a.csv", "--range", text]).range) == numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv"], "COUNTS must be a file"),
        (["poisson.csv", "--range", "2,91"], "must be numbers from 1 to 90"),
        (["poisson.csv", "--thinnings", "1"], "n_seeds must be at least 2"),
        (["poisson.csv", "--set", "n_components=3"], "n_components must be several"),
        (["poisson.csv", "--out", "a.csv"], "--out must end in .html"),
    ],
)
def test_errors_of_select(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run("select", *arguments) == 2
    one_line(capsys.readouterr(), message)


@pytest.mark.filterwarnings("default::sklearn.exceptions.ConvergenceWarning")
def test_a_fit_that_has_not_settled(folder, tmp_path, capsys):
    out = tmp_path / "a.h5ad"
    short = ("--set", "training_mode=standard", "--set", "max_iter=40")
    assert run("fit", folder / "poisson.csv", "--out", out, *short) == 1
    assert "pnmf-pyro: warning: The fit did not converge" in capsys.readouterr().err
    assert anndata.read_h5ad(out).uns["pnmf"]["n_iter"] >= 20


def test_fit_writes_a_model_and_a_report(folder, tmp_path, capsys):
    out, model, report = (tmp_path / name for name in ("a.npz", "model.npz", "fit.html"))
    options = ("--out", out, "--save-model", model, "--report", report, "--components", 2)
    assert run("fit", folder / "poisson.csv", *options) == 0
    assert f"wrote {out}, {model}, {report}" in capsys.readouterr().out
    assert list(PNMF.load(model).feature_names_in_) == FEATURES
    assert report.read_text().count("data:image/png;base64,") == 5


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_maps_of_a_report_are_turned_as_those_of_plot(folder, tmp_path):
    model, turned, usual = (tmp_path / name for name in ("m.npz", "a.html", "b.html"))
    names = ("--out", tmp_path / "a.npz", "--save-model", model, "--report", turned, "--north-up")
    short = ("--components", 2, "--set", "max_iter=5", "--quiet")
    assert run("fit", folder / "places.h5ad", *names, *short) == 0
    assert run("plot", model, "--out", usual) == 0
    pictures = (re.findall('base64,[^"]+', page.read_text()) for page in (turned, usual))
    same = [one == other for one, other in zip(*pictures, strict=True)]
    assert same == [False, False, *[True] * 4]
    assert f": pnmf-pyro plot {model} --out {usual}</footer>" in usual.read_text()


@pytest.mark.parametrize("option", ["--save-model", "--report"])
def test_outputs_of_fit_are_checked_before_it(option, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit.shared, "read_table", lambda options: pytest.fail("it began"))
    for name in ("a.txt", "absent/a.npz"):
        arguments = ("--out", tmp_path / "a.h5ad", option, tmp_path / name)
        assert run("fit", folder / "poisson.csv", *arguments) == 2
        one_line(capsys.readouterr(), f"{option} must")


def test_results_do_not_go_between_the_arrays_of_a_store(folder, tmp_path, capsys):
    (tmp_path / "cells.zarr").mkdir()
    assert run("fit", folder / "poisson.csv", "--out", tmp_path / "cells.zarr") == 2
    one_line(capsys.readouterr(), "--out cannot be a .zarr store other than COUNTS")
    assert not list((tmp_path / "cells.zarr").iterdir())


def test_a_fault_is_no_answer(folder, monkeypatch, capsys):
    def fail(options):
        raise RuntimeError("broken")

    monkeypatch.setattr(fit.shared, "read_table", fail)
    assert run("fit", folder / "poisson.csv", "--out", folder / "a.npz") == 3
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "a.html").mkdir()
    options = ("--range", "2", "--thinnings", 2, "--out", tmp_path / "a.html", "--quiet")
    assert run("select", folder / "poisson.csv", *options) == 2
    one_line(capsys.readouterr(), "a.html")


NAMES = ["fit", "check", "calibrate", "markers", "select", "plot", "demo"]


def help_of(*names):
    actions = parser()
    for name in names:
        groups = actions._subparsers._group_actions
        assert isinstance(groups[0], argparse._SubParsersAction)
        actions = groups[0].choices[name]
    return actions.format_help()


def test_help_needs_nothing_heavy_and_says_the_numbers_of_the_commands():
    """Seconds of torch are for commands that compute; so parsers have their numbers as words."""
    code = (
        "import sys; from pnmf_pyro.command_line.cli import main\n"
        "try: main(['fit', '--help'])\n"
        "finally: assert not {'torch', 'pyro', 'scipy', 'sklearn'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"(default: {EVERY:g})" in done.stdout
    assert f"p < {FLAGGED}" in help_of("check")
    assert f"at least {FEWEST} " in help_of("calibrate")
    assert f"{{{','.join(HOLD_OUT)}}}" in help_of("select")


def command_lines(text):
    return [line.strip() for line in text.splitlines() if line.strip().startswith("pnmf-pyro ")]


@pytest.mark.parametrize("names", [(), *((name,) for name in NAMES)])
def test_help_has_examples_that_parse_and_exit_codes(names):
    text = help_of(*names)
    lines = command_lines(text.partition("examples:")[2])
    assert any(f"pnmf-pyro {names[0] if names else 'fit'}" in line for line in lines)
    for line in lines:
        assert_parses(line)
    codes = re.findall(r"^  (\d)  ", text.partition("exit codes:")[2], re.MULTILINE)
    assert codes == (
        ["0", "2", "3"] if names in (("plot",), ("demo",), ("markers",)) else list("0123")
    )
    assert max(map(len, text.splitlines())) <= 100


def test_command_lines_of_the_docs_parse():
    lines = command_lines((ROOT / "docs/command_line.md").read_text())
    assert {"fit", "plot", "check", "select"} <= {line.split()[1] for line in lines}
    for line in lines:
        assert_parses(line)


def assert_parses(line):
    arguments = shlex.split(line)[1:]
    if "--help" not in arguments:
        assert parser().parse_args(arguments).module == arguments[0]


def test_a_plan_is_said_and_nothing_is_written(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run("fit", folder / "places.h5ad", "--components", 3, "--plan") == 0
    said = capsys.readouterr().out
    assert said.startswith("table    90 samples x 25 features, ")
    assert "3 components, fields through 90 inducing points (SVGP)" in said
    assert run("fit", folder / "poisson.csv", "--plan", "--out", folder / "new.npz") == 0
    assert "no space" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_fit_needs_a_place_for_its_results(folder, capsys):
    assert run("fit", folder / "poisson.csv") == 2
    assert "--out must name where to write" in capsys.readouterr().err


def test_a_fit_that_memory_cannot_hold_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pnmf_pyro.estimator.size.available_memory", lambda: 1e6)
    assert run("fit", folder / "poisson.csv", "--out", tmp_path / "new.npz") == 2
    assert "of memory to fit, and 0.0 GB are available" in words(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    assert run("fit", folder / "poisson.csv", "--plan") == 0
