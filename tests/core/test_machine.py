"""Free memory is what this process may take, not what the machine has."""

import os
from pathlib import Path

import pytest

from intervale.core.machine import free_ram

GIB = 1 << 30


def machine(root: Path, groups: str, **files: str) -> Path:
    """A machine with 100 GiB free, the process in `groups`, and files below /sys/fs/cgroup by name."""
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {100 * GIB // 1024} kB\n", "proc/self/cgroup": groups}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("inside", [True, False], ids=["the group is seen", "a container that sees only its own root"])
def test_a_container_or_a_job_has_what_its_limit_leaves(tmp_path: Path, inside: bool) -> None:
    place = "jobs/one/" if inside else ""
    files = {"memory.max": str(8 * GIB), "memory.current": str(6 * GIB), "memory.stat": f"anon 1\ninactive_file {1 * GIB}\n"}
    root = machine(tmp_path, "0::/jobs/one\n", **{place + name: text for name, text in files.items()})
    assert free_ram(root) == 3 * GIB


def test_a_limit_above_counts_and_none_is_none(tmp_path: Path) -> None:
    none = {"memory.max": "max", "memory.current": "5", "memory.stat": ""}
    root = machine(tmp_path, "0::/jobs/one\n", **{f"jobs/one/{name}": text for name, text in none.items()})
    assert free_ram(root) == 100 * GIB
    above = {"memory.max": str(4 * GIB), "memory.current": "0", "memory.stat": "inactive_file 0\n"}
    assert free_ram(machine(tmp_path, "0::/jobs/one\n", **{f"jobs/{name}": text for name, text in above.items()})) == 4 * GIB


def test_version_1_of_control_groups_is_read_too(tmp_path: Path) -> None:
    files = {"limit_in_bytes": str(8 * GIB), "usage_in_bytes": str(7 * GIB), "stat": "total_inactive_file 0\n"}
    groups = "5:cpu:/a\n4:memory:/a\n0::/\n"
    assert free_ram(machine(tmp_path, groups, **{f"memory/a/memory.{name}": text for name, text in files.items()})) == GIB


def test_a_machine_without_any_of_it_has_its_memory(tmp_path: Path) -> None:
    assert free_ram(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_ram() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
