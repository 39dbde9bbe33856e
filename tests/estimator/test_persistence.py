"""Saving and loading (identity 9), in this process and a new one."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from pnmf_pyro import PNMF
from pnmf_pyro.estimator.archive import read_archive, write_archive


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
    with pytest.raises(FileNotFoundError):
        PNMF.load(tmp_path / "absent.npz")
    write_archive(tmp_path / "results.npz", {"settings": {}}, {"factors": np.ones(3)})
    with pytest.raises(ValueError, match="not a saved PNMF model"):
        PNMF.load(tmp_path / "results.npz")


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
