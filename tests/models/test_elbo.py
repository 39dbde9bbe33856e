"""The objective and its gradients: sparse = dense = twin, parts, orders and sums of data sets."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data.batches import Batch, Batches, take
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.training.loop import evaluate_elbo
from tests.support import dense as ref
from tests.support.models import (
    LAYOUTS,
    PRIOR_SCALE,
    SIGMAS,
    assert_all_close,
    assert_within_error,
    blocks_of,
    counts_of,
    double,
    elbo_and_gradients,
    elbo_of,
    model_of,
    terms_of,
)
from tests.support.state import drawing

# --- identity 1: sparse = dense = twin


def test_objective_and_gradients_equal_the_twin(problem, mode, layout, dtype, fields):
    model = model_of(problem, mode, dtype=dtype)
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


def test_batches_of_samples_and_features_average_to_the_whole(sized, layout):
    problem = ref.simulate_problem(4, N=8, D=6, sized=sized)
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
    first, other = (ref.simulate_problem(seed, N=n, sized=sized) for seed, n in ((10, 9), (11, 5)))
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


def drawn_field(
    name: str, problem: ref.Problem, loc: torch.Tensor, factor: float = 1.0, stated: bool = True
) -> torch.Tensor:
    """Draw from independent normals with `factor` times the scales of the problem.

    Their marginal is stated, so that it may be integrated out, or not.
    """
    q = dist.Normal(loc, factor * double(problem.scale))
    return pyro.sample(name, q, infer={"marginal": q} if stated else {})


def standard(loc: torch.Tensor) -> dist.Normal:
    return dist.Normal(torch.zeros_like(loc), 1.0)


@pytest.mark.parametrize("order", [("a", "F"), ("F", "a")])
def test_fields_with_the_same_mean_are_told_apart(order, problem):
    """Both hold the very same tensor as their mean, with other scales; no draw is made."""
    loc, W, counts = double(problem.mean), double(problem.W), as_counts(problem.X)

    def guide():
        for name in order:
            drawn_field(name, problem, loc, 2.0 if name == "a" else 1.0)

    def model():
        drawn = {name: pyro.sample(name, standard(loc)) for name in order}
        pyro.sample("X", PoissonFactors(drawn["F"], W), obs=counts)

    before = torch.random.get_rng_state()
    terms = FactorizationELBO("lower-bound").terms(model, guide)
    assert torch.equal(torch.random.get_rng_state(), before)
    q = dist.Normal(loc, double(problem.scale))
    expected = PoissonFactors(loc, W).expected_log_prob(counts, q, "lower-bound").sum()
    torch.testing.assert_close(terms["log_likelihood"], expected)


@pytest.mark.parametrize("stated", [True, False])
def test_what_depends_on_a_field_is_averaged_over_its_draws(problem, stated):
    """With z ~ N(F, 1) and q(z) = N(0, 1), E KL(q(z) || p(z | F)) is E F^2 / 2 for each.

    The divergence of F itself is in closed form.
    """
    loc, scale = double(problem.mean), double(problem.scale)

    def guide():
        F = drawn_field("F", problem, loc, stated=stated)
        pyro.sample("z", standard(loc).to_event(2))
        return F

    def model():
        F = pyro.sample("F", standard(loc))
        pyro.sample("z", dist.Normal(F, 1.0).to_event(2))

    with drawing(0):
        terms = [FactorizationELBO().terms(model, guide)["kl"].item() for _ in range(400)]
    own = ref.kl_independent(problem.mean, problem.scale, 1.0).sum()
    exact = own + ((loc.square() + scale.square()) / 2).sum().item()
    assert_within_error(np.mean(terms), exact, np.std(terms) / 400**0.5)
    at_means = own + (loc.square() / 2).sum().item()
    assert abs(at_means - exact) > SIGMAS * np.std(terms) / 400**0.5


def test_loss_and_gradients_refuse_a_value_that_is_not_finite(layout):
    problem = ref.simulate_problem(23)
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
