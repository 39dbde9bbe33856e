"""Arrays and a JSON header in one .npz archive, which runs no code when it is read."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from pnmf_pyro.data.atomic import replacing

Arrays = dict[str, np.ndarray]

FORMAT = "pnmf_pyro"
FORMAT_VERSION = 2
_HEADER = "header"

# A file may unpack to this many times its size and as many bytes; more is a mistake, or malice.
LARGEST_RATIO, LARGEST_SMALL = 200, 2**26


class _OtherFormat(ValueError):
    """A whole file, which another program or a newer version wrote."""


def write_archive(
    path: str | os.PathLike,
    header: dict[str, Any],
    arrays: Mapping[str, ArrayLike],
    compressed: bool = True,
) -> None:
    """Write arrays and a JSON header to one file, which appears whole or not at all.

    A folder that does not exist, and arrays of objects, are a ValueError.
    """
    path = _checked(path)
    if not path.parent.is_dir():
        raise ValueError(f"path must be in an existing folder; there is no {path.parent}.")
    held = {name: np.asarray(array) for name, array in arrays.items()}
    if objects := [name for name, array in held.items() if array.dtype.hasobject]:
        raise ValueError(f"arrays must hold numbers or text; {objects} hold Python objects.")
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **header})
    content: dict[str, Any] = {_HEADER: np.array(text), **held}
    with replacing(path) as part, open(part, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **content)


def read_archive(
    path: str | os.PathLike,
    known: Callable[[str], bool] = lambda name: True,
    what: str = "a model saved by pnmf_pyro",
    remedy: str = "Save it again with PNMF.save.",
) -> tuple[dict[str, Any], Arrays]:
    """Return header and arrays of a file that :func:`write_archive` wrote.

    Only arrays with `known` names are read. A file that is damaged, of another
    kind, or of a newer version is a ValueError; sizes that it claims are checked before anything
    of that size is read. The error says of `what` kind it should be, and a `remedy`.
    """
    with open(_checked(path), "rb") as file:
        try:
            return _read(file, known)
        except _OtherFormat as error:
            raise ValueError(f"{path} {error}") from None
        except Exception as error:  # a damaged file fails in any way
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} is not {what}, or it is damaged ({why}). {remedy}") from error


def _checked(path: str | os.PathLike) -> Path:
    """Return a path; a ValueError for what is the name of no file."""
    if not isinstance(path, str | os.PathLike) or "\0" in os.fsdecode(path):
        raise ValueError(f"path must be the name of a file, such as 'model.npz'; got {path!r}.")
    return Path(os.fsdecode(path))


def _read(file: IO[bytes], known: Callable[[str], bool]) -> tuple[dict[str, Any], Arrays]:
    with zipfile.ZipFile(file) as archive:
        members = _members(archive)
        header = _header(str(_array(archive, members.pop(_HEADER))))
        wanted = {n: m for n, m in members.items() if known(n)}
        _check_sizes(wanted.values(), os.fstat(file.fileno()).st_size)
        return header, {name: _array(archive, member) for name, member in wanted.items()}


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by the names of their arrays; a ValueError for what numpy would not have written."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in found:
            raise ValueError(f"it holds {name!r} twice")
        if member.flag_bits & 1:
            raise ValueError(f"{name!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name!r} is compressed in another way than numpy does")
        found[name] = member
    if _HEADER not in found:
        raise ValueError("it has no header")
    _check_sizes([found[_HEADER]], 0)
    return found


def _check_sizes(members: Collection[zipfile.ZipInfo], file_size: int) -> None:
    size = sum(member.file_size for member in members)
    if size > LARGEST_SMALL + LARGEST_RATIO * file_size:
        raise ValueError(f"it claims to unpack to {size} bytes, from {file_size}")


def _header(text: str) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    version: Any = header.get("format_version")
    whole = type(version) is int
    if header.get("format") != FORMAT or (whole and version > FORMAT_VERSION):
        raise _OtherFormat(
            f"has format {str(header.get('format'))[:20]!r} {str(version)[:20]}; this version "
            f"reads {FORMAT!r} up to {FORMAT_VERSION}. Upgrade pnmf_pyro to open it."
        )
    if not whole or version < 1:
        raise ValueError(f"format_version is {str(version)[:20]!r}")
    return header


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Read an array, of exactly as many bytes as its shape needs."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, kind = readers[version](file)
        if kind.hasobject or kind.kind not in "fiubU":
            raise ValueError(f"{member.filename!r} holds neither numbers nor text, but {kind}")
        if file.tell() + math.prod(shape) * kind.itemsize != member.file_size:
            raise ValueError(f"{member.filename!r} has another size than its shape")
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read()  # to the end, where the checksum is
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
