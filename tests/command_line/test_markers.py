"""pnmf-pyro markers."""

import numpy as np
import pandas as pd
import pytest

import pnmf_pyro
from pnmf_pyro.command_line.cli import main
from tests.support.data import simulate

FEATURES = [f"species{j}" for j in range(25)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("markers") / "model.npz"
    X = pd.DataFrame(simulate(0, 90, 25, 3)[0], columns=FEATURES)
    pnmf_pyro.fit(X, n_components=3).save(path)
    return path


def run(*arguments):
    return main([*map(str, arguments)])


def test_what_is_printed_and_written(model, tmp_path, capsys):
    table = pnmf_pyro.differential_features(pnmf_pyro.PNMF.load(model))
    assert run("markers", model, "--out", tmp_path / "m.csv", "--top", 2) == 0
    printed = capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "m.csv"), table, check_dtype=False)
    sure = table[(table["lfsr"] < 0.05) & (table["mean"] > 0)]
    first = sure.sort_values("mean", ascending=False).groupby("component").head(2)
    lines = [line.split() for line in printed.splitlines()[1:] if "species" in line]
    assert sorted((int(line[0]), line[1]) for line in lines) == sorted(
        zip(first["component"], first["feature"], strict=True)
    )
    assert run("markers", model, "--out", tmp_path / "m.html", "--lfsr", 0.01) == 0
    assert "lfsr &lt; 0.01" in (tmp_path / "m.html").read_text()
    assert "data:image/png" in (tmp_path / "m.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lfsr", "0"], "--lfsr must be a rate"),
        (["--top", "0"], "--top must be at least 1"),
        (["--out", "m.txt"], "--out must end in .csv"),
    ],
)
def test_bad_options(model, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("markers", model, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_errors_of_loadings_says_so(model, tmp_path, capsys):
    held = {k: v for k, v in np.load(model).items() if not k.startswith("loadings/errors")}
    np.savez_compressed(tmp_path / "older.npz", **held)
    assert run("markers", tmp_path / "older.npz") == 2
    assert "Fit it again" in capsys.readouterr().err
