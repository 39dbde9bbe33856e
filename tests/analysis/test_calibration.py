"""Calibration of a fit by tables that it makes itself."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.analysis import Calibration, calibrate
from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior, SideBySide
from pnmf_pyro.priors.joint import posterior_of
from pnmf_pyro.priors.natural import SiteSteps
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.reinference import infer_again
from pnmf_pyro.training.schedules import Constant
from pnmf_pyro.transforms import transform_F
from tests.support.calibration import separated_loadings

DRAWS = 99


def made_up(z, ranks=None, refit=False):
    """A calibration with these z (S, N, L), and uniform ranks unless given."""
    if ranks is None:
        ranks = np.random.default_rng(0).integers(0, DRAWS + 1, (len(z), z.shape[2]))
    names = [f"component {l}" for l in range(ranks.shape[1])]
    return Calibration(z, ranks, names, DRAWS, refit)


def normal(n, scale=1.0, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(n, 40, 2))


def gamma(ranks, n_draws):
    """The statistic by its definition, one rank and one k after another."""
    n, tails = len(ranks), []
    for k in range(1, n_draws + 1):
        below = sum(rank < k for rank in ranks)
        share = k / (n_draws + 1)
        chance = [binom.pmf(b, n, share) for b in range(n + 1)]
        tails.append(min(sum(chance[: below + 1]), sum(chance[below:])))
    return 2 * min(tails)


@pytest.mark.slow
def test_p_values_are_those_of_the_statistic_by_its_definition():
    rng = np.random.default_rng(3)
    ranks = rng.integers(0, 10, (25, 2))
    ranks[:, 1] = np.minimum(ranks[:, 1], 4)
    found = Calibration(normal(25), ranks, ["a", "b"], 9, False)
    sets = [gamma(rng.integers(0, 10, 25), 9) for _ in range(400)]
    for q in range(2):
        p = np.mean(np.array(sets) <= gamma(ranks[:, q], 9) + 1e-12)
        assert found.p_values[q] == pytest.approx(p, abs=0.09)  # four standard errors or more
    assert found.p_values[1] < 0.01 < found.p_values[0]
    assert found.p_value == pytest.approx(2 * found.p_values[1])


def test_the_band_holds_all_of_uniform_ranks_as_often_as_it_says():
    rng = np.random.default_rng(1)
    low, high = made_up(normal(60)).band(0.9)
    held = 0
    for _ in range(1000):
        counted = np.bincount(rng.integers(0, DRAWS + 1, 60), minlength=DRAWS + 1).cumsum()[:-1]
        held += bool(((counted / 60 >= low) & (counted / 60 <= high)).all())
    assert 0.87 < held / 1000 <= 0.96  # discrete: at least what it says, but for three errors


def test_coverage_and_its_error():
    z = np.zeros((30, 4, 2))
    z[:10, :, 0] = 9.0
    found = made_up(z)
    assert found.coverage(0.9).share == pytest.approx(50 / 60)
    assert found.coverage(0.9, 1).share == 1
    each = np.repeat([0.5, 1.0], [10, 20])
    assert found.coverage(0.9).error == pytest.approx(each.std(ddof=1) / 30**0.5)
    assert found.coverage(0.9, 1).error == pytest.approx((0.09 / 120) ** 0.5)
    table = found.table()
    assert list(table["component"]) == ["0", "1", "all"]
    assert table["90%"][2] == pytest.approx(50 / 60)


@pytest.mark.parametrize(
    ("found", "flagged", "words"),
    [
        (made_up(normal(10)), False, "10 tables are too few to say anything"),
        (made_up(normal(100)), False, "not told from 90%"),
        (made_up(normal(100, 1.3)), True, "too narrow"),
        (made_up(normal(100, 0.6)), True, "wider than they need"),
        (made_up(normal(100), np.zeros((100, 2), int)), True, "Ranks are not uniform"),
        (made_up(normal(10, 5.0)), False, "too few"),
    ],
)
def test_what_is_said(found, flagged, words):
    assert found.flagged is flagged
    assert words in found.verdict()


def test_a_few_values_that_all_lie_inside_show_nothing():
    found = made_up(np.zeros((20, 1, 1)), np.arange(20)[:, None] * 5)
    assert found.off == 0
    assert "less than" in found.verdict()


def model_of(prior, mode="lower-bound", overlap=0.3, N=25, D=20, L=2):
    rng = np.random.default_rng(0)
    W = separated_loadings(D, L, overlap, 2.0, rng).astype(np.float32)
    places = Places(torch.from_numpy(rng.uniform(size=(N, 2))))
    kernel = SpatialKernel("Matern32", 0.3, 1.0)
    y = torch.empty(D, N, device="meta")
    made = {
        "independent": lambda: GaussianPrior(y, L, 1.0, use_natural_gradients=True),
        "SVGP": lambda: SVGP(kernel, places, places, L, use_natural_gradients=True),
        "LCGP": lambda: LCGP(kernel, places, L, K=10, use_natural_gradients=True),
        "side by side": lambda: SideBySide(
            LCGP(kernel, places, L - 1, K=10, use_natural_gradients=True),
            GaussianPrior(y, 1, 1.0, use_natural_gradients=True),
        ),
    }[prior]()
    for part in made.parts:
        if isinstance(part, LCGP):
            part.correlate(10)
    model = PoissonFactorization(made, y, L, "multiplicative", mode)
    model.W.assign(torch.from_numpy(W))
    return model


def test_inference_again_is_that_of_transform_F():
    model = model_of("independent")
    W = model.W.data.detach().numpy()
    X = np.random.default_rng(1).poisson(2.0, size=(model.N, model.D)).astype(np.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = infer_again(model, as_counts(X), torch_generator(0))
    q = posterior_of(found.prior).marginal()
    same = transform_F(X, W, mode="lower-bound", tol=1e-8, max_iter=3000, return_prior=True)
    expected = posterior_of(same).marginal()
    torch.testing.assert_close(q.loc, expected.loc, atol=0.01, rtol=0)
    torch.testing.assert_close(q.scale, expected.scale, atol=0, rtol=0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("natural", [True, False])
def test_a_prior_of_either_training_is_inferred_alike(natural):
    model = model_of("SVGP")
    places = model.prior.places
    if not natural:
        model.prior = SVGP(model.prior.kernel, places, places, 2)
    X = np.random.default_rng(1).poisson(2.0, size=(model.N, model.D)).astype(np.float32)
    q = infer_again(model, as_counts(X), torch_generator(0)).prior.marginal()
    reference = infer_again(model_of("SVGP"), as_counts(X), torch_generator(0)).prior.marginal()
    torch.testing.assert_close(q.loc, reference.loc, atol=0.05, rtol=0)


@pytest.mark.parametrize("prior", ["LCGP", "side by side"])
def test_inference_again_ends_at_the_optimum_with_the_same_rank(prior):
    model = model_of(prior)
    counts = as_counts(np.random.default_rng(1).poisson(2.0, size=(25, 20)).astype(np.float32))
    found = infer_again(model, counts, torch_generator(0))
    assert found.prior.parts[0].low_rank.shape[-1] == 10
    objective = FactorizationELBO("lower-bound", newton=True)
    steps = [(SiteSteps(part), Constant()) for part in found.prior.parts]
    args = found, Batches(counts), objective, steps, torch_generator(0)
    values = train(*args, max_iter=50, monotone=True).history
    assert values[-1] - values[0] < 1e-5 * abs(values[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "prior"),
    [
        *[("expanded", prior) for prior in ("independent", "SVGP", "LCGP", "side by side")],
        *[("simple", prior) for prior in ("independent", "SVGP")],
        *[("lower-bound", prior) for prior in ("independent", "SVGP", "LCGP")],
    ],
)
def test_posteriors_are_calibrated(mode, prior):
    """Flagged without a fault: p < 0.01, and coverage beyond three standard errors."""
    found = calibrate(model_of(prior, mode, N=15), 40, random_state=1)
    assert not found.flagged, found.verdict()
    assert found.coverage(0.9).share == pytest.approx(0.9, abs=0.05)


def test_a_posterior_that_is_too_narrow_is_flagged(monkeypatch):
    monkeypatch.setattr("pnmf_pyro.analysis.calibration.posterior_of", lambda prior: prior)
    found = calibrate(model_of("independent", overlap=0.9, N=60), 20, random_state=0)
    assert found.off < 0
    assert found.flagged


def test_refits_are_matched_and_their_levels_taken_away():
    rng = np.random.default_rng(0)
    W = separated_loadings(20, 2, 0.0, 4.0, rng)
    X = rng.poisson(np.exp(rng.normal(size=(80, 2))) @ W.T)
    model = pnmf_pyro.fit(X, n_components=2, size_factors=rng.uniform(0.5, 2, 80))
    found = calibrate(model, 3, refit=True, random_state=0)
    assert found.refit
    assert found.ranks.shape == (3, 2)
    assert found.coverage(0.9).share == pytest.approx(0.9, abs=0.06)
    assert np.abs(found.z.mean((0, 1))).max() < 0.3


def test_it_is_the_same_for_one_seed():
    model = model_of("independent")
    first, second = (calibrate(model, 2, random_state=5) for _ in range(2))
    assert np.array_equal(first.z, second.z)
    assert np.array_equal(first.ranks, second.ranks)


def test_what_cannot_be_calibrated(fitted):
    with pytest.raises(ValueError, match="n_simulations"):
        calibrate(fitted, 0)
    with pytest.raises(ValueError, match="refit=True needs the fitted PNMF"):
        calibrate(fitted.model_, 2, refit=True)
    with pytest.raises(ValueError, match="not fitted"):
        calibrate(PNMF())
