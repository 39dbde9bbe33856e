r"""Covariance of the loadings of each feature, given the counts.

To second order (Gauss-Newton) counts say of errors dF_i of log-factors and dW_j of loadings

.. math:: \frac12 \sum_{ij} X_{ij} (\phi_{ij}^T dF_i + \psi_{ij}^T dW_j)^2, \qquad
    \psi_{ijl} = \exp F_{il} / \rho_{ij},

to which the prior of F comes, of precision c, and a weak one of W. With F taken out (a Schur
complement, exact for independent samples) there is one system over all loadings. Its diagonal
blocks are

.. math:: D_j = \Lambda_j + \sum_i X_{ij} (1 - X_{ij} \phi_{ij}^T P_i^{-1} \phi_{ij}) \psi_{ij}
    \psi_{ij}^T, \qquad P_i = \mathrm{diag}(c) + \sum_j X_{ij} \phi_{ij} \phi_{ij}^T.

Features share the errors of factors as far as all loadings are transformed at once, dW_j = T^T W_j
with T of shape (L, L): levels, and components that mix. In these L^2 directions Z the system is
solved as it is, in the others by its blocks:

.. math:: S^{-1} \approx D^{-1} + Z [(Z^T S Z)^{-1} - (Z^T D Z)^{-1}] Z^T.

In a field c is that of one place alone, but for the directions Z, where what F takes is solved over
all of the field (:mod:`~pnmf_pyro.models.joint_fields`). The standard deviation of the prior of
W_jl is three times W_jl, or one count of the feature in the component where that is more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.log_rate import rates
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.priors.joint import inverses, packed_numbers, unpacked

# Standard deviation of the prior of a loading, relative to it.
RELATIVE_SPREAD = 3.0


class LoadingErrors(NamedTuple):
    """Errors of loadings: the blocks D^-1, and what is added in the directions Z.

    Attributes
    ----------
    blocks : Tensor of shape (D, L (L + 1) / 2)
        D^-1 of each feature, packed, in float32.
    coupling : Tensor of shape (L^2, L^2)
        (Z^T S Z)^-1 - (Z^T D Z)^-1, rows and columns by T_ml.
    """

    blocks: Tensor
    coupling: Tensor

    def covariances(self, W: Tensor, *, profiles: bool = False) -> Tensor:
        """Return the covariances of the loadings of each feature, (D, L, L), in float64.

        Parameters
        ----------
        W : Tensor of shape (D, L)
            Loadings.
        profiles : bool
            Take the sum of the loadings of a component for known, so that its level does not
            count: errors of W_jl / sum_j W_jl, times that sum.
        """
        W, L = W.detach().double(), W.shape[1]
        found = unpacked(self.blocks)
        Z = W[:, :, None].expand(-1, L, L)
        if profiles:
            totals = W.sum(0).clamp_min(torch.finfo(W.dtype).tiny)
            Z = Z - W[:, None, :] * (totals[:, None] / totals)
            rest = 1 - W / totals
            found = found * rest[:, :, None] * rest[:, None, :]
        coupling = self.coupling.double().reshape(L, L, L, L)
        return found + torch.einsum("jml,mlkp,jkp->jlp", Z, coupling, Z)


def loading_errors(
    model: PoissonFactorization, counts: Counts, shared: Tensor, taken: Tensor | None = None
) -> LoadingErrors | None:
    """Return the errors of the loadings of a trained model.

    None for a prior that does not say what it knows apart from the counts of a sample.

    Parameters
    ----------
    model : PoissonFactorization
    counts : Counts of shape (N, D)
        What of each count tells of its rate.
    shared : Tensor of shape (N, L (L + 1) / 2)
        H of each sample, see :mod:`pnmf_pyro.priors.joint`.
    taken : Tensor of shape (L^2, L^2), optional
        What F takes from transformations of all loadings, where it is known over a field.
    """
    W, A = model.W.data, model.prior.marginal().loc.exp().T.contiguous()
    apart = model.prior.apart_from_own(torch.zeros(A.T.shape, dtype=torch.float64))
    if apart is None:
        return None
    ranks = model.ranks
    covariance = ranks.all_or_none(lambda: inverses(shared, apart), torch.linalg.LinAlgError)
    given, alone = ranks.totals(*_blocks(counts, A, W, covariance))
    spread = torch.maximum(RELATIVE_SPREAD * W, 1 / model.levels()).double()
    for blocks in (given, alone):
        blocks.diagonal(dim1=-2, dim2=-1).add_(spread.square().reciprocal())
    L, W = W.shape[1], W.double()
    of_given, of_alone = (
        torch.einsum("jm,jk,jlp->mlkp", W, W, blocks).reshape(L * L, L * L)
        for blocks in (given, alone)
    )
    if taken is None:
        taken = ranks.total(_coupling(A, shared, covariance))
    joint = of_given - taken
    coupling = _inverse(joint) - _inverse(of_alone)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(alone))
    rows, columns = packed_numbers(L, W.device)
    return LoadingErrors(inverse[:, rows, columns].float(), coupling.float())


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a matrix that is not negative, but for directions in which it is nothing."""
    return torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10)


