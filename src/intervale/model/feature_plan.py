"""Where the features of a frozen tower are kept, decided before a picture is decoded, and why. Pure arithmetic and one statvfs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from intervale.core.lang import say

HEAD = 128  # bytes of a stored entry before its tensor
Place = Literal["ram", "disk", "live"]
_RAM_SHARE = 4  # a quarter of the free memory at most
_DISK_SHARE = 2  # half of the free disk: checkpoints and the export want the rest
_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Where features go, a sentence that says why, and the bytes they take."""

    place: Place
    why: str
    need: int


def default_store_folder() -> Path:
    """$INTERVALE_CACHE, else ~/.cache/intervale/features. It may not exist."""
    named = os.environ.get("INTERVALE_CACHE", "")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "intervale" / "features"


def free_disk(folder: Path) -> int:
    """Bytes free on the disk that a folder is on, or will be on. Raises: OSError when that cannot be asked."""
    place = Path(os.path.abspath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _free_or_none(folder: Path) -> int:
    try:
        return free_disk(folder)
    except OSError:
        return 0


def plan_features(need: int, *, free_ram: int, folder: Path | None, disk_budget: int, stored: int = 0, disk_first: bool = False) -> Plan:
    """Where `need` bytes of features go: memory (a quarter of `free_ram`), the disk, or nowhere ("live").

    `stored`: bytes of them that `folder` holds already. `disk_first`: the user named a folder, so later runs shall find them there.
    """
    ram = free_ram // _RAM_SHARE
    free = _free_or_none(folder) if folder is not None else 0
    disk = min(disk_budget, stored + free // _DISK_SHARE) if folder is not None else 0
    size, in_ram, on_disk = (f"{number / _GIB:.2f} GiB" for number in (need, ram, disk))
    order: tuple[Place, Place] = ("disk", "ram") if disk_first else ("ram", "disk")
    for place in order:
        if place == "ram" and need <= ram:
            why = say(f"the features ({size}) fit into a quarter of the free memory", f"特征（{size}）可放入空闲内存的四分之一")
            return Plan("ram", why, need)
        if place == "disk" and need <= disk:
            why = say(
                f"the features ({size}) are kept in {folder}, which may take {on_disk}", f"特征（{size}）保存在 {folder}（可用 {on_disk}）"
            )
            return Plan("disk", why, need)
    more = f" nor into {on_disk} in {folder}" if folder is not None else ""
    more_zh = f"，也超过 {folder} 可用的 {on_disk}" if folder is not None else ""
    why = say(
        f"the features ({size}) do not fit into a quarter of the free memory ({in_ram}){more}",
        f"特征（{size}）超过空闲内存的四分之一（{in_ram}）{more_zh}",
    )
    return Plan("live", why, need)
