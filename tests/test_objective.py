"""The objective: its hot kernel, its value and gradients, and that it is a bound.

Monte Carlo estimates are compared with quadrature. Each such test tiles the samples, so that one
call holds thousands of independent draws, and asks for agreement within SIGMAS standard errors:
by the normal approximation a right formula fails with probability below 6e-7 under a new seed.
The seeds are fixed, so that a test that passes keeps passing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal, init_to_value
from scipy import integrate, special, stats
from sklearn.metrics import mean_poisson_deviance

import pnmf_pyro.data.counts
from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import Batch, Batches, take
from pnmf_pyro.data.counts import Counts, as_counts
from pnmf_pyro.data.log_rate import log_rate, log_rate_and_moments, log_rate_with_gradients
from pnmf_pyro.data.random_state import drawing_from
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.poisson import PoissonFactors, mean_deviance
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.fields import FieldMarginals
from pnmf_pyro.priors.natural import NaturalGradient
from pnmf_pyro.training.loop import evaluate_elbo, train
from tests import dense_reference as ref

MODES = ("simple", "expanded", "lower-bound")
LAYOUTS = ("dense", "sparse")
PRIOR_SCALE = 1.25  # exact in float32
SIGMAS = 5.0
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}
NUMPY = {torch.float64: np.float64, torch.float32: np.float32}


@pytest.fixture(params=MODES)
def mode(request) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "sized"])
def sized(request) -> bool:
    return request.param


@pytest.fixture(params=list(TOLERANCE), ids=["float64", "float32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def problem(sized) -> ref.Problem:
    return ref.simulate(sized=sized)


@pytest.fixture
def fields(monkeypatch) -> list[torch.Tensor]:
    """The fields exp F over which the objective averages, recorded as it goes."""
    seen: list[torch.Tensor] = []
    original = PoissonFactors.expected_terms

    def recording(self, value, fields, expected):
        seen.extend(field.detach().double() for field in fields)
        return original(self, value, fields, expected)

    monkeypatch.setattr(PoissonFactors, "expected_terms", recording)
    return seen


@pytest.fixture(params=["one block", "blocks", "portable"])
def kernel(request, monkeypatch) -> str:
    """The ways through the kernel: whole, cut into blocks, and without torch's sampled product."""
    if request.param != "one block":
        monkeypatch.setattr(pnmf_pyro.data.counts, "BLOCK_ENTRIES", 10)
    if request.param == "portable":
        monkeypatch.setattr(
            pnmf_pyro.data.counts, "_has_sampled_addmm", lambda device, dtype: False
        )
    return request.param


def drawing(seed: int) -> AbstractContextManager[None]:
    return drawing_from(torch.Generator().manual_seed(seed), torch.device("cpu"))


def counts_of(X: np.ndarray, layout: str, dtype: torch.dtype = torch.float64) -> Counts:
    X = X.astype(NUMPY[dtype])
    return as_counts(sp.csr_matrix(X) if layout == "sparse" else X)


def double(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64)


def model_of(
    problem: ref.Problem,
    mode: str = "lower-bound",
    dtype: torch.dtype = torch.float64,
    *,
    kind: type[PoissonFactorization] = PoissonFactorization,
    natural: bool = False,
) -> PoissonFactorization:
    """A model whose q(F) and W are those of the problem."""
    N, D, L = problem.shape
    y = torch.empty(D, N, dtype=dtype, device="meta")
    s = None if problem.s is None else double(problem.s).to(dtype)
    prior = GaussianPrior(y, L, PRIOR_SCALE, use_natural_gradients=natural)
    model = kind(prior, y, L, "projected", mode, size_factors=s, random_state=0)
    prior.assign(double(problem.mean).to(dtype), double(problem.scale).to(dtype))
    model.W.assign(double(problem.W))
    return model


def terms_of(model: PoissonFactorization, batch: Batch, n_draws: int = 4) -> dict:
    with drawing(0):
        return FactorizationELBO(model.mode, n_draws).terms(model.model, model.guide, batch)


def elbo_of(model: PoissonFactorization, batch: Batch) -> float:
    terms = terms_of(model, batch)
    return (terms["log_likelihood"] - terms["kl"]).item()


def elbo_and_gradients(model: PoissonFactorization, batches: list[tuple[float, Batch]]):
    """Weighted sum of the ELBOs of batches, with its gradients in q and W."""
    parameters = [model.prior.mean, model.prior.scale.raw, model.W.raw]
    total = torch.zeros((), dtype=torch.float64)
    for weight, batch in batches:
        terms = terms_of(model, batch)
        total = total + weight * (terms["log_likelihood"] - terms["kl"])
    return total.detach(), torch.autograd.grad(total, parameters)


def assert_all_close(actual, expected, dtype: torch.dtype = torch.float64) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach().double(), **TOLERANCE[dtype])


def assert_within_error(estimate: float, exact: float, error: float) -> None:
    assert error > 0
    assert abs(estimate - exact) < SIGMAS * error, (estimate, exact, (estimate - exact) / error)


# --- the twins themselves


def test_the_twin_of_the_evidence_agrees_with_adaptive_integration():
    problem = ref.simulate(1, N=3, D=4, L=1, sized=True)
    for i, value in enumerate(ref.log_evidence(problem, PRIOR_SCALE)):

        def joint(f: float, i: int = i) -> float:
            rate = problem.s[i] * problem.W[:, 0] * np.exp(f)
            likelihood = stats.poisson.pmf(problem.X[i], rate).prod()
            return likelihood * stats.norm.pdf(f, scale=PRIOR_SCALE)

        evidence, _ = integrate.quad(joint, -15, 15, limit=500, epsabs=0, points=[0.0])
        assert value == pytest.approx(np.log(evidence), rel=1e-7)


# --- the kernel


