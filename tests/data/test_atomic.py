"""Files that appear whole or not at all."""

import errno
import os
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from pnmf_pyro.data import atomic
from pnmf_pyro.data.atomic import PART, replacing
from pnmf_pyro.estimator import archive

posix = pytest.mark.skipif(os.name == "nt", reason="modes and links of POSIX")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    return tmp_path / "file.txt"


def write(path, text="new"):
    with replacing(path) as part:
        part.write_text(text)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(folder):
    return sorted(one.name for one in folder.iterdir())


def test_what_is_written_takes_the_place_of_the_old_file_at_the_end(path):
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == path.parent
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_error_leaves_the_old_file_and_nothing_else(error, path):
    def stopped():
        with replacing(path) as part:
            part.write_text("half of it")
            raise error

    with pytest.raises(error):
        stopped()
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_names_it(call, path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, call, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*file\.txt'"):
        write(path)
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.filterwarnings(  # Python 3.10 closes the archive once more
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_an_archive_that_finds_no_room(path, monkeypatch):
    """The write itself fails, in the middle of the archive."""

    def full(*_):
        return open("/dev/full", "wb")

    monkeypatch.setattr(archive, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '.*file\.txt'"):
        archive.write_archive(path, {}, {"a": np.random.default_rng(0).normal(size=10**5)})
    assert path.read_text() == "old"
    assert names(path.parent) == ["file.txt"]


def test_errors_of_other_files_keep_their_name(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), replacing(path):
        (tmp_path / "absent").read_text()


@posix
def test_modes_follow_the_umask_or_the_old_file(path, tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "new.txt")
        assert mode(tmp_path / "new.txt") == 0o640
        path.chmod(0o664)
        write(path)
        assert mode(path) == 0o664
    finally:
        os.umask(before)


@posix
def test_links_are_followed(path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.txt").symlink_to(path)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "folder" / "made.txt")
    write(tmp_path / "folder" / "link.txt")
    write(tmp_path / "dangling.txt")
    assert (tmp_path / "folder" / "link.txt").is_symlink()
    assert path.read_text() == (tmp_path / "folder" / "made.txt").read_text() == "new"
    assert names(tmp_path / "folder") == ["link.txt", "made.txt"]


def test_folders_and_devices_are_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match="a folder is there"):
        write(tmp_path)
    if os.path.exists(os.devnull) and os.name != "nt":
        with pytest.raises(OSError, match="a device is there"):
            write(os.devnull)


@posix
@pytest.mark.skipif(os.name != "nt" and os.geteuid() == 0, reason="root may write anywhere")
def test_write_protection_holds(path):
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="write-protected"):
        write(path)
    path.parent.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="its folder is write-protected"):
            write(path.parent / "new.txt")
    finally:
        path.parent.chmod(0o755)


def test_write_protection_is_told_apart(path, monkeypatch):
    """As the test above, where the system says so of any user."""
    monkeypatch.setattr(atomic.os, "access", lambda one, _: one != path.parent)
    with pytest.raises(PermissionError, match=r"its folder is write-protected: '.*file\.txt'"):
        write(path)
    assert names(path.parent) == ["file.txt"]


def left_by(pid, path, number=0):
    return path.with_name(f"{atomic._prefix(path)}{pid}-{number}{PART}")


def test_rests_of_killed_writers_are_removed_and_others_stay(path, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    elsewhere = path.with_name(f".{path.name}.another-machine.1-0{PART}")
    old = path.with_name(f".{path.name}.another-machine.2-0{PART}")
    gone = [left_by(ended.pid, path), left_by(os.getpid(), path, 10**9), old]
    kept = [left_by(living.pid, path), elsewhere, tmp_path / f".other.txt.1-0{PART}"]
    kept.append(path.with_name(f".{path.name}.mine{PART}"))
    for one in (*gone, *kept):
        one.write_text("rest")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    write(path)
    living.communicate(b"\n")
    assert names(tmp_path) == sorted(["file.txt", *(one.name for one in kept)])


def test_two_writers_of_one_process_do_not_disturb_each_other(path):
    with replacing(path) as one:
        one.write_text("first")
        write(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_long_names(tmp_path):
    path = tmp_path / ("ü" * 120 + ".txt")
    write(path)
    assert path.read_text() == "new"
