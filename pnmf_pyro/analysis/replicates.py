"""Replicated counts: tables that the model itself would have made, one after another.

Latent variables are drawn for all samples at once, and the counts given them for a block of samples
at a time: a tensor of draws by samples by features is never made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import scipy.sparse as sp
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from pnmf_pyro.analysis.statistics import Table
from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.checks import check_count
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.random_state import RandomState, drawing_from, torch_generator
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors.joint import JointPosterior, posterior_of
from pnmf_pyro.training.fitted import Fitted, fitted_module

Program = Callable[[Batch], Any]

# Stored entries that the tables of one group of draws may have together, and how many these are.
HELD_ENTRIES = 1 << 24
GROUP = 8

# Entries of a block of samples, few enough for the caches.
BLOCK = 1 << 19

ALL = Batch()


def replicated_counts(
    model: Fitted,
    n_draws: int,
    *,
    prior: bool = False,
    sparse: bool = False,
    random_state: RandomState = None,
) -> Iterator[Table]:
    """Draw tables of counts from the posterior predictive, or the prior predictive, distribution.

    Each table is made from one draw of the latent variables and the fitted loadings. Any model with
    a sample statement "X" for the counts will do, whatever its likelihood.

    Parameters
    ----------
    model : PNMF, ModelFit or PoissonFactorization
        Fit, see :func:`~pnmf_pyro.training.fitted.fitted_module`.
    n_draws : int
        Number of tables, each an ndarray or csr_array of shape (N, D).
    prior : bool
        Whether the latent variables come from the model's prior rather than from the posterior.
    sparse : bool
        Whether the tables are sparse.
    random_state : int, RandomState, Generator or None
        Seed of the draws; None for different tables at each call.
    """
    module = fitted_module(model)
    without_counts = poutine.condition(module.model, {"X": torch.zeros(())})
    program = without_counts if prior else None
    rows = torch.arange(module.N, device=module.W.device)
    blocks = rows.split(at_once(module.D, BLOCK))
    left, group = check_count("n_draws", n_draws), 1
    generator = torch_generator(random_state)
    while left > 0:
        n = min(group, left)
        tables = _drawn(module, program, n, blocks, sparse, generator)
        group = max(1, min(GROUP, HELD_ENTRIES // max(1, tables[0].size)))
        left -= n
        yield from tables
        del tables


@isolated
def _drawn(
    module: PoissonFactorization,
    program: Program | None,
    n: int,
    blocks: Sequence[Tensor],
    sparse: bool,
    generator: torch.Generator,
) -> list[Table]:
    """Draw n tables, a block of samples at a time; from the posterior without a program."""
    with module.apart(inherit=True), drawing_from(generator, module.W.device):
        latents = draw_posterior(module, n) if program is None else draw_latents(program, n)
        drawn = [_tables(draw_counts(module, latents, block), sparse) for block in blocks]
    return [_joined(parts) for parts in zip(*drawn, strict=True)]


@dataclass(frozen=True)
class Latents:
    """Draws of latent variables for all samples, by the name of their sample statement.

    `values` have the draws as first dimension; `dims` has the dimension of samples, where there is
    one.
    """

    values: dict[str, Tensor]
    dims: dict[str, int]

    def of(self, samples: Tensor) -> dict[str, Tensor]:
        """Return the values for some of the samples."""
        return {
            name: value.index_select(self.dims[name], samples) if name in self.dims else value
            for name, value in self.values.items()
        }


def draw_latents(program: Program, n_draws: int) -> Latents:
    """Draw all latent variables of a program, jointly over samples, `n_draws` times."""
    with pyro.validation_enabled(False):
        trace: Any = poutine.trace(torch.no_grad()(program)).get_trace(ALL)
        drawn = Predictive(program, num_samples=n_draws)(ALL)
    drawn.pop("X", None)
    dims = {
        name: frame.dim - site["fn"].event_dim
        for name, site in trace.nodes.items()
        for frame in site.get("cond_indep_stack", ())
        if name in drawn and frame.name == "samples"
    }
    return Latents(drawn, dims)


def draw_posterior(module: PoissonFactorization, n_draws: int) -> Latents:
    """Draw all latent variables of a trained model, log-factors from their joint posterior."""
    latents, posterior = draw_latents(module.guide, n_draws), posterior_of(module.prior)
    if isinstance(posterior, JointPosterior):
        values = {**latents.values, "F": posterior.from_draws_of_q(latents.values["F"]).detach()}
        latents = replace(latents, values=values)
    return latents


def draw_counts(module: PoissonFactorization, latents: Latents, samples: Tensor) -> Tensor:
    """Draw counts of some samples given each draw of the latent variables, (n_draws, n, D)."""
    predictive = Predictive(
        module.model, posterior_samples=latents.of(samples), return_sites=("X",)
    )
    with pyro.validation_enabled(False):
        drawn = predictive(Batch(samples=samples))["X"]
    return drawn.reshape(-1, len(samples), module.D)


def _joined(parts: Sequence[Table]) -> Table:
    join = sp.vstack if sp.issparse(parts[0]) else np.concatenate
    return join(parts) if len(parts) > 1 else parts[0]


def _tables(drawn: Tensor, sparse: bool) -> list[Table]:
    """Draws as tables; the CSR ones are made several times as fast as scipy makes them."""
    tables = list(drawn.cpu().numpy())
    if not sparse:
        return tables
    _, n, d = drawn.shape
    compressed = []
    for flat in (table.ravel() for table in tables):
        stored = np.flatnonzero(flat != 0)
        starts = np.searchsorted(stored, d * np.arange(n + 1))
        columns = (stored % d).astype(np.int32)
        compressed.append(sp.csr_array((flat[stored], columns, starts), shape=(n, d)))
    return compressed
