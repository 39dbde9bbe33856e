"""pnmf-pyro calibrate."""

import numpy as np
import pytest

import pnmf_pyro
from pnmf_pyro.command_line import calibrate as command
from pnmf_pyro.command_line.cli import main
from tests.support.data import simulate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrate") / "model.npz"
    pnmf_pyro.fit(simulate(0, 25, 15, 2)[0], n_components=2).save(path)
    return path


def run(*arguments):
    return main([*map(str, arguments)])


@pytest.mark.slow
def test_what_is_said_and_written(model, tmp_path, capsys, monkeypatch):
    kept = []

    def kept_too(*arguments, **keywords):
        kept.append(pnmf_pyro.calibrate(*arguments, **keywords))
        return kept[0]

    monkeypatch.setattr(command, "calibrate", kept_too)
    out = tmp_path / "calibration.html"
    code = run("calibrate", model, "--simulations", 20, "--seed", 3, "--out", out)
    assert code == (1 if kept[0].flagged else 0)
    printed = " ".join(capsys.readouterr().out.split())
    assert kept[0].verdict() in printed
    assert f"{kept[0].coverage(0.9).share:.3f}" in printed
    assert "data:image/png" in out.read_text()


def test_exit_code_of_intervals_that_are_off(model, monkeypatch):
    z = 3 * np.random.default_rng(0).normal(size=(30, 20, 2))
    ranks = np.random.default_rng(0).integers(0, 100, (30, 2))
    narrow = pnmf_pyro.analysis.Calibration(z, ranks, ["a", "b"], 99, False)
    monkeypatch.setattr(command, "calibrate", lambda *arguments, **keywords: narrow)
    assert run("calibrate", model, "--quiet") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulations", "19"], "--simulations must be at least 20"),
        (["--out", "c.txt"], "--out must end in .html"),
    ],
)
def test_bad_options(model, arguments, message, capsys):
    assert run("calibrate", model, *arguments) == 2
    assert message in capsys.readouterr().err
