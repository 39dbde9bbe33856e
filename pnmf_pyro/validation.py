"""Checks of options that several modules share, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEVICES = ("cpu", "cuda", "mps", "auto")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return `value` if it is one of `choices`; raise a ValueError naming `name` otherwise."""
    if not any(value is choice or value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}.")
    return value


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is a finite number above zero; raise a ValueError otherwise."""
    if not isinstance(value, Real) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number; got {value!r}.")
    return value


def check_count(name: str, value: Any) -> int:
    """Return `value` if it is a whole number of at least 1; raise a ValueError otherwise."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
    return int(value)


def check_array(name: str, values: Any) -> np.ndarray:
    """Return numbers as an array on the CPU; raise a ValueError naming `name` for anything else.

    Parameters
    ----------
    name : str
    values : array-like, Tensor, sparse matrix or DataFrame
        Real numbers; float32 stays float32, and everything else becomes float64.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to_dense()
    elif hasattr(values, "toarray"):
        values = values.toarray()
    try:
        array = np.asarray(values)
        return array if array.dtype == np.float32 else array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}.") from error


def check_output_path(name: str, path: str | Path, endings: tuple[str, ...]) -> Path:
    """Return a path to write to; raise a ValueError for another ending or a folder not there."""
    path = Path(path)
    if path.suffix not in endings:
        raise ValueError(f"{name} must end in {' or '.join(endings)}; got {path.name}.")
    if not path.parent.is_dir():
        raise ValueError(f"{name} must be in an existing folder; there is no {path.parent}.")
    return path


def check_callback(callback: Any, interval: Any) -> None:
    """Raise a ValueError unless the callback can be called every `interval` steps."""
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback must be a function of (model, iteration, elbo), or None; got {callback!r}."
        )
    check_count("callback_interval", interval)


def check_training(*, max_iter: int, tol: float, E: int = 1, learning_rate: float = 1.0) -> None:
    """Raise a ValueError for settings of a training loop that cannot be used."""
    check_count("max_iter", max_iter)
    check_count("E", E)
    check_positive("learning_rate", learning_rate)
    if not isinstance(tol, Real) or not tol >= 0:
        raise ValueError(f"tol must be a number of at least 0; got {tol!r}. 0 goes on to max_iter.")


def check_device(device: str) -> torch.device:
    """Choose the device to compute on.

    Parameters
    ----------
    device : {'cpu', 'cuda', 'mps', 'auto'}
        ``'auto'`` takes CUDA where there is one and the CPU otherwise.

    Raises
    ------
    ValueError
        For another word, and for a device that this machine does not have or that lacks float64.
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
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
