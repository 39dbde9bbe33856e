"""Tables of results: pandas data frames, where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pandas import DataFrame

Columns = Mapping[str, Sequence | np.ndarray]


def as_table(columns: Columns, index: str | None = None) -> DataFrame | np.ndarray:
    """Return columns of equal length as a DataFrame, or as a structured array without pandas.

    Columns are read by name from both; entries may be tuples. `index` names the column that becomes
    the index of a data frame.
    """
    try:
        import pandas as pd
    except ImportError:
        vectors = {name: _vector(values) for name, values in columns.items()}
        kinds = [(name, vector.dtype) for name, vector in vectors.items()]
        table = np.empty(min(map(len, vectors.values())), dtype=kinds)
        for name, vector in vectors.items():
            table[name] = vector
        return table
    frame = pd.DataFrame(columns)
    return frame if index is None else frame.set_index(index)


def _vector(values: Sequence | np.ndarray) -> np.ndarray:
    """Values as a vector; tuples stay what they are."""
    found = np.asarray(values)
    return found if found.ndim == 1 else np.fromiter(values, dtype=object, count=len(values))
