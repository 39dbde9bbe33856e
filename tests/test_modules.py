"""Parameters, the Gaussian prior, natural gradients, schedules, and the model as a torch module."""

from __future__ import annotations

import copy
import pickle
from contextlib import AbstractContextManager

import numpy as np
import pyro
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import kl_divergence

from pnmf_pyro.custom_modules import ConstrainedParameter, PositiveParameter
from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import drawing_from
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.natural import NaturalGradient
from pnmf_pyro.training.loadings import ClosedFormLoadings, ClosedFormScale, ShrunkLoadings
from pnmf_pyro.training.loop import train
from pnmf_pyro.training.schedules import Constant, Decreasing, OneCycle, Plateau
from tests import dense_reference as ref

PARAMETER_MODES = ("softplus", "exp", "projected", "multiplicative")
ELBO_MODES = ("simple", "expanded", "lower-bound")
PRIOR_SCALE = 1.25


@pytest.fixture(params=PARAMETER_MODES)
def parameter_mode(request) -> str:
    return request.param


@pytest.fixture(params=ELBO_MODES)
def mode(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "sized"])
def problem(request) -> ref.Problem:
    return ref.simulate(1, N=8, D=6, L=3, sized=request.param)


@pytest.fixture(params=[False, True], ids=["standard", "natural"])
def natural(request) -> bool:
    return request.param


def double(array) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def drawing(seed: int) -> AbstractContextManager[None]:
    return drawing_from(torch.Generator().manual_seed(seed), torch.device("cpu"))


def prior_of(problem: ref.Problem, natural: bool, scale: float = PRIOR_SCALE) -> GaussianPrior:
    N, D, L = problem.shape
    y = torch.empty(D, N, dtype=torch.float64, device="meta")
    prior = GaussianPrior(y, L, scale, use_natural_gradients=natural)
    prior.assign(double(problem.mean), double(problem.scale))
    return prior


def model_of(
    problem: ref.Problem,
    mode: str = "expanded",
    loadings_mode: str = "softplus",
    natural: bool = False,
) -> PoissonFactorization:
    N, D, L = problem.shape
    y = torch.empty(D, N, dtype=torch.float64, device="meta")
    s = None if problem.s is None else double(problem.s)
    prior = prior_of(problem, natural)
    model = PoissonFactorization(prior, y, L, loadings_mode, mode, size_factors=s, random_state=0)
    model.W.assign(double(problem.W))
    return model


def parameter(
    values: np.ndarray, mode: str, dtype: torch.dtype = torch.float64
) -> PositiveParameter:
    made = PositiveParameter(values.shape, mode).to(dtype)
    made.assign(torch.tensor(values))
    return made


# --- PositiveParameter: the documented members


VALUES = np.array([[0.5, 2.0, 1e-3], [40.0, 1.0, 7.0]])


def test_a_parameter_describes_itself(parameter_mode):
    p = parameter(VALUES, parameter_mode)
    assert isinstance(p, ConstrainedParameter)
    assert p.mode == parameter_mode
    assert p.shape == (2, 3)
    assert p.size() == (2, 3)
    assert (p.size(0), p.size(1), p.size(-1)) == (2, 3, 3)
    assert (p.dim(), p.numel()) == (2, 6)
    assert p.dtype == torch.float64
    assert p.device == torch.device("cpu")
    assert p.is_leaf
    assert not p.is_cuda
    assert p.raw is p._raw
    assert isinstance(p.raw, torch.nn.Parameter)
    assert list(p.parameters()) == [p.raw]


@pytest.mark.parametrize("shape", [5, (5,), (2, 3), (2, 3, 4)])
def test_any_shape(parameter_mode, shape):
    p = PositiveParameter(shape, parameter_mode)
    assert p.shape == ((shape,) if isinstance(shape, int) else shape)
    assert bool((p.data > 0).all())
    values = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    p.assign(values)
    torch.testing.assert_close(p.data.detach(), values)