class Kernel:
    """sum_j X_ij log rho_ij with X, A = exp F, W and weights, all dense and float64."""

    def __init__(self, dtype: torch.dtype):
        problem = ref.simulate(2, N=11, D=8, L=3)
        random = np.random.default_rng(3)
        self.X = double(problem.X)
        self.A = double(np.exp(problem.mean.T)).to(dtype)
        self.W = double(problem.W).to(dtype)
        self.weights = double(random.uniform(-2, 3, 11))

    def expected(self, weights: torch.Tensor):
        """Values, and gradients of their weighted sum, by autograd through the dense formula."""
        A, W = (part.double().clone().requires_grad_() for part in (self.A, self.W))
        values = (self.X * (A @ W.T).log()).sum(1)
        return values, *torch.autograd.grad((weights * values).sum(), [A, W])


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_log_rate_and_its_gradients_equal_the_dense_formula(layout, dtype, kernel, weighted):
    twin = Kernel(dtype)
    weights = twin.weights if weighted else torch.full((11,), -1.5, dtype=torch.float64)
    counts = counts_of(twin.X.numpy(), layout, dtype)
    assert (len(list(counts.blocks())) > 2) == (kernel != "one block")
    A, W = (part.clone().requires_grad_() for part in (twin.A, twin.W))
    values = log_rate(counts, A, W)
    (weights * values).sum().backward()
    assert values.dtype == torch.float64
    assert A.grad.dtype == W.grad.dtype == dtype
    assert_all_close((values, A.grad, W.grad), twin.expected(weights), dtype)


def test_log_rate_has_the_same_values_without_gradients(layout, dtype, kernel):
    twin = Kernel(dtype)
    counts = counts_of(twin.X.numpy(), layout, dtype)
    expected, *_ = twin.expected(twin.weights)
    A = twin.A.clone().requires_grad_()
    with torch.no_grad():
        assert_all_close([log_rate(counts, A, twin.W)], [expected], dtype)
    assert_all_close([log_rate(counts, twin.A, twin.W)], [expected], dtype)


def test_log_rate_with_gradients_is_the_weighted_sum(layout, kernel):
    twin = Kernel(torch.float64)
    counts = counts_of(twin.X.numpy(), layout)
    for weights in (None, twin.weights):
        result = log_rate_with_gradients(counts, twin.A, twin.W, weights)
        assert_all_close(result, twin.expected(torch.ones(11) if weights is None else weights))


def test_log_rate_passes_gradcheck(layout, kernel):
    twin = Kernel(torch.float64)
    counts = counts_of(twin.X.numpy(), layout)
    A, W = (part.clone().requires_grad_() for part in (twin.A, twin.W))
    assert torch.autograd.gradcheck(lambda A, W: log_rate(counts, A, W), (A, W))
    assert torch.autograd.gradcheck(lambda A: log_rate(counts, A, twin.W), (A,))
    assert torch.autograd.gradcheck(lambda W: log_rate(counts, twin.A, W), (W,))


