"""PoissonFactors against torch's contract: shapes, types, validation, masks; the twin is scipy."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models.poisson import PoissonFactors
from tests.support import dense as ref
from tests.support.models import SIGMAS, counts_of, double
from tests.support.state import drawing

n, d, L = 4, 3, 2


def parts(F_leading=(), W_leading=(), s_shape=None, seed=0):
    """Log-factors, loadings and size factors with leading dimensions."""
    random = np.random.default_rng(seed)
    F, W = random.normal(size=(*F_leading, L, n)), random.gamma(2.0, size=(*W_leading, d, L))
    return F, W, None if s_shape is None else random.uniform(0.5, 2.0, size=s_shape)


def likelihood(F, W, s=None, **settings) -> PoissonFactors:
    return PoissonFactors(double(F), double(W), None if s is None else double(s), **settings)


def twin(X, F, W, s, leading) -> np.ndarray:
    """Log density of rows for each index of the leading dimensions, one table at a time."""
    F, W = np.broadcast_to(F, (*leading, L, n)), np.broadcast_to(W, (*leading, d, L))
    s = np.broadcast_to(np.ones(n) if s is None else s, (*leading, 1, n))
    X = np.broadcast_to(X, (*leading, 1, n, d))
    found = np.zeros((*leading, 1, n))
    for e in np.ndindex(*leading):
        rate = ref.rates(F[e], W[e], s[e][0])
        found[e] = stats.poisson.logpmf(X[e][0], rate).sum(1)
    return found


LEADING = {
    "loadings": ((), (3,), None, (3,)),
    "loadings of two dimensions": ((), (3, 1), None, (3, 1)),
    "both": ((3,), (3,), None, (3,)),
    "crossed": ((2, 1), (3,), None, (2, 3)),
    "factors": ((2, 3), (), (n,), (2, 3)),
    "size factors": ((), (), (3, 1, n), (3,)),
    "all": ((3,), (2, 1), (3, 1, n), (2, 3)),
}


@pytest.fixture(params=list(LEADING))
def leading_case(request):
    F_leading, W_leading, s_shape, leading = LEADING[request.param]
    return *parts(F_leading, W_leading, s_shape), leading


# --- shapes


def test_leading_dimensions_broadcast(leading_case, layout):
    F, W, s, leading = leading_case
    X = np.random.default_rng(1).poisson(2.0, (n, d)).astype(float)
    observation = likelihood(F, W, s)
    assert observation.batch_shape == (*leading, 1, n)
    assert observation.event_shape == (d,)
    value = observation.log_prob(counts_of(X, layout))
    np.testing.assert_allclose(value, twin(X, F, W, s, leading), rtol=1e-10)


def test_mean_and_draws_of_leading_dimensions(leading_case):
    F, W, s, leading = leading_case
    observation = likelihood(F, W, s)
    Fs, Ws = np.broadcast_to(F, (*leading, L, n)), np.broadcast_to(W, (*leading, d, L))
    ss = np.broadcast_to(1.0 if s is None else s, (*leading, 1, n))
    rate = np.stack([ref.rates(Fs[e], Ws[e], ss[e][0]) for e in np.ndindex(*leading)])
    rate = rate.reshape(*leading, 1, n, d)
    np.testing.assert_allclose(observation.mean, rate, rtol=1e-12)
    with drawing(2):
        draws = observation.sample((2000,))
    assert draws.shape == (2000, *leading, 1, n, d)
    error = np.sqrt(rate / 2000)
    assert (np.abs(draws.numpy().mean(0) - rate) < SIGMAS * error).all()


def test_gradients_of_leading_dimensions(leading_case):
    """Against torch's own Poisson, whose rates are dense."""
    F, W, s, _ = leading_case
    X = double(np.random.default_rng(1).poisson(2.0, (n, d)))
    found = [double(F).requires_grad_(), double(W).requires_grad_()]
    own = [part.detach().clone().requires_grad_() for part in found]
    PoissonFactors(*found, None if s is None else double(s)).log_prob(X).cos().sum().backward()
    factors = own[0].exp() if s is None else own[0].exp() * double(s)
    rate = (factors.mT @ own[1].mT).unsqueeze(-3)
    torch.distributions.Poisson(rate).log_prob(X).sum(-1).cos().sum().backward()
    for given, expected in zip(found, own, strict=True):
        torch.testing.assert_close(given.grad, expected.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("F_leading", [(), (3,)])
def test_loadings_drawn_to_event_by_vectorised_particles(F_leading):
    """(3, 1, 1, d, L): dimensions of components and of samples stand before (d, L)."""
    F, W, _ = parts(F_leading, (3,))
    placed = likelihood(F, W[:, None, None])
    assert placed.batch_shape == (3, 1, n)
    X = np.ones((n, d))
    np.testing.assert_allclose(placed.log_prob(double(X)), twin(X, F, W, None, (3,)), rtol=1e-10)
    assert likelihood(F[0] if F_leading else F, W[:1, None]).batch_shape == (n,)


def test_as_many_dimensions_as_the_factors_are_leading_ones():
    """Both drawn in the plates of components and samples or features, beside four others."""
    F, W, _ = parts((3, 1, 1), (3, 1, 1))
    assert likelihood(F, W).batch_shape == (3, 1, 1, 1, n)


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 5), (1,)])
def test_log_prob_of_draws(leading_case, sample_shape):
    F, W, s, leading = leading_case
    observation = likelihood(F, W, s)
    with drawing(3):
        X = observation.sample(sample_shape)
    value = observation.log_prob(X)
    assert value.shape == (*sample_shape, *leading, 1, n)
    np.testing.assert_allclose(
        value, twin(X, F, W, s, (*sample_shape, *leading)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "shape", [(5, n, d), (1, n, d), (d,), (1, d), (5, 1, d), (2, 5, n, d), (n, d)]
)
def test_values_broadcast_against_plain_parameters(shape, sized):
    """Also for as many samples as features, where a wrong sum would have the right shape."""
    F, W, s = parts(s_shape=(n,) if sized else None)
    X = np.random.default_rng(1).poisson(2.0, shape).astype(float)
    value = likelihood(F, W, s).log_prob(double(X))
    expected = stats.poisson.logpmf(X, ref.rates(F, W, s)).sum(-1)
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_one_sample_broadcasts_to_rows_of_a_value():
    F, W, _ = parts()
    X = np.random.default_rng(1).poisson(2.0, (5, 7, d)).astype(float)
    value = likelihood(F[:, :1], W).log_prob(double(X))
    expected = stats.poisson.logpmf(X, ref.rates(F[:, :1], W)).sum(-1)
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_expanded_to_leading_dimensions():
    F, W, _ = parts()
    expanded = likelihood(F, W).expand((5, 1, n))
    assert expanded.mean.shape == (5, 1, n, d)
    with drawing(4):
        X = expanded.sample((2,))
    assert X.shape == (2, 5, 1, n, d)
    assert len(np.unique(X.numpy().reshape(10, -1), axis=0)) == 10
    expected = stats.poisson.logpmf(X, ref.rates(F, W)).sum(-1)
    np.testing.assert_allclose(expanded.log_prob(X), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="batch_shape must extend"):
        expanded.expand((1, n))
    with pytest.raises(ValueError, match="value must broadcast"):
        expanded.log_prob(torch.ones(2, 1, n, d))
    one = likelihood(F[:, :1], W).expand((5, n))
    np.testing.assert_allclose(
        one.log_prob(X[0, 0, 0]),
        np.tile(stats.poisson.logpmf(X[0, 0, 0], ref.rates(F[:, :1], W)).sum(-1), (5, 1)),
    )


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.ones(n + 1, d), r"\(5, 3\)"),
        (torch.ones(n, d + 1), r"\(4, 4\)"),
        (torch.ones(n, 1), r"\(4, 1\)"),
        (torch.ones(()), r"\(\)"),
        (as_counts(np.ones((n, d + 1))), r"\(4, 4\)"),
        (sp.csr_matrix(np.ones((1, d))), r"\(1, 3\)"),
    ],
)
def test_values_of_other_shapes_are_refused(value, got):
    F, W, _ = parts()
    with pytest.raises(ValueError, match=rf"value must broadcast.*\(4, 3\).*got {got}"):
        likelihood(F, W).log_prob(value)