@pytest.mark.parametrize("values", [VALUES, VALUES.T, 1e3 * VALUES, 1e6 + VALUES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_assigned_values_come_back(parameter_mode, values, dtype):
    p = parameter(values, parameter_mode, dtype)
    expected = torch.tensor(values, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(p.data.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unit", [None, 100.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_assigned_zeros_come_back_as_nothing_much(parameter_mode, unit, dtype):
    """The open modes cannot hold zero: they hold a rounding error of the unit, and stay finite."""
    p = PositiveParameter((2, 3), parameter_mode).to(dtype)
    if unit is not None:
        p.set_unit(torch.full((2, 1), unit))
    p.assign(torch.zeros(2, 3))
    value = p.data.detach()
    closed = parameter_mode in ("projected", "multiplicative")
    assert bool(torch.isfinite(p.raw).all())
    assert bool((value >= 0).all())
    assert float(value.max()) <= (0 if closed else 1.01 * torch.finfo(dtype).eps * (unit or 1))


@pytest.mark.parametrize(
    ("mode", "raw", "expected"),
    [
        ("softplus", [-2.0, 0.0, 3.0], np.log1p(np.exp([-2.0, 0.0, 3.0]))),
        ("exp", [-2.0, 0.0, 3.0], np.exp([-2.0, 0.0, 3.0])),
        ("projected", [0.2, 0.0, 3.0], [0.2, 0.0, 3.0]),
        ("multiplicative", [0.2, 0.0, 3.0], [0.2, 0.0, 3.0]),
    ],
)
def test_data_is_the_documented_function_of_raw(mode, raw, expected):
    p = PositiveParameter(3, mode).double()
    with torch.no_grad():
        p.raw.copy_(double(raw))
    np.testing.assert_allclose(p.data.detach(), expected, rtol=1e-12)
    p.unit = double([10.0, 1.0, 0.5])
    np.testing.assert_allclose(p.data.detach(), np.array([10, 1, 0.5]) * expected, rtol=1e-12)


def test_data_is_differentiable_in_raw():
    for mode in PARAMETER_MODES[:3]:
        p = parameter(VALUES, mode)
        assert p.requires_grad
        assert p.grad is None
        (3 * p.data).sum().backward()
        x = p.raw.detach()
        slope = {"softplus": x.sigmoid(), "exp": x.exp(), "projected": torch.ones_like(x)}[mode]
        torch.testing.assert_close(p.grad, 3 * slope)
        assert p.grad is p.raw.grad


def test_freeze_and_unfreeze(parameter_mode):
    p = parameter(VALUES, parameter_mode)
    for _ in range(2):
        p.freeze()
        assert not p.requires_grad
        assert not p.data.requires_grad
        p.unfreeze()
        assert p.requires_grad
        assert p.data.requires_grad


def test_project_clamps_in_projected_mode_only(parameter_mode):
    p = PositiveParameter(3, parameter_mode).double()
    with torch.no_grad():
        p.raw.copy_(double([-1.0, 0.0, 2.0]))
    raw = p.raw
    p.project()
    assert p.raw is raw
    expected = [0.0, 0.0, 2.0] if parameter_mode == "projected" else [-1.0, 0.0, 2.0]
    assert p.raw.tolist() == expected


@pytest.mark.parametrize(
    "index", [1, (0, 2), (slice(None), 1), [1, 0], torch.tensor([1]), (..., None)]
)
def test_indexing(parameter_mode, index):
    p = parameter(VALUES, parameter_mode)
    torch.testing.assert_close(p[index].detach(), double(VALUES)[index], rtol=1e-12, atol=1e-14)


def test_copies(parameter_mode):
    p = parameter(VALUES, parameter_mode)
    p.unfreeze()
    detached, cloned, contiguous, array = p.detach(), p.clone(), p.contiguous(), p.numpy()
    assert not detached.requires_grad
    assert cloned.requires_grad
    assert contiguous.is_contiguous()
    assert isinstance(array, np.ndarray)
    for copied in (detached, cloned.detach(), contiguous.detach(), torch.tensor(array)):
        torch.testing.assert_close(copied, double(VALUES), rtol=1e-12, atol=1e-14)
    # Writing to a copy does not write to the parameter, also where data is raw.
    detached.zero_()
    array[:] = 0
    np.testing.assert_allclose(p.numpy(), VALUES, rtol=1e-12)


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda p: p.float(), torch.float32),
        (lambda p: p.double(), torch.float64),
        (lambda p: p.half(), torch.float16),
        (lambda p: p.to(torch.float32), torch.float32),
        (lambda p: p.to("cpu"), torch.float64),
        (lambda p: p.cpu(), torch.float64),
    ],
)
def test_moving(parameter_mode, move, dtype):
    p = parameter(VALUES, parameter_mode)
    assert move(p) is p
    assert p.dtype == p.data.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    np.testing.assert_allclose(p.numpy(), VALUES, rtol=tolerance, atol=2e-3 * (tolerance > 1e-3))


@pytest.mark.parametrize("through", ["state_dict", "pickle", "deepcopy"])
def test_round_trips(parameter_mode, through):
    p = parameter(VALUES, parameter_mode)
    p.set_unit(double([[3.0], [0.1]]))
    if through == "state_dict":
        other = PositiveParameter((2, 3), parameter_mode).double()
        other.load_state_dict(p.state_dict())
    else:
        other = pickle.loads(pickle.dumps(p)) if through == "pickle" else copy.deepcopy(p)
    assert torch.equal(other.data, p.data)
    assert torch.equal(other.raw, p.raw)
    other.assign(double(2 * VALUES))
    np.testing.assert_allclose(p.numpy(), VALUES, rtol=1e-12)


def test_set_unit_keeps_the_value_and_scales_the_raw_parameter(parameter_mode):
    p = parameter(VALUES, parameter_mode)
    unit = double([[100.0], [0.01]])
    p.set_unit(unit)
    np.testing.assert_allclose(p.numpy(), VALUES, rtol=1e-12)
    same = parameter(VALUES / unit.numpy(), parameter_mode)
    torch.testing.assert_close(p.raw, same.raw)
    p.assign(double(3 * VALUES))
    np.testing.assert_allclose(p.numpy(), 3 * VALUES, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("square",), "mode must be one of .*'softplus'.*got 'square'"),
        (("exp", "exact"), "elbo_mode must be one of .*'lower-bound'.*got 'exact'"),
    ],
)
def test_unknown_modes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PositiveParameter((2, 3), *arguments)


# --- multiplicative updates


def update_terms(problem: ref.Problem, mode: str) -> tuple[dict, list[np.ndarray], np.ndarray]:
    """Terms for the update, and the fields and expectation they stand for."""
    random = np.random.default_rng(2)
    noise = random.normal(size=(4, *problem.mean.shape))
    draws = np.exp(problem.mean + problem.scale * noise)
    terms = {
        "exp_mu": double(np.exp(problem.mean)),
        "exp_mu_sigma": double(np.exp(problem.mean + problem.scale**2 / 2)),
        "exp_F_samples": double(draws),
        "size_factors": None if problem.s is None else double(problem.s),
    }
    fields = [np.exp(problem.mean)] if mode == "lower-bound" else list(draws)
    expected = draws.mean(0) if mode == "simple" else terms["exp_mu_sigma"].numpy()
    if mode == "lower-bound":
        del terms["exp_F_samples"]
    return terms, fields, expected


def multiplicative(problem: ref.Problem, mode: str) -> PositiveParameter:
    p = PositiveParameter(problem.W.shape, "multiplicative", mode).double()
    p.assign(double(problem.W))
    return p


def given_as(X: np.ndarray, kind: str):
    """Counts X of shape (N, D) in a form in which a module takes them, (D, N) for tensors."""
    return {
        "tensor": lambda: double(X.T),
        "counts": lambda: as_counts(X),
        "sparse counts": lambda: as_counts(sp.csr_matrix(X)),
        "torch csr": lambda: double(X.T).to_sparse_csr(),
        "torch csc": lambda: double(X.T).to_sparse_csc(),
        "torch coo": lambda: double(X.T).to_sparse_coo(),
    }[kind]()


FORMS = ("tensor", "counts", "sparse counts", "torch csr", "torch csc", "torch coo")


