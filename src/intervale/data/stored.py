"""Pictures that lie inside an archive: named by path like any other, read without unpacking.

    shards/a.tar/@1536+48211/cat.jpg     bytes 1536 .. 1536 + 48211 of a.tar (tar does not compress)
    shards/a.parquet/@g3r17k0/picture    row group 3, row 17 of it, its first picture

Cost: a tar member is one read; a parquet picture reads its row group once, and the last groups are kept (512 MiB).
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError

ARCHIVES = (".tar", ".parquet")  # files of items that are no lines of text
GROUPS_KEPT = 512 << 20  # bytes of parquet pictures a process keeps
_IN_TAR = re.compile(r"(.+)/@(\d+)\+(\d+)/[^/]*")
_IN_PARQUET = re.compile(r"(.+)/@g(\d+)r(\d+)k(\d+)/[^/]*")
_groups: OrderedDict[tuple[str, int], tuple[list[Any], int]] = OrderedDict()
_lock = threading.Lock()


def need_pyarrow() -> Any:
    """pyarrow.parquet. Raises: UserError with the extra's name when it is not installed."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("reading parquet needs pyarrow, which is not installed", "pip install 'intervale[parquet]'") from error
    return parquet


def tar_name(shard: str, offset: int, size: int, name: str) -> str:
    """The path of a tar member's bytes, from the shard's folder."""
    return f"{shard}/@{offset}+{size}/{Path(name).name}"


def parquet_name(shard: str, group: int, row: int, number: int) -> str:
    """The path of a row's picture, from the shard's folder."""
    return f"{shard}/@g{group}r{row}k{number}/picture"


def is_stored(path: Path) -> bool:
    """Does the path name a picture inside an archive?"""
    return "/@" in str(path) and bool(_IN_TAR.fullmatch(str(path)) or _IN_PARQUET.fullmatch(str(path))) and not path.exists()


def picture_bytes(path: Path) -> bytes:
    """The bytes of a picture file, or of a picture inside an archive. Raises: OSError as reading a file does."""
    if not is_stored(path):
        return path.read_bytes()
    if found := _IN_TAR.fullmatch(str(path)):
        archive, offset, size = found[1], int(found[2]), int(found[3])
        handle = os.open(archive, os.O_RDONLY)
        try:
            data = os.pread(handle, size, offset)
        finally:
            os.close(handle)
        if len(data) != size:
            raise OSError(0, "the archive is shorter than its index says")
        return data
    found = _IN_PARQUET.fullmatch(str(path))
    assert found is not None
    try:
        return bytes(_group(found[1], int(found[2]))[int(found[3])][int(found[4])])
    except (ValueError, IndexError, KeyError, TypeError) as error:  # Arrow's own errors are ValueErrors
        raise OSError(0, f"the archive does not hold it: {error}") from error


def _group(archive: str, number: int) -> Any:
    """Every row's pictures of a row group, as lists of bytes."""
    with _lock:
        if (archive, number) in _groups:
            _groups.move_to_end((archive, number))
            return _groups[archive, number][0]
        parquet = need_pyarrow()
        with parquet.ParquetFile(archive) as file:
            rows = file.read_row_group(number, columns=["images"]).column("images").to_pylist()
        pictures = [[entry["bytes"] if isinstance(entry, dict) else entry for entry in row or ()] for row in rows]
        size = sum(len(data) for row in pictures for data in row)
        _groups[archive, number] = (pictures, size)
        while len(_groups) > 1 and sum(size for _, size in _groups.values()) > GROUPS_KEPT:
            _groups.popitem(last=False)
        return pictures
