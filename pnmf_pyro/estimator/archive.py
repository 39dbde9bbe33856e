"""One file for a fitted model: arrays and JSON in a .npz archive, which runs no code when read."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "pnmf_pyro"
FORMAT_VERSION = 1
_HEADER = "header"


def write_archive(path: str | os.PathLike, header: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write arrays and a JSON header to one file, which appears whole or not at all.

    Parameters
    ----------
    path : path
    header : dict
        Values that JSON can hold.
    arrays : dict of str to ndarray
        Numbers or text; arrays of objects are refused.

    Raises
    ------
    ValueError
        For a folder that does not exist and for arrays of objects.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path must be in an existing folder; there is no {path.parent}.")
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
        raise ValueError(f"arrays must hold numbers or text; {objects} hold Python objects.")
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **header})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            content: dict[str, Any] = {_HEADER: np.array(text), **arrays}
            np.savez_compressed(file, **content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_archive(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_archive` wrote.

    Returns
    -------
    header : dict
    arrays : dict of str to ndarray

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, is of another kind or was written by a newer version.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(str(arrays.pop(_HEADER)))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a model saved by pnmf_pyro, or it is damaged ({error}). "
            "Save it again with PNMF.save."
        ) from error
    if header.get("format") != FORMAT or header.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {header.get('format')!r} {header.get('format_version')}; this "
            f"version reads {FORMAT!r} up to {FORMAT_VERSION}. Upgrade pnmf_pyro to open it."
        )
    return header, arrays
