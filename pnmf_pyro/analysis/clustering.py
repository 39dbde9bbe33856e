r"""Domains: samples that are alike in what their components contribute, and how sure that is.

With :math:`c_{il} = f_{il} \sum_j W_{jl}` the counts that a component contributes to a sample of
mean depth, the profile of a sample is the square root of their mean over the sample and its K
nearest places,

.. math:: v_{il} = \Bigl(\frac{1}{K + 1} \sum_{i' \in \{i\} \cup N_K(i)} c_{i'l}\Bigr)^{1/2},

which has about the same spread for rare and for frequent components, since counts of a Poisson
have. Profiles are divided by a mixture of n normals with one covariance. It is fitted to the mean
of the posterior. The probability of a domain is the mean of its responsibility over draws of the
posterior, and so counts what the factors are not sure of. The mixture stays the same for all draws,
and so do the numbers of its parts.

Contiguous domains are found by merging. Each sample begins alone. Of all pairs of domains that
touch the one is merged that raises the sum of squares within domains least (Ward 1963), until n
domains are left. The normals are then those of the domains, and a sample can be of its own domain
or that of a neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree
from sklearn.cluster import AgglomerativeClustering
from sklearn.mixture import GaussianMixture

from pnmf_pyro.analysis.statistics import neighbor_weights, places_of_samples
from pnmf_pyro.analysis.tables import as_table
from pnmf_pyro.data.checks import check_count, check_whole
from pnmf_pyro.data.random_state import RandomState, check_random_state
from pnmf_pyro.estimator.results import Fit, Results, results_of
from pnmf_pyro.training.fitted import module_of
from pnmf_pyro.transforms import factor_samples

if TYPE_CHECKING:
    from pandas import DataFrame

# Nearest places over which profiles are averaged unless said otherwise, and where domains are
# contiguous. Nearest places to which a contiguous domain may go on.
NEIGHBORS, OF_CONTIGUOUS = 16, 4
ADJACENT = 8

# Added to variances of profiles.
LEAST = 1e-6

# Samples to which a mixture is fitted at most; the others are only assigned.
FITTED = 50_000

# Starts of a mixture, and draws that are held at once.
STARTS, AT_ONCE = 3, 10


@dataclass(frozen=True)
class Domains:
    """Domains of samples, the largest first.

    Attributes
    ----------
    probabilities : ndarray of shape (n_samples, n)
        Probability that a sample is of a domain.
    contributions : ndarray of shape (n_samples, n_components)
        Expected counts that components contribute, averaged as for the profile of each sample.
    coordinates, groups : ndarray or None
        Places and sections of the samples, where they are known.
    """

    probabilities: np.ndarray
    contributions: np.ndarray
    coordinates: np.ndarray | None
    groups: np.ndarray | None

    @property
    def labels(self) -> np.ndarray:
        """Number of each sample's domain, counted from 0; of shape (n_samples,)."""
        return self.probabilities.argmax(1)

    @property
    def certainty(self) -> np.ndarray:
        """Probability of the domain in `labels`, of shape (n_samples,)."""
        return self.probabilities.max(1)

    @property
    def shares(self) -> np.ndarray:
        """Share of each component in the counts of a domain, of shape (n, n_components)."""
        totals = self.probabilities.T @ self.contributions
        return totals / np.maximum(totals.sum(1, keepdims=True), np.finfo(float).tiny)

    @property
    def table(self) -> DataFrame | np.ndarray:
        """One row for each domain.

        Columns `domain`; `samples`, the number of them; `certainty`, their mean; `component`, the
        one that is highest above its share in all samples, and `ratio`, by how much. A structured
        array without pandas.
        """
        n = self.probabilities.shape[1]
        size = np.bincount(self.labels, minlength=n)
        whole = self.contributions.sum(0) / self.contributions.sum()
        ratio = self.shares / np.maximum(whole, np.finfo(float).tiny)
        total = np.bincount(self.labels, self.certainty, minlength=n)
        certainty = np.divide(total, size, out=np.full(n, np.nan), where=size > 0)
        return as_table(
            {
                "domain": np.arange(n),
                "samples": size,
                "certainty": certainty,
                "component": ratio.argmax(1),
                "ratio": ratio.max(1),
            }
        )


