"""What the user gives, checked once at the door: counts, size factors, and batches of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyro
import scipy.sparse as sp
import torch
from torch import Tensor

from pnmf_pyro.counts import Counts, as_counts

NAMED_AT_MOST = 5

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class Batch:
    """The part of the data that one step sees; without arguments, all of it, unobserved.

    Model and guide are given the same batch, so they can never see different samples.

    Parameters
    ----------
    counts : Counts of shape (n, d), optional
        Observed counts; None to draw them from the model.
    samples, features : Tensor of int64, optional
        Which samples and features of the data the counts are; None for all.
    likelihood_scale, prior_scale : float
        Factors on the log-likelihood and on the KL of each sample, beside the N/n of the plate.
    """

    counts: Counts | None = None
    samples: Tensor | None = None
    features: Tensor | None = None
    likelihood_scale: float = 1.0
    prior_scale: float = 1.0

    @property
    def dense_counts(self) -> Tensor | None:
        """The counts as a tensor of shape (n, d), for likelihoods that need every zero."""
        return None if self.counts is None else self.counts.to_dense()

    def plate(self, n_samples: int) -> pyro.plate:
        """Return the plate over samples, which scales a batch of n to all `n_samples`."""
        subsample: Any = range(n_samples) if self.samples is None else self.samples
        return pyro.plate("samples", n_samples, subsample=subsample, dim=-1)


def take(values: MaybeTensor, index: Any, dim: int = -1) -> MaybeTensor:
    """Select `index` along `dim`; all of it if the index is None, None if there are no values.

    The index is a tensor of whole numbers, or anything else that selects from one dimension, such
    as a list, an array, a slice or a mask.
    """
    if index is None or values is None:
        return values
    if isinstance(index, tuple):
        index = list(index)
    if not isinstance(index, Tensor) or index.dtype == torch.bool:
        index = torch.arange(values.shape[dim], device=values.device)[index]
    return values.index_select(dim, index)


@dataclass
class Batches:
    """An endless stream of batches of a data set.

    A pass over the samples visits each once, in batches of `batch_size` of which the last may be
    smaller; there is one such pass for each batch of features. A batch that covers everything is
    the data set itself.

    Parameters
    ----------
    counts : Counts of shape (N, D)
    batch_size, y_batch_size : int, optional
        Samples and features in a batch; all of them unless given.
    shuffle : bool
        Visit in a new random order in each pass, and in the given order otherwise.
    scale_ll_D : bool
        Scale the likelihood of a batch of features by D/d, so that it estimates that of all.
    scale_kl_NM : bool
        Scale the KL of a batch of samples by N/n likewise.
    generator : torch.Generator, optional
        Source of the random order; needed where `shuffle` is true.
    """

    counts: Counts
    batch_size: int | None = None
    y_batch_size: int | None = None
    shuffle: bool = False
    scale_ll_D: bool = True
    scale_kl_NM: bool = True
    generator: torch.Generator | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Iterate without end, in each pass over every pair of a sample and a feature batch."""
        N, D = self.counts.shape
        while True:
            for features in self._pieces(D, self.y_batch_size):
                for samples in self._pieces(N, self.batch_size):
                    yield self.batch(samples, features)

    def one_pass(self) -> Iterator[Batch]:
        """Iterate once over all samples in their order, each batch with all features."""
        N = self.counts.shape[0]
        for samples in _split(torch.arange(N), self.batch_size or N):
            yield self.batch(samples, None)

    def batch(self, samples: Tensor | None, features: Tensor | None) -> Batch:
        """Return the batch of these samples and features."""
        N, D = self.counts.shape
        counts = self.counts
        if samples is not None:
            samples = samples.to(counts.device)
            counts = counts.rows(samples)
        if features is not None:
            features = features.to(counts.device)
            counts = counts.columns(features)
        n, d = counts.shape
        return Batch(
            counts,
            samples,
            features,
            likelihood_scale=D / d if self.scale_ll_D else 1.0,
            prior_scale=1.0 if self.scale_kl_NM else n / N,
        )

    def _pieces(self, size: int, batch_size: int | None) -> Sequence[Tensor | None]:
        if batch_size is None or batch_size >= size:
            return (None,)
        order = torch.arange(size)
        if self.shuffle:
            order = torch.randperm(size, generator=self.generator)
        return _split(order, batch_size)


def _split(order: Tensor, size: int) -> Sequence[Tensor | None]:
    """Cut into pieces of `size`, the last perhaps smaller; one piece is no index at all."""
    return (None,) if size >= len(order) else order.split(size)


def check_counts(X: Any) -> Counts:
    """Check a matrix of counts of shape (N, D) and return it for computing.

    Parameters
    ----------
    X : ndarray, Tensor, scipy sparse matrix, pandas DataFrame or Counts of shape (N, D)
        Finite and non-negative. Sparse input stays sparse.

    Returns
    -------
    Counts
        float64 where X is float64 and float32 otherwise.

    Raises
    ------
    ValueError
        For a matrix that is empty, not two-dimensional or not numeric, and for entries that are
        NaN, infinite or negative.

    Warns
    -----
    UserWarning
        For entries that are not whole numbers.
    """
    counts = check_matrix(X)
    _warn_not_whole(counts.values)
    return counts


def check_matrix(X: Any) -> Counts:
    """Check a matrix like :func:`check_counts`, but say nothing of numbers that are not whole."""
    counts = as_counts(_numeric_matrix(X))
    _check_entries(counts.values)
    return counts


