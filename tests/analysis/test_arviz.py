"""Export to ArviZ, of version 0 or 1, whichever is installed."""

import numpy as np
import pytest
import scipy.sparse as sp

from pnmf_pyro.analysis.arviz_bridge import to_arviz
from pnmf_pyro.transforms import factor_uncertainty, get_loadings, log_factors
from tests.support.data import simulate
from tests.support.settings import NATURAL, unconverged

arviz = pytest.importorskip("arviz", reason="ArviZ is not installed: pip install arviz")


def test_groups_dimensions_and_values(fitted, counts):
    samples, features = [5, 0, 70], [24, 3]
    data = to_arviz(fitted, sp.csr_matrix(counts), samples, features, 300, random_state=0)
    drawn = data["posterior"]["log_factors"]
    assert drawn.dims == ("chain", "draw", "sample", "component")
    assert drawn.shape == (1, 300, 3, 3)
    assert drawn["sample"].values.tolist() == samples
    mean, sd = log_factors(fitted)[samples], factor_uncertainty(fitted)[samples]
    # 9 means of 300 draws at 4.5 standard errors; the seed is fixed
    assert (np.abs(drawn.values[0].mean(0) - mean) < 4.5 * sd / 300**0.5).all()
    np.testing.assert_allclose(drawn.values[0].std(0), sd, rtol=0.2)
    made = data["posterior_predictive"]["counts"]
    assert made.dims == ("chain", "draw", "sample", "feature")
    assert made["feature"].values.tolist() == features
    rate = np.exp(drawn.values[0]) @ get_loadings(fitted)[features].T
    residual = (made.values[0] - rate) / np.sqrt(rate)
    assert abs(residual.mean()) < 4.5 / residual.size**0.5
    assert residual.std() == pytest.approx(1, abs=0.1)
    loadings = data["constant_data"]["loadings"]
    assert loadings.dims == ("feature", "component")
    np.testing.assert_array_equal(loadings.values, get_loadings(fitted)[features])
    seen = data["observed_data"]["counts"]
    np.testing.assert_array_equal(seen.values, counts[samples][:, features])


@unconverged
def test_names_and_defaults():
    pandas = pytest.importorskip("pandas")
    from pnmf_pyro import PNMF

    X = simulate(0, 15, 6, 2)[0]
    frame = pandas.DataFrame(X, columns=list("uvwxyz"))
    model = PNMF(2, random_state=0, max_iter=5, tol=0, **NATURAL)
    model.fit(frame)
    data = to_arviz(model, n_draws=9, random_state=0)
    made = data["posterior_predictive"]["counts"]
    assert made.shape == (1, 9, 15, 6)
    assert made["feature"].values.tolist() == list("uvwxyz")
    again = to_arviz(model, n_draws=9, random_state=0)
    np.testing.assert_array_equal(made.values, again["posterior_predictive"]["counts"].values)
    summary = arviz.summary(data, var_names=["log_factors"])
    assert len(summary) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": [80]}, "samples must be whole numbers from 0 to 79"),
        ({"samples": []}, "samples must be whole numbers"),
        ({"features": [0.5]}, "features must be whole numbers from 0 to 24"),
        ({"n_draws": 0}, "n_draws must be a whole number"),
        ({"n_draws": 10**5}, "samples and features must be fewer"),
        ({"X": np.ones((3, 3))}, "X must be the counts of the fit"),
    ],
)
def test_bad_input(fitted, arguments, message):
    with pytest.raises(ValueError, match=message):
        to_arviz(fitted, **{"n_draws": 2, **arguments})


def test_without_arviz(fitted, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pnmf-pyro\[arviz\]"):
        to_arviz(fitted)
