"""Hidden entries: how well they are predicted, and what is lost of the factors."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import NMF, non_negative_factorization

import pnmf_pyro
from benchmarks import ours, tables
from benchmarks.measure import median, report, table
from pnmf_pyro.transforms import get_factors

# Share of the entries that is hidden.
SHARE = 0.1

# Times that the peer fills the hidden entries by its own fit, and steps between: enough to settle.
ROUNDS, STEPS = 100, 20


def hidden(options: argparse.Namespace) -> None:
    """Deviance of hidden counts: `fit` with a mask, and scikit-learn's NMF that fills them."""
    rows = [["data", "ours", "scikit-learn", "at its best", "ratio", "CPU s", "its CPU s"]]
    for name in options.data.split(","):
        X = _frequent(tables.simulated(1000, 200, 0.5, 6) if name == "simulated" else name, options)
        found = [_once(X, seed, options.L) for seed in range(options.repeats)]
        line = {key: [one[key] for one in found] for key in found[0]}
        report(benchmark="hidden", data=name, shape=X.shape, L=options.L, **line)
        ratio = median([a / b for a, b in zip(line["ours"], line["peer"], strict=True)])
        keys = ("ours", "peer", "peer_best")
        numbers = [*(median(line[key]) for key in keys), ratio]
        numbers += [median(line[key]) for key in ("cpu_seconds", "peer_cpu_seconds")]
        rows.append([name, *(f"{number:.4g}" for number in numbers)])
    sys.stdout.write(table(rows))


def hidden_recovery(options: argparse.Namespace) -> None:
    """Correlation of true and learned log-factors, from all entries and with some hidden."""
    rows = [["seed", "all entries: lowest, mean", "a tenth hidden: lowest, mean"]]
    for seed in range(options.repeats):
        X, log_factors = _simulated(seed, options.N, options.D, options.L)
        seen = np.random.default_rng(seed).random(X.shape) >= SHARE
        found = [
            ours.recovery(pnmf_pyro.fit(X, n_components=options.L, mask=mask), log_factors)
            for mask in (None, seen)
        ]
        report(benchmark="hidden_recovery", seed=seed, all=found[0], hidden=found[1])
        rows.append([str(seed), *(f"{min(one):.4f}, {np.mean(one):.4f}" for one in found)])
    sys.stdout.write(table(rows))


def _simulated(seed: int, N: int, D: int, L: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of a mean of 5, and log-factors (N, L)."""
    random = np.random.default_rng(seed)
    F = random.normal(size=(N, L))
    rate = np.exp(F) @ random.gamma(0.3, size=(L, D))
    return random.poisson(rate * 5 / rate.mean()).astype(np.float64), F


def _frequent(given: Any, options: argparse.Namespace) -> np.ndarray:
    """The features with the highest totals of a table, dense."""
    X = tables.real(given) if isinstance(given, str) else given
    X = sp.csr_matrix(X)
    totals = np.asarray(X.sum(0)).ravel()
    chosen = np.sort(np.argsort(-totals, kind="stable")[: options.D])
    return X[:, chosen[totals[chosen] > 0]].toarray().astype(np.float64)


def _once(X: np.ndarray, seed: int, L: int) -> dict[str, float]:
    """Hide entries at random, and predict them in both ways."""
    seen = np.random.default_rng(seed).random(X.shape) >= SHARE
    began = time.process_time()
    model = ours.quietly(
        lambda: pnmf_pyro.fit(np.where(seen, X, np.nan), n_components=L, mask=seen)
    )
    cpu_seconds = time.process_time() - began
    rate = get_factors(model).astype(np.float64) @ model.components_
    began = time.process_time()
    course = _filled(X, seen, L)
    return {
        "ours": pnmf_pyro.deviance(X, rate, mask=~seen),
        "peer": course[-1],
        "peer_best": min(course),
        "cpu_seconds": cpu_seconds,
        "peer_cpu_seconds": time.process_time() - began,
    }


def _filled(X: np.ndarray, seen: np.ndarray, L: int) -> list[float]:
    """Deviances of hidden counts while scikit-learn's NMF fills them by its own fit, in turn."""
    means = (X * seen).sum(0) / np.maximum(seen.sum(0), 1)
    full = np.where(seen, X, means)
    settings: dict[str, Any] = {"solver": "mu", "beta_loss": "kullback-leibler", "tol": 0}
    nmf = NMF(L, init="nndsvda", random_state=0, max_iter=STEPS, **settings)
    W = ours.quietly(lambda: nmf.fit_transform(full))
    H, course = nmf.components_, []
    for _ in range(ROUNDS):
        rate = W @ H
        course.append(pnmf_pyro.deviance(X, rate, mask=~seen))
        full = np.where(seen, X, rate)
        W, H, _ = ours.quietly(
            lambda full=full, W=W, H=H: non_negative_factorization(
                full, W=W, H=H, n_components=L, init="custom", max_iter=STEPS, **settings
            )
        )
    return course