def warn_empty(counts: Counts, feature_names: Sequence[str] | None = None) -> None:
    """Warn of samples and of features without any counts, with their number and names.

    Parameters
    ----------
    counts : Counts of shape (N, D)
    feature_names : sequence of str, optional
        Column numbers stand in for names where there are none.
    """
    ones = counts.values.new_ones(counts.shape[0], 1)
    column_totals = counts.transposed_matmul(counts.values, ones)[:, 0]
    _warn_empty("samples", counts.row_totals)
    _warn_empty("features", column_totals, feature_names)


def _numeric_matrix(X: Any) -> Any:
    if isinstance(X, (Counts, Tensor)) or hasattr(X, "tocsr"):
        matrix = X
    elif hasattr(X, "dtypes") and hasattr(X, "sparse") and _all_sparse(X):
        matrix = X.sparse.to_coo()
    else:
        matrix = np.asarray(X)
    if len(matrix.shape) != 2:
        raise ValueError(
            f"X must be a matrix of shape (samples, features); got shape {tuple(matrix.shape)}. "
            "Reshape a single sample with X.reshape(1, -1)."
        )
    if 0 in matrix.shape:
        raise ValueError(f"X must have samples and features; got shape {tuple(matrix.shape)}.")
    if isinstance(matrix, np.ndarray) and matrix.dtype.kind not in "biuf":
        return _as_numbers(matrix)
    return matrix


def _all_sparse(frame: Any) -> bool:
    return all(hasattr(kind, "subtype") and "Sparse" in str(kind) for kind in frame.dtypes)


def _as_numbers(matrix: np.ndarray) -> np.ndarray:
    try:
        if matrix.dtype.kind in "OV":
            return matrix.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"X must hold numbers; got entries of type {matrix.dtype} such as {matrix.flat[0]!r}. "
        "Drop columns of text and convert the rest to numbers."
    )


def _check_entries(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        n_nan = int(values.isnan().sum())
        raise ValueError(
            f"X must be finite; it contains NaN {n_nan} times and infinity "
            f"{int(values.isinf().sum())} times. Remove these entries, or impute them, first."
        )
    lowest = float(values.min()) if values.numel() else 0.0
    if lowest < 0:
        raise ValueError(
            f"Negative values in data passed to X: counts must not be negative, the lowest is "
            f"{lowest:g}. Pass the raw counts, not centred or log-transformed data."
        )


def _warn_not_whole(values: Tensor) -> None:
    if bool((values != values.round()).any()):
        warnings.warn(
            "X is not made of counts (whole numbers). The Poisson likelihood accepts it, but its "
            "uncertainty is right for raw counts only: pass them if you have them.",
            UserWarning,
            stacklevel=5,
        )


def _warn_empty(what: str, totals: Tensor, names: Sequence[str] | None = None) -> None:
    empty = torch.nonzero(totals == 0)[:, 0].tolist()
    if empty:
        shown = [str(names[i] if names is not None else i) for i in empty[:NAMED_AT_MOST]]
        more = f" and {len(empty) - len(shown)} more" if len(empty) > len(shown) else ""
        warnings.warn(
            f"{len(empty)} of {len(totals)} {what} have no counts at all: "
            f"{', '.join(shown)}{more}. The fit goes on; consider removing them.",
            UserWarning,
            stacklevel=5,
        )


def check_size_factors(size_factors: Any, n_samples: int, like: Counts) -> Tensor | None:
    """Check size factors and return them with the type and device of `like`.

    Parameters
    ----------
    size_factors : array-like of shape (n_samples,) or None
        Positive; 1 for all where None.

    Raises
    ------
    ValueError
        For a wrong length or entries that are not positive and finite.
    """
    if size_factors is None:
        return None
    try:
        values = np.asarray(size_factors, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"size_factors must be numbers; got {size_factors!r}.") from error
    if values.shape != (n_samples,):
        raise ValueError(
            f"size_factors must have one entry for each of the {n_samples} samples, shape "
            f"({n_samples},); got shape {values.shape}."
        )
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(
            "size_factors must be positive and finite; the lowest is "
            f"{values.min():g}. For a sample without counts use any positive number."
        )
    return torch.from_numpy(values).to(like.device, like.dtype)


def library_size_factors(counts: Counts) -> np.ndarray:
    """Return row totals divided by their mean; samples without counts get the lowest of the rest.

    Returns
    -------
    ndarray of shape (N,)
    """
    totals = counts.row_totals.cpu().numpy()
    totals = np.maximum(totals, totals[totals > 0].min(initial=np.inf if totals.any() else 1.0))
    return totals / totals.mean()


def thin_counts(
    X: Any, fraction: float, random: np.random.RandomState
) -> tuple[np.ndarray | sp.csr_matrix, np.ndarray | sp.csr_matrix]:
    """Split counts into two tables of the same shape that are independent if X is Poisson.

    Each count goes to the first table with probability `fraction`, and to the second otherwise
    (binomial thinning): so what a model learns from one can be tested on the other.

    Parameters
    ----------
    X : ndarray or sparse matrix of shape (n, d)
        Whole numbers.
    fraction : float in (0, 1)
    random : RandomState

    Returns
    -------
    first, second : ndarray or CSR matrix of shape (n, d)

    Raises
    ------
    ValueError
        If X does not hold whole numbers.
    """
    matrix = as_counts(_numeric_matrix(X)).numpy()
    entries = matrix.data if sp.issparse(matrix) else matrix
    whole = np.asarray(entries).astype(np.int64)
    if not np.array_equal(whole, entries):
        raise ValueError("X must hold whole numbers to be thinned; pass the raw counts.")
    drawn = random.binomial(whole, fraction).astype(matrix.dtype)
    if not sp.issparse(matrix):
        return drawn, matrix - drawn
    first = matrix.copy()
    first.data = drawn
    second = matrix - first
    first.eliminate_zeros()
    second.eliminate_zeros()
    return first, second
