"""The drawings: seven artists' emoji from npm's icon sets, found by code point and rendered to RGBA pictures.

Which artist is for what was fixed before any result was seen: TEST artists are never trained on, from pre-training to tuning.
Needs `npm install` in this folder (package.json pins the versions) and the package resvg-py. Cost: about 1 ms a drawing
(fluent-emoji, which has blurs, about 10 ms).
"""

from __future__ import annotations

import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

TRAIN = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione")
TEST = ("twemoji", "fxemoji")
MODULES = Path(__file__).parent / "node_modules"

# fxemoji has names of its own: the noto name on the left, fxemoji's on the right, where more than hyphens differ. Looked at, one by one
# (its two place settings carry each other's name; its mushroom is a fly agaric and stays out).
_FXEMOJI = {
    "eggplant": "aubergine", "ear-of-corn": "earofmaize", "hot-pepper": "chilipepper", "pizza": "sliceofpizza",
    "curry-rice": "curryandrice", "fish-cake-with-swirl": "fishcakeswirl", "sake": "sakebottleandcup", "fork-and-knife": "forkandknife",
    "fork-and-knife-with-plate": "forkknife", "kitchen-knife": "hocho",
}  # fmt: skip


@cache
def icon_set(artist: str) -> dict[str, Any]:
    """The artist's icons.json: {icons: {name: {body, width?, height?}}, aliases, width, height}."""
    return json.loads((MODULES / "@iconify-json" / artist / "icons.json").read_text(encoding="utf-8"))


@cache
def _names() -> dict[str, str]:
    """Code points ('1f34e', without the variation selector) to the icon name that the sets share."""
    return json.loads((MODULES / "@iconify-json" / "noto" / "chars.json").read_text(encoding="utf-8"))


def code_of(hexcode: str) -> str:
    """A code point sequence as the icon sets write it."""
    return hexcode.lower().replace("-fe0f", "")


def icon_name(artist: str, code: str) -> str | None:
    """The artist's icon for a code point sequence, or None when it drew none."""
    shared = _names().get(code)
    if shared is None:
        return None
    found = icon_set(artist)
    if artist == "fxemoji":
        name = _FXEMOJI.get(shared, shared.replace("-", ""))
        return name if name in found["icons"] else None
    if shared in found["icons"]:
        return shared
    parent = found.get("aliases", {}).get(shared, {}).get("parent")
    return parent if parent in found["icons"] else None


def render(artist: str, code: str, size: int) -> Image.Image:
    """The drawing as a `size` x `size` RGBA picture on transparent ground."""
    found = icon_set(artist)
    icon = found["icons"][icon_name(artist, code)]
    width, height = icon.get("width", found.get("width", 16)), icon.get("height", found.get("height", 16))
    left, top = icon.get("left", found.get("left", 0)), icon.get("top", found.get("top", 0))
    body = re.sub(r"\s+", " ", icon["body"])
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{left} {top} {width} {height}" width="{size}" height="{size}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
