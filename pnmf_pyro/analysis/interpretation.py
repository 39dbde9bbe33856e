r"""What the components of a fit mean: their features, their share of the counts, their smoothness.

With the factors :math:`f_{il} = E \exp F_{il}`, the expected count of a sample and a feature is a
sum over components, :math:`s_i \sum_l f_{il} W_{jl}`. All scores here are made of its terms, and so
do not depend on how a fit divides a scale between factors and loadings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from pnmf_pyro.analysis.statistics import neighbor_weights, places_of_samples
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.checks import check_choice, check_count
from pnmf_pyro.data.counts import CountsLike
from pnmf_pyro.estimator.inputs import keys_of
from pnmf_pyro.estimator.results import Fit, Results, counts_of_fit, results_of

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
    over features is the Kullback-Leibler divergence of a component's profile from that of the whole
    (Kullback and Leibler 1951). It is large for features that are frequent in a component and more
    so than elsewhere; rare features, whose ratio is large by chance, count for little.

    Parameters
    ----------
    fit, key
        As for :func:`contributions`.
    by : {'weight', 'specificity'}
        Score to return.

    Returns
    -------
    DataFrame of shape (n_features, n_components)
        With the names of features as index and columns pnmf0, pnmf1, ...; without pandas, a
        structured array that has the names in its field `feature`.
    """
    check_choice("by", by, RANKINGS)
    found = results_of(fit, key)
    columns = {f"pnmf{number}": score for number, score in enumerate(_scores(found)[by].T)}
    return as_table({"feature": found.feature_names, **columns}, index="feature")


def top_features(
    fit: Fit, n: int = 10, by: str = "weight", *, key: str = "pnmf"
) -> DataFrame | np.ndarray:
    """Return the first n features of each component.

    Parameters
    ----------
    fit, key
        As for :func:`contributions`.
    n : int
        Number of features of each component; all where there are fewer.
    by : {'weight', 'specificity'}
        Score to rank by, see :func:`feature_scores`.

    Returns
    -------
    DataFrame
        One row for each component and rank, in that order, with columns `component` (from 0),
        `rank` (from 1), `feature`, `weight`, `specificity` and `share`, the part of the feature's
        expected counts that comes from the component. A structured array without pandas.
    """
    found = results_of(fit, key)
    scores, first = ranked_features(found, n, by)
    component, rank = (index.ravel() for index in np.indices(first.shape))
    ranked = first.ravel()
    values = {name: score[ranked, component] for name, score in scores.items()}
    names = {"component": component, "rank": rank + 1, "feature": found.feature_names[ranked]}
    return as_table({**names, **values})


def ranked_features(found: Results, n: int, by: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return all scores by name, (D, L), and numbers of each component's first features, (L, n)."""
    check_choice("by", by, RANKINGS)
    scores = _scores(found)
    return scores, np.argsort(-scores[by], axis=0, kind="stable")[: check_count("n", n)].T


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
    X: CountsLike | None = None,
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
    the mean rates: a spatial prior plays no part, and cannot make a factor look smooth.

    Parameters
    ----------
    fit, key
        As for :func:`contributions`.
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

    Returns
    -------
    DataFrame
        One row for each component or feature, with columns `component` or `feature`, `score` from
        0 to 1, `smooth` and `variance`. The score is NaN where there is nothing to explain: the
        variance beyond noise is less than twice its standard error under a Poisson,
        :math:`\sqrt{2 / N}` times the mean noise, or a component contributes less than one count.
        A structured array without pandas.
    """
    check_choice("of", of, ("components", "features"))
    found = results_of(fit, key)
    N = len(found.size_factors)
    counts = counts_of_fit(found.counts(keys_of(fit).counts(X)), (N, len(found.loadings)))
    coordinates = found.coordinates if coordinates is None else coordinates
    places = places_of_samples(coordinates, found.groups if groups is None else groups, N)
    codes = np.zeros(N, dtype=np.int64) if places.groups is None else places.groups.numpy()
    means = neighbor_weights(places, check_count("n_neighbors", n_neighbors))
    rates = sp.diags(1 / found.size_factors) @ sp.csr_matrix(counts.numpy(), dtype=np.float64)
    s = found.size_factors[:, None]
    if of == "features":
        names = {"feature": found.feature_names}
        parts = [_smooth_part(z, z / s, codes, means) for z in _feature_blocks(rates)]
        score, smooth, variance = np.concatenate(parts, 1)
    else:
        names = {"component": np.arange(found.n_components)}
        A = _least_squares(found)
        score, smooth, variance = _smooth_part(rates @ A, rates @ np.square(A) / s, codes, means)
        score[contributions(found).sum(0) < 1] = np.nan
    return as_table({**names, "score": score, "smooth": smooth, "variance": variance})


def _feature_blocks(rates: sp.csr_matrix) -> Iterator[np.ndarray]:
    """Rates of blocks of features, dense; the whole is never dense."""
    by_columns = rates.tocsc()
    N, D = rates.shape
    size = at_once(N)
    for start in range(0, D, size):
        yield by_columns[:, start : start + size].toarray()


def _least_squares(found: Results) -> np.ndarray:
    """The matrix (D, L) that estimates all factors of a sample from its rates."""
    W = found.loadings.astype(np.float64)
    mean = W @ found.factors.mean(0)
    weighted = W / _positive(mean)[:, None]
    return weighted @ np.linalg.pinv(W.T @ weighted)


def _smooth_part(
    z: np.ndarray, noise: np.ndarray, codes: np.ndarray, means: sp.csr_array
) -> np.ndarray:
    """Score, smooth part and variance beyond noise of each column of z, of shape (3, columns)."""
    N = len(z)
    members = sp.csr_matrix((np.ones(N), (codes, np.arange(N))))
    centred = z - ((members @ z) / np.bincount(codes)[:, None])[codes]
    smooth = (centred * (means @ centred)).mean(0)
    variance = np.square(centred).mean(0) - noise.mean(0)
    clear = variance > 2 * np.sqrt(2 / N) * noise.mean(0)
    score = np.full(z.shape[1], np.nan)
    score[clear] = np.clip(smooth[clear] / variance[clear], 0, 1)
    return np.stack([score, smooth, variance])
