r"""Errors of a field and its loadings together: draws of all components over all places at once.

To second order the counts say of errors dF_i of log-factors and dW_j of loadings what
:mod:`~pnmf_pyro.models.loading_errors` says, and the field has the precision Q over places. With H
the blocks of the samples, an error of loadings moves all of the field by

.. math:: dF = -(Q + H)^{-1} t, \qquad t_i = \sum_j X_{ij} \phi_{ij} \psi_{ij}^T dW_j.

So a draw is one solve: of t for a draw of dW, with noise of covariance H and Q (perturbation,
Papandreou and Yuille 2010). The L^2 directions in which all loadings move alike, dW_j = T^T W_j,
are those that a field confuses alike at all places. There what F takes from the loadings is solved
over the field as well; in other directions places are taken one by one.

The level of a component is not identified apart from its prior, since what its factors gain its
loadings lose. Where loadings are learned, draws are of the log-factors about their mean over
samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.log_rate import rates
from pnmf_pyro.data.parallel import together
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.models.loading_errors import LoadingErrors, per_factor
from pnmf_pyro.priors.joint import as_expected, expected_ratio, unpacked

# Draws that a field keeps: as many as there are numbers for, at most and at least; and their seed.
MOST_DRAWS, FEWEST_DRAWS = 48, 20
NUMBERS = 1 << 21
SEED = 0

# Log-factors of a field that keeps draws, at most, and numbers in the draws of one solve.
MOST_FACTORS = 1 << 20
AT_ONCE = 1 << 22

# Numbers in the right sides for all L^2 directions, beyond which places are taken one by one.
MOST_DIRECTIONS = 1 << 22


@torch.no_grad()
def taken_by_field(model: PoissonFactorization, shared: Tensor) -> Tensor | None:
    """Return what a field takes from transformations of all loadings, (L^2, L^2).

    None for a prior that is no field, and for one too large.
    """
    A, L = model.prior.marginal().loc.exp().T.double(), model.L
    if len(A) * L**3 > MOST_DIRECTIONS or model.prior.places is None:
        return None
    H = unpacked(shared)
    told = torch.einsum("npm,nl->pnml", per_factor(H, A), A).reshape(L, len(A), L * L)
    solved = model.prior.coupled(H, told, None)
    if solved is None:
        return None
    found = torch.einsum("pna,pnb->ab", told, solved[1].to(told)).reshape(L, L, L, L)
    return found.reshape(L * L, L * L)


@torch.no_grad()
def field_draws(
    model: PoissonFactorization,
    counts: Counts,
    shared: Tensor,
    expected: Tensor,
    errors: LoadingErrors,
) -> tuple[Tensor, Tensor] | None:
    """Draw errors of a field; None for a prior that is none, and for a field too large.

    Parameters
    ----------
    model : PoissonFactorization
    counts : Counts of shape (N, D)
        What of each count tells of its rate.
    shared, expected : Tensor
        H of each sample, packed, and the expected counts of its components.
    errors : LoadingErrors
        They count where loadings are learned.

    Returns
    -------
    held : Tensor of shape (L, M + 1, R)
        Draws in what the field is held in, and their levels in the last row.
    variance : Tensor of shape (L,)
        Mean square of the draws at the samples, less their levels.
    """
    factors, learned = model.L * model.N, model.W.requires_grad
    if model.prior.places is None or factors > MOST_FACTORS:
        return None
    H = unpacked(as_expected(shared, expected))
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    ratio = expected_ratio(shared, expected).T.double().sqrt()[..., None]
    n_draws = min(MOST_DRAWS, max(FEWEST_DRAWS, NUMBERS // factors))

    def drawn(part: Tensor) -> tuple[Tensor, Tensor] | None:
        n, generator = len(part), torch.Generator().manual_seed(SEED + int(part[0]))
        noise = torch.randn(model.N, model.L, n, generator=generator, dtype=torch.float64)
        told = torch.einsum("nlk,nkr->lnr", root, noise.to(root))
        if learned:
            told -= ratio * _told_by_loadings(model, counts, shared, errors, n, generator)
        found = model.prior.coupled(H, told, generator)
        if found is None:
            return None
        held, at_samples = found
        level = at_samples.mean(1, keepdim=True) if learned else torch.zeros_like(held[:, :1])
        square = (at_samples - level).square().mean(1).sum(-1) / n_draws
        return torch.cat([held, level], 1).float(), square

    parts = torch.arange(n_draws).split(at_once(factors, AT_ONCE))
    each = together().mapped(drawn, parts)
    found = [one for one in each if one is not None]
    if not found:
        return None
    kept, squares = zip(*found, strict=True)
    return torch.cat(kept, -1), torch.stack(squares).sum(0)


def _told_by_loadings(
    model: PoissonFactorization,
    counts: Counts,
    shared: Tensor,
    errors: LoadingErrors,
    n_draws: int,
    generator: torch.Generator,
) -> Tensor:
    """The t of draws of the errors of loadings, (L, N, R)."""
    W, A, L = model.W.data.detach(), model.prior.marginal().loc.exp().T.contiguous(), model.L
    H, a = unpacked(shared), A.double()

    def root_times_noise(matrices: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrices.double())
        noise = torch.randn(*values.shape, n_draws, generator=generator, dtype=torch.float64)
        return vectors @ (values.clamp_min(0).sqrt()[..., None] * noise.to(values))

    T = root_times_noise(errors.coupling).reshape(L, L, n_draws)
    alike = torch.einsum("npm,nl,mlr->pnr", per_factor(H, a), a, T)
    apart = root_times_noise(unpacked(errors.blocks)).to(W)
    told = torch.zeros_like(alike)
    largest = torch.finfo(W.dtype).max ** 0.5
    for index, block in counts.blocks():
        own = A[index]
        steep = (block.values / rates(block, own, W).square_()).clamp_max_(largest)
        for r in range(n_draws):
            moved = steep * block.inner(own, apart[..., r].contiguous())
            told[:, index, r] = (own * block.matmul(moved, W)).T.double()
    return told + alike