@pytest.mark.parametrize(
    ("F", "W", "s"),
    [
        ((L, n), (d, L + 1), None),
        ((L, n), (L,), None),
        ((n,), (d, L), None),
        ((L, n), (d, L), (n + 1,)),
        ((L, n), (d, L), (3, n)),
        ((2, L, n), (3, d, L), None),
    ],
)
def test_parameters_that_do_not_agree_are_refused(F, W, s):
    size_factors = None if s is None else torch.ones(s)
    with pytest.raises(ValueError, match=r"must agree in L, n and what stands before; got \("):
        PoissonFactors(torch.ones(F), torch.ones(W), size_factors)


def test_expectations_under_q_need_plain_parameters():
    F, W, _ = parts((), (3,))
    q = dist.Normal(double(F), 0.1)
    for observation in (likelihood(F, W), likelihood(F, W[0], np.ones((3, 1, n)))):
        with pytest.raises(ValueError, match=r"are needed; got PoissonFactors"):
            observation.expected_log_prob(torch.ones(n, d), q)


# --- types


@pytest.mark.parametrize("kinds", ["ff", "dd", "fd", "df"])
def test_type_of_the_parameters(kinds, layout):
    """Of a value of any type; those of the parameters are promoted, sums are in float64 inside."""
    F, W, s = parts(s_shape=(n,))
    types = [{"f": torch.float32, "d": torch.float64}[kind] for kind in kinds]
    observation = PoissonFactors(double(F).to(types[0]), double(W).to(types[1]), double(s).float())
    X = np.random.default_rng(1).poisson(2.0, (n, d))
    wanted = torch.float64 if "d" in kinds else torch.float32
    for value in (counts_of(X, layout), torch.tensor(X), torch.tensor(X).float()):
        found = observation.log_prob(value)
        assert found.dtype == wanted
        expected = stats.poisson.logpmf(X, ref.rates(F, W, s)).sum(1)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert observation.mean.dtype == observation.sample().dtype == wanted
    q = dist.Normal(observation.log_factors, torch.tensor(0.1, dtype=types[0]))
    for mode in ("simple", "expanded", "lower-bound"):
        with drawing(1):
            found = observation.expected_log_prob(counts_of(X, layout), q, mode, newton=True)
        assert found.dtype == torch.float64