def test_log_rate_refuses_second_derivatives(layout):
    """They would be wrong: the gradients are made on the way forward."""
    twin = Kernel(torch.float64)
    A = twin.A.clone().requires_grad_()
    value = log_rate(counts_of(twin.X.numpy(), layout), A, twin.W).square().sum()
    (gradient,) = torch.autograd.grad(value, A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_log_rate_stays_finite_where_a_rate_is_zero(layout, dtype):
    """Projected loadings reach zero, also all those of a feature that has counts."""
    twin = Kernel(dtype)
    twin.W[5] = 0
    assert twin.X[:, 5].sum() > 0
    result = log_rate_with_gradients(counts_of(twin.X.numpy(), layout, dtype), twin.A, twin.W)
    assert all(bool(part.isfinite().all()) for part in result)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_rate_of_no_counts_at_all_is_zero(layout):
    counts = counts_of(np.zeros((3, 4)), layout)
    A, W = torch.ones(3, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    for part in log_rate_with_gradients(counts, A, W):
        assert bool((part == 0).all())


def test_allocation_moments_equal_the_twin(layout, dtype, kernel):
    twin = Kernel(dtype)
    _, *result = log_rate_and_moments(counts_of(twin.X.numpy(), layout, dtype), twin.A, twin.W)
    F = twin.A.double().log().T.numpy()
    expected = ref.allocation_moments(twin.X.numpy(), F, twin.W.double().numpy())
    assert_all_close(result, [double(part) for part in expected], dtype)
    # What they are for: X phi (1 - phi) is the curvature of the log rate.
    curvature = ref.log_rate_curvature(twin.X.numpy(), F, twin.W.double().numpy())
    assert_all_close([result[0] - result[1]], [double(curvature)], dtype)


# --- identity 1: sparse = dense = twin


def test_objective_and_gradients_equal_the_twin(problem, mode, layout, dtype, fields):
    model = model_of(problem, mode, dtype)
    value, gradients = elbo_and_gradients(
        model, [(1.0, Batch(counts_of(problem.X, layout, dtype)))]
    )
    prior = model.prior
    leaves = [p.detach().double().requires_grad_() for p in (prior.mean, prior.scale.raw, model.W)]
    mean, raw, W = leaves
    scale = torch.nn.functional.softplus(raw)
    noise = (torch.stack(fields).log() - mean.detach()) / scale.detach()
    s = None if problem.s is None else model.size_factors.double()
    expected = ref.elbo_terms(double(problem.X), mean, scale, W, s, PRIOR_SCALE, mode, noise)
    elbo = expected[0].sum() - expected[1].sum()
    assert len(fields) == (1 if mode == "lower-bound" else 4)
    assert_all_close((value, *gradients), (elbo, *torch.autograd.grad(elbo, leaves)), dtype)


def test_sparse_equals_dense_for_the_same_draws(problem, mode):
    model = model_of(problem, mode)
    dense, sparse = (
        elbo_and_gradients(model, [(1.0, Batch(counts_of(problem.X, layout)))])
        for layout in LAYOUTS
    )
    assert_all_close((dense[0], *dense[1]), (sparse[0], *sparse[1]))


def test_expected_log_prob_is_per_sample(problem, mode, layout, fields):
    q = dist.Normal(double(problem.mean), double(problem.scale))
    W, s = double(problem.W), None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(q.mean, W, s)
    with drawing(1):
        value = likelihood.expected_log_prob(counts_of(problem.X, layout), q, mode, n_draws=3)
    noise = (torch.stack(fields).log() - q.mean) / q.stddev
    expected, _ = ref.elbo_terms(
        double(problem.X), q.mean, q.stddev, W, s, PRIOR_SCALE, mode, noise
    )
    assert_all_close([value], [expected])


def test_expected_log_prob_refuses_unknown_modes(problem):
    q = dist.Normal(double(problem.mean), double(problem.scale))
    with pytest.raises(ValueError, match=r"mode must be one of .*'simple'.*got 'exact'"):
        PoissonFactors(q.mean, double(problem.W)).expected_log_prob(
            as_counts(problem.X), q, "exact"
        )
    with pytest.raises(ValueError, match="mode must be one of"):
        FactorizationELBO("exact")


def gradients_of(problem: ref.Problem, counts: Counts, mode: str, newton: bool):
    """Values for three draws, and gradients of their sum in the mean and variance of q and in W."""
    mean, W = (double(part).requires_grad_() for part in (problem.mean, problem.W))
    variance = double(problem.scale**2).requires_grad_()
    q = dist.Normal(mean, variance.sqrt())
    likelihood = PoissonFactors(mean, W, None if problem.s is None else double(problem.s))
    with drawing(11):
        value = likelihood.expected_log_prob(counts, q, mode, n_draws=3, newton=newton)
    return value.detach(), *torch.autograd.grad(value.sum(), [mean, variance, W])


def test_newton_changes_nothing_but_the_gradient_in_the_variance(problem, mode, layout):
    counts = counts_of(problem.X, layout)
    plain, newton = (gradients_of(problem, counts, mode, newton) for newton in (False, True))
    value, mean, variance, W = zip(plain, newton, strict=True)
    for one, other in (value, mean, W):
        assert_all_close([other], [one])
    # The lower bound is analytic: its gradient is exact already.
    assert torch.equal(*variance) == (mode == "lower-bound")


@pytest.mark.parametrize("mode", ["simple", "expanded"])
def test_newton_gradient_is_half_the_bounded_curvature(problem, layout, mode, fields):
    """Of each draw, by automatic second derivatives; at most -1/4 sum_j X_ij phi_ijl^2."""
    counts = counts_of(problem.X, layout)
    *_, gradient, _ = gradients_of(problem, counts, mode, newton=True)
    fields.clear()
    gradients_of(problem, counts, mode, newton=False)  # the same draws, as the values show
    draws = [field.log().numpy() for field in fields]
    assert len(draws) == 3
    curvature = np.mean([ref.log_rate_curvature(problem.X, F, problem.W) for F in draws], 0)
    second = np.mean([ref.allocation_moments(problem.X, F, problem.W)[1] for F in draws], 0)
    moment = np.exp(problem.mean + problem.scale**2 / 2)
    if mode == "simple":
        moment = np.exp(draws).mean(0)
    s = 1.0 if problem.s is None else problem.s
    h = (s * moment).T * problem.W.sum(0)
    expected = np.minimum((curvature - h) / 2, -second / 4)
    bounded = -second / 4 < (curvature - h) / 2
    assert bounded.any() or problem.s is not None  # the sized problem has no such entry
    assert not bounded.all()
    assert_all_close([gradient], [double(expected.T)])


@pytest.mark.parametrize("batch_size", [1, 4, 9, 20])
def test_batches_of_one_pass_average_to_the_whole(problem, layout, batch_size):
    """Value and gradients; the last batch of four is smaller than the others."""
    counts = counts_of(problem.X, layout)
    model = model_of(problem)
    N = len(problem.X)
    parts = [(b.counts.shape[0] / N, b) for b in Batches(counts, batch_size).one_pass()]
    assert sum(weight for weight, _ in parts) == pytest.approx(1)
    value, gradients = elbo_and_gradients(model, parts)
    whole, whole_gradients = elbo_and_gradients(model, [(1.0, Batch(counts))])
    assert_all_close((value, *gradients), (whole, *whole_gradients))


def blocks_of(batches: Batches, n: int, d: int) -> list[Batch]:
    """All batches of n consecutive samples and d consecutive features."""
    N, D = batches.counts.shape
    return [
        batches.batch(samples, features)
        for samples in torch.arange(N).split(n)
        for features in torch.arange(D).split(d)
    ]


def test_batches_of_samples_and_features_average_to_the_whole(sized, layout):
    problem = ref.simulate(4, N=8, D=6, sized=sized)
    counts = counts_of(problem.X, layout)
    model = model_of(problem)
    parts = [(0.25, batch) for batch in blocks_of(Batches(counts), 4, 3)]
    value, gradients = elbo_and_gradients(model, parts)
    whole, whole_gradients = elbo_and_gradients(model, [(1.0, Batch(counts))])
    assert len(parts) == 4
    assert_all_close((value, *gradients), (whole, *whole_gradients))


def test_terms_of_blocks_add_up_for_given_draws(problem, layout):
    """The Monte Carlo modes: with the fields given, the terms of the blocks sum to the whole."""
    counts = counts_of(problem.X, layout)
    random = np.random.default_rng(5)
    F = double(problem.mean)
    draws = [double(np.exp(random.normal(size=F.shape))) for _ in range(3)]
    W, s = double(problem.W), None if problem.s is None else double(problem.s)
    whole = PoissonFactors(F, W, s).expected_terms(counts, draws, draws[0])
    total = [torch.zeros_like(term) for term in whole]
    for batch in blocks_of(Batches(counts), 4, 3):
        i, j = batch.samples, batch.features
        likelihood = PoissonFactors(F[:, i], W[j], take(s, i))
        terms = likelihood.expected_terms(batch.counts, [f[:, i] for f in draws], draws[0][:, i])
        for one, term in zip(total, terms, strict=True):
            one[i] += term
    assert_all_close(total, whole)


@pytest.mark.parametrize(
    ("scale_ll_D", "scale_kl_NM"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_scales_of_a_batch(problem, layout, scale_ll_D, scale_kl_NM):
    """Samples are scaled by N/n; features by D/d and the KL by N/n only where asked for."""
    N, D, _ = problem.shape
    i, j = torch.tensor([7, 0, 3, 4]), torch.tensor([5, 1, 2])
    batches = Batches(counts_of(problem.X, layout), scale_ll_D=scale_ll_D, scale_kl_NM=scale_kl_NM)
    terms = terms_of(model_of(problem), batches.batch(i, j))
    W, s = double(problem.W)[j], take(None if problem.s is None else double(problem.s), i)
    mean, scale = double(problem.mean)[:, i], double(problem.scale)[:, i]
    log_likelihood, kl = ref.elbo_terms(
        double(problem.X)[i][:, j], mean, scale, W, s, PRIOR_SCALE, "lower-bound", mean[None]
    )
    assert_all_close(
        [terms["log_likelihood"], terms["kl"]],
        [
            log_likelihood.sum() * N / 4 * (D / 3 if scale_ll_D else 1),
            kl.sum() * (N / 4 if scale_kl_NM else 1),
        ],
    )


@pytest.mark.parametrize("batch_size", [None, 4])
def test_evaluate_elbo_is_the_value_of_all_the_data(problem, layout, batch_size):
    model, counts = model_of(problem), counts_of(problem.X, layout)
    elbo = evaluate_elbo(
        model, Batches(counts, batch_size), FactorizationELBO("lower-bound"), torch.Generator()
    )
    assert elbo == pytest.approx(elbo_of(model, Batch(counts)), rel=1e-12)


# --- identity 2: lower-bound <= expanded = simple = quadrature


@pytest.mark.parametrize("seed", range(5))
def test_lower_bound_is_below_the_expectation(seed, sized):
    problem = ref.simulate(seed, N=4, D=5, L=2, sized=sized)
    q = dist.Normal(double(problem.mean), double(problem.scale))
    s = None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(q.mean, double(problem.W), s)
    value = likelihood.expected_log_prob(as_counts(problem.X), q, "lower-bound").numpy()
    exact, _ = ref.expected_log_likelihood(problem)
    has_counts = problem.X.sum(1) > 0
    assert (value[has_counts] < exact[has_counts]).all()
    # Without counts there is no log rate to bound, and both are the same number.
    np.testing.assert_allclose(value[~has_counts], exact[~has_counts], rtol=1e-10)


def test_lower_bound_is_exact_for_one_component(sized):
    problem = ref.simulate(6, N=4, D=5, L=1, sized=sized)
    terms = terms_of(model_of(problem), Batch(as_counts(problem.X)))
    exact, _ = ref.expected_log_likelihood(problem)
    assert terms["log_likelihood"].item() == pytest.approx(exact.sum(), rel=1e-10)


@pytest.mark.parametrize("mode", ["simple", "expanded"])
@pytest.mark.parametrize("n_draws", [1, 3])
def test_monte_carlo_modes_are_unbiased(sized, layout, mode, n_draws):
    """Each sample's mean over 8,000 independent estimates is the quadrature value.

    Failure probability under a new seed: 6e-7 for each of the 4 samples. The standard errors are
    exact too, so the spread of the estimates is checked as well, to a tenth.
    """
    problem, times = ref.simulate(7, N=4, D=5, L=2, sized=sized, empty=False), 8000
    problem.scale[:] *= 0.5  # draws of exp F have heavy tails, in which a spread converges slowly
    exact, variance = ref.expected_log_likelihood(problem)
    if mode == "expanded":
        variance = ref.expected_log_rate_variance(problem)
    tiled = problem.tiled(times)
    q = dist.Normal(double(tiled.mean), double(tiled.scale))
    s = None if tiled.s is None else double(tiled.s)
    likelihood = PoissonFactors(q.mean, double(tiled.W), s)
    with drawing(2):
        value = likelihood.expected_log_prob(counts_of(tiled.X, layout), q, mode, n_draws)
    estimates = value.numpy().reshape(times, 4)
    for i in range(4):
        assert_within_error(
            estimates[:, i].mean(), exact[i], np.sqrt(variance[i] / (times * n_draws))
        )
    np.testing.assert_allclose(estimates.var(0), variance / n_draws, rtol=0.1)


# --- identity 3: the ELBO is a lower bound on log p(X | W)


@pytest.mark.parametrize("seed", range(4))
def test_elbo_is_below_the_evidence(seed, sized, mode):
    """Deterministic for lower-bound; for the others failure probability 6e-7 or less, see above."""
    problem, times = ref.simulate(seed, N=4, D=3, L=1, sized=sized), 4000
    problem.scale[:] *= 0.5
    evidence = ref.log_evidence(problem, PRIOR_SCALE).sum()
    tiled = problem.tiled(1 if mode == "lower-bound" else times)
    terms = terms_of(model_of(tiled, mode), Batch(as_counts(tiled.X)), n_draws=1)
    elbo = (terms["log_likelihood"] - terms["kl"]).item() * len(problem.X) / len(tiled.X)
    variance = {
        "lower-bound": 0.0,
        "expanded": ref.expected_log_rate_variance(problem).sum() / times,
        "simple": ref.expected_log_likelihood(problem)[1].sum() / times,
    }[mode]
    assert elbo - SIGMAS * np.sqrt(variance) <= evidence
    assert SIGMAS * np.sqrt(variance) < 1.0, "an error bar this wide would prove nothing"


def test_optimised_elbo_is_close_to_the_evidence(sized):
    """So every constant is there: the gap left is that of a normal to a slightly skewed posterior.

    For one component and samples with h >= 5 expected counts it is about 1 / (12 h) at most.
    """
    problem = ref.simulate(8, N=5, D=6, L=1, sized=sized, empty=False)
    problem.W[:] *= 3
    X = np.random.default_rng(8).poisson(ref.rates(problem.mean, problem.W, problem.s)) + 1.0
    problem = ref.Problem(X, problem.W, problem.mean, problem.scale, problem.s)
    model, batches = model_of(problem, natural=True), Batches(as_counts(X))
    model.W.freeze()
    optimizers = [NaturalGradient(model.prior.natural_parameters())]
    objective = FactorizationELBO("lower-bound")
    train(model, batches, objective, optimizers, torch.Generator(), max_iter=60)
    elbo = evaluate_elbo(model, batches, objective, torch.Generator())
    gap = ref.log_evidence(problem, PRIOR_SCALE).sum() - elbo
    assert 0 < gap < 5 * 1 / 60


# --- identity 10: parts, orders and sums of data sets


def test_order_of_samples_and_features_does_not_matter(problem, layout):
    counts, model = counts_of(problem.X, layout), model_of(problem)
    N, D, _ = problem.shape
    random = np.random.default_rng(9)
    i, j = torch.tensor(random.permutation(N)), torch.tensor(random.permutation(D))
    value, gradients = elbo_and_gradients(model, [(1.0, Batches(counts).batch(i, j))])
    whole, whole_gradients = elbo_and_gradients(model, [(1.0, Batch(counts))])
    assert_all_close((value, *gradients), (whole, *whole_gradients))


def test_elbo_of_two_data_sets_is_the_sum(sized, layout):
    first, other = (ref.simulate(seed, N=n, sized=sized) for seed, n in ((10, 9), (11, 5)))
    second = ref.Problem(other.X, first.W, other.mean, other.scale, other.s)
    both = ref.Problem(
        np.vstack([first.X, second.X]),
        first.W,
        np.hstack([first.mean, second.mean]),
        np.hstack([first.scale, second.scale]),
        np.concatenate([first.s, second.s]) if sized else None,
    )
    results = []
    for part in (first, second, both):
        batch = Batch(counts_of(part.X, layout))
        results.append(elbo_and_gradients(model_of(part), [(1.0, batch)]))
    (a, (*_, W_a)), (b, (*_, W_b)), (total, (mean, scale, W)) = results
    assert_all_close([a + b, W_a + W_b], [total, W])
    assert_all_close([torch.cat([results[0][1][0], results[1][1][0]], 1)], [mean])
    assert_all_close([torch.cat([results[0][1][1], results[1][1][1]], 1)], [scale])


def field_of(problem: ref.Problem, loc: torch.Tensor, factor: float = 1.0) -> FieldMarginals:
    """Independent marginals with `factor` times the scales of the problem, as a field."""
    scale = factor * double(problem.scale)
    return FieldMarginals(loc, scale, lambda n: loc + scale * torch.randn(n, *loc.shape))


def standard(loc: torch.Tensor) -> dist.Normal:
    return dist.Normal(torch.zeros_like(loc), 1.0)


@pytest.mark.parametrize("order", [("a", "F"), ("F", "a")])
def test_fields_with_the_same_mean_are_told_apart(order, problem):
    """Both hold the very same tensor as their mean, with other scales; no draw is made."""
    loc, W, counts = double(problem.mean), double(problem.W), as_counts(problem.X)

    def guide():
        for name in order:
            pyro.sample(name, field_of(problem, loc, 2.0 if name == "a" else 1.0))

    def model():
        drawn = {name: pyro.sample(name, standard(loc)) for name in order}
        pyro.sample("X", PoissonFactors(drawn["F"], W), obs=counts)

    before = torch.random.get_rng_state()
    terms = FactorizationELBO("lower-bound").terms(model, guide)
    assert torch.equal(torch.random.get_rng_state(), before)
    q = dist.Normal(loc, double(problem.scale))
    expected = PoissonFactors(loc, W).expected_log_prob(counts, q, "lower-bound").sum()
    torch.testing.assert_close(terms["log_likelihood"], expected)


def test_what_depends_on_a_field_is_averaged_over_its_draws(problem):
    """With z ~ N(F, 1) and q(z) = N(0, 1), E KL(q(z) || p(z | F)) is E F^2 / 2 for each."""
    loc, scale = double(problem.mean), double(problem.scale)

    def guide():
        F = pyro.sample("F", field_of(problem, loc))
        pyro.sample("z", standard(loc).to_event(2))
        return F

    def model():
        F = pyro.sample("F", standard(loc))
        pyro.sample("z", dist.Normal(F, 1.0).to_event(2))

    with drawing(0):
        terms = [FactorizationELBO().terms(model, guide)["kl"].item() for _ in range(400)]
    exact = ((loc.square() + scale.square()) / 2).sum().item()
    assert_within_error(np.mean(terms), exact, np.std(terms) / 400**0.5)
    at_means = (loc.square() / 2).sum().item()
    assert abs(at_means - exact) > SIGMAS * np.std(terms) / 400**0.5


# --- PoissonFactors as a distribution


def as_value(X: np.ndarray, kind: str):
    return {
        "counts": lambda: as_counts(sp.csr_matrix(X)),
        "tensor": lambda: double(X),
        "int tensor": lambda: torch.tensor(X, dtype=torch.int64),
        "csr": lambda: sp.csr_matrix(X),
        "coo": lambda: sp.coo_array(X),
        "torch csr": lambda: double(X).to_sparse_csr(),
        "float32 tensor": lambda: double(X).float(),
        "float32 csr": lambda: sp.csr_matrix(X.astype(np.float32)),
        "int csr": lambda: sp.csr_matrix(X.astype(np.int64)),
        "int torch csr": lambda: torch.tensor(X, dtype=torch.int64).to_sparse_csr(),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "counts",
        "tensor",
        "csr",
        "coo",
        "torch csr",
        # The type of the counts need not be that of the parameters: neither for dense nor sparse.
        "int tensor",
        "float32 tensor",
        "int csr",
        "float32 csr",
        "int torch csr",
    ],
)
def test_log_prob_equals_scipy(problem, kind):
    s = None if problem.s is None else double(problem.s)
    F = double(problem.mean)
    value = PoissonFactors(F, double(problem.W), s).log_prob(as_value(problem.X, kind))
    rate = ref.rates(problem.mean, problem.W, problem.s)
    expected = stats.poisson.logpmf(problem.X, rate).sum(1)
    assert value.dtype == torch.float64
    # log X! of float32 counts is taken in float32
    tolerance = 1e-10 if kind in ("counts", "tensor", "csr", "coo", "torch csr") else 1e-6
    np.testing.assert_allclose(value.numpy(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ref.poisson_log_prob(problem.X, rate), expected, rtol=1e-10)


def test_log_prob_of_leading_dimensions(problem, layout):
    """One row for each draw of F, as in Predictive and Trace_ELBO with vectorised particles."""
    F = np.random.default_rng(12).normal(size=(2, 4, *problem.mean.shape))
    likelihood = PoissonFactors(double(F), double(problem.W))
    N, D, _ = problem.shape
    value = likelihood.log_prob(counts_of(problem.X, layout))
    assert value.shape == likelihood.batch_shape == (2, 4, 1, N)
    assert likelihood.event_shape == (D,)
    for e in np.ndindex(2, 4):
        expected = stats.poisson.logpmf(problem.X, ref.rates(F[e], problem.W)).sum(1)
        np.testing.assert_allclose(value[e][0].numpy(), expected, rtol=1e-10)


def test_gradient_of_log_prob_in_the_log_factors(problem, layout):
    F = double(problem.mean).requires_grad_()
    W = double(problem.W).requires_grad_()
    s = None if problem.s is None else double(problem.s)
    PoissonFactors(F, W, s).log_prob(counts_of(problem.X, layout)).sum().backward()
    G, V = F.detach().clone().requires_grad_(), W.detach().clone().requires_grad_()
    zero = torch.zeros_like(G)
    ref.elbo_terms(double(problem.X), G, zero, V, s, 1.0, "simple", zero[None])[0].sum().backward()
    assert_all_close([F.grad, W.grad], [G.grad, V.grad])


def test_log_prob_of_its_own_draws_is_right_or_refused():
    """A value with leading dimensions is not supported; it must not be summed over a wrong one.

    With as many samples as features nothing but a check of the shape can tell the two apart.
    """
    problem = ref.simulate(13, N=4, D=4)
    likelihood = PoissonFactors(double(problem.mean), double(problem.W))
    with drawing(3):
        draw = likelihood.sample((1,))
    try:
        value = likelihood.log_prob(draw)
    except (RuntimeError, ValueError):
        return
    expected = stats.poisson.logpmf(draw.numpy(), ref.rates(problem.mean, problem.W)).sum(-1)
    np.testing.assert_allclose(value.numpy().ravel(), expected.ravel(), rtol=1e-10)


def test_log_prob_adds_up_repeated_entries_of_a_sparse_matrix():
    """Entry (0, 0) is 1 + 2: a CSR matrix may hold the parts, and log 3! is not log 1! + log 2!."""
    parts = sp.csr_matrix((np.array([1.0, 2.0]), np.array([0, 0]), np.array([0, 2])), shape=(1, 1))
    value = PoissonFactors(double(np.zeros((1, 1))), double(np.ones((1, 1)))).log_prob(parts)
    assert float(value) == pytest.approx(stats.poisson.logpmf(3, 1.0))


def test_mean_and_variance_are_the_rates(problem):
    s = None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(double(problem.mean), double(problem.W), s)
    for moment in (likelihood.rate, likelihood.mean, likelihood.variance):
        np.testing.assert_allclose(
            moment.numpy(), ref.rates(problem.mean, problem.W, problem.s), rtol=1e-12
        )


def test_draws_have_the_mean_and_the_variance_of_a_poisson(sized):
    """20,000 draws of 6 entries, each moment within SIGMAS exact standard errors."""
    problem, times = ref.simulate(14, N=3, D=2, L=2, sized=sized), 20_000
    s = None if problem.s is None else double(problem.s)
    likelihood = PoissonFactors(double(problem.mean), double(problem.W), s)
    with drawing(4):
        draws = likelihood.sample((times,)).numpy()
    assert draws.shape == (times, 3, 2)
    rate = ref.rates(problem.mean, problem.W, problem.s)
    for entry in np.ndindex(3, 2):
        x, r = draws[(slice(None), *entry)], rate[entry]
        assert_within_error(x.mean(), r, np.sqrt(r / times))
        assert_within_error(x.var(), r, np.sqrt((r + 2 * r**2) / times))


@pytest.mark.parametrize("shape", [(9,), (5, 1, 9), (2, 5, 1, 9), (5, 9)])
def test_expand_gives_the_batch_shape_asked_for(problem, shape):
    """Or says that it cannot, but does not return another distribution.

    The dimension before samples is that of components, so F leaves room for 1 there.
    """
    likelihood = PoissonFactors(double(problem.mean), double(problem.W))
    counts = as_counts(problem.X)
    try:
        expanded = likelihood.expand(shape)
    except (ValueError, NotImplementedError):
        assert shape == (5, 9)
        return
    assert expanded.batch_shape == shape
    assert expanded.event_shape == likelihood.event_shape
    expected = likelihood.log_prob(counts).expand(shape)
    assert_all_close([expanded.log_prob(counts)], [expected])
    with drawing(5):
        assert expanded.sample().shape == (*shape, problem.shape[1])


def test_expand_twice(problem):
    """As nested plates of a user's model do, one after another."""
    likelihood = PoissonFactors(double(problem.mean), double(problem.W))
    twice = likelihood.expand((5, 1, 9)).expand((2, 5, 1, 9))
    assert twice.batch_shape == (2, 5, 1, 9)
    counts = as_counts(problem.X)
    assert_all_close([twice.log_prob(counts)], [likelihood.log_prob(counts).expand(2, 5, 1, 9)])
    with drawing(5):
        assert twice.sample().shape == (2, 5, 1, 9, problem.shape[1])
        outer, inner = pyro.plate("outer", 2, dim=-3), pyro.plate("inner", 5, dim=-2)
        with outer, inner, pyro.plate("samples", 9, dim=-1):
            draw = pyro.sample("X", likelihood)
    assert draw.shape == (2, 5, 9, problem.shape[1])


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
@pytest.mark.parametrize("posterior", [False, True], ids=["prior", "posterior"])
def test_predictive_draws(sized, parallel, posterior):
    """F has its distribution, and each X is Poisson with the rates of the F beside it.

    Standardised residuals have mean 0 and mean square 1; each is checked within SIGMAS standard
    errors. A mismatch of dimensions anywhere would inflate the residuals many times over.
    """
    problem, draws = ref.simulate(15, N=6, D=4, L=2, sized=sized), 300
    model = model_of(problem)
    guide = model.guide if posterior else None
    with drawing(6):
        predictive = Predictive(
            model.model, guide=guide, num_samples=draws, parallel=parallel, return_sites=("F", "X")
        )
        samples = predictive(Batch())
    F, X = samples["F"].detach().numpy(), samples["X"].numpy()
    assert F.shape == (draws, 2, 6)
    assert X.shape == (draws, 1, 6, 4)
    mean, scale = (problem.mean, problem.scale) if posterior else (0.0, PRIOR_SCALE)
    standard = (F - mean) / scale
    assert_within_error(standard.mean(), 0, F.size**-0.5)
    assert_within_error((standard**2).mean(), 1, (2 / F.size) ** 0.5)
    rate = np.stack([ref.rates(f, problem.W, problem.s) for f in F])[:, None]
    residual = (X - rate) / np.sqrt(rate)
    assert_within_error(residual.mean(), 0, X.size**-0.5)
    error = np.sqrt((2 + 1 / rate).mean() / X.size)
    assert_within_error((residual**2).mean(), 1, error)


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "parallel"])
def test_predictive_draws_of_some_samples_and_features(parallel):
    problem = ref.simulate(16, N=6, D=4, L=2, sized=True)
    model = model_of(problem)
    batch = Batch(samples=torch.tensor([4, 1, 5]), features=torch.tensor([3, 0]))
    with drawing(7):
        predictive = Predictive(model.model, guide=model.guide, num_samples=200, parallel=parallel)
        samples = predictive(batch)
    F, X = samples["F"].detach().numpy(), samples["X"].numpy()
    assert F.shape == (200, 2, 3)
    assert X.shape == (200, 1, 3, 2)
    W, s = problem.W[[3, 0]], problem.s[[4, 1, 5]]
    rate = np.stack([ref.rates(f, W, s) for f in F])[:, None]
    assert_within_error(((X - rate) / np.sqrt(rate)).mean(), 0, X.size**-0.5)


# --- mean deviance


def test_mean_deviance_equals_scikit_learn(layout, dtype, kernel):
    problem = ref.simulate(17)
    factors = double(np.exp(problem.mean.T)).to(dtype)
    W = double(problem.W).to(dtype)
    value = mean_deviance(counts_of(problem.X, layout, dtype), factors, W)
    rate = ref.rates(problem.mean, problem.W)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected = mean_poisson_deviance(problem.X.ravel(), rate.ravel())
    assert value == pytest.approx(expected, rel=tolerance)
    assert ref.mean_deviance(problem.X, rate) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["int tensor", "int csr", "float32 csr", "csr", "torch csr"])
def test_mean_deviance_of_counts_of_any_type(kind):
    problem = ref.simulate(17)
    factors, W = double(np.exp(problem.mean.T)), double(problem.W)
    expected = ref.mean_deviance(problem.X, ref.rates(problem.mean, problem.W))
    value = mean_deviance(as_value(problem.X, kind), factors, W)
    assert value == pytest.approx(expected, rel=1e-6)


def test_mean_deviance_is_zero_for_perfect_rates(layout):
    X = np.array([[2.0, 3.0], [4.0, 6.0]])
    factors, W = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[2.0], [3.0]]).double()
    assert mean_deviance(counts_of(X, layout), factors, W) == pytest.approx(0, abs=1e-12)


