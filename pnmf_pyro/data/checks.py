"""Checks of options that several modules share, with errors that say what to do."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from pnmf_pyro.data.atomic import check_replaceable
from pnmf_pyro.data.counts import Counts, CountsLike, as_counts
from pnmf_pyro.data.parallel import leads
from pnmf_pyro.data.tables import numeric_matrix, refuse_masked

Choice = TypeVar("Choice")

DEVICES = ("cpu", "cuda", "mps", "auto")

# Names that a message lists.
NAMED_AT_MOST = 5

# Folder of the package, with the separator at its end.
PACKAGE = str(Path(__file__).parents[1]) + os.sep


# Who takes note of warnings, the last one first.
_listening: list[list[tuple[str, str]]] = []


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of something at the line of the user's code that led to it; of ranks the first does."""
    if not leads():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    if _listening:
        _listening[-1].append((message, category.__name__))
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def noting(said: list[tuple[str, str]]) -> Iterator[None]:
    """Take note in `said` of the messages of warnings in a block, and their categories' names."""
    _listening.append(said)
    try:
        yield
    finally:
        _listening.pop()


def check_choice(name: str, value: Choice, choices: Collection[object]) -> Choice:
    """Return `value` if it is one of `choices`; raise a ValueError naming `name` otherwise."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}.")
    return value


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is a finite number above zero; raise a ValueError otherwise."""
    if not isinstance(value, Real) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number; got {value!r}.")
    return value


def check_count(name: str, value: object) -> int:
    """Return `value` if it is a whole number of at least 1; raise a ValueError otherwise."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
    return int(value)


def check_whole(name: str, value: object) -> int:
    """Return `value` if it is a whole number of at least 0; raise a ValueError otherwise."""
    if not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0; got {value!r}.")
    return int(value)


def check_number(
    name: str, value: float, low: float = -float("inf"), high: float = float("inf")
) -> float:
    """Return `value` if it is a number from `low` to `high`; raise a ValueError otherwise."""
    if not isinstance(value, Real) or not low <= float(value) <= high:
        limits = f"of at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be a number {limits}; got {value!r}.")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return `value` if it is true or false; raise a ValueError otherwise."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False; got {value!r}.")
    return bool(value)


def check_array(name: str, values: CountsLike) -> np.ndarray:
    """Return real numbers as an array on the CPU; raise a ValueError for anything else.

    Sparse input becomes dense. float32 stays float32, and everything else becomes float64.
    """
    refuse_masked(name, values)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to_dense()
    elif hasattr(values, "toarray"):
        values = values.toarray()
    try:
        array = np.asarray(values)
        if array.dtype.kind in "cmM":
            raise TypeError(f"got entries of type {array.dtype}")
        return array if array.dtype == np.float32 else array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}.") from error


def check_output_path(name: str, path: str | Path, endings: tuple[str, ...]) -> Path:
    """Return a path to write to.

    Another ending, and a folder that is not there, are a ValueError; what cannot be written to is
    an OSError.
    """
    path = Path(path)
    if path.suffix not in endings:
        raise ValueError(f"{name} must end in {' or '.join(endings)}; got {path.name}.")
    if not path.parent.is_dir():
        raise ValueError(f"{name} must be in an existing folder; there is no {path.parent}.")
    check_replaceable(path)
    return path


def check_callback(callback: object, interval: int) -> None:
    """Raise a ValueError unless the callback can be called every `interval` steps."""
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback must be a function of (model, iteration, elbo), or None; got {callback!r}."
        )
    check_count("callback_interval", interval)


def check_training(
    *,
    max_iter: int,
    tol: float,
    E: int = 1,
    learning_rate: float = 1.0,
    verbose: bool | int = False,
) -> None:
    """Raise a ValueError for settings of a training loop that cannot be used."""
    check_number("verbose", verbose, low=0)
    check_count("max_iter", max_iter)
    check_count("E", E)
    check_positive("learning_rate", learning_rate)
    check_number("tol", tol, low=0)


def check_device(device: str) -> torch.device:
    """Return the device to compute on; raise a ValueError for one that cannot be used.

    'auto' takes CUDA where there is one and the CPU otherwise.
    """
    check_choice("device", device, DEVICES)
    if device == "mps":
        raise ValueError(
            "device='mps' is not supported: the ELBO is summed in float64, which Apple's backend "
            "lacks. Use device='cpu'."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda' was asked for, but torch sees no CUDA device. "
            "Use device='auto' or 'cpu', or install a CUDA build of torch."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def some_of(names: Sequence[object]) -> str:
    """Return the first few names, and how many more there are, for a message."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(map(str, names[:NAMED_AT_MOST])) + more


def check_counts(X: CountsLike) -> Counts:
    """Check a matrix of counts of shape (N, D) and return it for computing.

    X may be an array, a tensor, a scipy sparse matrix, a DataFrame or Counts. Sparse input stays
    sparse, and what is not float64 becomes float32. One that is empty, not two-dimensional or not
    numeric raises a ValueError, as do entries that are NaN, infinite or negative; entries that are
    not whole numbers are warned of.
    """
    counts = check_matrix(X)
    warn_not_whole(counts)
    return counts


