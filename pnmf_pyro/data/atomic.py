"""Files that appear whole or not at all: every output of the package is written through here.

A file is written beside its target, flushed to the disk and then renamed, which is one step. So a
reader finds the old file or the new one, and whatever ends the writing leaves the old one alone.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

# Ending of a file that is being written; its name says for which file, and by which process.
PART = ".part"

# Seconds after which a file that nobody has written to belongs to nobody.
DAY = 86400

_under_way: set[Path] = set()
_numbers = count()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the path of an empty file, which takes the place of `path` when the block ends.

    If the block raises anything, that file is removed and what was at `path` stays. A symbolic link
    is followed. The new file has the mode and the group of the old one, or the mode that the umask
    gives. What a process that was killed has left of `path` is removed.

    Raises
    ------
    OSError
        If the file cannot be written; it names `path`.
    """
    target = Path(os.path.realpath(path))
    check_replaceable(path)
    part = target.with_name(f"{_prefix(target)}{os.getpid()}-{next(_numbers)}{PART}")
    _under_way.add(part)
    try:
        _remove_rests(target)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield part
        _flush(part)
        if target.exists():
            _take_over_mode(target, part)
        os.replace(part, target)
        with suppress(OSError):  # not every system can flush a folder
            _flush(target.parent)
    except OSError as error:
        if error.filename is not None and str(part) not in map(
            str, (error.filename, error.filename2)
        ):
            raise  # of another file
        raise _named(error, path) from error
    finally:
        part.unlink(missing_ok=True)
        _under_way.discard(part)


def check_replaceable(path: str | os.PathLike) -> None:
    """Raise an OSError that names `path` unless a file can be written there, or replaced."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is there, not a file", os.fspath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "a device is there, not a file", os.fspath(path))
    for one, what in ((target, "this file is"), (target.parent, "its folder is")):
        if one.exists() and not os.access(one, os.W_OK):
            raise PermissionError(errno.EACCES, f"{what} write-protected", os.fspath(path))


def _named(error: OSError, path: str | os.PathLike) -> OSError:
    """The same error, which names the file that was asked for."""
    if error.errno is None:
        return OSError(f"{os.fspath(path)} cannot be written: {error}")
    return OSError(error.errno, error.strerror or str(error), os.fspath(path))


def _prefix(target: Path) -> str:
    """How the names of files begin that are written for `target` on this machine."""
    return f".{target.name[:40]}.{_machine()}."


def _machine() -> str:
    return "".join(c for c in platform.node()[:20] if c.isalnum() or c in "-_") or "here"


def _remove_rests(target: Path) -> None:
    """Remove what processes that have ended left beside a target, and what is a day old."""
    names: list[str] = []
    with suppress(OSError):  # a folder that cannot be listed
        names = [n for n in os.listdir(target.parent) if n.startswith(f".{target.name[:40]}.")]
    for rest in [target.with_name(name) for name in names if name.endswith(PART)]:
        with suppress(OSError, ValueError):  # another process removed it, or a name of others
            here = rest.name.startswith(_prefix(target))
            ended = here and rest not in _under_way and not _is_alive(rest)
            if ended or time.time() - rest.stat().st_mtime > DAY:
                rest.unlink()


def _is_alive(rest: Path) -> bool:
    """Whether another process than this one writes a file."""
    pid = int(rest.name.split(".")[-2].partition("-")[0])
    if pid == os.getpid() or os.name == "nt":
        return False  # of an earlier process of this number; Windows keeps files that are open
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_over_mode(old: Path, new: Path) -> None:
    status = old.stat()
    with suppress(OSError, AttributeError):  # of another user's group, or another system
        os.chown(new, -1, status.st_gid)
    os.chmod(new, stat.S_IMODE(status.st_mode))