@pytest.mark.parametrize("kind", FORMS[:3])
def test_multiplicative_update_equals_its_twin(problem, mode, kind):
    p = multiplicative(problem, mode)
    terms, fields, expected = update_terms(problem, mode)
    p.multiplicative_update(given_as(problem.X, kind), terms)
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    # eps = 1e-8 in the denominator, which is of the order of 10 here
    np.testing.assert_allclose(p.numpy(), twin, rtol=1e-7)


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_of_the_counts_is_taken(kind):
    problem = ref.simulate(12)
    p = multiplicative(problem, "lower-bound")
    terms, fields, expected = update_terms(problem, "lower-bound")
    p.multiplicative_update(given_as(problem.X, kind), terms)
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected)
    np.testing.assert_allclose(p.numpy(), twin, rtol=1e-7)
    model = model_of(problem, "lower-bound")
    terms, *_ = model(X=given_as(problem.X, kind))
    whole, *_ = model(X=double(problem.X.T))
    torch.testing.assert_close(terms["log_likelihood"], whole["log_likelihood"])


def test_multiplicative_update_without_size_factors_in_the_terms(mode):
    problem = ref.simulate(3)
    p = multiplicative(problem, mode)
    terms, fields, expected = update_terms(problem, mode)
    del terms["size_factors"]
    p.multiplicative_update(double(problem.X.T), terms)
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected)
    np.testing.assert_allclose(p.numpy(), twin, rtol=1e-7)


def test_multiplicative_updates_raise_the_objective_to_its_maximum(problem, mode):
    """In the end each entry is stationary, or zero with a slope that keeps it there."""
    p = multiplicative(problem, mode)
    terms, fields, expected = update_terms(problem, mode)
    X = double(problem.X.T)

    def objective() -> float:
        return ref.loadings_objective(problem.X, p.numpy(), fields, expected, problem.s)

    values = [objective()]
    for _ in range(300):
        p.multiplicative_update(X, terms)
        values.append(objective())
    # A step may lose what eps in the denominator takes: 1e-8 of the expected counts.
    assert (np.diff(values) > -1e-6).all()
    assert values[-1] > values[0] + 1
    W = p.data.clone().requires_grad_()
    s = 1.0 if problem.s is None else problem.s
    value = -(double(s * expected).sum(1) @ W.sum(0))
    for field in fields:
        value = value + torch.xlogy(X, W @ double(field)).sum() / len(fields)
    counted = problem.X.sum(0) > 0
    (slope,) = torch.autograd.grad(value, W)
    slope, W = slope.numpy()[counted], W.detach().numpy()
    assert (np.abs(slope)[W[counted] > 1e-2] < 0.3).all()
    assert (slope < 0.3).all()
    np.testing.assert_array_equal(W[~counted], 0)


def test_multiplicative_update_lowers_the_poisson_deviance(mode):
    """With a q as good as certain, all modes are the rule of Lee and Seung for the deviance."""
    problem = ref.simulate(4, N=8, D=6, L=3, sized=True)
    problem.scale[:] = 1e-9
    p = multiplicative(problem, mode)
    terms, *_ = update_terms(problem, mode)
    deviances = []
    for _ in range(20):
        deviances.append(
            ref.mean_deviance(problem.X, ref.rates(problem.mean, p.numpy(), problem.s) + 1e-300)
        )
        p.multiplicative_update(double(problem.X.T), terms)
    assert (np.diff(deviances) < 0).all()


def test_multiplicative_update_of_some_features(problem, mode):
    idy = torch.tensor([4, 0, 3])
    p = multiplicative(problem, mode)
    terms, fields, expected = update_terms(problem, mode)
    p.multiplicative_update(double(problem.X.T)[idy], terms, idy)
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    updated = np.isin(np.arange(6), idy)
    np.testing.assert_allclose(p.numpy()[updated], twin[updated], rtol=1e-7)
    np.testing.assert_array_equal(p.numpy()[~updated], problem.W[~updated])


def test_multiplicative_update_part_of_the_way(problem, mode):
    p = multiplicative(problem, mode)
    terms, fields, expected = update_terms(problem, mode)
    p.multiplicative_update(double(problem.X.T), terms, step=0.25)
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    np.testing.assert_allclose(p.numpy(), 0.75 * problem.W + 0.25 * twin, rtol=1e-7)


def test_multiplicative_update_adds_eps_to_the_denominator(problem):
    p = multiplicative(problem, "lower-bound")
    terms, fields, expected = update_terms(problem, "lower-bound")
    p.multiplicative_update(double(problem.X.T), terms, eps=5.0)
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    total = (expected * (1 if problem.s is None else problem.s)).sum(1)
    np.testing.assert_allclose(p.numpy(), twin * total / (total + 5), rtol=1e-12)


def test_project_parameters_clamps_the_loadings(problem):
    model = model_of(problem, loadings_mode="projected")
    with torch.no_grad():
        model.W.raw[1, 2] = -3.0
    model.project_parameters()
    expected = problem.W.copy()
    expected[1, 2] = 0
    np.testing.assert_array_equal(model.W.numpy(), expected)


# --- the multiplicative update from the gradient of the ELBO


def closed_form(
    problem: ref.Problem, batch: Batch, lr: float = 1.0
) -> tuple[PoissonFactorization, ClosedFormLoadings]:
    """A model with the gradients of a batch, and an optimiser that has taken note of them."""
    model = model_of(problem, "lower-bound", "multiplicative")
    # A unit that differs between features: the step must not depend on it.
    model.W.set_unit(double(np.linspace(0.1, 3, len(problem.W)))[:, None])
    optimizer = ClosedFormLoadings(model.W, model.expected_totals, lr)
    FactorizationELBO("lower-bound").loss_and_grads(model.model, model.guide, batch)
    optimizer.prepare(batch)
    return model, optimizer


@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_closed_form_loadings_are_the_multiplicative_update(problem, lr):
    model, optimizer = closed_form(problem, Batch(as_counts(sp.csr_matrix(problem.X))), lr)
    optimizer.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    new = (1 - lr) * problem.W + lr * twin
    np.testing.assert_allclose(model.W.numpy(), new, rtol=1e-9, atol=1e-12)


