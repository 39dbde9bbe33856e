"""Outputs of the commands: what they keep, what they refuse, and how they end when stopped."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from benchmarks.durability import all_killed
from pnmf_pyro import PNMF
from pnmf_pyro.command_line import commands
from pnmf_pyro.command_line import fit as fit_command
from pnmf_pyro.command_line.cli import main
from pnmf_pyro.data import atomic

QUICK = ("--components", "2", "--quiet", "--set", "tol=0.05")
X = np.random.default_rng(0).poisson(np.kron(np.eye(2), np.full((6, 3), 9.0))[:, :5] + 1)
X = X.astype(np.float32)
SAMPLES, FEATURES = [f"cell{i}" for i in range(12)], [f"gene, {j}" for j in range(5)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the same counts as .h5ad, which holds much else, .npz and .csv."""
    monkeypatch.chdir(tmp_path)
    adata = anndata.AnnData(sp.csr_matrix(X), layers={"spliced": sp.csr_matrix(2 * X)})
    adata.obs_names, adata.var_names = SAMPLES, FEATURES
    adata.obs["region"] = pd.Categorical(["a", "b"] * 6)
    adata.uns["note"], adata.varm["loadings"] = "mine", np.ones((5, 3))
    adata.obsp["graph"], adata.raw = sp.identity(12, format="csr"), adata.copy()
    adata.write_h5ad("counts.h5ad")
    sp.save_npz("counts.npz", sp.csr_matrix(X))
    pd.DataFrame(X, SAMPLES, FEATURES).to_csv("counts.csv")
    return tmp_path


def fit(counts, *options):
    return main(["fit", str(counts), *map(str, options), *QUICK])


def names(path):
    return sorted(one.name for one in path.iterdir())


def one_line(capsys, *said):
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for words in said:
        assert words in error


# --- results in the file of the counts


@pytest.mark.parametrize("out", ["counts.h5ad", "./counts.h5ad", "link.h5ad", "sub/../counts.h5ad"])
def test_results_go_into_the_file_of_the_counts(out, folder):
    (folder / "link.h5ad").symlink_to("counts.h5ad")
    (folder / "sub").mkdir()
    before = anndata.read_h5ad("counts.h5ad")
    assert fit("counts.h5ad", "--out", out, "--size-factors", "total") == 0
    after = anndata.read_h5ad("counts.h5ad")
    np.testing.assert_array_equal(after.X.toarray(), X)
    np.testing.assert_array_equal(after.layers["spliced"].toarray(), 2 * X)
    np.testing.assert_array_equal(after.raw.X.toarray(), X)
    np.testing.assert_array_equal(after.obsp["graph"].toarray(), np.eye(12))
    np.testing.assert_array_equal(after.varm["loadings"], before.varm["loadings"])
    assert (after.uns["note"], after.uns["pnmf"]["parameters"]["n_components"]) == ("mine", 2)
    pd.testing.assert_frame_equal(after.obs[["region"]], before.obs)
    assert after.obsm["X_pnmf"].shape == after.obsm["X_pnmf_sd"].shape == (12, 2)
    assert after.varm["PNMF_loadings"].shape == (5, 2)
    assert after.obs["pnmf_size_factors"].mean() == pytest.approx(1)
    assert (folder / "link.h5ad").is_symlink()


def test_results_of_a_second_fit_replace_those_of_the_first(folder):
    assert fit("counts.h5ad", "--out", "counts.h5ad", "--size-factors", "total") == 0
    assert fit("counts.h5ad", "--out", "counts.h5ad", "--components", "3") == 0
    after = anndata.read_h5ad("counts.h5ad")
    assert list(after.obs) == ["region"]
    assert after.obsm["X_pnmf"].shape == (12, 2)  # the last --components counts


