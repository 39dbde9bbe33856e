"""Checkpoints: a fit that was stopped goes on to the bits of one that was not."""

import os
import signal
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator import archive, checkpoints
from pnmf_pyro.estimator.checkpoints import flattened, rebuilt
from pnmf_pyro.estimator.stages import Settle
from pnmf_pyro.priors import GaussianPrior
from tests.support.checkpoints import FITS, PLACES, X, differing, fit, stopped, writes
from tests.support.interrupts import shared_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

NAME = "non-spatial"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.ckpt"


@pytest.fixture
def interruptible():
    """A process in the background may have been told to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_a_stopped_fit_goes_on_to_the_same_bits(name, path, monkeypatch):
    """Stopped after the first step, in the midst, and when it had ended."""
    expected = fit(name)
    total = writes(lambda: fit(name, checkpoint=path, every=0), monkeypatch)
    assert total > 10
    assert differing(fit(name, checkpoint=path), expected) == []  # it had ended
    for number in (2, total // 2):
        stopped(path, name, number, monkeypatch)
        assert differing(fit(name, checkpoint=path), expected) == [], (number, total)


def test_a_fit_may_be_stopped_again_and_again(path, monkeypatch):
    expected = fit("SVGP")
    while writes(lambda: fit("SVGP", checkpoint=path, every=0), monkeypatch, 5) == 5:
        pass
    assert differing(fit("SVGP", checkpoint=path), expected) == []


def test_without_time_to_write_stages_are_kept(path, monkeypatch):
    model = fit("LCGP")
    assert writes(lambda: fit("LCGP", checkpoint=path, every=1e9), monkeypatch) == 6
    assert [stage for stage, _, _ in model.history_.stages] == ["warm-up", "settle", "settle"]


def test_the_estimator_takes_a_checkpoint(path, monkeypatch):
    model = PNMF(2, max_iter=20, random_state=3)
    count = writes(lambda: model.fit(X, checkpoint=path, every=0), monkeypatch)
    assert count == 1 + 20 + 1
    told = []
    again = PNMF(2, max_iter=20, random_state=3, verbose=False)
    again.fit(X, checkpoint=path, callback=lambda *given: told.append(given), callback_interval=1)
    assert differing(again, model) == []
    assert told == []  # there was no step left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_components": 3}, "n_components was 2, and is 3"),
        ({"max_iter": 51}, "max_iter was 50, and is 51"),
        ({"random_state": 1}, "random_state was 0, and is 1"),
        ({"init": (None, "random")}, "init was"),
        ({"init": np.ones((X.shape[1], 2))}, "init was"),
        ({"size_factors": "total"}, "size_factors has changed"),
        ({"mask": X < 5}, "X has changed; mask has changed"),
        ({"batches": np.arange(len(X)) % 2}, "batches or covariates has changed"),
        ({"coords": PLACES}, "spatial was False, and is True; .*coordinates has changed"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(change, message, path):
    fit(NAME, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"run.ckpt is of another fit: .*{message}"):
        fit(NAME, checkpoint=path, **change)
    assert path.read_bytes() == before


def test_other_counts_and_versions_are_refused(path, monkeypatch):
    fit(NAME, checkpoint=path)
    other = X.astype("f4")
    other[3, 4] += 1
    with pytest.raises(ValueError, match=r"another fit: X has changed\. Go on"):
        pnmf_pyro.fit(other, n_components=2, max_iter=50, checkpoint=path)
    monkeypatch.setattr(checkpoints, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"pnmf_pyro was \S+, and is 9.9"):
        fit(NAME, checkpoint=path)


def test_progress_is_no_part_of_a_fit(path):
    fit(NAME, checkpoint=path)
    fit(NAME, checkpoint=path, verbose=True, every=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint": 3}, "checkpoint must be the name of a file"),
        ({"checkpoint": "a\0b"}, "checkpoint must be the name of a file"),
        ({"checkpoint": "nowhere/run.ckpt"}, "checkpoint must be in an existing folder"),
        ({"every": -1}, "every must be a number"),
        ({"every": "1"}, "every must be a number"),
        ({"every": float("nan")}, "every must be a number"),
        ({"random_state": None}, "checkpoint needs a seed"),
        ({"random_state": np.random.RandomState(0)}, "checkpoint needs a seed"),
    ],
)
def test_what_cannot_be_kept_is_refused(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(NAME, **{"checkpoint": "run.ckpt", **given})
    assert list(tmp_path.iterdir()) == []


def test_objects_of_the_user_are_refused(path):
    prior = GaussianPrior(torch.empty(X.shape[::-1]), 2, use_natural_gradients=True)
    with pytest.raises(ValueError, match="checkpoint cannot keep this fit: prior="):
        fit(NAME, prior=prior, checkpoint=path)

    class Mine(Settle):
        pass

    with pytest.raises(ValueError, match="checkpoint cannot keep this fit: stages="):
        fit(NAME, stages=[Mine()], checkpoint=path)
    with pytest.raises(IsADirectoryError):
        fit(NAME, checkpoint=path.parent)


def test_a_damaged_checkpoint_is_refused(path, monkeypatch):
    stopped(path, NAME, 9, monkeypatch)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    expected = fit(NAME)
    refused: list[str] = []
    for number in range(80):  # half of it in the list of its parts, at the end
        data = bytearray(whole)
        place = int(random.integers(0 if number < 40 else len(data) - 4000, len(data)))
        if number % 2:
            data[place] ^= 1 << int(random.integers(8))
        else:
            del data[place:]
        path.write_bytes(data)
        try:
            found = fit(NAME, checkpoint=path)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert differing(found, expected) == []  # a bit that nobody reads
            continue
        assert path.read_bytes() == data
    assert len(refused) > 50
    assert all("Remove it to begin anew" in message for message in refused)


def test_a_file_of_another_kind_is_refused_and_stays(path):
    fit(NAME).save(path)
    model = path.read_bytes()
    for data, message in (
        (model, "holds a model"),
        (b"words", "is not a checkpoint"),
        (b"", "is not"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            fit(NAME, checkpoint=path)
        assert path.read_bytes() == data
    path.unlink()
    fit(NAME, checkpoint=path)
    with pytest.raises(ValueError, match="not a saved PNMF model"):
        PNMF.load(path)


def test_without_space_the_old_checkpoint_stays_and_the_fit_goes_on(path, monkeypatch):
    savez, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) > 6:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    expected = fit(NAME)
    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match=r"not written: .*No space left.*run.ckpt"):
        model = fit(NAME, checkpoint=path, every=0)
    assert differing(model, expected) == []
    assert os.listdir(path.parent) == ["run.ckpt"]
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint is not written")
        assert differing(fit(NAME, checkpoint=path), expected) == []
    path.unlink()
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):  # at once, before the fit takes its time
        fit(NAME, checkpoint=path)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_step_and_leaves_a_checkpoint(path):
    expected, before = fit(NAME), shared_state()
    usual = signal.getsignal(signal.SIGINT)
    model = PNMF(**expected.get_params())

    def interrupt(model: PNMF, iteration: int, elbo: float) -> None:
        if iteration == 30:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) != usual

    with pytest.raises(KeyboardInterrupt):
        model.fit(X.astype("f4"), callback=interrupt, callback_interval=1, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) == usual
    assert shared_state() == before
    assert not hasattr(model, "components_")
    steps = []
    model.fit(
        X.astype("f4"),
        callback=lambda model, iteration, elbo: steps.append(iteration),
        callback_interval=1,
        checkpoint=path,
    )
    assert steps[0] == 31
    assert differing(model, expected) == []


def test_warnings_of_finished_stages_are_said_again(path, monkeypatch):
    given = {"max_iter": 40, "tol": 1e-9}
    with pytest.warns(ConvergenceWarning) as first:
        fit(NAME, checkpoint=path, every=1e9, **given)
    with pytest.warns(ConvergenceWarning) as again:
        fit(NAME, checkpoint=path, **given)
    assert [str(one.message) for one in again] == [str(one.message) for one in first]


def test_states_are_the_same_after_the_file(path):
    odd = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).T
    state = {
        "a": [odd, (1, 2.5, None, True), {"x": float("inf")}],
        "b": {0: torch.tensor(3, dtype=torch.uint8), 1: torch.zeros(0), 2: torch.ones(2) > 0},
        "c": "word",
        "d": [0.1 + 0.2, -0.0],
    }
    plain, arrays = flattened(state)
    archive.write_archive(path, {"state": plain}, arrays, compressed=False)
    header, arrays = archive.read_archive(path)
    found = rebuilt(header["state"], arrays)
    assert torch.equal(found["a"][0], odd)
    assert found["a"][0].stride() == odd.stride()
    assert found["a"][1:] == state["a"][1:]
    assert found["b"].keys() == state["b"].keys()
    assert all(torch.equal(found["b"][k], state["b"][k]) for k in range(3))
    assert all(found["b"][k].dtype == state["b"][k].dtype for k in range(3))
    assert (found["c"], found["d"]) == (state["c"], state["d"])
    with pytest.raises(TypeError, match="cannot hold"):
        flattened({"a": object()})
