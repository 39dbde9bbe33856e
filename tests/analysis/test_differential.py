"""Differential features: shrinkage against quadrature, signs against the truth."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import gamma, norm

import pnmf_pyro
from pnmf_pyro.analysis.differential import error_of_ratio, log_profiles, shrunk
from pnmf_pyro.models import PoissonFactorization


def test_posterior_is_that_of_the_mixture_by_quadrature():
    """Truths of one normal: the learned mixture has its posterior, which is known."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2.0, 4000)
    s = rng.uniform(0.5, 1.5, 4000)
    b = truth + s * rng.normal(size=4000)
    found = shrunk(b, s)
    for i in range(0, 200, 20):

        def density(t, i=i):
            return norm.pdf(t, 0, 2.0) * norm.pdf(b[i], t, s[i])

        total = quad(density, -20, 20)[0]
        mean = quad(lambda t, f=density: t * f(t), -20, 20)[0] / total
        below = quad(density, -20, 0)[0] / total
        assert found.mean[i] == pytest.approx(mean, abs=0.1)
        assert -0.02 < found.not_above[i] - below < 0.1  # a weight of zero is preferred
    lfsr = np.minimum(found.not_above, found.not_below)
    sure = lfsr < 0.05
    wrong = np.sign(found.mean[sure]) != np.sign(truth[sure])
    assert wrong.mean() < lfsr[sure].mean() + 0.004
    assert np.abs(truth - found.mean).mean() < 0.95 * np.abs(truth - b).mean()
    z = (truth - found.mean) / found.sd
    assert np.mean(np.abs(z) < 1.645) == pytest.approx(0.9, abs=0.02)


def test_what_is_only_noise_is_shrunk_to_zero_and_no_sign_is_sure():
    rng = np.random.default_rng(1)
    s = rng.uniform(0.5, 1.5, 2000)
    found = shrunk(s * rng.normal(size=2000), s)
    assert np.abs(found.mean).max() < 0.3
    assert np.minimum(found.not_above, found.not_below).min() > 0.05
    one = shrunk(np.array([0.5]), np.array([1.0]))
    assert np.isfinite(np.concatenate(one)).all()


def test_signs_change_with_the_estimates():
    rng = np.random.default_rng(2)
    b, s = rng.normal(size=50) * 3, rng.uniform(0.5, 1.5, 50)
    found, mirrored = shrunk(b, s), shrunk(-b, s)
    np.testing.assert_allclose(found.mean, -mirrored.mean, atol=1e-10)
    np.testing.assert_allclose(found.not_above, mirrored.not_below, atol=1e-10)
    assert (found.not_above + found.not_below >= 1 - 1e-12).all()


@pytest.mark.parametrize("k", [0, 1, 3, 10, 100])
def test_the_error_towards_zero_is_that_of_a_posterior_of_few_counts(k):
    """Of k counts against very many; the rate of k counts is Gamma(k + 1/2) about k + 1/2.

    The mean of that way up and of the usual error is taken.
    """
    errors = np.array([1e-6, np.sqrt(max(k, 1)) / (k + 0.5)])
    covariances = np.diag(errors**2)[None]
    up = np.log(gamma.ppf(norm.cdf(1), k + 0.5) / (k + 0.5))
    for l, m, sign in ((0, 1, 1.0), (1, 0, -1.0)):
        found = error_of_ratio(covariances, l, m, np.array([sign]))[0]
        assert found == pytest.approx((up + errors[1]) / 2, rel=0.2)
        assert found <= errors[1]
        np.testing.assert_allclose(error_of_ratio(covariances, l, m), errors[1])
        np.testing.assert_allclose(error_of_ratio(covariances, l, m, np.array([-sign])), errors[1])
    both = covariances + 0.5 * np.prod(errors) * (1 - np.eye(2))
    np.testing.assert_allclose(
        error_of_ratio(both, 0, 1) ** 2, both[0, 0, 0] + both[0, 1, 1] - 2 * both[0, 0, 1]
    )