def _blocks(counts: Counts, A: Tensor, W: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Information on the loadings of each feature with F known, and D without a prior."""
    L = W.shape[1]
    rows, columns = packed_numbers(L, W.device)
    twice = 2.0 - (rows == columns).to(W)
    products = W[:, rows] * W[:, columns]
    given, alone = (W.new_zeros(len(W), len(rows)) for _ in range(2))
    largest = torch.finfo(W.dtype).max ** 0.75
    for index, block in counts.blocks():
        pairs = A[index][:, rows] * A[index][:, columns]
        squared = rates(block, A[index], W).square_()
        steep = (block.values / squared).clamp_max_(largest)
        given += block.transposed_matmul(steep, pairs)
        known = block.inner(pairs * twice * covariance[index].to(W), products)
        known = (known / squared).mul_(block.values)
        alone += block.transposed_matmul(steep * (1 - known).clamp_min_(0), pairs)
    return unpacked(given), unpacked(alone)


def per_factor(H: Tensor, a: Tensor) -> Tensor:
    """Return H over exp F of its columns, (n, L, L); nothing where a component is absent."""
    return H / a[:, None, :].clamp_min(torch.finfo(a.dtype).tiny)


def _coupling(A: Tensor, shared: Tensor, covariance: Tensor) -> Tensor:
    """What F takes from transformations T of all loadings, (L^2, L^2)."""
    N, L = A.shape
    total = torch.zeros(L * L, L * L, dtype=torch.float64, device=A.device)
    for block in torch.arange(N, device=A.device).split(at_once(L**2)):
        a = A[block].double()
        E = per_factor(unpacked(shared[block]), a)
        M = E.mT @ unpacked(covariance[block]) @ E
        total += M.flatten(1).T @ (a[:, :, None] * a[:, None, :]).flatten(1)
    return total.reshape(L, L, L, L).permute(0, 2, 1, 3).reshape(L * L, L * L)


def covariance_from_loadings(
    model: PoissonFactorization,
    counts: Counts,
    shared: Tensor,
    covariance: Tensor,
    errors: LoadingErrors,
) -> Tensor:
    r"""Return what errors of loadings add to the covariance of each sample's log-factors, packed.

    Loadings that are off by dW_j move log-factors by :math:`-P_i^{-1} \sum_j X_{ij} \phi_{ij}
    \psi_{ij}^T dW_j`. The blocks D_j^{-1} and the directions Z are taken one after the other.

    Parameters
    ----------
    model, counts, shared
        As for :func:`loading_errors`.
    covariance : Tensor of shape (N, L (L + 1) / 2)
        P^{-1} of each sample, packed.
    errors : LoadingErrors
    """
    W, A = model.W.data, model.prior.marginal().loc.exp().T.contiguous()
    L = W.shape[1]
    rows, columns = packed_numbers(L, W.device)
    coupling = errors.coupling.double().reshape(L, L, L, L).permute(1, 3, 0, 2).reshape(L * L, -1)
    twice = 2.0 - (rows == columns).to(W)
    products = W[:, rows] * W[:, columns]
    largest = torch.finfo(W.dtype).max ** 0.5
    found = torch.empty_like(covariance)
    for index, block in counts.blocks():
        a, pairs = A[index], A[index][:, rows] * A[index][:, columns]
        squared = rates(block, a, W).square_()
        weight = block.inner(pairs * twice, errors.blocks.to(W)).mul_(block.values.square())
        weight = weight.div_(squared).div_(squared).clamp_max_(largest)
        found[index] = (block.matmul(weight, products) * pairs).to(found)
    for part in torch.arange(len(A), device=A.device).split(at_once(L**2)):
        moved, a = unpacked(found[part]), A[part].double()
        E = per_factor(unpacked(shared[part]), a)
        Q = ((a[:, :, None] * a[:, None, :]).flatten(1) @ coupling).reshape(-1, L, L)
        moved += E @ Q @ E.mT
        P = unpacked(covariance[part])
        found[part] = (P @ moved @ P)[:, rows, columns].to(found)
    return found