def test_what_anndata_cannot_read_stays(folder):
    with h5py.File("counts.h5ad", "a") as file:
        file["uns"].create_group("odd").attrs["encoding-type"] = "of another program"
        file["odd/table"] = np.arange(3)
    fitted = anndata.read_h5ad
    with pytest.MonkeyPatch.context() as patch:  # a reader that leaves alone what it cannot read
        patch.setattr(anndata, "read_h5ad", lambda _: without_odd(fitted))
        assert fit("counts.h5ad", "--out", "counts.h5ad") == 0
    with h5py.File("counts.h5ad") as file:
        assert file["uns/odd"].attrs["encoding-type"] == "of another program"
        assert list(file["odd/table"]) == [0, 1, 2]
        assert file["obsm/X_pnmf"].shape == (12, 2)


def without_odd(read):
    with h5py.File("counts.h5ad") as file, h5py.File("copy.h5ad", "w") as copy:
        for name in file:
            if name != "odd":
                file.copy(name, copy)
        copy.attrs.update(file.attrs)
        del copy["uns/odd"]
    return read("copy.h5ad")


def test_a_file_that_was_changed_during_the_fit_is_left_alone(folder, monkeypatch, capsys):
    run = fit_command.fit

    def change(*arguments, **settings):
        anndata.read_h5ad("counts.h5ad")[::-1].copy().write_h5ad("counts.h5ad")
        return run(*arguments, **settings)

    monkeypatch.setattr(fit_command, "fit", change)
    assert fit("counts.h5ad", "--out", "counts.h5ad", "--save-model", "model.npz") == 2
    error = capsys.readouterr().err
    assert "counts.h5ad has changed since it was read: its obs_names are others" in error
    assert "the fitted model is in model.npz" in error
    assert list(anndata.read_h5ad("counts.h5ad").obsm) == []
    assert PNMF.load("model.npz").n_components == 2


def test_a_file_of_an_old_layout_is_refused_before_the_fit(folder, capsys):
    with h5py.File("counts.h5ad", "a") as file:
        del file["obs"]
        file["obs"] = np.array([(b"a", 1)], dtype=[("index", "S5"), ("n", "i4")])
    assert fit("counts.h5ad", "--out", "counts.h5ad") == 2
    one_line(capsys, "layout of an old anndata", "Give --out another name")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved")