# --- the user's own models and guides


def estimates(model, batch: Batch, mode: str = "expanded", times: int = 300) -> tuple[float, float]:
    """Mean of independent one-draw estimates of the ELBO, and its standard error."""
    objective = FactorizationELBO(mode, n_draws=1)
    with drawing(8), pyro.get_param_store().scope():
        values = [-objective.loss(model.model, model.guide, batch) for _ in range(times)]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(times))


class NegativeBinomial(PoissonFactorization):
    """Counts more variable than Poisson, as a user would write it."""

    concentration = 2.5

    def model(self, batch: Batch = Batch()):  # noqa: B008 - frozen, and the interface's own
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        rate = (take(self.W.data, batch.features, dim=0) @ F.exp()).mT
        counts = dist.GammaPoisson(torch.tensor(2.5).double(), 2.5 / rate).to_event(1)
        with samples, pyro.poutine.scale(scale=batch.likelihood_scale):
            return pyro.sample("X", counts, obs=batch.counts.to_dense())


def negative_binomial(x: np.ndarray, rate: np.ndarray) -> np.ndarray:
    return stats.nbinom.logpmf(x, 2.5, 2.5 / (2.5 + rate))


@pytest.mark.parametrize("n_draws", [1, 5])
def test_own_likelihood_is_averaged_over_draws(layout, n_draws):
    problem, times = ref.simulate(18, N=4, D=3, L=2), 2000
    tiled = problem.tiled(times)
    model = model_of(tiled, "expanded", kind=NegativeBinomial)
    terms = terms_of(model, Batch(counts_of(tiled.X, layout)), n_draws)
    exact, variance = ref.expected_log_likelihood(problem, negative_binomial)
    error = np.sqrt(variance.sum() / (times * n_draws))
    assert_within_error(terms["log_likelihood"].item() / times, exact.sum(), error)
    kl = ref.kl_normal(problem.mean, problem.scale, PRIOR_SCALE).sum()
    assert terms["kl"].item() / times == pytest.approx(kl, rel=1e-10)
    # The first draw is the same for every number of draws; the others must not repeat it.
    first = terms_of(model, Batch(counts_of(tiled.X, layout)), 1)["log_likelihood"].item()
    assert (terms["log_likelihood"].item() == first) == (n_draws == 1)


