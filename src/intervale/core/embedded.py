"""What is inside the package itself, by its name: the model `nano` and the data set `foodemoji`, so that a first run needs no network.

A path of that name in the user's folder always wins: nobody's own files are hidden by ours. Cost: two look-ups on the disk.
"""

from __future__ import annotations

import os
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = ("nano", "foodemoji")


def embedded(name: str | Path) -> Path | None:
    """The package's own folder called `name`; None for another name, when a path of that name is here, or when it is not installed."""
    text = str(name)
    folder = ASSETS / text
    return folder if text in NAMES and not os.path.lexists(text) and folder.is_dir() else None
