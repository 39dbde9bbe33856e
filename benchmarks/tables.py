"""Tables of counts to measure on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.datasets import load_digits

DATA = Path(os.environ.get("PNMF_DATA", Path(__file__).parents[2] / "shared" / "data"))


def simulated(N: int, D: int, density: float, L: int = 10, seed: int = 0) -> sp.csr_matrix:
    """Counts from a Poisson factorisation, scaled so that about `density` of them are not zero."""
    random = np.random.default_rng(seed)
    factors, loadings = truth(N, D, density, L, random)
    blocks = []
    for start in range(0, N, 5000):
        rates = factors[start : start + 5000] @ loadings.T
        blocks.append(sp.csr_matrix(random.poisson(rates).astype(np.float32)))
    return sp.vstack(blocks, format="csr")


def truth(
    N: int, D: int, density: float, L: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (N, L) and loadings (D, L) of the simulated counts."""
    factors = np.exp(random.normal(size=(N, L))).astype(np.float32)
    loadings = random.gamma(0.3, 1.0, size=(D, L)).astype(np.float32)
    return factors, np.float32(_scale_for(density, factors[:500] @ loadings.T)) * loadings


def _scale_for(density: float, rates: np.ndarray) -> float:
    """Solve mean(1 - exp(-scale * rate)) = density by bisection in the logarithm."""
    low, high = 1e-8, 1e4
    for _ in range(60):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if -np.expm1(-middle * rates).mean() > density else (middle, high)
    return float(low)


def real(name: str) -> sp.csr_matrix:
    """One of the files of real counts, or scikit-learn's digits; CSR, float32."""
    if name == "digits":
        return sp.csr_matrix(load_digits().data.astype(np.float32))
    return counts_of(adata(name))


def adata(name: str) -> Any:
    """One of the files of real counts."""
    import anndata

    return anndata.read_h5ad(DATA / f"{name}.h5ad")


def counts_of(adata: Any) -> sp.csr_matrix:
    """Its counts, CSR, float32."""
    return sp.csr_matrix(adata.layers.get("counts", adata.X), dtype=np.float32)


def tissue(
    N: int, D: int, density: float, L: int = 10, seed: int = 0
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray, np.ndarray]:
    """Counts of a simulated tissue: one place on each unit of area on average, and smooth factors.

    Each log-factor is a sum of 300 waves: in the limit of many a Gaussian process with a Matern-3/2
    kernel, of standard deviation 1 and a lengthscale of 5 to 15 times the spacing
    (:func:`lengthscales`).

    Returns
    -------
    X : CSR matrix of shape (N, D)
    coordinates : ndarray of shape (N, 2)
    log_factors : ndarray of shape (N, L)
    loadings : ndarray of shape (D, L)
    """
    random = np.random.default_rng(seed)
    coordinates = random.uniform(size=(N, 2)) * np.sqrt(N)
    fields = np.stack([_waves(coordinates, l, random) for l in lengthscales(L)], 1)
    loadings = random.gamma(0.1, 1.0, size=(D, L)).astype(np.float32)
    some = np.exp(fields[random.integers(N, size=500)]).astype(np.float32)
    loadings *= np.float32(_scale_for(density, some @ loadings.T))
    blocks = []
    for start in range(0, N, 5000):
        rates = np.exp(fields[start : start + 5000]).astype(np.float32) @ loadings.T
        blocks.append(sp.csr_matrix(random.poisson(rates).astype(np.float32)))
    return sp.vstack(blocks, format="csr"), coordinates, fields, loadings


def lengthscales(L: int) -> np.ndarray:
    """Lengthscales of the fields of a tissue, shape (L,)."""
    return np.geomspace(5, 15, L)


def _waves(x: np.ndarray, lengthscale: float, random: np.random.Generator) -> np.ndarray:
    """Random Fourier features: frequencies of a Matern-3/2 kernel are Student's with 3 degrees."""
    n = 300
    frequencies = random.normal(size=(n, 2)) / np.sqrt(random.chisquare(3, size=(n, 1)) / 3)
    phase, weight = random.uniform(0, 2 * np.pi, n), random.normal(size=n)
    field = np.zeros(len(x))
    for one, shift, amplitude in zip(frequencies / lengthscale, phase, weight, strict=True):
        field += amplitude * np.cos(x @ one + shift)
    return field * np.sqrt(2 / n)
