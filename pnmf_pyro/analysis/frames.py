"""Tables as pandas data frames where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_frame(columns: Mapping[str, Any]) -> Any:
    """Return columns of equal length as a pandas DataFrame, or as a dict without pandas."""
    try:
        import pandas as pd
    except ImportError:
        return dict(columns)
    return pd.DataFrame(columns)
