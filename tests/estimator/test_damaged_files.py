"""Damaged, foreign and hostile files of models: refused in one line, or of full use.

Changes are drawn with a seed. `load` must answer each with a ValueError that names the file, or
with a model that computes finite numbers.
"""

import io
import pickle

import numpy as np
import pytest

from pnmf_pyro import PNMF
from tests.support.damaged_models import (
    CHANGES,
    members,
    npy,
    saved_models,
    use,
    with_header,
    with_member,
    zipped,
)
from tests.support.settings import unconverged

pytestmark = unconverged

DRAWS = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_models(tmp_path_factory.mktemp("models"))


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore")  # of settings that another machine, or nobody, has
def test_a_changed_file_is_refused_in_one_line_or_of_full_use(change, saved, tmp_path):
    files, *data = saved
    path, refused = tmp_path / "changed.npz", 0
    for seed in range(DRAWS):
        random = np.random.default_rng([seed, CHANGES.index(change)])
        path.write_bytes(change(files[list(files)[seed % len(files)]], random))
        refused += use(path, *data) is None
        assert [one.name for one in tmp_path.iterdir()] == ["changed.npz"]
    assert refused


@pytest.mark.parametrize("kind", ["plain", "natural", "groups", "local"])
def test_an_unchanged_file_is_of_full_use(kind, saved, tmp_path):
    files, *data = saved
    path = tmp_path / "model.npz"
    path.write_bytes(b"in front" + files[kind] + b"behind")
    assert use(path, *data) is not None


# --- one of each that was answered otherwise


def refused(path, data, match):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as raised:
        PNMF.load(path)
    assert path.name in str(raised.value)


def encrypted(data):
    changed = bytearray(data)
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(sign)
        while at >= 0:
            changed[at + offset] |= 1
            at = data.find(sign, at + 4)
    return bytes(changed)


@pytest.mark.parametrize("version", ["2", None, [1], {}, True, -1, 1.5])
def test_format_versions_that_are_no_number(version, saved, tmp_path):
    data = with_header(saved[0]["plain"], lambda header: header | {"format_version": version})
    refused(tmp_path / "a.npz", data, "format_version is")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[" * 10**5, '{"a":' * 10**5, "9" * 5000])
def test_headers_that_are_no_object(text, saved, tmp_path):
    refused(tmp_path / "a.npz", with_member(saved[0]["plain"], "header", npy(text)), "damaged")


@pytest.mark.parametrize("n", [0, -1, 23, 25, 10**12, "24", 24.0, None, True])
def test_numbers_of_samples_that_are_not_those_of_the_arrays(n, saved, tmp_path):
    for data in saved[0].values():
        changed = with_header(data, lambda header: header | {"n_samples": n})
        refused(tmp_path / "a.npz", changed, "n_samples is")


@pytest.mark.parametrize("name", ["history", "feature_names", "loadings/unconstrained"])
def test_a_file_that_would_fill_the_memory(name, saved, tmp_path):
    """It would unpack to 300 times its size, and is refused before any of it is read."""
    zeros = npy(np.zeros(2 * 10**7))
    refused(tmp_path / "a.npz", with_member(saved[0]["plain"], name, zeros), "claims to unpack")


def test_what_the_package_does_not_know_is_not_read(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "evil"), "w")

    parts = members(saved[0]["plain"]) | {
        "evil.npy": npy(np.array([Evil()], dtype=object)),
        "evil.pkl": pickle.dumps(Evil()),
        "large.npy": npy(np.zeros(2 * 10**7)),
    }
    (tmp_path / "a.npz").write_bytes(zipped(parts.items()))
    assert use(tmp_path / "a.npz", *saved[1:]) is not None
    assert [one.name for one in tmp_path.iterdir()] == ["a.npz"]


def test_objects_are_not_unpickled(saved, tmp_path):
    data = with_member(saved[0]["plain"], "history", npy(np.array([{}], dtype=object)))
    refused(tmp_path / "a.npz", data, "neither numbers nor text")
    refused(tmp_path / "a.npz", encrypted(saved[0]["plain"]), "encrypted")


def test_loadings_and_components_must_agree(saved, tmp_path):
    parts = members(saved[0]["plain"])
    components = np.load(io.BytesIO(parts["components.npy"]))
    data = with_member(saved[0]["plain"], "components", npy(2 * components))
    refused(tmp_path / "a.npz", data, "not those of its loadings")
    data = with_member(saved[0]["plain"], "loadings/unconstrained", npy(-components.T))
    refused(tmp_path / "a.npz", data, "components")


@pytest.mark.parametrize("likelihood", [-1, "gamma", [1]])
def test_likelihoods_that_the_package_does_not_name(likelihood, saved, tmp_path):
    data = with_header(saved[0]["natural"], lambda header: header | {"likelihood": likelihood})
    refused(tmp_path / "a.npz", data, "likelihood must be one of")


@pytest.mark.parametrize("groups", ["x" * 10**4, ["a"], list(range(10**4)), {"a": 1}])
def test_groups_that_are_not_those_of_the_kernel(groups, saved, tmp_path):
    data = with_header(saved[0]["groups"], lambda header: header | {"groups": groups})
    refused(tmp_path / "a.npz", data, "groups are")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("natural", "prior/scale", 1e-300),
        ("plain", "factors/scale/unconstrained", -1e30),
        ("groups", "factors/joint_covariance", 0.0),
        ("groups", "sites/precision", 1e300),
    ],
)
def test_spreads_of_nothing(kind, name, value, saved, tmp_path):
    held = np.load(io.BytesIO(members(saved[0][kind])[f"{name}.npy"]))
    data = with_member(saved[0][kind], name, npy(np.full_like(held, value)))
    refused(tmp_path / "a.npz", data, "must not be negative or too small|must be finite")