def test_own_likelihood_in_batches_and_its_gradients(layout):
    """With a q as good as certain there is nothing to draw, and values are exact."""
    problem = ref.simulate(19, N=6, D=4, L=2)
    problem.scale[:] = 1e-9
    counts = counts_of(problem.X, layout)
    model = model_of(problem, "expanded", kind=NegativeBinomial)
    parts = [(0.25, batch) for batch in blocks_of(Batches(counts), 3, 2)]
    value, (_, _, W_gradient) = elbo_and_gradients(model, parts)
    rate = ref.rates(problem.mean, problem.W)
    kl = ref.kl_normal(problem.mean, problem.scale, PRIOR_SCALE).sum()
    expected = negative_binomial(problem.X, rate).sum() - kl
    assert float(value) == pytest.approx(expected, rel=1e-7)
    # d log NB / d rate = x / rate - (x + r) / (r + rate)
    slope = problem.X / rate - (problem.X + 2.5) / (2.5 + rate)
    np.testing.assert_allclose(W_gradient, slope.T @ np.exp(problem.mean.T), rtol=1e-6, atol=1e-6)


class CommonDepth(PoissonFactorization):
    """A latent depth c of all samples; a log-normal q has no closed-form KL to a gamma prior."""

    def model(self, batch: Batch = Batch()):  # noqa: B008
        c = pyro.sample("c", dist.Gamma(torch.tensor(3.0).double(), torch.tensor(2.0).double()))
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        with samples:
            return pyro.sample("X", PoissonFactors(F, c * self.W.data), obs=batch.counts)

    def guide(self, batch: Batch = Batch()):  # noqa: B008
        pyro.sample("c", dist.LogNormal(torch.tensor(0.2).double(), torch.tensor(0.3).double()))
        return super().guide(batch)