def domains(
    fit: Fit,
    n: int,
    *,
    contiguous: bool = False,
    n_neighbors: int | None = None,
    coordinates: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    n_draws: int = 50,
    random_state: RandomState = 0,
    key: str = "pnmf",
) -> Domains:
    """Divide samples into domains by their factors, and say how sure that is.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to read, see :func:`~pnmf_pyro.estimator.results.results_of`. An AnnData object does not
        hold how errors go together: they are then taken for independent, and averages over
        neighbours for surer than they are. Pass the model where the certainty matters.
    n : int
        Number of domains.
    contiguous : bool
        Whether each domain is one piece of the tissue, as a layer is, but for samples at its
        border. Else a domain may come again elsewhere, as a follicle does. Parts of a tissue that
        do not touch, and sections, are linked where they are nearest. It needs places.
    n_neighbors : int, optional
        Number K of nearest places over which counts are averaged: regions, in which types of cells
        are mixed, need some; 0 sorts samples by their own factors, into types. It acts where places
        are known. It is 16 unless given, and 4 for contiguous domains.
    coordinates : array-like of shape (n_samples, p), optional
        Places of the samples; those of the fit unless given.
    groups : array-like of shape (n_samples,), optional
        Sections, across which there are no neighbours; those of the fit unless given.
    n_draws : int
        Number of draws of the posterior.
    random_state : int, RandomState, Generator or None
        Seed of the draws and of the mixture's starts.
    key : str
        `key_added` of the fit, for AnnData.

    Returns
    -------
    Domains

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> counts = np.repeat([[9, 1], [1, 9]], 20, axis=0)
    >>> model = pnmf_pyro.fit(counts, n_components=2)
    >>> found = pnmf_pyro.domains(model, 2)
    >>> np.bincount(found.labels)
    array([20, 20])
    """
    found = results_of(fit, key)
    N = len(found.factors)
    check_count("n_draws", n_draws)
    if check_count("n", n) > N:
        raise ValueError(f"n must be at most the number of samples, {N}; got {n}.")
    where = found.coordinates if coordinates is None else coordinates
    sections = found.groups if groups is None else groups
    if n_neighbors is None:
        n_neighbors = OF_CONTIGUOUS if contiguous else NEIGHBORS
    mean = _mean_over_neighbors(where, sections, N, n_neighbors)
    weight = found.loadings.astype(np.float64).sum(0)
    random = check_random_state(random_state)
    expected = mean @ (found.factors * weight)
    if contiguous:
        mixture, possible = _merged(np.sqrt(expected), n, _links(where, sections, N))
    else:
        mixture, possible = _mixture(np.sqrt(expected), n, random), np.ones(n)
    probabilities = np.zeros((N, n))
    for start in range(0, n_draws, AT_ONCE):
        for draw in _draws(fit, found, min(AT_ONCE, n_draws - start), random):
            likely = mixture.predict_proba(np.sqrt(mean @ (draw * weight)))
            likely = np.maximum(likely, np.finfo(float).tiny) * possible
            probabilities += likely / likely.sum(1, keepdims=True) / n_draws
    order = np.argsort(-np.bincount(probabilities.argmax(1), minlength=n), kind="stable")
    return Domains(
        probabilities[:, order],
        expected,
        None if where is None else np.asarray(where),
        None if sections is None else np.asarray(sections),
    )


def _mixture(profile: np.ndarray, n: int, random: np.random.RandomState) -> GaussianMixture:
    """A mixture of n normals with one covariance, fitted to profiles (N, L)."""
    mixture = GaussianMixture(
        n, covariance_type="tied", n_init=STARTS, reg_covar=LEAST, random_state=random
    )
    N = len(profile)
    return mixture.fit(profile if N <= FITTED else profile[random.choice(N, FITTED, replace=False)])


def _merged(profile: np.ndarray, n: int, links: sp.csr_array) -> tuple[GaussianMixture, np.ndarray]:
    """Merge samples along their links into n domains.

    Returns
    -------
    mixture : GaussianMixture
        Shares and means of the domains in the profiles (N, L), and their one covariance.
    possible : ndarray of bool, shape (N, n)
        Whether a sample, or one that it is linked with, is of a domain.
    """
    merging = AgglomerativeClustering(n, connectivity=sp.csr_matrix(links))
    is_of = np.eye(n)[merging.fit_predict(profile)]
    size = is_of.sum(0)
    mixture = GaussianMixture(n, covariance_type="tied")
    mixture.weights_, mixture.means_ = size / size.sum(), is_of.T @ profile / size[:, None]
    rest = profile - is_of @ mixture.means_
    mixture.covariances_ = rest.T @ rest / len(rest) + LEAST * np.eye(rest.shape[1])
    mixture.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(mixture.covariances_)).T
    return mixture, (links @ is_of + is_of) > 0


def _links(coordinates: ArrayLike | None, groups: ArrayLike | None, N: int) -> sp.csr_array:
    """Links (N, N) between near samples, which leave no part of the samples alone."""
    if coordinates is None:
        raise ValueError(
            "contiguous=True needs the places of the samples, and the fit has none. Pass "
            "coordinates=, or leave contiguous out."
        )
    places = places_of_samples(coordinates, groups, N)
    near, points = neighbor_weights(places, ADJACENT), places.coordinates.cpu().numpy()
    links = near + near.T
    while True:
        n_parts, part = sp.csgraph.connected_components(links, directed=False)
        if n_parts == 1:
            return links
        ends = []
        for one in np.delete(np.arange(n_parts), np.bincount(part).argmax()):
            inside, outside = np.flatnonzero(part == one), np.flatnonzero(part != one)
            distance, nearest = cKDTree(points[outside]).query(points[inside])
            ends.append((inside[distance.argmin()], outside[nearest[distance.argmin()]]))
        rows, columns = np.transpose(ends)
        added = sp.csr_array((np.ones(len(ends)), (rows, columns)), shape=links.shape)
        links = links + added + added.T


def _mean_over_neighbors(
    coordinates: ArrayLike | None, groups: ArrayLike | None, N: int, k: int
) -> sp.csr_array:
    """Weights (N, N) of the mean over each sample and its k nearest places."""
    itself = sp.csr_array(sp.identity(N, format="csr"))
    if check_whole("n_neighbors", k) == 0 or coordinates is None:
        return itself
    near = neighbor_weights(places_of_samples(coordinates, groups, N), k)
    alone = sp.diags_array(1.0 - np.asarray(near.sum(1)).ravel())
    return (itself + k * (near + alone)) / (k + 1)


def _draws(fit: Fit, found: Results, n_draws: int, random: np.random.RandomState) -> np.ndarray:
    """Draws of the factors, (n_draws, N, L)."""
    if (module := module_of(fit)) is not None:
        return np.asarray(factor_samples(module, n_draws, return_exp=True, random_state=random))
    sd = found.log_factors_sd
    middle = np.log(np.maximum(found.factors, np.finfo(np.float32).tiny)) - sd**2 / 2
    return np.exp(middle + sd * random.standard_normal((n_draws, *sd.shape)))
