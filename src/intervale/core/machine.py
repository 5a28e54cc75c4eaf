"""How much memory is free to this process: the machine's, or what its container or batch job has left.

Promises: never more than the kernel would give before it kills: /proc/meminfo tells of the whole machine, which in a container with a
limit is not ours to take. Cost: a few small reads.
"""

from __future__ import annotations

import os
from pathlib import Path

# (the limit, what is taken, and in memory.stat the file cache of it that makes room): control groups of version 2, and of version 1
_FILES = (("memory.max", "memory.current", "inactive_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still take. `root`: where /proc and /sys are."""
    return int(min([_free_of_machine(root), *(_left(folder) for folder in _groups(root))]))


def _free_of_machine(root: Path) -> int:
    try:
        with open(root / "proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> list[Path]:
    """The folders of this process's control groups for memory, up to the topmost: any of them may have a limit."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds or "memory" in kinds.split(","):
            top = mounted / "memory" if kinds else mounted
            own = top / path.lstrip("/")
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return found


def _left(folder: Path) -> int | float:
    """What a group has left; inf where it has no limit (or the folder is not seen from within a container)."""
    for limit, taken, cached in _FILES:
        try:
            most, used = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, taken))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            if most != "max":
                return max(0, int(most) - int(used) + int(stat.get(cached, 0)))
        except (OSError, ValueError):
            continue
    return float("inf")