def test_own_latent_site_without_a_closed_form(layout):
    """The divergence over 500 draws, and the likelihood over 300 runs, each with its exact error.

    Given c the likelihood of lower-bound mode is a number, so both are integrals over log c alone.
    """
    problem = ref.simulate(20, N=4, D=3, L=2)
    model = model_of(problem, kind=CommonDepth)
    batch = Batch(counts_of(problem.X, layout))
    rate = ref.rates(problem.mean, problem.W)
    moment = ref.rates(problem.mean + problem.scale**2 / 2, problem.W)

    def log_ratio(log_c: np.ndarray) -> np.ndarray:
        q = stats.norm.logpdf(log_c, 0.2, 0.3) - log_c
        return (q - stats.gamma.logpdf(np.exp(log_c), 3, scale=1 / 2))[:, 0]

    def log_likelihood(log_c: np.ndarray) -> np.ndarray:
        jensen = special.xlogy(problem.X, rate).sum() - special.gammaln(problem.X + 1).sum()
        return (problem.X.sum() * log_c - np.exp(log_c) * moment.sum())[:, 0] + jensen

    q = np.array([0.2]), np.array([0.3])
    exact, variance = ref.moments(log_ratio, *q)
    terms = terms_of(model, batch, n_draws=500)
    exact += ref.kl_normal(problem.mean, problem.scale, PRIOR_SCALE).sum()
    assert_within_error(terms["kl"].item(), exact, np.sqrt(variance / 500))
    assert SIGMAS * np.sqrt(variance / 500) < 0.3, "less than the entropy of c, 0.4"
    exact, variance = ref.moments(log_likelihood, *q)
    objective = FactorizationELBO("lower-bound", n_draws=1)
    with drawing(9):
        runs = [
            objective.terms(model.model, model.guide, batch)["log_likelihood"].item()
            for _ in range(300)
        ]
    assert_within_error(np.mean(runs), exact, np.sqrt(variance / 300))


