"""The packages to compare with, each imported only where it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import NMF, non_negative_factorization


def require(module: str, package: str) -> Any:
    """Import an optional peer, or say how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"This comparison needs {package}: pip install {package}") from error


def pnmf_iterations(X: sp.csr_matrix, L: int, n_iter: int) -> None:
    """Run full-data Adam steps of `pnmf` 0.1.0 with three draws, on the dense matrix it takes."""
    PNMF = require("PNMF", "pnmf==0.1.0").PNMF
    PNMF(n_components=L, E=3, max_iter=n_iter, tol=0, random_state=0, device="cpu").fit(X.toarray())


def kl_iterations(X: sp.csr_matrix, L: int, n_iter: int) -> None:
    """Run multiplicative Kullback-Leibler iterations of scikit-learn, without stopping early."""
    random = np.random.default_rng(0)
    W = random.random((X.shape[0], L), dtype=np.float32) + 0.1
    H = random.random((L, X.shape[1]), dtype=np.float32) + 0.1
    non_negative_factorization(
        X,
        W=W,
        H=H,
        n_components=L,
        init="custom",
        solver="mu",
        beta_loss="kullback-leibler",
        tol=0,
        max_iter=n_iter,
    )


def torchnmf_iterations(X: sp.csr_matrix, L: int, n_iter: int) -> None:
    """Run multiplicative Kullback-Leibler iterations of torchnmf on a sparse tensor."""
    import torch

    nmf = require("torchnmf.nmf", "torchnmf")
    coo = X.tocoo()
    places = np.stack([coo.row, coo.col])
    target = torch.sparse_coo_tensor(places, coo.data, coo.shape, check_invariants=False)
    nmf.NMF(target.shape, rank=L).fit(target.coalesce(), beta=1, tol=0, max_iter=n_iter)


def kl_fit(L: int) -> NMF:
    """Return scikit-learn's multiplicative Kullback-Leibler NMF, to be fitted at its own tol."""
    return NMF(
        L,
        init="nndsvda",
        solver="mu",
        beta_loss="kullback-leibler",
        tol=1e-4,
        max_iter=5000,
        random_state=0,
    )
