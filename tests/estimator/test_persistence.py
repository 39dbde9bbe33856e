"""Saving and loading (identity 9), in this process and a new one."""

import copy
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from pnmf_pyro import PNMF
from pnmf_pyro.estimator.archive import read_archive, write_archive
from pnmf_pyro.estimator.stages import Correlate, Settle
from tests.support.data import tissue
from tests.support.settings import STEPS, unconverged


def test_round_trip(fitted, counts, tmp_path):
    path = tmp_path / "model.npz"
    fitted.save(path)
    again = PNMF.load(path)
    np.testing.assert_array_equal(again.transform(counts), fitted.transform(counts))
    np.testing.assert_array_equal(again.components_, fitted.components_)
    assert again.get_params() == fitted.get_params()
    assert (again.elbo_, again.n_iter_, again.history_) == (
        fitted.elbo_,
        fitted.n_iter_,
        fitted.history_,
    )
    assert again.score(counts) == fitted.score(counts)
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]


def test_a_new_process_reads_the_same(fitted, counts, tmp_path):
    fitted.save(tmp_path / "model.npz")
    np.save(tmp_path / "X.npy", counts)
    code = (
        "import sys, numpy as np; from pnmf_pyro import PNMF; folder = sys.argv[1]; "
        "np.save(folder + '/out.npy', "
        "PNMF.load(folder + '/model.npz').transform(np.load(folder + '/X.npy')))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    expected = fitted.transform(counts)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"loadings_mode": "softplus", "mode": "simple"},
        {"training_mode": "natural", "mode": "lower-bound"},
        {"random_state": np.random.RandomState(0)},
        {"random_state": np.int64(3), "tol": np.float64(0.05)},
    ],
)
def test_every_kind_of_model(parameters, counts, tmp_path):
    names = [f"gene{j}" for j in range(counts.shape[1])]
    frame = pd.DataFrame(counts, columns=names)
    s = np.linspace(0.5, 2, len(counts))
    model = PNMF(**{"n_components": 2, "tol": 0.05, "random_state": 0, **parameters})
    model.fit(frame, size_factors=s).save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(
        again.transform(frame, size_factors=s), model.transform(frame, size_factors=s)
    )
    assert list(again.feature_names_in_) == names
    state, restored = model.model_.state_dict(), again.model_.state_dict()
    assert state.keys() == restored.keys()
    assert all(bool((state[key] == restored[key]).all()) for key in state)


def test_truncated_file(fitted, tmp_path):
    path = tmp_path / "model.npz"
    fitted.save(path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            PNMF.load(path)


def test_a_flipped_byte_is_noticed(fitted, tmp_path):
    path = tmp_path / "model.npz"
    fitted.save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        PNMF.load(path)


def test_foreign_files(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "objects.npz", header=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("counts")
    for name in ("other.npz", "array.npy", "objects.npz", "text.npz"):
        with pytest.raises(ValueError, match="not a model saved by pnmf_pyro"):
            PNMF.load(tmp_path / name)
    for name in (None, 3, "a\0.npz"):
        with pytest.raises(ValueError, match="path must be the name of a file"):
            PNMF.load(name)
    with pytest.raises(FileNotFoundError):
        PNMF.load(tmp_path / "absent.npz")
    write_archive(tmp_path / "results.npz", {"settings": {}}, {"factors": np.ones(3)})
    with pytest.raises(ValueError, match="not a saved PNMF model"):
        PNMF.load(tmp_path / "results.npz")


LABELS = {
    "bytes": np.array([b"a", b"\xff"]),
    "dates": np.array(["2024-01-31", "2025-06-01"], dtype="datetime64[D]"),
    "times": np.array(["2024-01-31T10", "2025-06-01T11"], dtype="datetime64[s]"),
    "stamps": pd.to_datetime(["2024-01-31", "2025-06-01"]).to_series().astype(object).to_numpy(),
    "numbers": np.array([0.5, 2.0]),
    "numpy's numbers": np.array([np.int64(3), np.int64(4)], dtype=object),
    "truth": np.array([True, False]),
    "intervals": np.asarray(pd.cut([1, 5], [0, 2, 6])),
    "words": np.array(["a", "b"]),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@unconverged
def test_groups_of_every_kind_of_label(labels, tmp_path):
    X, x, *_ = tissue(N=20)
    model = PNMF(2, **{**STEPS, "max_iter": 3}, multigroup=True)
    groups = np.repeat(labels, 10)
    model.fit(X, coordinates=x, groups=groups).save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    assert again.groups_ == model.groups_
    assert [type(name) for name in again.groups_] == [type(name) for name in model.groups_]
    predicted = (one.transform(None, coordinates=x, groups=groups) for one in (model, again))
    np.testing.assert_array_equal(*predicted)


@pytest.mark.parametrize(
    "parameters",
    [
        {"kernel": [np.str_("RBF")], "num_inducing": np.int64(9)},
        {"learn": {"sigma", "nugget"}},
        {"learn": frozenset({"sigma"}), "lengthscale": np.float32(0.3)},
        {"stages": [Settle(kl_weight=np.float32(0.5)), Settle(mode=np.str_("expanded"))]},
        {
            "stages": (Settle(), Correlate(np.int64(2)), Settle()),
            "local": np.True_,
            "K": np.int8(4),
        },
    ],
)
@unconverged
def test_what_fit_accepts_is_saved(parameters, tmp_path):
    X, x, *_ = tissue(N=20)
    model = PNMF(2, **{**STEPS, "max_iter": 3, **parameters}).fit(X, coordinates=x)
    model.save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    for name, value in model.get_params().items():
        held = getattr(again, name)
        value = tuple(value) if isinstance(value, list | set | frozenset) else value
        assert held == value or set(held) == set(value), name
    np.testing.assert_array_equal(again.components_, model.components_)


def test_a_stage_of_ones_own_cannot_be_saved(fitted, tmp_path):
    class Mine(Settle):
        pass

    model = copy.copy(fitted).set_params(stages=[Mine()])
    with pytest.raises(ValueError, match=r"stages.*cannot be saved: it is an object"):
        model.save(tmp_path / "model.npz")


def test_a_fit_of_no_use_is_not_saved(fitted, tmp_path):
    """What is saved can be loaded; so both look at the same things."""
    broken = copy.deepcopy(fitted)
    broken.elbo_ = float("nan")
    with pytest.raises(ValueError, match="cannot be saved, since no use can be made of it: elbo"):
        broken.save(tmp_path / "model.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_fit_on_a_device_that_is_not_here(fitted, tmp_path, counts):
    model = copy.copy(fitted)
    model.set_params(device="cuda").save(tmp_path / "model.npz")
    again = PNMF.load(tmp_path / "model.npz")
    assert again.device == ("cuda" if torch.cuda.is_available() else "auto")
    np.testing.assert_allclose(again.transform(counts), fitted.transform(counts), rtol=1e-5)


def test_a_newer_format_says_to_upgrade(tmp_path):
    header = json.dumps({"format": "pnmf_pyro", "format_version": 99})
    np.savez(tmp_path / "new.npz", header=np.array(header))
    with pytest.raises(ValueError, match="Upgrade"):
        read_archive(tmp_path / "new.npz")


def test_objects_and_absent_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Python objects"):
        write_archive(tmp_path / "a.npz", {}, {"a": np.array([{}])})
    with pytest.raises(ValueError, match="existing folder"):
        write_archive(tmp_path / "absent" / "a.npz", {}, {})
    assert list(tmp_path.iterdir()) == []