def test_closed_form_loadings_see_the_q_that_has_moved(problem):
    """Expected counts are those of the gradient, totals those of q as it is when W moves."""
    model, optimizer = closed_form(problem, Batch(as_counts(problem.X)))
    model.prior.assign(double(problem.mean + 0.3), double(problem.scale))
    optimizer.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    twin = ref.multiplicative_update(
        problem.X, problem.W, fields, expected * np.exp(0.3), problem.s
    )
    np.testing.assert_allclose(model.W.numpy(), twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale_ll_D", [True, False])
def test_closed_form_loadings_of_a_batch(problem, scale_ll_D):
    """Both sums are over the samples of the batch; other features stay."""
    i, j = torch.tensor([5, 1, 6, 4]), torch.tensor([2, 5])
    batch = Batches(as_counts(problem.X), scale_ll_D=scale_ll_D).batch(i, j)
    model, optimizer = closed_form(problem, batch)
    optimizer.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    s = None if problem.s is None else problem.s[i]
    twin = ref.multiplicative_update(
        problem.X[i], problem.W, [field[:, i] for field in fields], expected[:, i], s
    )
    new = problem.W.copy()
    new[j] = twin[j]
    np.testing.assert_allclose(model.W.numpy(), new, rtol=1e-9, atol=1e-12)


def test_shrunk_loadings_are_posterior_means(problem):
    counts = Batch(as_counts(sp.csr_matrix(problem.X)))
    model, _ = closed_form(problem, counts)
    optimizer = ShrunkLoadings(model.W, model.expected_totals)
    optimizer.prepare(counts)
    optimizer.step()
    _, fields, expected = update_terms(problem, "lower-bound")
    R = ref.expected_counts(problem.X, problem.W, fields)
    assert optimizer.shape == pytest.approx(ref.shape_by_moments(R), rel=1e-9)
    exposure = (expected if problem.s is None else problem.s * expected).sum(1)
    twin = ref.posterior_mean_loadings(R, exposure, optimizer.shape)
    np.testing.assert_allclose(model.W.numpy(), twin, rtol=1e-4, atol=1e-12)


def test_the_shape_is_that_before_shrinking_and_finite_without_contrast(problem):
    counts = Batch(as_counts(problem.X))
    model, _ = closed_form(problem, counts)
    optimizer = ShrunkLoadings(model.W, model.expected_totals)
    optimizer.prepare(counts)
    shape = optimizer.shape
    optimizer.step()
    FactorizationELBO("lower-bound").loss_and_grads(model.model, model.guide, counts)
    optimizer.prepare(counts)
    assert optimizer.shape == shape
    model.W.assign(torch.ones_like(model.W.data))
    model.zero_grad()
    FactorizationELBO("lower-bound").loss_and_grads(model.model, model.guide, counts)
    flat = ShrunkLoadings(model.W, model.expected_totals)
    flat.prepare(counts)
    assert flat.shape == pytest.approx(flat.LARGEST_SHAPE)


@pytest.mark.parametrize("index", [None, [3, 0, 7]])
def test_expected_totals(problem, index):
    """sum_i s_i E exp F_il over all samples, which a batch estimates by N/n times its own."""
    samples = None if index is None else torch.tensor(index)
    i = slice(None) if index is None else index
    model = model_of(problem)
    moments = np.exp(problem.mean + problem.scale**2 / 2)[:, i]
    s = 1.0 if problem.s is None else problem.s[i]
    total = (s * moments).sum(1) * 8 / moments.shape[1]
    np.testing.assert_allclose(model.expected_totals(Batch(samples=samples)), total, rtol=1e-10)


# --- the Gaussian prior


def test_both_forms_hold_what_was_assigned(problem, natural):
    prior = prior_of(problem, natural)
    qF, pF = prior()
    mean, scale = double(problem.mean), double(problem.scale)
    for q in (qF, prior.marginal(), prior.forward_batched(None)[0]):
        torch.testing.assert_close(q.loc.detach(), mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(q.scale.detach(), scale, rtol=1e-12, atol=1e-12)
    held = prior.scale.data.detach()
    torch.testing.assert_close(prior.mean.detach(), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(held, scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.theta1.detach(), mean / scale**2, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prior.theta2.detach(), -0.5 / scale**2, rtol=1e-11, atol=1e-11)
    assert pF.loc.shape == (3, 8)
    assert bool((pF.loc == 0).all())
    assert bool((pF.scale == PRIOR_SCALE).all())


def test_forward_batched_is_forward_at_these_samples(problem, natural):
    prior, idx = prior_of(problem, natural), torch.tensor([6, 0, 3])
    (qF, pF), (q, p) = prior(), prior.forward_batched(idx)
    assert torch.equal(q.loc, qF.loc[:, idx])
    assert torch.equal(q.scale, qF.scale[:, idx])
    assert p.batch_shape == (3, 3)
    assert torch.equal(p.loc, pF.loc[:, idx])
    assert torch.equal(prior.marginal(idx).loc, q.loc)


def test_trained_parameters_leave_out_that_of_the_prior(problem, natural):
    prior = prior_of(problem, natural)
    names = {name.split(".")[1] for name, _ in prior.named_parameters()}
    assert names == ({"theta1", "theta2"} if natural else {"mean", "scale"})
    assert "scale_pf" not in dict(prior.named_parameters())
    assert not prior.scale_pf.requires_grad
    assert all(p.shape == (3, 8) and p.requires_grad for p in prior.parameters())


def test_natural_parameters_are_for_natural_gradients(problem):
    prior = prior_of(problem, natural=True)
    theta1, theta2 = prior.natural_parameters()
    assert theta1 is prior.theta1
    assert theta2 is prior.theta2
    with pytest.raises(ValueError, match="use_natural_gradients=True"):
        prior_of(problem, natural=False).natural_parameters()


@pytest.mark.parametrize("scale_pf", [0.5, 1.0, 1.3, 3.0])
def test_divergence_equals_the_closed_form(natural, scale_pf):
    """Also for a prior scale that float32 cannot hold, such as 1.3."""
    problem = ref.simulate(13)
    qF, pF = prior_of(problem, natural, scale_pf)()
    expected = ref.kl_normal(problem.mean, problem.scale, scale_pf)
    np.testing.assert_allclose(kl_divergence(qF, pF).detach(), expected, rtol=1e-10)


def test_the_twin_of_the_divergence_is_right():
    """E_q[log q - log p], whose integrand is quadratic and so exact by quadrature."""
    mean, scale, prior_scale = 0.7, 0.4, 1.3

    def log_ratio(F: np.ndarray) -> np.ndarray:
        z = (F[:, 0] - mean) / scale
        return np.log(prior_scale / scale) - z**2 / 2 + F[:, 0] ** 2 / (2 * prior_scale**2)

    value, _ = ref.moments(log_ratio, np.array([mean]), np.array([scale]))
    assert ref.kl_normal(mean, scale, prior_scale) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("scale_pf", [0, -1.0, float("nan"), float("inf"), "wide"])
def test_bad_prior_scales_are_refused(scale_pf):
    with pytest.raises(ValueError, match="scale_pf must be a positive finite number; got"):
        GaussianPrior(torch.ones(3, 4), 2, scale_pf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_prior_takes_the_type_of_the_data(natural, dtype):
    prior = GaussianPrior(torch.ones(3, 4, dtype=dtype), L=2, use_natural_gradients=natural)
    expected = torch.float32 if dtype == torch.int64 else dtype
    assert {p.dtype for p in prior.parameters()} | {prior.scale_pf.dtype} == {expected}
    assert (prior.L, prior.N) == (2, 4)
    qF, _ = prior()
    assert qF.rsample((5,)).shape == (5, 2, 4)


def test_state_dict_round_trip_of_a_prior(problem, natural):
    prior, other = prior_of(problem, natural), prior_of(ref.simulate(5, N=8, D=6), natural, 2.0)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.marginal().loc, prior.marginal().loc)
    assert float(other.scale_pf) == PRIOR_SCALE


# --- natural gradients


def negative_bound(problem: ref.Problem, mean: torch.Tensor, variance: torch.Tensor):
    s = None if problem.s is None else double(problem.s)
    log_likelihood, kl = ref.elbo_terms(
        double(problem.X),
        mean,
        variance.sqrt(),
        double(problem.W),
        s,
        PRIOR_SCALE,
        "lower-bound",
        mean[None],
    )
    return kl.sum() - log_likelihood.sum()


@pytest.mark.parametrize("lr", [1.0, 0.5])
@pytest.mark.parametrize("shift", [-1.5, 0.0, 1.5])
def test_a_step_is_the_textbook_step(problem, lr, shift):
    """With two brakes on the way up: the variance rises by at most LARGEST_RISE, and the mean by
    log(1 + delta) where it would rise by delta.
    """
    problem.mean[:] += shift
    prior = prior_of(problem, natural=True)
    optimizer = NaturalGradient(prior.natural_parameters(), lr)
    q = prior.marginal()
    negative_bound(problem, q.loc, q.scale**2).backward()
    optimizer.step()
    mean, variance = double(problem.mean), double(problem.scale) ** 2
    new_mean, new_variance = ref.natural_step(
        lambda m, v: negative_bound(problem, m, v), mean, variance, lr
    )
    assert bool((new_mean < mean).any()) or shift < 0
    assert bool((new_mean > mean).any()) or shift > 0
    braked = torch.minimum(new_variance, variance + NaturalGradient.LARGEST_RISE)
    # The change of the mean is a slope over the precision, so it is shortened likewise.
    change = (new_mean - mean) * braked / new_variance
    damped = mean + torch.where(change > 0, torch.log1p(change), change)
    q = prior.marginal()
    torch.testing.assert_close(q.variance.detach(), braked, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.loc.detach(), damped, rtol=1e-10, atol=1e-10)


def test_a_step_through_the_whole_model_is_the_textbook_step(problem):
    """The same step when the gradient comes from Pyro's traces and the sparse kernel."""
    model = model_of(problem, "lower-bound", "projected", natural=True)
    batch = Batch(as_counts(sp.csr_matrix(problem.X)))
    objective = FactorizationELBO("lower-bound")
    objective.loss_and_grads(model.model, model.guide, batch)
    NaturalGradient(model.prior.natural_parameters()).step()
    mean, variance = double(problem.mean), double(problem.scale) ** 2
    new_mean, new_variance = ref.natural_step(
        lambda m, v: negative_bound(problem, m, v), mean, variance, 1.0
    )
    falls = (new_mean < mean) & (new_variance < variance + NaturalGradient.LARGEST_RISE)
    assert falls.sum() > 8
    q = model.prior.marginal()
    torch.testing.assert_close(
        q.variance[falls].detach(), new_variance[falls], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(q.loc[falls].detach(), new_mean[falls], rtol=1e-10, atol=1e-10)


def test_a_step_of_a_batch_is_the_step_of_its_samples(problem):
    """Each sample has its own q: a batch moves that of its samples as a whole pass would."""
    counts, objective = as_counts(problem.X), FactorizationELBO("lower-bound")
    results = []
    for index in (None, torch.tensor([6, 2, 3])):
        model = model_of(problem, "lower-bound", "projected", natural=True)
        batch = Batches(counts).batch(index, None)
        objective.loss_and_grads(model.model, model.guide, batch)
        optimizer = NaturalGradient(model.prior.natural_parameters())
        optimizer.prepare(batch)
        optimizer.step()
        results.append(model.prior.marginal())
    whole, part = results
    inside = np.isin(np.arange(8), [6, 2, 3])
    for name, start in (("loc", problem.mean), ("scale", problem.scale)):
        moved, of_all = (getattr(q, name).detach().numpy() for q in (part, whole))
        np.testing.assert_allclose(moved[:, inside], of_all[:, inside], rtol=1e-10)
        np.testing.assert_allclose(moved[:, ~inside], start[:, ~inside], rtol=1e-12)


def test_one_step_solves_a_conjugate_problem():
    """Observations y ~ N(F, t^2) and F ~ N(0, 1): exact from any q above the posterior."""
    random = np.random.default_rng(6)
    y, t = double(random.normal(size=(2, 5))), 0.6
    precision = 1 + 1 / t**2
    posterior_mean = y / t**2 / precision
    prior = GaussianPrior(torch.empty(3, 5, dtype=torch.float64), 2, use_natural_gradients=True)
    start = posterior_mean + double(random.uniform(0.1, 2, (2, 5)))
    prior.assign(start, double(random.uniform(0.2, 3, (2, 5))))
    qF, pF = prior()
    loss = (((qF.loc - y) ** 2 + qF.variance) / (2 * t**2)).sum() + kl_divergence(qF, pF).sum()
    loss.backward()
    NaturalGradient(prior.natural_parameters(), lr=1.0).step()
    q = prior.marginal()
    torch.testing.assert_close(q.loc.detach(), posterior_mean)
    torch.testing.assert_close(q.variance.detach(), torch.full_like(y, 1 / precision))


def test_a_fixed_point_is_left_alone():
    prior = GaussianPrior(torch.empty(3, 5, dtype=torch.float64), 2, use_natural_gradients=True)
    qF, pF = prior()
    kl_divergence(qF, pF).sum().backward()
    NaturalGradient(prior.natural_parameters()).step()
    assert torch.equal(prior.marginal().loc, torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(prior.marginal().scale, torch.ones(2, 5, dtype=torch.float64))


def test_steps_never_lower_the_bound_and_converge(problem):
    model = model_of(problem, "lower-bound", "projected", natural=True)
    model.W.freeze()
    batch, objective = Batch(as_counts(problem.X)), FactorizationELBO("lower-bound")
    optimizer = NaturalGradient(model.prior.natural_parameters())
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(objective.loss_and_grads(model.model, model.guide, batch))
        optimizer.step()
    assert (np.diff(losses) < 1e-9).all()
    # The closed form of DESIGN.md, section 4: 1 / sigma^2 = 1 / scale_pf^2 + h.
    q = model.prior.marginal()
    s = 1.0 if problem.s is None else problem.s
    h = s * problem.W.sum(0)[:, None] * (q.loc + q.variance / 2).exp().detach().numpy()
    precision = 1 / q.variance.detach().numpy()
    np.testing.assert_allclose(precision, 1 / PRIOR_SCALE**2 + h, rtol=1e-4)


def test_natural_gradient_without_gradients_does_nothing(problem):
    prior = prior_of(problem, natural=True)
    optimizer = NaturalGradient(prior.natural_parameters())
    before = prior.marginal().loc.clone()
    optimizer.step()
    assert torch.equal(prior.marginal().loc, before)


@pytest.mark.parametrize("index", [None, [6, 2, 3]])
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_closed_form_scale_minimises_the_divergence(problem, natural, index, lr):
    """scale^2 = mean of mu^2 + sigma^2 over the samples of the batch, or part of the way to it."""
    prior = prior_of(problem, natural)
    optimizer = ClosedFormScale(prior, lr)
    optimizer.prepare(Batch(samples=None if index is None else torch.tensor(index)))
    optimizer.step()
    scale = float(prior.scale_pf)
    i = slice(None) if index is None else index
    mean, sigma = problem.mean[:, i], problem.scale[:, i]
    optimum = (mean**2 + sigma**2).mean()
    assert scale**2 == pytest.approx((1 - lr) * PRIOR_SCALE**2 + lr * optimum, rel=1e-10)
    if lr == 1.0:
        divergences = [ref.kl_normal(mean, sigma, scale * c).sum() for c in (0.99, 1, 1.01)]
        assert divergences[1] == min(divergences)


# --- schedules


def learning_rates(schedule, elbos: list[float], lr: float = 0.2) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    adjust = schedule.attach(optimizer, len(elbos))
    rates = []
    for elbo in elbos:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        adjust(elbo)
    return rates


@pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("steps", [101, 11])
def test_one_cycle_rises_to_its_peak_and_falls(pct_start, steps):
    schedule = OneCycle(pct_start, div_factor=20.0, final_div_factor=50.0)
    rates = np.array(learning_rates(schedule, [0.0] * steps))
    peak = round(pct_start * (steps - 1))
    assert rates.argmax() == peak
    assert rates[0] == pytest.approx(0.2 / 20)
    assert rates[peak] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.2 / 20 / 50)
    assert (np.diff(rates)[:peak] > 0).all()
    assert (np.diff(rates)[peak:] < 0).all()
    np.testing.assert_allclose(rates[: peak + 1], np.linspace(0.01, 0.2, peak + 1))
    # Half way down a cosine is the mean of both ends.
    half = peak + (steps - 1 - peak) / 2
    if half.is_integer():
        assert rates[int(half)] == pytest.approx((0.2 + rates[-1]) / 2)


def test_one_cycle_defaults_are_those_of_the_reference():
    assert OneCycle() == OneCycle(pct_start=0.3, div_factor=25.0, final_div_factor=1e4)
    assert OneCycle().warm_up(200) == 60


@pytest.mark.parametrize("pct_start", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_one_cycle_at_its_limits(pct_start, steps):
    rates = np.array(learning_rates(OneCycle(pct_start), [0.0] * steps))
    assert np.isfinite(rates).all()
    assert (rates > 0).all()
    assert (rates <= 0.2 + 1e-12).all()


def test_one_cycle_stays_at_its_end_beyond_the_last_step():
    schedule = OneCycle()
    assert schedule.factor(1.5) == pytest.approx(schedule.factor(1.0))


def test_decreasing_falls_as_stated():
    """(1 + step / delay) ** -forgetting, whose sum diverges and whose squares are summable."""
    rates = learning_rates(Decreasing(delay=4.0, forgetting=0.8), [0.0] * 30)
    np.testing.assert_allclose(rates, 0.2 * (1 + np.arange(30) / 4) ** -0.8, rtol=1e-12)
    assert Decreasing().warm_up(100) == 0
    assert 0.5 < Decreasing().forgetting <= 1


def test_plateau_reduces_to_its_floor_and_no_further():
    schedule = Plateau(patience=3, factor=0.5, min_lr=0.03)
    rates = learning_rates(schedule, [-10.0] * 40)
    assert schedule.warm_up(100) == 0
    # Three steps of patience, after the first, which is the best so far.
    assert rates[:5] == [0.2] * 5
    assert rates[5] == pytest.approx(0.1)
    assert sorted(set(rates), reverse=True) == pytest.approx([0.2, 0.1, 0.05, 0.03])
    assert min(rates) == 0.03


def test_plateau_waits_while_the_elbo_rises():
    schedule = Plateau(patience=2, factor=0.5)
    assert set(learning_rates(schedule, list(np.linspace(-100, -1, 30)))) == {0.2}
    assert min(learning_rates(schedule, list(np.linspace(-1, -100, 30)))) < 0.2


def test_plateau_defaults_are_those_of_the_reference():
    assert Plateau() == Plateau(patience=200, factor=0.8, min_lr=1e-5)


def test_constant_changes_nothing():
    assert set(learning_rates(Constant(), [-1.0] * 20)) == {0.2}
    assert Constant().warm_up(100) == 0


# --- the model as a module


def test_rate_of_draws(problem):
    model, random = model_of(problem), np.random.default_rng(7)
    F, idy = random.normal(size=(4, 3, 8)), torch.tensor([5, 2])
    rate, part = model.get_rate(double(F)).detach(), model.get_rate(double(F), idy).detach()
    assert rate.shape == (4, 6, 8)
    for e in range(4):
        expected = ref.rates(F[e], problem.W).T
        np.testing.assert_allclose(rate[e], expected, rtol=1e-10)
        np.testing.assert_allclose(part[e], expected[idy], rtol=1e-10)


def batches_of_indices():
    return [(None, None), (torch.tensor([7, 2, 4]), None), (None, torch.tensor([3, 0])),
            (torch.tensor([1, 6]), torch.tensor([5, 1, 2]))]  # fmt: skip


@pytest.mark.parametrize(("idx", "idy"), batches_of_indices())
@pytest.mark.parametrize("kind", ["tensor", "counts", None])
def test_forward_gives_the_documented_terms(problem, mode, natural, idx, idy, kind):
    model = model_of(problem, mode, natural=natural)
    i = slice(None) if idx is None else idx
    j = slice(None) if idy is None else idy
    X, W = problem.X[i][:, j], problem.W[j]
    s = None if problem.s is None else problem.s[i]
    given = {"tensor": double(X.T), "counts": as_counts(sp.csr_matrix(X)), None: None}[kind]
    with drawing(0):
        terms, qF, pF = model(idx=idx, idy=idy, E=4, X=given)
    terms = {key: value.detach() for key, value in terms.items() if value is not None}
    mean, scale = problem.mean[:, i], problem.scale[:, i]
    (n, d), L = X.shape, 3
    np.testing.assert_allclose(qF.loc.detach(), mean, rtol=1e-12)
    np.testing.assert_allclose(qF.scale.detach(), scale, rtol=1e-12)
    assert qF.batch_shape == pF.batch_shape == (L, n)
    np.testing.assert_allclose(terms["exp_mu"], np.exp(mean), rtol=1e-12)
    np.testing.assert_allclose(terms["exp_mu_sigma"], np.exp(mean + scale**2 / 2), rtol=1e-12)
    assert ("exp_F_samples" in terms) == (mode != "lower-bound")
    if kind is None:
        key = "rate_mean" if mode == "lower-bound" else "rate_samples"
        assert set(terms) & {"rate_mean", "rate_samples", "log_rate", "log_likelihood"} == {key}
        fields = terms["exp_mu"][None] if mode == "lower-bound" else terms["exp_F_samples"]
        rates = np.stack([ref.rates(np.log(f), W).T for f in fields.numpy()])
        assert terms[key].shape == ((d, n) if mode == "lower-bound" else (4, d, n))
        np.testing.assert_allclose(terms[key].reshape(rates.shape), rates, rtol=1e-10)
        return
    noise = double(np.zeros((1, L, n)))
    if mode != "lower-bound":
        assert terms["exp_F_samples"].shape == (4, L, n)
        noise = (terms["exp_F_samples"].log() - qF.loc.detach()) / qF.scale.detach()
    assert not set(terms) & {"rate_mean", "rate_samples"}
    sizes = None if s is None else double(s)
    expected, _ = ref.elbo_terms(
        double(X), double(mean), double(scale), double(W), sizes, PRIOR_SCALE, mode, noise
    )
    for key in ("log_rate", "total_rate", "log_likelihood"):
        assert terms[key].shape == (n,)
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-10)
    # Terms (a) and (b); what is left of the likelihood is constant.
    fields = np.exp(mean + scale * noise.numpy())
    log_rate = [(X * np.log(ref.rates(np.log(f), W))).sum(1) for f in fields]
    np.testing.assert_allclose(terms["log_rate"], np.mean(log_rate, 0), rtol=1e-10, atol=1e-10)
    moment = fields.mean(0) if mode == "simple" else np.exp(mean + scale**2 / 2)
    total_rate = ref.rates(np.log(moment), W, s).sum(1)
    np.testing.assert_allclose(terms["total_rate"], total_rate, rtol=1e-10)


def test_terms_without_samples(problem, mode):
    model = model_of(problem, mode)
    qF, _ = model.prior()
    with drawing(1):
        terms = model.compute_log_likelihood_terms(qF, 2, double(problem.X.T))
        assert "exp_F_samples" not in terms
        terms = model.compute_log_likelihood_terms(qF, 2, double(problem.X.T), return_samples=True)
    assert ("exp_F_samples" in terms) == (mode != "lower-bound")


def test_forward_is_differentiable(problem, mode):
    model = model_of(problem, mode)
    with drawing(2):
        terms, qF, pF = model(E=2, X=double(problem.X.T))
    loss = kl_divergence(qF, pF).sum() - terms["log_likelihood"].sum()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())


def test_a_training_loop_of_the_users_own(problem):
    """As in the reference: multiplicative_update takes the terms that forward returns."""
    model = model_of(problem, "expanded", "multiplicative")
    X = double(problem.X.T)
    with drawing(3):
        terms, _, _ = model(E=3, X=X)
    model.W.multiplicative_update(X, terms)
    fields = list(terms["exp_F_samples"].detach().numpy())
    expected = terms["exp_mu_sigma"].detach().numpy()
    twin = ref.multiplicative_update(problem.X, problem.W, fields, expected, problem.s)
    np.testing.assert_allclose(model.W.numpy(), twin, rtol=1e-7)


@pytest.mark.parametrize(
    "arguments", [{"spatial": True}, {"coordinates": torch.ones(8, 2)}, {"groups": torch.ones(8)}]
)
def test_forward_refuses_what_needs_a_spatial_prior(problem, arguments):
    with pytest.raises(ValueError, match="need a spatial prior; this model has a GaussianPrior"):
        model_of(problem)(**arguments)


@pytest.mark.parametrize(
    ("shape", "L", "options", "message"),
    [
        ((6, 8), 2, {}, "prior must be over L=2 components and N=8 samples.*L=3 and N=8"),
        ((6, 9), 3, {}, "prior must be over L=3 components and N=9 samples.*L=3 and N=8"),
        ((6, 8), 3, {"loadings_mode": "free"}, "loadings_mode must be one of .*got 'free'"),
        ((6, 8), 3, {"mode": "exact"}, "mode must be one of .*got 'exact'"),
    ],
)
def test_a_model_refuses_what_does_not_fit(shape, L, options, message):
    prior = GaussianPrior(torch.ones(6, 8), 3)
    with pytest.raises(ValueError, match=message):
        PoissonFactorization(prior, torch.ones(shape), L, **options)


def test_a_model_describes_itself(parameter_mode, mode):
    y = torch.ones(6, 8, dtype=torch.float64)
    model = PoissonFactorization(GaussianPrior(y, 3), y, 3, parameter_mode, mode)
    assert (model.D, model.N, model.L) == (6, 8, 3)
    assert (model.loadings_mode, model.mode) == (parameter_mode, mode)
    assert isinstance(model.W, PositiveParameter)
    assert model.W.shape == (6, 3)
    assert model.W.elbo_mode == mode
    assert model.W.dtype == torch.float64
    assert bool((model.W.data > 0).all())


def test_first_loadings_come_from_the_random_state():
    y = torch.ones(6, 8)

    def loadings(seed) -> np.ndarray:
        return PoissonFactorization(GaussianPrior(y, 3), y, 3, random_state=seed).W.numpy()

    before = torch.random.get_rng_state()
    np.testing.assert_array_equal(loadings(0), loadings(0))
    assert (loadings(0) != loadings(1)).any()
    assert (loadings(None) != loadings(None)).any()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("empty_feature", [False, True])
def test_assign_starts_the_model(parameter_mode, natural, empty_feature):
    problem = ref.simulate(8, N=8, D=6)
    model = model_of(problem, loadings_mode=parameter_mode, natural=natural)
    random = np.random.default_rng(8)
    W, exp_F = random.gamma(1, 1, (6, 3)), random.gamma(1, 1, (8, 3))
    if empty_feature:
        W[2] = 0
    model.assign(double(W), double(exp_F), scale=0.2)
    np.testing.assert_allclose(model.W.numpy(), W, rtol=1e-10, atol=1e-14)
    qF, _ = model.prior()
    np.testing.assert_allclose(qF.loc.detach(), np.log(exp_F).T, rtol=1e-10)
    np.testing.assert_allclose(qF.scale.detach(), np.full((3, 8), 0.2), rtol=1e-10)
    assert bool((model.W.unit > 0).all())
    assert bool(model.W.raw.isfinite().all())


def test_state_dict_round_trip_of_a_model(problem, parameter_mode, natural):
    model = model_of(problem, loadings_mode=parameter_mode, natural=natural)
    model.assign(double(2 * problem.W), double(np.exp(problem.mean.T)))
    other = model_of(problem, loadings_mode=parameter_mode, natural=natural)
    other.load_state_dict(model.state_dict())
    batch, objective = Batch(as_counts(problem.X)), FactorizationELBO("lower-bound")
    losses = [objective.loss(m.model, m.guide, batch) for m in (model, other)]
    assert losses[0] == losses[1]


# --- nothing global moves


def global_state() -> dict:
    numpy_state = np.random.get_state()  # noqa: NPY002 - that it does not move is the point
    store = pyro.get_param_store()
    return {
        "torch generator": torch.random.get_rng_state().tolist(),
        "numpy generator": [numpy_state[1].tolist(), *numpy_state[2:]],
        "parameter store": {name: value.tolist() for name, value in store.items()},
        "store object": id(store),
        "default type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "pyro": pyro.settings.get(),  # validation flags, and whether parameters are local
        "validation": torch.distributions.Distribution._validate_args,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def users_parameter():
    """A parameter in Pyro's store whose name is one that a careless fit would take for its own."""
    with pyro.get_param_store().scope():
        pyro.param("factorization$$$W._raw", torch.ones(3))
        pyro.param("users", torch.zeros(2))
        yield


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_training_moves_no_global_state(mode, users_parameter, validation, batch_size):
    problem = ref.simulate(9)
    model = model_of(problem, mode)
    generator = torch.Generator().manual_seed(0)
    batches = Batches(as_counts(problem.X), batch_size, shuffle=True, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with pyro.validation_enabled(validation):
        before = global_state()
        first = model.W.numpy()
        result = train(model, batches, FactorizationELBO(mode), [optimizer], generator, max_iter=5)
        assert global_state() == before
    assert len(result.history) == 5
    assert (model.W.numpy() != first).any()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_training_repeats_with_its_generator(mode):
    problem = ref.simulate(10)

    def fit(seed: int) -> tuple[list[float], np.ndarray]:
        model = model_of(problem, mode)
        generator = torch.Generator().manual_seed(seed)
        batches = Batches(as_counts(problem.X), 4, shuffle=True, generator=generator)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        objective = FactorizationELBO(mode)
        result = train(model, batches, objective, [optimizer], generator, max_iter=6)
        return result.history, model.W.numpy()

    (history, W), (again, W_again), (other, _) = fit(0), fit(0), fit(1)
    assert history == again
    np.testing.assert_array_equal(W, W_again)
    assert history != other


def test_a_failed_fit_leaves_the_global_state_as_well(users_parameter):
    problem = ref.simulate(11)
    model = model_of(problem, "expanded")
    with torch.no_grad():
        model.prior.mean[0, 0] = float("nan")
    before = global_state()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with pytest.raises(FloatingPointError, match=r"at its first step: .*mean is the first"):
        train(
            model,
            Batches(as_counts(problem.X)),
            FactorizationELBO("expanded"),
            [optimizer],
            torch.Generator(),
            max_iter=3,
        )
    assert global_state() == before
