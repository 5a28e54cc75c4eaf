"""What a run leaves behind while it goes: metrics.jsonl, a line a step, readable at any time and after a crash."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from intervale import __version__
from intervale.core.files import disk_errors, write_atomic

METRICS = "metrics.jsonl"
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pillow")


def append_metrics(run: Path, entry: dict[str, Any]) -> None:
    """Add one line. Raises: UserError on a full disk."""
    with disk_errors(run / METRICS), open(run / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every complete line; a half line at the end (a crash) is left out."""
    path = run / METRICS
    entries = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def forget_after(run: Path, step: int) -> None:
    """Drop the lines of steps after `step`: they will be made again."""
    kept = [entry for entry in read_metrics(run) if entry["step"] <= step]
    write_atomic(run / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept))


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Every leaf in which two JSON values differ, as `place: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    shown = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    return [] if old == new else [f"{name}: {shown[0]} -> {shown[1]}"]


def versions() -> dict[str, str]:
    """The software this process runs on."""
    found = {"intervale": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
