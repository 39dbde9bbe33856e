"""Files of fitted models: those of version 0.1 load, and names do not depend on attributes."""

from pathlib import Path

import numpy as np
import pytest

from pnmf_pyro import PNMF
from pnmf_pyro.estimator.archive import NAMES, read_archive
from pnmf_pyro.transforms import get_factors

# Written by version 0.1.0 (format 1), with the values that the fitted models had then.
FILES = Path(__file__).parent / "files"
EXPECTED = np.load(FILES / "expected.npz")
OLD = sorted(path.stem for path in FILES.glob("*.npz") if path.stem != "expected")

# Held in natural parameters then, and in a covariance now: equal to rounding.
CONVERTED = {"svgp_few": 1e-5}


def expected(name, what):
    return EXPECTED[f"{name}.{what}"]


@pytest.mark.parametrize("name", OLD)
def test_files_of_version_1_load_with_their_values(name):
    model = PNMF.load(FILES / f"{name}.npz")
    q = model.model_.prior.marginal()
    tolerance = {"rtol": CONVERTED.get(name, 1e-6), "atol": CONVERTED.get(name, 1e-7)}
    np.testing.assert_allclose(model.components_, expected(name, "components"), rtol=1e-6)
    np.testing.assert_allclose(q.loc.detach(), expected(name, "loc"), **tolerance)
    np.testing.assert_allclose(q.scale.detach(), expected(name, "scale"), **tolerance)
    assert model.elbo_ == expected(name, "elbo")
    np.testing.assert_array_equal(model.history_, expected(name, "history"))


@pytest.mark.parametrize("name", [n for n in OLD if f"{n}.transform" in EXPECTED.files])
def test_files_of_version_1_predict_at_new_places(name):
    model = PNMF.load(FILES / f"{name}.npz")
    random = np.random.default_rng(0)  # the places of the script that wrote the files
    places = random.uniform(0, 10, (30, 2))[:5] + 0.3
    groups = None if model.groups_ is None else ["a"] * 5
    found = model.transform(None, coordinates=places, groups=groups)
    np.testing.assert_allclose(found, expected(name, "transform"), rtol=1e-4)


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_version_1_saved_again_is_one_of_version_2(name, tmp_path):
    first = PNMF.load(FILES / f"{name}.npz")
    first.save(tmp_path / "again.npz")
    header, arrays = read_archive(tmp_path / "again.npz")
    again = PNMF.load(tmp_path / "again.npz")
    assert header["format_version"] == 2
    assert set(arrays) <= {*NAMES, "components", "history", "feature_names"}
    np.testing.assert_array_equal(again.components_, first.components_)
    np.testing.assert_array_equal(get_factors(again), get_factors(first))


def test_stages_stand_for_the_parameters_of_version_1():
    words = str(PNMF.load(FILES / "svgp_fit.npz").stages)
    order = ["WarmUp", "LearnHyperparameters", "Settle(", "RestoreSpread", "SettleLoadings"]
    positions = [words.index(word) for word in order]
    assert positions == sorted(positions)
    assert "kl_weight=0.6" in words


@pytest.mark.parametrize("name", OLD)
def test_every_array_of_a_model_has_a_name_in_files(name):
    state = PNMF.load(FILES / f"{name}.npz").model_.state_dict()
    assert set(state) <= set(NAMES.values())