class UniformGuide(PoissonFactorization):
    """q(F) uniform within 2 of its mean: a guide that is not normal."""

    def guide(self, batch: Batch = Batch()):  # noqa: B008
        with self.prior.local_sites(batch, batch.plate(self.N)):
            mean = self.prior.marginal(batch.samples).mean
            return pyro.sample("F", dist.Uniform(mean - 2, mean + 2))


@pytest.mark.parametrize("mode", ["simple", "expanded"])
def test_own_guide_that_is_not_normal(mode):
    """One component, so every expectation is elementary: E log rho = log W + m, E e^F = e^m sh."""
    problem, h = ref.simulate(21, N=4, D=3, L=1), 2.0
    tiled = problem.tiled(500)
    model = model_of(tiled, mode, kind=UniformGuide)
    value, error = estimates(model, Batch(as_counts(tiled.X)), mode, times=30)
    rate = ref.rates(problem.mean, problem.W)
    log_likelihood = special.xlogy(problem.X, rate) - rate * np.sinh(h) / h
    log_likelihood -= special.gammaln(problem.X + 1)
    log_prior = -0.5 * np.log(2 * np.pi * PRIOR_SCALE**2)
    log_prior = log_prior - (problem.mean**2 + h**2 / 3) / (2 * PRIOR_SCALE**2)
    exact = log_likelihood.sum() + log_prior.sum() + 4 * np.log(2 * h)
    assert_within_error(value / 500, exact, error / 500)


