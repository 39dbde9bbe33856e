"""Clusters on factors against labels that no method saw."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree
from sklearn.decomposition import NMF, PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture

import pnmf_pyro
from benchmarks import ours, peers, tables
from benchmarks.measure import report, table
from pnmf_pyro.analysis import clustering
from pnmf_pyro.analysis.statistics import moran, neighbor_weights, places_of_samples

# Places over which factors are averaged, besides none.
NEIGHBOURS = (8, 16)

# Epochs of MOFA-FLEX at most.
EPOCHS = 300


@dataclass
class Labelled:
    """Counts at places with labels, and how many components and clusters are asked for."""

    X: sp.csr_matrix
    coordinates: np.ndarray
    labels: np.ndarray
    L: int
    n: int
    by_depth: bool

    @property
    def size_factors(self) -> np.ndarray:
        """Totals over their mean where depth is no part of the question, else 1."""
        total = np.asarray(self.X.sum(1)).ravel()
        return total / total.mean() if self.by_depth else np.ones(len(total))

    @property
    def rates(self) -> np.ndarray:
        """Counts over size factors, dense."""
        return self.X.toarray() / self.size_factors[:, None]


def labelled(name: str) -> Labelled:
    """One of the labelled data sets, as the performance page describes it."""
    adata = tables.adata(name)
    if name == "osmfish_cortex":
        adata = adata[adata.obs["valid"]]
        labels, L, n = adata.obs["region"].astype(str).to_numpy(), 10, 12
    elif name == "eco_mite":
        labels, L, n = adata.obs["substrate"].astype(str).to_numpy(), 3, 7
    else:  # which of four patterns are active
        active = np.asarray(adata.obsm["spfac"]) > 0
        labels = active @ 2 ** np.arange(active.shape[1])
        L, n = 7, len(np.unique(labels))
    places = np.asarray(adata.obsm["spatial"], dtype=float)
    return Labelled(tables.counts_of(adata), places, labels, L, n, name == "osmfish_cortex")


def scores(task: Labelled, found: np.ndarray) -> dict[str, float]:
    """How well clusters agree with the labels, and how smooth they are in space.

    `chaos` is the mean distance to the nearest sample of the same cluster, in standard deviations
    of the coordinates; `moran` the mean over clusters of Moran's I of who is in it.
    """
    x = (task.coordinates - task.coordinates.mean(0)) / task.coordinates.std(0)
    apart = np.zeros(len(x))
    members = [np.flatnonzero(found == cluster) for cluster in np.unique(found)]
    for rows in members:
        if len(rows) > 1:
            apart[rows] = cKDTree(x[rows]).query(x[rows], 2)[0][:, 1]
    one_hot = np.stack([np.isin(np.arange(len(x)), rows) for rows in members], 1).astype(float)
    weights = neighbor_weights(places_of_samples(task.coordinates, None, len(x)))
    return {
        "ari": float(adjusted_rand_score(task.labels, found)),
        "nmi": float(normalized_mutual_info_score(task.labels, found)),
        "chaos": float(apart.mean()),
        "moran": float(np.mean(moran(one_hot, weights))),
    }


def clusters(profile: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The mixture of `pnmf_pyro.domains`."""
    mixture = GaussianMixture(n, covariance_type="tied", n_init=3, random_state=seed)
    return mixture.fit_predict(profile)


def pieces(task: Labelled, profile: np.ndarray) -> np.ndarray:
    """The contiguous clusters of `pnmf_pyro.domains`, without draws."""
    links = clustering._links(task.coordinates, None, len(profile))
    mixture, possible = clustering._merged(profile, task.n, links)
    return (mixture.predict_proba(profile) * possible).argmax(1)


def averaged(task: Labelled, values: np.ndarray, k: int) -> np.ndarray:
    """Means over each sample and its k nearest places."""
    near = cKDTree(task.coordinates).query(task.coordinates, k + 1)[1]
    return values[near.reshape(len(values), -1)].mean(1)


