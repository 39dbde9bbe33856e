r"""One component fewer: the two of a factorisation that are nearest to being one.

Two components make the table :math:`M = a_k w_k^\top + a_l w_l^\top`. Where counts have about the
rates :math:`e_{ij}` that the sums of samples and features say, what one component in the place of
two leaves is, in the measure of Pearson's chi-squared,

.. math:: \min_{a, w} \sum_{ij} \frac{(M_{ij} - a_i w_j)^2}{e_{ij}}, \qquad
    e_{ij} \propto r_i c_j,

the second squared singular value of M divided by the square roots of r and c. It is an eigenvalue
of a product of two 2 x 2 Gram matrices, so that all pairs cost no more than the Gram matrices of
all components.
"""

from __future__ import annotations

import numpy as np

# Share of the mean profile of features in loadings from which a fit may still leave its optimum.
SOFTENING = 0.5


def merged(loadings: np.ndarray, factors: np.ndarray, n_components: int) -> np.ndarray:
    """Return loadings of fewer components, from which a fit of so many may start.

    The two components that lose least are made one, which keeps their sums over samples and over
    features, until there are `n_components`. Then the loadings come half way to the mean profile:
    a start that has settled with other components would not leave them.

    Parameters
    ----------
    loadings, factors : ndarray of shape (d, L) and (n, L)
        Of a fit. Factors are times size factors, where it has any.
    n_components : int
        Number of components to keep, at most L.

    Returns
    -------
    ndarray of shape (d, n_components)
    """
    W, A = loadings.astype(np.float64), factors.astype(np.float64)
    columns = W @ A.sum(0)
    while W.shape[1] > n_components:
        loss = losses(W, A)
        k, l = np.unravel_index(np.argmin(loss), loss.shape)
        w = W[:, k] * A[:, k].sum() + W[:, l] * A[:, l].sum()
        a = A[:, k] * W[:, k].sum() + A[:, l] * W[:, l].sum()
        rest = np.delete(np.arange(W.shape[1]), [k, l])
        W = np.column_stack([W[:, rest], w])
        A = np.column_stack([A[:, rest], a / max(w.sum(), np.finfo(float).tiny)])
    profile = columns / columns.sum()
    return (1 - SOFTENING) * W + SOFTENING * W.sum(0) * profile[:, None]


def losses(W: np.ndarray, A: np.ndarray) -> np.ndarray:
    """Return what each pair of components loses as one, (L, L), infinite on the diagonal."""
    rows, columns = A @ W.sum(0), W @ A.sum(0)
    least = np.finfo(float).tiny
    G = A.T @ (A / np.maximum(rows, least)[:, None])
    H = W.T @ (W / np.maximum(columns, least)[:, None])
    own = np.diag(G) * np.diag(H)
    trace = own[:, None] + own + 2 * G * H
    determinant = np.ones_like(trace)
    for gram in (G, H):
        determinant *= np.maximum(np.outer(np.diag(gram), np.diag(gram)) - gram**2, 0)
    root = np.sqrt(np.maximum(trace**2 - 4 * determinant, 0))
    loss = 2 * determinant / np.maximum(trace + root, least)
    np.fill_diagonal(loss, np.inf)
    return loss * rows.sum()
