"""Commands and processes that are stopped while they fit, and go on."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.stops import FITS, killed_fits
from pnmf_pyro.command_line.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
]

COMMAND = [sys.executable, "-c", "import sys; from pnmf_pyro.command_line.cli import main; "
           "sys.exit(main())"]  # fmt: skip
FIT = ("fit", "counts.npy", "--components", "2", "--set", "tol=0", "--checkpoint", "run.ckpt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("counts.npy", np.random.default_rng(0).poisson(3.0, size=(60, 8)))
    return tmp_path


def results(file):
    with np.load(file) as found:
        return {name: found[name].tobytes() for name in found.files}


@pytest.mark.slow
def test_a_command_that_is_stopped_goes_on(folder, capsys):
    """By SIGTERM in the midst of its steps."""
    fit = (*FIT, "--set", "max_iter=1000", "--out", "out.npz")
    with subprocess.Popen([*COMMAND, *fit], stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "run.ckpt").exists():
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in error
    assert sorted(os.listdir(folder)) == ["counts.npy", "run.ckpt"]
    assert main(fit) in (0, 1)
    assert "run.ckpt is there: the fit goes on from it" in capsys.readouterr().err
    found = results("out.npz")
    os.unlink("run.ckpt")
    assert main(fit) in (0, 1)
    assert results("out.npz") == found
    assert (folder / "run.ckpt").exists()
    capsys.readouterr()
    assert main([*fit, "--components", "3"]) == 2
    assert re.search(r"run.ckpt is of another fit: n_components was 2", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "run.ckpt.npz", "--checkpoint", "counts.npy"), "would overwrite COUNTS"),
        (("--out", "out.npz", "--checkpoint", "out.npz"), "--checkpoint would overwrite --out"),
        (("--out", "out.npz", "--checkpoint", "no/run.ckpt"), "must be in an existing folder"),
        (("--out", "out.npz", "--every", "-1"), "every must be a number"),
    ],
)
def test_what_cannot_be_a_checkpoint_ends_with_code_2(options, message, folder, capsys):
    assert main([*FIT, *options]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(folder) == ["counts.npy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fits_that_are_killed_go_on_to_the_same_bits(name, tmp_path):
    """A few times; `python -m benchmarks stops` does it more often."""
    for told in killed_fits(name, 2, 300, 40, 3, tmp_path):
        assert told["same"]
        assert not told["rests"]
