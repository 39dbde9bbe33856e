"""Memory that there is, as the files of a machine and of its control groups say it."""

import os
from math import inf

import numpy as np
import pytest

from pnmf_pyro.data.memory import available_memory, held_memory

GIB = 1 << 30


def machine(root, **files):
    """Write the files of a made-up machine, by paths in which two underscores are a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  16777216 kB\nMemFree:  1 kB\nMemAvailable:  8388608 kB\n"


def test_it_is_what_the_machine_has_left(tmp_path):
    assert available_memory(machine(tmp_path, proc__meminfo=MEMINFO)) == 8 * GIB


def test_it_is_unknown_where_nothing_says_it(tmp_path):
    assert available_memory(tmp_path) == inf
    assert held_memory(tmp_path) == 0


@pytest.mark.parametrize("limited", ["job", "job/step"])
def test_a_control_group_or_one_around_it_may_allow_less(tmp_path, limited):
    root = machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/job/step\n")
    for group in ("job", "job/step"):
        folder = root / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{2 * GIB}\n" if group == limited else "max\n")
        (folder / "memory.current").write_text(f"{GIB}\n")
    assert available_memory(root) == GIB
    # Half of what is used are files that can go.
    (root / "sys/fs/cgroup" / limited / "memory.stat").write_text(
        f"anon 5\ninactive_file {GIB // 2}\n"
    )
    assert available_memory(root) == 1.5 * GIB
    (root / "sys/fs/cgroup" / limited / "memory.current").write_text(f"{9 * GIB}\n")
    assert available_memory(root) == 0


def test_so_may_one_of_the_older_kind(tmp_path):
    groups = "8:pids:/\n4:memory:/job\n3:cpuset:/\n0::/\n"
    root = machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=groups)
    folder = root / "sys/fs/cgroup/memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    assert available_memory(root) == 2 * GIB


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux says it")
def test_this_process_holds_what_it_allocates():
    before = held_memory()
    block = np.ones(20_000_000)
    assert held_memory() - before == pytest.approx(block.nbytes, rel=0.1)
    assert 0 < available_memory() < inf