class AutoGuided(PoissonFactorization):
    """Pyro writes the guide: F is a function of an auxiliary site, which carries the entropy."""

    def make_guide(self, problem: ref.Problem, scale: float) -> None:
        start = init_to_value(values={"F": double(problem.mean)})
        self.auto = AutoNormal(super().model, init_loc_fn=start, init_scale=scale)

    def guide(self, batch: Batch = Batch()):  # noqa: B008
        return self.auto(batch)


def test_automatic_guide_has_its_entropy():
    problem, scale = ref.simulate(22, N=4, D=3, L=2), 0.4
    problem.scale[:] = scale
    model = model_of(problem, "simple", kind=AutoGuided)
    model.make_guide(problem, scale)
    value, error = estimates(model, Batch(as_counts(problem.X)), "simple", times=400)
    exact = ref.expected_log_likelihood(problem)[0].sum()
    exact -= ref.kl_normal(problem.mean, np.full_like(problem.mean, scale), PRIOR_SCALE).sum()
    assert_within_error(value, exact, error)


def test_loss_and_gradients_refuse_a_value_that_is_not_finite(layout):
    problem = ref.simulate(23)
    model, batch = model_of(problem), Batch(counts_of(problem.X, layout))
    with torch.no_grad():
        model.prior.mean[0, 0] = 1e5
    objective = FactorizationELBO("lower-bound")
    with pytest.raises(FloatingPointError, match="the ELBO is"):
        objective.loss_and_grads(model.model, model.guide, batch)
    assert model.prior.mean.grad is None


def test_loss_is_the_negative_elbo_with_gradients_added(problem, layout):
    model, batch = model_of(problem), Batch(counts_of(problem.X, layout))
    value, gradients = elbo_and_gradients(model, [(1.0, batch)])
    objective = FactorizationELBO("lower-bound")
    assert objective.loss(model.model, model.guide, batch) == pytest.approx(-float(value))
    for _ in range(2):
        loss = objective.loss_and_grads(model.model, model.guide, batch)
    assert loss == pytest.approx(-float(value), rel=1e-12)
    parameters = [model.prior.mean, model.prior.scale.raw, model.W.raw]
    assert_all_close([p.grad for p in parameters], [-2 * g for g in gradients])
    assert isinstance(model.W, PositiveParameter)
