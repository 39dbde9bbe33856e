r"""What the components of a fit mean: their features, their share of the counts, their smoothness.

With the factors :math:`f_{il} = E \exp F_{il}`, the expected count of a sample and a feature is a
sum over components, :math:`s_i \sum_l f_{il} W_{jl}`. Whatever is said here of a component is made
of its terms, and so does not depend on how a fit divides a scale between factors and loadings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.statistics import neighbor_weights
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_choice, check_count, check_counts
from pnmf_pyro.data.counts import BLOCK_ENTRIES
from pnmf_pyro.data.places import GroupCodes, Places, check_coordinates
from pnmf_pyro.estimator.results import Fit, Results, results_of

if TYPE_CHECKING:
    from pandas import DataFrame

RANKINGS = ("weight", "specificity")


def contributions(fit: Fit, per: str = "sample", *, key: str = "pnmf") -> np.ndarray:
    r"""Return the expected counts that each component contributes to each sample or feature.

    .. math:: \mathrm{sample}: \; s_i f_{il} \sum_j W_{jl} \qquad
              \mathrm{feature}: \; W_{jl} \sum_i s_i f_{il}

    Their sums over components are the sums of the reconstruction; both add up to the same totals
    of components.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to read, see :func:`~pnmf_pyro.estimator.results.results_of`.
    per : {'sample', 'feature'}
        Unit whose contributions are returned.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    ndarray of shape (n_samples, n_components) or (n_features, n_components)
    """
    check_choice("per", per, ("sample", "feature"))
    found = results_of(fit, key)
    factors = found.size_factors[:, None] * found.factors
    loadings = found.loadings.astype(np.float64)
    return factors * loadings.sum(0) if per == "sample" else loadings * factors.sum(0)


def feature_scores(fit: Fit, by: str = "weight", *, key: str = "pnmf") -> DataFrame | np.ndarray:
    r"""Return a score of each feature in each component, for rankings and gene-set tests.

    `weight` is the share of a component's expected counts that fall to a feature,
    :math:`p_{jl} = W_{jl} / \sum_{j'} W_{j'l}`. `specificity` is

    .. math:: p_{jl} \log(p_{jl} / p_j),

    where :math:`p_j` is the share of the feature in the expected counts of all components. Its sum
    over features is the Kullback-Leibler divergence of a component's profile from that of the
    whole (Kullback and Leibler 1951), so it is large for features that are both frequent in a
    component and more so than elsewhere; rare features, whose ratio is large by chance, count for
    little.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to read, see :func:`~pnmf_pyro.estimator.results.results_of`.
    by : {'weight', 'specificity'}
        Score to return.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    DataFrame of shape (n_features, n_components)
        With the names of features as index and columns pnmf0, pnmf1, ...; without pandas, a
        structured array that has the names in its field `feature`.
    """
    check_choice("by", by, RANKINGS)
    found = results_of(fit, key)
    scores = _scores(found)[by]
    columns = {f"pnmf{number}": score for number, score in enumerate(scores.T)}
    return as_table({"feature": found.feature_names, **columns}, index="feature")


def top_features(
    fit: Fit, n: int = 10, by: str = "weight", *, key: str = "pnmf"
) -> DataFrame | np.ndarray:
    """Return the first n features of each component.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to read, see :func:`~pnmf_pyro.estimator.results.results_of`.
    n : int
        Number of features of each component; all where there are fewer.
    by : {'weight', 'specificity'}
        Score to rank by, see :func:`feature_scores`.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    DataFrame
        One row for each component and rank, in that order, with columns `component` (from 0),
        `rank` (from 1), `feature`, `weight`, `specificity` and `share`, the part of the feature's
        expected counts that comes from the component. A structured array without pandas.
    """
    check_choice("by", by, RANKINGS)
    found = results_of(fit, key)
    scores = _scores(found)
    n = min(check_count("n", n), len(found.feature_names))
    ranked = np.argsort(-scores[by], axis=0, kind="stable")[:n].T.ravel()  # component by component
    component = np.repeat(np.arange(found.n_components), n)
    values = {name: score[ranked, component] for name, score in scores.items()}
    rank = np.tile(np.arange(1, n + 1), found.n_components)
    names = {"component": component, "rank": rank, "feature": found.feature_names[ranked]}
    return as_table({**names, **values})


def _scores(found: Results) -> dict[str, np.ndarray]:
    """Weight, specificity and share, each of shape (n_features, n_components)."""
    expected = contributions(found, "feature")
    weight = expected / _positive(expected.sum(0))
    whole = expected.sum(1) / _positive(expected.sum())
    ratio = np.divide(weight, whole[:, None], out=np.ones_like(weight), where=weight > 0)
    return {
        "weight": weight,
        "specificity": weight * np.log(ratio),
        "share": expected / _positive(expected.sum(1, keepdims=True)),
    }


def _positive(totals: np.ndarray | float) -> np.ndarray:
    """Totals to divide by: 1 in place of 0."""
    return np.where(totals > 0, totals, 1.0)


def spatial_scores(
    fit: Fit,
    X: Any = None,
    of: str = "components",
    *,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    n_neighbors: int = 6,
    key: str = "pnmf",
) -> DataFrame | np.ndarray:
    r"""Return which share of the variance of components or features is smooth in space.

    A linear function of a sample's counts, :math:`z_i = \sum_j A_j X_{ij} / s_i`, varies because
    its expectation does, and by Poisson noise, of variance
    :math:`n_i = \sum_j A_j^2 X_{ij} / s_i^2` (unbiased). Noise is independent between samples:
    what a sample has in common with its K nearest neighbours is none of it. Hence

    .. math::

       \mathrm{smooth} = \frac1N \sum_i \tilde z_i \frac1K \sum_{i' \sim i} \tilde z_{i'}, \qquad
       \mathrm{variance} = \frac1N \sum_i (\tilde z_i^2 - n_i), \qquad
       \mathrm{score} = \mathrm{smooth} / \mathrm{variance},

    with :math:`\tilde z` centred in each group. This is Moran's I (1950) over nearest neighbours
    with the noise taken out of its denominator, and one minus the relative nugget of geostatistics
    (Cressie 1993, section 2.3) for variation that is smooth on the scale of the spacing. For a
    feature z is its count. For a component it is the estimate of its factor by weighted least
    squares from the sample's own counts, :math:`(W^T D^{-1} W)^{-1} W^T D^{-1} X_i / s_i` with D
    the mean rates: what a spatial prior believes plays no part, so that a factor does not look
    smooth because it was made so.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to read, see :func:`~pnmf_pyro.estimator.results.results_of`.
    X : array-like or sparse matrix of shape (n_samples, n_features), optional
        Counts of the fit; those of the AnnData object unless given.
    of : {'components', 'features'}
        Unit that is scored.
    coordinates : array-like of shape (n_samples, p), optional
        Places of the samples; those of the fit unless given, needed where it knew no space.
    groups : array-like of shape (n_samples,), optional
        Groups of the samples, across which there are no neighbours; those of the fit unless given.
    n_neighbors : int
        K, the number of nearest neighbours of a sample.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    DataFrame
        One row for each component or feature, with columns `component` or `feature`, `score` from
        0 to 1, `smooth` and `variance`. The score is NaN where the variance beyond noise is less
        than twice its standard error under a Poisson, :math:`\sqrt{2 / N}` times the mean noise:
        there is nothing to explain; and for a component that contributes less than one count in
        all. A structured array without pandas.

    Raises
    ------
    ValueError
        Where counts or coordinates are needed or do not fit the samples.
    """
    check_choice("of", of, ("components", "features"))
    found = results_of(fit, key)
    counts = check_counts(found.counts(X))
    shape = (len(found.size_factors), len(found.loadings))
    if counts.shape != shape:
        raise ValueError(f"X must be the counts of the fit, of shape {shape}; got {counts.shape}.")
    codes, means = _neighbourhood(found, coordinates, groups, n_neighbors)
    rates = sp.diags(1 / found.size_factors) @ sp.csr_matrix(counts.numpy(), dtype=np.float64)
    names: dict[str, np.ndarray]
    if of == "features":
        names, blocks = {"feature": found.feature_names}, _feature_blocks(rates)
    else:
        names = {"component": np.arange(found.n_components)}
        blocks = iter([_component_block(found, rates)])
    s = found.size_factors[:, None]
    parts = [_smooth_part(z, noise / s, codes, means) for z, noise in blocks]
    score, smooth, variance = np.concatenate(parts, 1)
    if of == "components":
        score[contributions(found).sum(0) < 1] = np.nan
    return as_table({**names, "score": score, "smooth": smooth, "variance": variance})


def _neighbourhood(
    found: Results, coordinates: ArrayLike | None, groups: ArrayLike | None, n_neighbors: int
) -> tuple[np.ndarray, sp.csr_array]:
    """Codes of the groups, and the matrix that averages over nearest neighbours in the group."""
    N = len(found.size_factors)
    coordinates = found.coordinates if coordinates is None else coordinates
    groups = found.groups if groups is None else groups
    points = check_coordinates(coordinates, N)
    codes = torch.zeros(N, dtype=torch.int64)
    if groups is not None:
        codes = GroupCodes.of(groups, N).encode(groups, N)
    K = check_count("n_neighbors", n_neighbors)
    return codes.numpy(), neighbor_weights(Places(points, codes), K)


def _feature_blocks(rates: sp.csr_matrix) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of features as z and s times their noise; the whole is never dense."""
    by_columns = rates.tocsc()
    N, D = rates.shape
    size = max(1, BLOCK_ENTRIES // N)
    for start in range(0, D, size):
        z = by_columns[:, start : start + size].toarray()
        yield z, z


def _component_block(found: Results, rates: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares estimates of all factors as z, and s times their noise."""
    W = found.loadings.astype(np.float64)
    mean = W @ found.factors.mean(0)
    weighted = W / _positive(mean)[:, None]
    A = weighted @ np.linalg.pinv(W.T @ weighted)
    return rates @ A, rates @ np.square(A)


def _smooth_part(
    z: np.ndarray, noise: np.ndarray, codes: np.ndarray, means: sp.csr_array
) -> np.ndarray:
    """Score, smooth part and variance beyond noise of each column of z, of shape (3, columns)."""
    N = len(z)
    centred = z - _group_means(z, codes)
    smooth = (centred * (means @ centred)).mean(0)
    variance = np.square(centred).mean(0) - noise.mean(0)
    clear = variance > 2 * np.sqrt(2 / N) * noise.mean(0)
    score = np.full(z.shape[1], np.nan)
    score[clear] = np.clip(smooth[clear] / variance[clear], 0, 1)
    return np.stack([score, smooth, variance])


def _group_means(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The mean of each sample's group, of the shape of z."""
    sizes = np.bincount(codes)
    members = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    return ((members @ z) / sizes[:, None])[codes]