def test_room_is_reserved_before_hdf5_writes(folder, monkeypatch, capsys):
    """HDF5 crashes on a disk that is full, so it is not to find it so."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = names(folder), (folder / "counts.h5ad").read_bytes()
    assert fit("counts.h5ad", "--out", "counts.h5ad", "--save-model", "../model.npz") == 2
    assert "No space left on device: 'counts.h5ad'" in capsys.readouterr().err
    assert (names(folder), (folder / "counts.h5ad").read_bytes()) == before


# --- names that clash


@pytest.mark.parametrize(
    ("arguments", "other", "one"),
    [
        (["fit", "counts.npz", "--out", "counts.npz"], "--out", "COUNTS"),
        (["fit", "counts.npz", "--out", "link.npz"], "--out", "COUNTS"),
        (["fit", "counts.npz", "--out", "hard.npz"], "--out", "COUNTS"),
        (["fit", "counts.h5ad", "--out", "counts.h5ad", "--transpose"], "--out", "COUNTS"),
        (["fit", "factors.csv", "--out", "./"], "--out", "COUNTS"),
        (["fit", "counts.npz", "--out", "a.npz", "--save-model", "a.npz"], "--save-model", "--out"),
        (["fit", "counts.npz", "--out", "a.npz", "--save-model", "link.npz"], "--save-model", "CO"),
        (["fit", "counts.npz", "--out", "a.h5ad", "--report", "link.html"], "--report", "COUNTS"),
        (["plot", "counts.npz", "--out", "link.html"], "--out", "FIT"),
        (["check", "counts.npz", "counts.csv", "--out", "link.html"], "--out", "MODEL"),
        (["select", "counts.npz", "--out", "link.html"], "--out", "COUNTS"),
    ],
)
def test_clashes_are_refused_before_anything_is_read(arguments, other, one, folder, capsys):
    (folder / "factors.csv").write_bytes((folder / "counts.csv").read_bytes())
    os.link("counts.npz", "hard.npz")
    for name in ("link.npz", "link.html"):
        (folder / name).symlink_to("counts.npz")
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    assert main(arguments) == 2
    one_line(capsys, f"{other} would overwrite {one}")
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_a_folder_in_the_place_of_an_output_is_told_before_the_fit(folder, capsys, monkeypatch):
    monkeypatch.delattr(fit_command, "fit")
    (folder / "a.html").mkdir()
    assert fit("counts.csv", "--out", "a.npz", "--report", "a.html") == 2
    one_line(capsys, "a folder is there", "a.html")


# --- tables for R and spreadsheets


@pytest.mark.parametrize("out", ["results/", "results.csv"])
def test_results_as_csv(out, folder):
    assert fit("counts.csv", "--out", out, "--save-model", "model.npz") == 0
    start = out if out.endswith("/") else "results_"
    table = {
        name: pd.read_csv(f"{start}{name}.csv", index_col=0, float_precision="round_trip")
        for name in ("factors", "factors_sd", "log_factors_sd", "loadings", "elbo_history")
    }
    model = PNMF.load("model.npz")
    np.testing.assert_array_equal(table["loadings"], model.components_.T)
    assert list(table["factors"].index) == list(table["factors_sd"].index) == SAMPLES
    assert list(table["loadings"].index) == FEATURES
    assert list(table["factors"]) == ["component_0", "component_1"]
    expected = table["factors"] * np.sqrt(np.expm1(table["log_factors_sd"] ** 2))
    np.testing.assert_allclose(table["factors_sd"], expected)
    assert table["elbo_history"]["elbo"].tolist() == model.history_
    with open(f"{start}settings.json") as file:
        assert json.load(file)["parameters"]["n_components"] == 2
    with open(f"{start}factors.csv", newline="") as file:
        assert {len(row) for row in csv.reader(file)} == {3}


def test_csv_of_counts_without_names(folder, capsys):
    assert main(["fit", "counts.npz", "--out", "r.csv", "--components", "1"]) == 0
    assert list(pd.read_csv("r_loadings.csv", index_col=0).index) == [0, 1, 2, 3, 4]
    assert "wrote r_factors.csv, r_factors_sd.csv, " in capsys.readouterr().out


def test_tables_that_cannot_all_be_written_leave_the_old_ones(folder, monkeypatch):
    assert fit("counts.csv", "--out", "results/") == 0
    before = {name: (folder / "results" / name).read_bytes() for name in names(folder / "results")}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    for out in ("results/", "new/"):
        assert fit("counts.csv", "--out", out, "--components", "1") == 3
    assert not (folder / "new").exists()
    found = {name: (folder / "results" / name).read_bytes() for name in names(folder / "results")}
    assert found == before


# --- what cannot be written


def test_odd_annotation_costs_no_results(folder, capsys):
    """A column called _index, as SeuratDisk leaves it, which anndata reads and does not write."""
    with h5py.File("counts.h5ad", "a") as file:
        file["var"]["features"] = np.array(FEATURES, dtype=h5py.string_dtype())
        file["var"].attrs["_index"] = "features"
        file["var"].attrs["column-order"] = np.array(["_index"], dtype=object)
    assert fit("counts.h5ad", "--out", "out.h5ad", "--save-model", "model.npz") == 1
    one_line(capsys, "out.h5ad is without var['_index'], which cannot be written")
    found = anndata.read_h5ad("out.h5ad")
    assert list(found.var_names) == FEATURES
    assert found.obs["region"].tolist() == ["a", "b"] * 6
    assert found.obsm["X_pnmf"].shape == (12, 2)
    assert fit("counts.h5ad", "--out", "counts.h5ad") == 0
    assert list(anndata.read_h5ad("counts.h5ad").var) == ["_index"]


def test_a_report_that_fails_costs_no_results(folder, monkeypatch, capsys):
    monkeypatch.setattr(fit_command, "fit_report", lambda *_, **__: 1 / 0)
    assert fit("counts.csv", "--out", "out.npz", "--report", "fit.html") == 1
    one_line(capsys, "the report is not written: division by zero; results are in out.npz")
    assert {"factors", "loadings"} <= set(np.load("out.npz"))


def test_a_model_that_cannot_be_saved_costs_no_results(folder, monkeypatch, capsys):
    monkeypatch.setattr(PNMF, "save", lambda *_: [][0:1].index(2))
    assert fit("counts.csv", "--out", "out.npz", "--save-model", "model.npz") == 1
    one_line(capsys, "the model is not saved")
    assert names(folder)[-1] == "out.npz"


def test_too_little_memory_is_said_in_one_line(folder, monkeypatch, capsys):
    def full(*given, **settings):
        raise MemoryError

    monkeypatch.setattr(PNMF, "fit", full)
    assert fit("counts.csv", "--out", "out.npz") == 2
    one_line(capsys, "MemoryError")


def test_results_that_cannot_be_written_leave_the_model(folder, monkeypatch, capsys):
    replace = os.replace

    def full(part, target):
        if os.fspath(target).endswith("out.npz"):
            raise OSError(28, "No space left on device")
        replace(part, target)

    monkeypatch.setattr(atomic.os, "replace", full)
    before = names(folder)
    assert fit("counts.csv", "--out", "out.npz") == 2
    warning, error = capsys.readouterr().err.splitlines()
    path = warning.partition("the fitted model is in ")[2].partition(";")[0]
    assert PNMF.load(path).components_.shape == (2, 5)
    assert "No space left on device: 'out.npz'" in error
    assert names(folder) == before
    os.remove(path)
    os.rmdir(os.path.dirname(path))


# --- how a process ends

# A shell that runs tests in the background has them ignore SIGINT, and so would their children.
COMMAND = [sys.executable, "-c", "import signal, sys; "
           "signal.signal(signal.SIGINT, signal.default_int_handler); "
           "from pnmf_pyro.command_line.cli import main; sys.exit(main())"]  # fmt: skip
LONG = ("--components", "2", "--set", "max_iter=10000000", "--set", "tol=0")


def start(*arguments, **streams):
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *arguments], **(usual | streams))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "when"),
    [(signal.SIGINT, 130, "imports"), (signal.SIGINT, 130, "fit"), (signal.SIGTERM, 143, "fit")],
)
def test_a_signal_ends_in_one_line(number, code, when, folder):
    before = names(folder)
    process = start("fit", "counts.csv", "--out", "out.npz", *LONG)
    with process:
        if when == "imports":
            time.sleep(0.8)
        else:
            process.stderr.read(1)  # of the progress bar
        process.send_signal(number)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    said = f"stopped by {number.name}; files that were not finished are as they were before.\n"
    assert error.endswith(said)
    assert "Traceback" not in error
    assert names(folder) == before


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_waits_for_the_end_of_an_import(tmp_path):
    """Libraries in C++ that are stopped while they are imported abort the process."""
    (tmp_path / "half.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhole = True\n"
    )
    program = f"""
