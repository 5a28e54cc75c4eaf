"""A data set's pictures as small data: URIs for a page that asks nothing of the network.

Promises: a picture enters through `data.images` from below the data's folder or not at all; whatever is wrong with one is a reason to
show, never an exception; a thumbnail is at most `MOST_BYTES`, and the same file gives the same bytes. Cost: one decode a picture.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.lang import say
from intervale.data.images import load_picture

MOST_BYTES = 6 * 1024
# (share of the edge, WebP quality), tried until one fits. The last always does: pure noise at that size is 1 KB.
_TRIES = ((1.0, 76), (1.0, 55), (1.0, 35), (0.75, 35), (0.5, 30), (0.3, 10))


@dataclass(frozen=True)
class Thumbnail:
    """A picture for a page: its `uri` and size in pixels, or (then `uri` is empty) `why` there is none, in the user's language."""

    name: str
    uri: str = ""
    width: int = 0
    height: int = 0
    why: str = ""


def _shrink(picture: Image.Image, edge: int, most: int) -> tuple[bytes, tuple[int, int]]:
    for share, quality in _TRIES:
        small = picture.copy()
        small.thumbnail((round(edge * share), round(edge * share)), Image.Resampling.LANCZOS)
        drawn = io.BytesIO()
        small.save(drawn, "WEBP", quality=quality, method=4)
        if drawn.tell() <= most:
            break
    return drawn.getvalue(), small.size


def thumbnail(root: Path, name: str, edge: int = 160, most: int = MOST_BYTES) -> Thumbnail:
    """The picture `name` below `root`, its longer side at most `edge` pixels, in at most `most` bytes (from 2 KB up)."""
    try:
        path = inside(root, name, "")
    except UserError:
        return Thumbnail(name, why=say("not a path below the data's folder", "路径无效或不在数据目录之内"))
    try:
        if not path.exists():
            return Thumbnail(name, why=say("there is no such file now", "文件已不存在"))
        data, (width, height) = _shrink(load_picture(path), edge, most)
    except UserError as error:
        # The errors' texts are English (and name the whole path); a reader of the page needs the kind of trouble only.
        return Thumbnail(name, why=say(error.what.removeprefix(f"{path}: "), "无法读取或已损坏"))
    except (OSError, ValueError) as error:
        return Thumbnail(name, why=say(f"cannot be read: {error}", "无法读取"))
    return Thumbnail(name, "data:image/webp;base64," + base64.b64encode(data).decode(), width, height)
