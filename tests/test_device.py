"""Values, gradients, one fit of each prior, files: on the CPU, and on CUDA where there is one."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro import PNMF, posterior_predictive_check
from pnmf_pyro.data import Batch, as_counts
from pnmf_pyro.estimator.stages import Correlate, Settle
from pnmf_pyro.models import FactorizationELBO, PoissonFactorization, PoissonFactors
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.training import loop
from pnmf_pyro.transforms import factor_samples, get_factors
from tests.support.data import simulate, tissue

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]

NATURAL = {"training_mode": "natural", "loadings_mode": "multiplicative", "mode": "lower-bound"}
SPACE = {"spatial": True, "lengthscale": 2.0}
FITS = {
    "gaussian": {},
    "gaussian, natural": NATURAL,
    "svgp": {**SPACE, "num_inducing": 20},
    "svgp, natural, over samples": {**SPACE, **NATURAL},
    "svgp, natural, over inducing points": {**SPACE, **NATURAL, "num_inducing": 20},
    "lcgp, natural": {
        **SPACE,
        **NATURAL,
        "local": True,
        "K": 8,
        "stages": [Settle(), Correlate(4), Settle()],
    },
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def data():
    X, x, *_ = tissue()
    return X.astype(np.float64), x


def fitted(data, name, device):
    X, x = data
    settings = FITS[name]
    where = {"coordinates": x} if settings.get("spatial") else {}
    model = PNMF(2, max_iter=30, tol=0, random_state=0, device=device, **settings)
    return model.fit(X, **where), where


@pytest.mark.parametrize("sparse", [False, True])
def test_values_and_gradients(device, sparse):
    X, F, W = simulate(0, 30, 12, 2)
    X = X.astype(np.float64)
    counts = as_counts(sp.csr_matrix(X) if sparse else X).to(torch.device(device))
    log_factors = torch.from_numpy(F.T.copy()).to(device).requires_grad_()
    loadings = torch.from_numpy(W).to(device).requires_grad_()
    value = PoissonFactors(log_factors, loadings).log_prob(counts).sum()
    value.backward()
    rate = np.exp(F) @ W.T
    whole = torch.distributions.Poisson(torch.from_numpy(rate)).log_prob(torch.from_numpy(X))
    assert float(value.detach()) == pytest.approx(float(whole.sum()), rel=1e-10)
    slope = (X / rate - 1).T @ np.exp(F)  # of sum X log rate - rate in W
    np.testing.assert_allclose(loadings.grad.cpu(), slope, rtol=1e-8)


@pytest.mark.parametrize("mode", ["simple", "expanded", "lower-bound"])
def test_every_mode_has_a_bound_on_the_device(device, mode):
    X = simulate(1, 30, 12, 2)[0].astype(np.float64)
    y = torch.from_numpy(X.T).to(device)
    model = PoissonFactorization(GaussianPrior(y, 2), y, 2, mode=mode).to(device)
    batch = Batch(counts=as_counts(X).to(torch.device(device)))
    loss = FactorizationELBO(mode, 2).loss(model.model, model.guide, batch)
    assert np.isfinite(loss)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_that_of_the_cpu(device, data, name):
    model, where = fitted(data, name, device)
    assert model.model_.W.device.type == device
    reference, _ = fitted(data, name, "cpu")
    if "natural" in name:  # without noise
        assert model.elbo_ == pytest.approx(reference.elbo_, rel=1e-5)
        np.testing.assert_allclose(get_factors(model), get_factors(reference), rtol=1e-3)
    draws = factor_samples(model, 2, random_state=0)
    assert draws.shape == (2, *get_factors(model).shape)
    assert np.isfinite(model.score(data[0], **where))
    new = model.transform(None if where else data[0][:4], **{k: v[:4] for k, v in where.items()})
    assert new.shape == (4, 2)


@pytest.mark.parametrize("name", FITS)
def test_no_array_crosses_between_processors_in_a_step(device, data, name, monkeypatch):
    """After the first, which makes what all steps share; numbers, such as the bound, are read."""
    whole, steps = loop._one_step, []

    def refused(*args, **kwargs):
        raise AssertionError("an array crosses")

    def step(*args, validate):
        steps.append(validate)
        with pytest.MonkeyPatch.context() as patch:
            for name in () if validate else ("numpy", "cpu", "tolist", "__array__"):
                patch.setattr(torch.Tensor, name, refused)
            if not validate:
                patch.setattr(torch, "from_numpy", refused)
            return whole(*args, validate=validate)

    monkeypatch.setattr(loop, "_one_step", step)
    fitted(data, name, device)
    assert len(steps) == 30


@pytest.mark.parametrize("name", FITS)
def test_a_file_goes_from_the_device_to_the_cpu(device, data, name, tmp_path):
    model, _ = fitted(data, name, device)
    model.save(tmp_path / "model.npz")
    loaded = PNMF.load(tmp_path / "model.npz")
    np.testing.assert_allclose(get_factors(loaded), get_factors(model), rtol=1e-6)
    moved = loaded.model_.to(device)
    assert moved.prior.marginal().loc.device.type == device


def test_a_predictive_check_runs_where_the_model_is(device, data):
    model, _ = fitted(data, "svgp, natural, over inducing points", device)
    check = posterior_predictive_check(model, data[0], n_draws=5, random_state=0)
    assert len(check.verdict()) > 0
