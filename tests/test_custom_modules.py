"""Parameters with constraints: the documented members, and multiplicative updates."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro.custom_modules import ConstrainedParameter, PositiveParameter
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.random_state import drawing_from
from tests.support import dense as ref
from tests.support.models import PARAMETER_MODES, double, model_like, model_of, update_terms


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
    problem = ref.simulate_problem(12)
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
    problem = ref.simulate_problem(3)
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
    problem = ref.simulate_problem(4, N=8, D=6, L=3, sized=True)
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


# --- a parameter of the user's own, and one as part of a model


class UnitInterval(ConstrainedParameter):
    """A user's own: values between 0 and 1."""

    def _to_constrained(self, raw):
        return raw.sigmoid()

    def _to_unconstrained(self, value):
        return value.logit()


def test_a_parameter_of_the_users_own():
    """The base class gives every documented member to what only writes the two maps."""
    p = UnitInterval((2, 3), "open").double()
    values = torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.2, 0.7]], dtype=torch.float64)
    p.assign(values)
    p.project()
    torch.testing.assert_close(p.data.detach(), values)
    torch.testing.assert_close(p.raw.detach(), (values / (1 - values)).log())
    assert (p.mode, p.shape, p.dim(), p.size(1), p.numel()) == ("open", (2, 3), 2, 3, 6)
    assert (p.dtype, p.device) == (torch.float64, torch.device("cpu"))
    assert p.is_leaf
    assert not p.is_cuda
    torch.testing.assert_close(p[1, :2].detach(), values[1, :2])
    np.testing.assert_allclose(p.numpy(), values)
    (p.clone() * p.contiguous()).sum().backward()
    torch.testing.assert_close(p.grad, 2 * values * values * (1 - values))
    assert list(p.state_dict()) == ["_raw"]
    p.freeze()
    assert not p.requires_grad
    assert not p.detach().requires_grad
    p.unfreeze()
    assert p.requires_grad
    assert torch.equal(p(), p.data)
    with pytest.raises(NotImplementedError):
        ConstrainedParameter((2, 3), "open").assign(values)


def test_a_parameter_moves_as_part_of_a_model():
    model = model_like(torch.ones(6, 8))
    assert model.to(dtype=torch.float64) is model
    assert model.W.dtype == model.W.data.dtype == model.prior.scale.dtype == torch.float64
    assert {"W._raw", "W.unit", "prior.q.scale._raw"} <= set(model.state_dict())
    moved = model.to("meta")
    assert moved.W.device == moved.W.data.device == moved.prior.scale.device == torch.device("meta")
    assert PositiveParameter((2, 3)).to("meta", torch.float16).dtype == torch.float16


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_parameter_on_cuda():
    p = PositiveParameter((2, 3)).cuda(0)
    assert p.is_cuda
    assert p.data.is_cuda
    assert not p.cpu().is_cuda


def test_elbo_mode_changes_the_update(X):
    """The three updates of one W from one set of terms differ, and each lowers its own deviance."""
    y = torch.from_numpy(X.T)
    model = model_like(y)
    model.prior.assign(torch.zeros(2, 80), torch.full((2, 80), 0.8))
    with drawing_from(torch.Generator().manual_seed(0), y.device):
        terms, *_ = model(E=4, X=y)
    updated = {}
    for elbo_mode in ("lower-bound", "expanded", "simple"):
        p = PositiveParameter((24, 2), "multiplicative", elbo_mode).double()
        p.assign(model.W.detach())
        p.multiplicative_update(y, terms)
        updated[elbo_mode] = p.numpy()
    assert np.abs(updated["lower-bound"] / updated["expanded"] - 1).max() > 1e-3
    # The numerators are the same, and so are the denominators of each column.
    ratio = updated["simple"] / updated["expanded"]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-6)
    assert np.abs(ratio - 1).max() > 1e-3
