"""Models whose q(F) and W are those of a small problem, their terms, and how these are compared.

Monte Carlo estimates are compared with quadrature. Each such test tiles the samples, so that one
call holds thousands of independent draws, and asks for agreement within SIGMAS standard errors:
by the normal approximation a right formula fails with probability below 6e-7 under a new seed.
The seeds are fixed, so that a test that passes keeps passing.
"""

from __future__ import annotations

import anndata
import numpy as np
import scipy.sparse as sp
import torch

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import Counts, as_counts
from pnmf_pyro.estimator.anndata_bridge import add_results
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.priors.natural import SiteSteps, Step
from pnmf_pyro.training.loop import Steps
from pnmf_pyro.training.schedules import Constant, GradientSteps
from tests.support import dense as ref
from tests.support.state import drawing

PARAMETER_MODES = ("softplus", "exp", "projected", "multiplicative")
ELBO_MODES = ("simple", "expanded", "lower-bound")
LAYOUTS = ("dense", "sparse")
PRIOR_SCALE = 1.25  # exact in float32
SIGMAS = 5.0
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}
NUMPY = {torch.float64: np.float64, torch.float32: np.float32}


def double(array) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def counts_of(X: np.ndarray, layout: str, dtype: torch.dtype = torch.float64) -> Counts:
    X = X.astype(NUMPY[dtype])
    return as_counts(sp.csr_matrix(X) if layout == "sparse" else X)


def as_value(X: np.ndarray, kind: str):
    """Counts in each of the forms that a distribution takes."""
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


# --- models


def prior_of(
    problem: ref.Problem,
    natural: bool,
    scale: float = PRIOR_SCALE,
    dtype: torch.dtype = torch.float64,
) -> GaussianPrior:
    """A prior whose q(F) is that of the problem."""
    N, D, L = problem.shape
    y = torch.empty(D, N, dtype=dtype, device="meta")
    prior = GaussianPrior(y, L, scale, use_natural_gradients=natural)
    prior.assign(double(problem.mean).to(dtype), double(problem.scale).to(dtype))
    return prior


def model_of(
    problem: ref.Problem,
    mode: str = "lower-bound",
    loadings_mode: str = "projected",
    *,
    natural: bool = False,
    dtype: torch.dtype = torch.float64,
    kind: type[PoissonFactorization] = PoissonFactorization,
) -> PoissonFactorization:
    """A model whose q(F) and W are those of the problem."""
    N, D, L = problem.shape
    y = torch.empty(D, N, dtype=dtype, device="meta")
    s = None if problem.s is None else double(problem.s).to(dtype)
    prior = prior_of(problem, natural, dtype=dtype)
    model = kind(prior, y, L, loadings_mode, mode, size_factors=s, random_state=0)
    model.W.assign(double(problem.W))
    return model


def model_like(y: torch.Tensor) -> PoissonFactorization:
    """A model of two components over the counts y."""
    return PoissonFactorization(GaussianPrior(y, 2), y, 2, "softplus", random_state=0)


# --- terms and gradients


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


def take_step(
    model: PoissonFactorization, batch: Batch, step: Step, mode: str = "lower-bound"
) -> float:
    """Take a step from the gradients of a batch; return the loss before it."""
    step.start()
    model.zero_grad()
    objective = FactorizationELBO(mode, newton=isinstance(step, SiteSteps))
    loss = objective.loss_and_grads(model.model, model.guide, batch)
    step.prepare(batch)
    step.step()
    step.close()
    return loss


def by_adam(model: PoissonFactorization, lr: float = 0.01) -> Steps:
    """Train all parameters by Adam."""
    return [(GradientSteps(torch.optim.Adam(model.parameters(), lr)), Constant())]


def blocks_of(batches: Batches, n: int, d: int) -> list[Batch]:
    """All batches of n consecutive samples and d consecutive features."""
    N, D = batches.counts.shape
    return [
        batches.batch(samples, features)
        for samples in torch.arange(N).split(n)
        for features in torch.arange(D).split(d)
    ]


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


# --- comparisons


def assert_all_close(actual, expected, dtype: torch.dtype = torch.float64) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach().double(), **TOLERANCE[dtype])


def assert_within_error(estimate: float, exact: float, error: float) -> None:
    assert error > 0
    assert abs(estimate - exact) < SIGMAS * error, (estimate, exact, (estimate - exact) / error)


# --- fits


class Trained:
    """What training returned, as `fit_model` does: a model and the ELBO at each step."""

    def __init__(self, model, history):
        self.model, self.history = model, history


def forms_of(estimator, X, x) -> dict:
    """A spatial fit in each of the forms that hold one."""
    adata = anndata.AnnData(X.astype(np.float32), obsm={"spatial": x})
    add_results(adata, estimator)
    return {
        "estimator": estimator,
        "module": estimator.model_,
        "trained": Trained(estimator.model_, estimator.history_),
        "anndata": adata,
    }
