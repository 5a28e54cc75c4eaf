"""The picture files of a data set: which there are, what names their content, how many tiles they make, and their tiles.

Promises: a file is named by its bytes, not by where it lies; what cannot be read is told by name and stops nothing.
Cost: a header each to count tiles, one read each to hash.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intervale.core.errors import UserError
from intervale.core.files import inside, sha256_file
from intervale.core.lang import say
from intervale.core.records import Record
from intervale.core.spread import spread
from intervale.data.images import PictureError, load_picture, picture_size
from intervale.data.stored import is_stored, picture_bytes
from intervale.data.tiling import Tiling, cut_tiles

_TELL_SECONDS = 5.0
_MOST_THREADS = 8  # both the disk and sha256 work without the interpreter lock


def pictures_of(records: Sequence[Record]) -> dict[Path, str]:
    """Every distinct picture file of the records, and what an error calls it. Raises: UserError for a path out of the data's folder."""

    seen: dict[tuple[Path, str], Path] = {}  # a name that many items share is looked up once

    def one(record: Record) -> list[tuple[Path, str]]:
        pairs = []
        for image in record.images:
            path = seen.get((record.root, image)) or inside(record.root, image, record.where)
            seen[record.root, image] = path
            pairs.append((path, f"{record.where}: {image}"))
        return pairs

    found: dict[Path, str] = {}
    parts: list[list[tuple[Path, str]]] = spread(one, records)
    for pairs in parts:
        for path, where in pairs:
            found.setdefault(path, where)
    return found


def count_tiles(pictures: Iterable[Path], tiling: Tiling) -> tuple[int, int]:
    """(pictures, their tiles) from the headers alone; what cannot be read counts as nothing."""

    def one(path: Path) -> int:
        try:
            return tiling.tiles_of(*picture_size(path))
        except PictureError:
            return 0

    counts = spread(one, list(pictures))
    return sum(count > 0 for count in counts), sum(counts)


def _hash(path: Path, where: str) -> str | UserError:
    try:
        if is_stored(path):
            return hashlib.sha256(picture_bytes(path)).hexdigest()
        if not path.is_file():
            picture_size(path, where)  # says what is wrong, and never blocks on a pipe
        return sha256_file(path)
    except UserError as error:
        return error
    except OSError as error:
        return PictureError(f"{where}: cannot be read: {error.strerror}", "check the path and its permissions")


def hash_pictures(pictures: Mapping[Path, str], tell: Callable[[str], None]) -> dict[Path, str | UserError]:
    """sha256 of every picture file's bytes, or why it cannot be read; in a few threads."""
    found: dict[Path, str | UserError] = {}
    told = time.monotonic()
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        try:
            for path, digest in zip(pictures, pool.map(_hash, pictures, pictures.values()), strict=True):
                found[path] = digest
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    tell(say(f"pictures read: {len(found)} of {len(pictures)}", f"已读取图片 {len(found)}/{len(pictures)}"))
        finally:
            pool.shutdown(cancel_futures=True)
    return found


@dataclass(frozen=True)
class Picture:
    """A distinct picture: its key, its file and that file's sha256, and what errors call it."""

    key: str
    path: Path
    sha: str
    where: str


def load_tiles(picture: Picture, tiling: Tiling) -> np.ndarray | UserError:
    """`tiles_PHWC`, or why there are none."""
    try:
        picture_size(picture.path, picture.where)  # refuses a bomb or a foreign file before all of it is read
        data = picture_bytes(picture.path)
        if hashlib.sha256(data).hexdigest() != picture.sha:
            return PictureError(f"{picture.where}: the file changes while it is read", "let whatever writes it finish, then run again")
        return cut_tiles(load_picture(data, picture.where), tiling)
    except UserError as error:
        return error
    except OSError as error:
        return PictureError(f"{picture.where}: cannot be read: {error.strerror}", "check the path and its permissions")
