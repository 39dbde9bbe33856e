"""What JSON holds in the place of parameters, and of names that are no text."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from datetime import date, datetime
from typing import Any, Protocol

import numpy as np

from pnmf_pyro.estimator.results import named
from pnmf_pyro.estimator.stages import plain_stage


class HasParameters(Protocol):
    """An estimator of scikit-learn."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name."""


def plain_parameters(model: HasParameters) -> dict[str, Any]:
    """Return the parameters of an estimator as values that JSON can hold.

    An object of the user, for which a file has no name, is a ValueError.
    """
    plain = {}
    for name, value in model.get_params(deep=False).items():
        if name == "random_state" and not isinstance(value, int | np.integer):
            value = None  # it is only where a seed came from
        if name == "init":
            value = _named_starts(value)
        try:
            if name == "stages" and value is not None:
                value = [plain_stage(one) for one in value]
            plain[name] = json.loads(json.dumps(value, default=_plain_value))
        except TypeError as error:
            raise ValueError(
                f"{name}={named(value)!r} cannot be saved: it is an object, and a file holds names "
                "and numbers. Keep model_.state_dict() and the program that made the object."
            ) from error
    return plain


def _named_starts(init: Any) -> Any:
    """Return the starts of a fit that have names; loadings that it has left are not kept."""
    if isinstance(init, list | tuple):
        return [one for one in init if not isinstance(one, np.ndarray)] or None
    return None if isinstance(init, np.ndarray) else init


def _plain_value(value: object) -> Any:
    """What JSON holds in the place of a number or array of numpy, or of a set."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{value!r} is an object")


def plain_label(label: Hashable) -> Any:
    """Return the name of a group for JSON: text and numbers as they are, the rest with its kind."""
    if isinstance(label, tuple):
        return {"pair": [plain_label(one) for one in label]}
    if isinstance(label, bytes):
        return {"bytes": label.decode("latin-1")}
    if isinstance(label, date):
        return {"datetime" if isinstance(label, datetime) else "date": label.isoformat()}
    return label


def label_of(plain: Any) -> Hashable:
    """Return the name of which :func:`plain_label` made what JSON holds."""
    if not isinstance(plain, dict):
        return plain
    ((kind, text),) = plain.items()
    read: dict[str, Callable[[Any], Hashable]] = {
        "pair": lambda parts: tuple(label_of(one) for one in parts),
        "bytes": lambda text: text.encode("latin-1"),
        "date": date.fromisoformat,
        "datetime": datetime.fromisoformat,
    }
    return read[kind](text)