def marked(seed, N=300, n=15, L=3, mean=3.0):
    """Counts, and the shares p of components: n features mark each, more are in all alike."""
    rng = np.random.default_rng(seed)
    base, more = rng.gamma(1.0, 1.0, n), np.exp(rng.gamma(4.0, 0.5, n))
    W = np.repeat(rng.gamma(1.0, 1.0, 4 * n)[:, None], L, 1)
    for l in range(L):
        rows = np.repeat(base[:, None], L, 1)
        rows[:, l] *= more
        W = np.concatenate([rows, W])
    W *= mean / W.sum(1).mean() / np.exp(0.5)
    return W / W.sum(0), rng.poisson(np.exp(rng.normal(size=(N, L))) @ W.T)


@pytest.fixture(scope="module", params=[0, 1, 2])
def fitted(request):
    p, X = marked(request.param)
    model = pnmf_pyro.fit(X, n_components=3)
    order = np.corrcoef(p.T, model.components_)[3:, :3].argmax(1)
    assert sorted(order) == [0, 1, 2]
    return p[:, order], model


def test_false_discoveries_are_fewer_than_the_rate_says(fitted):
    """Discoveries are features more frequent than in any other component; those that are not are
    alike in all components, or mark another.
    """
    p, model = fitted
    table = pnmf_pyro.differential_features(model)
    assert list(table.columns) == [
        *("component", "feature", "against", "log2_ratio", "se", "mean", "sd", "lfsr")
    ]
    l, j = table["component"].to_numpy(), table["feature"].astype(int).to_numpy()
    others = np.stack([np.delete(p, k, 1).max(1) for k in range(3)], 1)
    true = p[j, l] > others[j, l] * 1.001
    found = ((table["lfsr"] < 0.05) & (table["mean"] > 0)).to_numpy()
    assert found.sum() > 15
    assert (found & ~true).sum() <= 0.05 * found.sum()
    assert (found & true).sum() > 0.6 * true.sum()


def test_each_pair_has_its_ratio_with_an_honest_error(fitted):
    p, model = fitted
    table = pnmf_pyro.differential_features(model, against="each")
    l, m = (table[name].to_numpy() for name in ("component", "against"))
    j = table["feature"].astype(int).to_numpy()
    assert len(table) == 3 * 2 * len(p)
    assert (l != m).all()
    truth = np.log2(p[j, l] / p[j, m])
    z = (table["log2_ratio"] - truth) / table["se"]
    assert np.median(np.abs(z)) / 0.6745 == pytest.approx(1, abs=0.2)
    closest = pnmf_pyro.differential_features(model)
    of_pairs = table.groupby(["component", "feature"])["mean"].min().sort_index()
    closest = closest.set_index(["component", "feature"]).sort_index()
    sure = (closest["mean"] > 0) & (closest["lfsr"] < 0.05)
    assert (of_pairs[sure] > 0).all()
    assert sure.any()


def test_levels_of_components_play_no_part(fitted):
    _, model = fitted
    module = model.model_
    before, covariances = log_profiles(module)
    W = module.W.data.clone()
    totals = module.levels()
    try:
        module.W.assign(W * 3)
        module.levels = lambda: totals / 3
        blocks, coupling = module.loading_blocks, module.loading_coupling
        module.loading_blocks = blocks * 9
        after, scaled = log_profiles(module)
        assert coupling is module.loading_coupling
    finally:
        del module.levels
        module.W.assign(W)
        module.loading_blocks = blocks
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scaled, covariances, rtol=1e-3, atol=1e-5)


def test_an_empty_component_is_closest_to_none():
    """Nothing is known of its profile, so that no feature would be surely above it."""
    module = pnmf_pyro.fit(marked(0, N=100, mean=30.0)[1], n_components=3).model_
    module.W.assign(module.W.data * module.W.data.new_tensor([1.0, 1.0, 1e-9]))
    closest = pnmf_pyro.differential_features(module)
    assert set(closest["against"][closest["component"] < 2]) == {0, 1}


def test_bad_input(fitted):
    _, model = fitted
    with pytest.raises(ValueError, match="against must be one of"):
        pnmf_pyro.differential_features(model, against="all")
    with pytest.raises(ValueError, match="fit must be a fitted PNMF"):
        pnmf_pyro.differential_features(np.ones((3, 3)))
    alone = pnmf_pyro.fit(np.random.default_rng(0).poisson(3.0, (20, 5)), n_components=1)
    with pytest.raises(ValueError, match="two components"):
        pnmf_pyro.differential_features(alone)
    assert isinstance(alone.model_, PoissonFactorization)