# --- validation


def test_valid_parameters_and_values_pass(layout):
    F, W, s = parts(s_shape=(n,))
    X = counts_of(np.array([[0.0, 1, 2]] * n), layout)
    checked, unchecked = (likelihood(F, W, s, validate_args=flag) for flag in (True, False))
    assert torch.equal(checked.log_prob(X), unchecked.log_prob(X))


@pytest.mark.parametrize("entry", [-0.5, np.nan, np.inf])
def test_bad_loadings_are_refused(entry):
    F, W, _ = parts()
    W[1, 1] = entry
    for settings in ({}, {"validate_args": True}):
        with pytest.raises(ValueError, match="loadings must be finite and not negative"):
            likelihood(F, W, **settings)
    assert likelihood(F, W, validate_args=False).event_shape == (d,)


@pytest.mark.parametrize("entry", [-0.5, 0.0, np.nan, np.inf])
def test_bad_size_factors_are_refused(entry):
    F, W, s = parts(s_shape=(n,))
    s[1] = entry
    for settings in ({}, {"validate_args": True}):
        with pytest.raises(ValueError, match="size_factors must be positive and finite"):
            likelihood(F, W, s, **settings)
    assert likelihood(F, W, s, validate_args=False).event_shape == (d,)


@pytest.mark.parametrize("entry", [-1.0, 0.5, np.nan, np.inf])
def test_values_that_are_no_counts_are_refused(entry, layout):
    F, W, _ = parts()
    X = np.ones((n, d))
    X[1, 1] = entry
    q = dist.Normal(double(F), 0.1)
    for observation in (likelihood(F, W), likelihood(F, W, validate_args=True).expand((2, 1, n))):
        with pytest.raises(ValueError, match="value must hold counts"):
            observation.log_prob(counts_of(X, layout))
        with pytest.raises(ValueError, match="value must hold counts"):
            observation.log_prob(double(X).expand(2, 1, n, d))
        with pytest.raises(ValueError, match="value must hold counts"):
            observation.expected_log_prob(counts_of(X, layout), q)
    assert likelihood(F, W, validate_args=False).log_prob(counts_of(X, layout)).shape == (n,)


def test_pyros_switch_turns_validation_off():
    F, W, _ = parts()
    before = torch.distributions.Distribution._validate_args
    try:
        dist.enable_validation(False)
        assert likelihood(F, -W).log_prob(0.5 * torch.ones(n, d)).shape == (n,)
        with pytest.raises(ValueError, match="loadings must be finite"):
            likelihood(F, -W, validate_args=True)
    finally:
        dist.enable_validation(before)


# --- the rest of a distribution


def test_repr_shows_shapes():
    F, W, s = parts((), (3,), (n,))
    assert repr(likelihood(F, W)) == "PoissonFactors(log_factors: (2, 4), loadings: (3, 3, 2))"
    assert repr(likelihood(F, W, s)).endswith("loadings: (3, 3, 2), size_factors: (4,))")


def test_mask_over_samples():
    F, W, _ = parts()
    X = double(np.ones((n, d)))
    seen = torch.tensor([True, False, True, True])
    whole = likelihood(F, W)
    np.testing.assert_allclose(whole.mask(seen).log_prob(X), whole.log_prob(X) * seen)
    assert whole.mask(torch.ones(2, 1, n) > 0).batch_shape == (2, 1, n)
    assert (whole.mask(False).log_prob(as_counts(X)) == 0).all()


@pytest.mark.parametrize("D", [d, n])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_mask_of_entries_is_refused(D, leading):
    """Also where there are as many features as samples, and it would broadcast."""
    observation = PoissonFactors(torch.zeros(*leading, L, n), torch.ones(D, L))
    with pytest.raises(ValueError, match="hidden entries are part of an Exposure"):
        observation.mask(torch.ones(n, D) > 0)


def test_a_row_is_an_event_and_has_no_reparameterised_draw():
    F, W, _ = parts()
    observation = likelihood(F, W)
    assert not observation.has_rsample
    with pytest.raises(NotImplementedError):
        observation.rsample()
    assert observation.support.event_dim == 1
    assert observation.support.check(observation.sample()).all()
    assert not observation.support.check(-torch.ones(n, d)).any()
    X = observation.sample()
    total = observation.to_event(1).log_prob(X)
    torch.testing.assert_close(total, observation.log_prob(X).sum())