def warn_not_whole(counts: Counts) -> None:
    """Warn of entries that are not whole numbers."""
    if not counts.whole:
        warn(
            "X is not made of counts (whole numbers). The Poisson likelihood accepts it, but its "
            "uncertainty is right for raw counts only: pass them if you have them.",
        )


def check_matrix(X: CountsLike) -> Counts:
    """Check a matrix like :func:`check_counts`, but say nothing of numbers that are not whole."""
    counts = as_counts(numeric_matrix(X))
    values = counts.values
    if not bool(torch.isfinite(values).all()):
        n_nan = int(values.isnan().sum())
        raise ValueError(
            f"X must be finite; it contains NaN {n_nan} times and infinity "
            f"{int(values.isinf().sum())} times. Remove their samples or features, or tell a fit "
            "with mask= which entries are observed."
        )
    lowest = float(values.min()) if values.numel() else 0.0
    if lowest < 0:
        raise ValueError(
            f"Negative values in data passed to X: counts must not be negative, the lowest is "
            f"{lowest:g}. Pass the raw counts, not centred or log-transformed data."
        )
    return counts


def warn_empty(counts: Counts, feature_names: Sequence[str] | None = None) -> None:
    """Warn of samples and features without counts, with their number and their names, if known."""
    ranks, (n_samples, n_features) = counts.ranks, counts.ranks.whole(counts.shape)
    ones = counts.values.new_ones(counts.shape[0], 1)
    column_totals = counts.transposed_matmul(counts.values, ones)[:, 0]
    empty = (torch.nonzero(counts.row_totals == 0)[:, 0] + ranks.rows.start).tolist()
    _warn_empty("samples", [i for of_rank in ranks.gathered(empty) for i in of_rank], n_samples)
    empty = torch.nonzero(ranks.total(column_totals) == 0)[:, 0].tolist()
    named = empty if feature_names is None else [feature_names[i] for i in empty]
    _warn_empty("features", named, n_features)


def _warn_empty(what: str, empty: Sequence[object], number: int) -> None:
    if empty:
        warn(
            f"{len(empty)} of {number} {what} have no counts at all: {some_of(empty)}. "
            "The fit goes on; consider removing them.",
        )


def check_size_factors(
    size_factors: ArrayLike | None, counts: Counts, mean: float | None = None
) -> Tensor | None:
    """Return the size factors of counts, (N,), with their type and device; None for None.

    "total" stands for total counts over `mean`, that of these counts unless given. Another word, a
    wrong length, or an entry that is not positive and finite raises a ValueError.
    """
    if size_factors is None:
        return None
    n_samples = counts.shape[0]
    if isinstance(size_factors, str):
        check_choice("size_factors", size_factors, ("total",))
        size_factors = library_size_factors(counts, mean)
    values = check_array("size_factors", size_factors).astype(np.float64)
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
    found = torch.from_numpy(values).to(counts.device, counts.dtype)
    if not bool((torch.isfinite(found) & (found > 0)).all()):
        raise ValueError(
            f"size_factors must be within the range of {counts.dtype}; they are from "
            f"{values.min():g} to {values.max():g}. Divide them by their mean."
        )
    return found


def library_size_factors(counts: Counts, mean: float | None = None) -> np.ndarray:
    """Return row totals divided by their mean, or by that of other counts, an array of shape (N,).

    Samples without counts get the lowest total of the others.
    """
    return _totals(counts) / (mean_total(counts) if mean is None else mean)


def mean_total(counts: Counts) -> float:
    """Return what :func:`library_size_factors` divides totals by."""
    total = counts.ranks.total(torch.from_numpy(_totals(counts)).sum())
    return float(total / counts.ranks.whole(counts.shape)[0])


def _totals(counts: Counts) -> np.ndarray:
    totals = counts.row_totals.cpu().numpy()
    lowest = min(counts.ranks.gathered(float(totals[totals > 0].min(initial=np.inf))))
    return np.maximum(totals, lowest if lowest < np.inf else 1.0)


MODES = ("simple", "expanded", "lower-bound")


def check_data(y: object) -> None:
    """Raise a ValueError unless `y` is a tensor of shape (D, N)."""
    if not isinstance(y, Tensor) or y.ndim != 2:
        shape = f" of shape {tuple(y.shape)}" if hasattr(y, "shape") else ""
        raise ValueError(
            f"y must be a tensor of shape (D, N), features by samples; got {type(y).__name__}"
            f"{shape}. torch.as_tensor(X.T) makes one of an array of samples by features."
        )


def like_data(module: nn.Module, y: Tensor) -> nn.Module:
    """Move a module to the floating-point type and the device of the data `y`, in place."""
    module.to(y.dtype if y.dtype.is_floating_point else torch.get_default_dtype())
    return module if y.device.type == "meta" else module.to(y.device)