def of_ours(task: Labelled, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Clusters of `pnmf_pyro.fit` in space, by `domains`."""
    model = ours.quietly(
        lambda: pnmf_pyro.fit(
            task.X,
            task.coordinates,
            n_components=task.L,
            size_factors="total" if task.by_depth else None,
            random_state=seed,
        )
    )
    for k in (0, *NEIGHBOURS):
        found = pnmf_pyro.domains(model, task.n, n_neighbors=k, random_state=seed)
        yield f"pnmf_pyro.domains, {k} neighbours", found.labels
    found = pnmf_pyro.domains(model, task.n, contiguous=True, random_state=seed)
    yield f"pnmf_pyro.domains, {clustering.OF_CONTIGUOUS} neighbours, contiguous", found.labels


def of_factors(
    name: str, factors: Callable[[Labelled, int], np.ndarray], root: bool = True
) -> Callable[[Labelled, int], Iterator[tuple[str, np.ndarray]]]:
    """Clusters of another method's factors, plain and averaged, by the same mixture."""

    def run(task: Labelled, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        values = factors(task, seed)
        for k in (0, clustering.OF_CONTIGUOUS, *NEIGHBOURS):
            profile = averaged(task, values, k)
            profile = np.sqrt(np.maximum(profile, 0)) if root else profile
            if k == clustering.OF_CONTIGUOUS:
                yield f"{name}, {k} neighbours, contiguous", pieces(task, profile)
            else:
                yield f"{name}, {k} neighbours", clusters(profile, task.n, seed)

    return run


def nmf(task: Labelled, seed: int) -> np.ndarray:
    """What components of scikit-learn's NMF contribute to the rates of samples."""
    model = NMF(
        task.L,
        init="nndsvdar",
        solver="mu",
        beta_loss="kullback-leibler",
        max_iter=1000,
        random_state=seed,
    )
    return model.fit_transform(task.rates) * model.components_.sum(1)


def pca(task: Labelled, seed: int) -> np.ndarray:
    """Principal components of the logarithms of rates."""
    return PCA(task.L, random_state=seed).fit_transform(np.log1p(task.rates))


def mofaflex(task: Labelled, seed: int) -> np.ndarray:
    """Smooth non-negative factors of MOFA-FLEX, negative binomial, as FlowSig sets them."""
    anndata, mfl = peers.require("anndata", "anndata"), peers.require("mofaflex", "mofaflex")
    adata = anndata.AnnData(task.X.copy(), obsm={"spatial": task.coordinates})
    model = mfl.MOFAFLEX(
        {"all": {"rna": adata}},
        mfl.DataOptions(covariates_obsm_key="spatial", plot_data_overview=False),
        mfl.ModelOptions(
            n_factors=task.L,
            weight_prior="Horseshoe",
            factor_prior="GP",
            likelihoods="NegativeBinomial",
            nonnegative_weights=True,
            nonnegative_factors=True,
        ),
        mfl.TrainingOptions(device="cpu", max_epochs=EPOCHS, seed=seed, save_path=False, lr=0.01),
        mfl.SmoothOptions(n_inducing=100, kernel="Matern"),
    )
    factors, weights = model.get_factors()["all"], model.get_weights()["rna"]
    values = factors.loc[adata.obs_names].to_numpy()
    across = weights.to_numpy().sum(1 if weights.shape[0] == values.shape[1] else 0)
    return values * across


def stamp(task: Labelled, seed: int) -> np.ndarray:
    """Shares of topics of STAMP."""
    anndata, sctm = peers.require("anndata", "anndata"), peers.require("sctm", "sctm")
    adata = anndata.AnnData(task.X.copy(), obsm={"spatial": task.coordinates})
    near = neighbor_weights(places_of_samples(task.coordinates, None, adata.n_obs))
    adata.obsp["spatial_connectivities"] = sp.csr_matrix((near + near.T) > 0, dtype=np.float32)
    vars(np).setdefault("Inf", np.inf)  # which sctm 0.1.3 reads, and NumPy 2 has no more
    sctm.seed.seed_everything(seed)
    model = sctm.stamp.STAMP(adata, n_topics=task.L)
    model.train(device="cpu")
    return np.asarray(model.get_cell_by_topic())


METHODS: dict[str, Callable[[Labelled, int], Iterator[tuple[str, np.ndarray]]]] = {
    "pnmf_pyro": of_ours,
    "scikit-learn": of_factors("scikit-learn NMF", nmf),
    "pca": of_factors("PCA", pca, root=False),
    "mofaflex": of_factors("MOFA-FLEX", mofaflex),
    "stamp": of_factors("STAMP", stamp),
}


def labels(options: argparse.Namespace) -> None:
    """ARI and NMI of clusters with labels, their CHAOS and Moran's I, mean of `--repeats` seeds.

    `--data` is of osmfish_cortex, eco_mite and sim_nsf_S1; `--peers` of pnmf_pyro, scikit-learn,
    pca, mofaflex and stamp, where "all" is the first three.
    """
    data = [name for name in options.data.split(",") if name in LABELLED] or LABELLED
    chosen = list(METHODS)[:3] if options.peers == "all" else options.peers.split(",")
    rows = [["data", "clusters by", "ARI", "over seeds", "NMI", "CHAOS", "Moran's I"]]
    logging.disable(logging.INFO)
    for name in data:
        task = labelled(name)
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(options.repeats):
            for method in chosen:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    for what, clustered in METHODS[method](task, seed):
                        line = scores(task, clustered)
                        report(benchmark="labels", data=name, method=what, seed=seed, **line)
                        found.setdefault(what, []).append(line)
        for what, lines in found.items():
            mean = {key: np.mean([line[key] for line in lines]) for key in lines[0]}
            spread = np.std([line["ari"] for line in lines])
            numbers = [mean["ari"], spread, mean["nmi"], mean["chaos"], mean["moran"]]
            rows.append([name, what, *(f"{number:.3f}" for number in numbers)])
    sys.stdout.write(table(rows))


LABELLED = ["osmfish_cortex", "eco_mite", "sim_nsf_S1"]