import sys, time
from pnmf_pyro.command_line import cli, commands
sys.path.insert(0, {str(tmp_path)!r})
def run(arguments):
    import half
    print(half.whole, flush=True)
    time.sleep(60)
commands.run = run
sys.exit(cli.main())
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 143
    assert process.stdout == "True\n"
    assert process.stderr.startswith("pnmf-pyro: stopped by SIGTERM")


def test_ctrl_c_within_python_is_the_same(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(commands, "run", interrupted)
    assert main(["fit"]) == 130
    one_line(capsys, "stopped by SIGINT")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_has_gone_costs_no_results(closed, folder):
    read, write = os.pipe()
    os.close(read)
    arguments = ("--components", "1", "--set", "max_iter=5", "--set", "tol=1")
    with start("fit", "counts.csv", "--out", "out.npz", *arguments, **{closed: write}) as process:
        os.close(write)
        out, error = process.communicate(timeout=60)
    assert process.returncode in (0, 1)
    assert "Traceback" not in f"{out}{error}"
    assert "Exception ignored" not in f"{out}{error}"
    assert "factors" in np.load("out.npz")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore")  # of forks, and of fits that have not converged
def test_a_writer_that_is_killed_loses_nothing():
    for found in all_killed(6, 2000, 20, 5):
        assert (found["lost"], found["rests"]) == (0, 0), found
