"""Effects of batches and covariates: each move against dense arithmetic of the bound."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro.data.counts import SparseCounts, as_counts
from pnmf_pyro.data.design import as_design
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.models.effects import (
    blocks_of,
    counted,
    effect_errors,
    expected,
    improve,
    shares,
    take_level,
)
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.models.negative_binomial import NegativeBinomialFactors
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.priors import GaussianPrior

N, D, L, B, C = 40, 6, 2, 3, 2


class Dense:
    """Counts, factors and everything that scales a rate, as arrays of float64."""

    def __init__(self, seed=0, covariates=True, hidden=True):
        r = np.random.default_rng(seed)
        self.A, self.W = r.gamma(2, 0.5, (N, L)), r.gamma(1, 2.0, (D, L))
        self.s = r.uniform(0.5, 2, N)
        self.labels = r.integers(0, B, N)
        self.Z = np.eye(B)[self.labels]
        if covariates:
            self.Z = np.hstack([self.Z, r.normal(size=(N, C))])
        self.seen = 1 - (r.random((N, D)) < 0.2) if hidden else np.ones((N, D))
        self.effects = r.normal(size=(D, self.Z.shape[1])) / 3
        self.r = np.array([2.0, np.inf, 0.7, 5.0, np.inf, 1.0])
        self.X = (r.poisson(self.rates(self.effects)) * self.seen).astype(np.float64)

    def rates(self, effects):
        return self.s[:, None] * np.exp(self.Z @ effects.T) * self.seen * (self.A @ self.W.T)

    def bound(self, effects, dispersed):
        """Terms of the bound of each feature that effects change."""
        x = self.rates(effects)
        linear = (self.X * (self.Z @ effects.T)).sum(0)
        if not dispersed:
            return linear - x.sum(0)
        finite = np.where(np.isfinite(self.r), self.r, 1)
        values = (self.X + finite) * np.log1p(x / finite)
        return linear - np.where(np.isfinite(self.r), values, x).sum(0)

    def theta(self, effects, dispersed):
        x = self.rates(effects)
        finite = np.where(np.isfinite(self.r), self.r, 1)
        found = (finite + self.X) / (finite + x)
        return np.where(np.isfinite(self.r) & dispersed, found, 1)

    def likelihood(self, dispersed, dtype=torch.float64):
        def tensor(values):
            return torch.tensor(values, dtype=dtype)

        design, codes = as_design(self.Z)
        hidden = SparseCounts.from_scipy(sp.csr_matrix((1 - self.seen).astype(np.float64)))
        exposure = Exposure(
            tensor(self.s),
            design.to(dtype),
            codes,
            tensor(self.effects),
            hidden.to(dtype) if len(hidden.values) else None,
            B,
            True,
        )
        poisson = PoissonFactors(
            tensor(self.A.T).log(), tensor(self.W), exposure, validate_args=False
        )
        return NegativeBinomialFactors(poisson, tensor(1 / self.r)) if dispersed else poisson


@pytest.fixture(params=[False, True], ids=["poisson", "negative-binomial"])
def dispersed(request):
    return request.param


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix])
def test_value_and_weighted_sums_are_those_of_dense_rates(dispersed, kind):
    given = Dense()
    found, x = given.likelihood(dispersed), given.rates(given.effects)
    design, counts = found.exposure.design, as_counts(kind(given.X))
    value, sums = expected(found, counts, torch.from_numpy(given.A), design)
    linear = (given.X * (given.Z @ given.effects.T)).sum(0)
    np.testing.assert_allclose(value, linear - given.bound(given.effects, dispersed))
    np.testing.assert_allclose(sums, (given.theta(given.effects, dispersed) * x).T @ given.Z)
    np.testing.assert_allclose(counted(counts, found.exposure), given.X.T @ given.Z)


def test_there_may_be_no_feature_of_a_kind():
    given = Dense()
    exposure = given.likelihood(False).exposure.of(None, torch.arange(0))
    A, W = torch.from_numpy(given.A), torch.zeros(0, L, dtype=torch.float64)
    assert exposure.totals(A).shape == (0, L)
    assert exposure.weighted(A, W, exposure.design).shape == (0, B + C)


def test_batches_of_a_poisson_move_to_the_maximum():
    """Counts of a batch over its expected counts, as a loop over batches and features says."""
    given = Dense(covariates=False)
    found, counts = given.likelihood(False), as_counts(given.X)
    improve(found, counts, torch.from_numpy(given.A), counted(counts, found.exposure))
    at_zero = given.rates(np.zeros_like(given.effects))
    for g in range(B):
        inside = given.labels == g
        for j in range(D):
            wanted = np.log(given.X[inside, j].sum() / at_zero[inside, j].sum())
            np.testing.assert_allclose(found.exposure.effects[j, g], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_no_move_lowers_the_bound_and_many_settle_at_its_maximum(dispersed, seed):
    given = Dense(seed)
    given.effects = 3 * given.effects  # far away
    found, counts = given.likelihood(dispersed), as_counts(given.X)
    told, before = counted(counts, found.exposure), given.bound(given.effects, dispersed)
    for _ in range(400 if dispersed else 60):
        improve(found, counts, torch.from_numpy(given.A), told)
        now = given.bound(found.exposure.effects.numpy(), dispersed)
        assert (now >= before - 1e-6 * np.abs(before)).all()
        before = now
    effects = found.exposure.effects.numpy()
    x = given.theta(effects, dispersed) * given.rates(effects)
    slope = (given.X - x).T @ given.Z
    there = given.X.T @ given.Z[:, :B] > 0  # a feature without counts has no maximum
    np.testing.assert_allclose(np.where(there.all(1)[:, None], slope, 0), 0, atol=0.02)


def test_a_feature_without_counts_in_a_batch_keeps_half_a_count():
    given = Dense(covariates=False)
    given.X[given.labels == 1, 3] = 0
    given.effects *= 0
    found, counts = given.likelihood(False), as_counts(given.X)
    told = counted(counts, found.exposure)
    improve(found, counts, torch.from_numpy(given.A), told)
    inside = given.rates(given.effects)[given.labels == 1, 3].sum()
    np.testing.assert_allclose(found.exposure.effects[3, 1], np.log(0.5 / inside))


def test_levels_go_to_the_loadings_and_no_rate_changes():
    given = Dense()
    exposure, x = given.likelihood(False).exposure, given.rates(given.effects)
    np.testing.assert_allclose(shares(exposure), given.Z[:, :B].mean(0))
    growth = take_level(exposure).numpy()
    given.W *= growth
    effects = exposure.effects.numpy()
    np.testing.assert_allclose(given.rates(effects), x)
    np.testing.assert_allclose((given.Z[:, :B] @ effects[:, :B].T).mean(0), 0, atol=1e-12)


def test_newton_steps_are_those_of_each_feature_alone():
    given = Dense(hidden=False)
    found, counts = given.likelihood(False), as_counts(given.X)
    block = blocks_of(found.exposure)[1]
    _, sums = expected(found, counts, torch.from_numpy(given.A), block.weights)
    told = counted(counts, found.exposure)[:, B:]
    step = block.change(torch.from_numpy(given.effects[:, B:]), told, sums).numpy()
    x, Z = given.rates(given.effects), given.Z[:, B:]
    for j in range(D):
        slope, bend = Z.T @ (given.X[:, j] - x[:, j]), (Z.T * x[:, j]) @ Z
        wanted = np.linalg.solve(bend, slope)
        longest = (np.abs(wanted) * np.abs(Z).max(0)).max()
        np.testing.assert_allclose(step[j], wanted * min(1, 2 / longest), rtol=1e-6)


def test_standard_errors_are_those_of_the_dense_information():
    """With factors known but for levels: the inverse of one matrix, with the constraint."""
    given = Dense(hidden=False)
    y = torch.empty(D, N, dtype=torch.float64, device="meta")
    prior = GaussianPrior(y, L, 0.8)
    model = PoissonFactorization(
        prior, y, L, "projected", size_factors=given.likelihood(False).exposure
    )
    model.assign(torch.from_numpy(given.W), torch.from_numpy(given.A), 0.1)
    L2 = L * (L + 1) // 2
    told = 1e9 * torch.eye(L, dtype=torch.float64)[tuple(torch.tril_indices(L, L))].expand(N, L2)
    with torch.no_grad():
        found = effect_errors(model, as_counts(given.X), told).numpy()
    rho, share = given.A @ given.W.T, given.Z[:, :B].mean(0)
    P = given.Z.shape[1]
    T = np.eye(P)
    T[:B, :B] -= share
    for j in range(D):
        v = np.hstack([given.Z, given.A / rho[:, [j]]])
        spread = np.maximum(3 * given.W[j], 1 / (given.s @ given.A))
        info = (v.T * given.X[:, j]) @ v + np.diag([*np.full(P, 1e-2), *spread**-2])
        penalty = np.zeros(P + L)
        penalty[:B] = share
        info += 1e9 * np.outer(penalty, penalty)  # the mean over batches is 0
        variance = np.linalg.inv(info).diagonal()[:P]
        part = ((given.X[:, [j]] / rho[:, [j]]) * given.A).sum(0) * given.W[j]
        part = part / part.sum()
        levels = np.square(part).sum() / (np.square(given.Z).sum(0) / 0.8**2)
        np.testing.assert_allclose(found[j], np.sqrt(variance + T**2 @ levels), rtol=1e-3)
