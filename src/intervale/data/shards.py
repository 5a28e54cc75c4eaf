"""Archives of items as lines: WebDataset's tar files and parquet tables, their text copied once, their pictures left where they are.

A tar holds `KEY.json` (a record, docs/data.md) and its pictures `KEY.jpg`, `KEY.0.png`, ...: named by the record's `images`, or in the
order of the archive. A parquet row has the record's columns; `images` holds paths, bytes, or {bytes, path} as Hugging Face writes them.
Cost: a tar's headers and JSON members (pictures are skipped); parquet's columns but for pictures that lie inside.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from intervale.core.errors import UserError
from intervale.core.files import parse_json
from intervale.data.stored import need_pyarrow, parquet_name, tar_name

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BLOCK = 512  # a tar's unit; two of zeros end it
_COLUMNS = ("messages", "images", "id", "choices", "answer", "tags")


def write_records(path: Path, target: Path) -> tuple[int, ...]:
    """The items of a shard as JSON lines in `target`; returns the items of each block that is read as a whole (none: any item alone).

    Raises: UserError for what is no shard, or an item without its parts.
    """
    with open(target, "wb") as out:
        return _tar(path, out) if path.suffix == ".tar" else _parquet(path, out)


def _line(out: BinaryIO, item: dict[str, Any]) -> None:
    out.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")


def _samples(path: Path) -> Iterator[tuple[str, list[tarfile.TarInfo], tarfile.TarFile]]:
    """Members with the same key (the name up to the first dot of its last part), which stand together in a WebDataset."""
    with tarfile.open(path, "r:") as archive:
        key, members = "", list[tarfile.TarInfo]()
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            own = f"{folder}/{name.partition('.')[0]}"
            if own != key and members:
                yield key, members, archive
                members = []
            key = own
            members.append(member)
        if members:
            yield key, members, archive
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(_BLOCK) != bytes(_BLOCK):  # cut at a member's end: without this the rest would be missed by nobody
            raise tarfile.ReadError("it is cut short: the mark of its end is missing")


def _tar(path: Path, out: BinaryIO) -> tuple[int, ...]:
    try:
        for number, (key, members, archive) in enumerate(_samples(path), 1):
            where = f"{path}: sample {number} ({key.strip('/')})"
            texts = [member for member in members if member.name.endswith(".json")]
            if len(texts) != 1 or texts[0].size > 1 << 26:
                raise UserError(f"{where}: {len(texts)} JSON members", "each sample has one KEY.json with the record's keys (docs/data.md)")
            file = archive.fileobj
            assert file is not None
            back = file.tell()
            file.seek(texts[0].offset_data)
            raw = file.read(texts[0].size)
            file.seek(back)
            item = parse_json(raw.decode("utf-8-sig", "replace"), where)
            if not isinstance(item, dict):
                raise UserError(f"{where}: KEY.json is no JSON object", 'start it with {"messages": ...')
            _line(out, item | {"images": _members(path, item.get("images"), members, where)})
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path}: not an uncompressed tar archive that can be read: {error}", "write it again, without compression"
        ) from error
    return ()


def _members(path: Path, named: Any, members: list[tarfile.TarInfo], where: str) -> list[str]:
    """The stored names of a sample's pictures, in the order of the record's `images` or else of the archive."""
    pictures = [member for member in members if member.name.lower().endswith(_PICTURES)]
    chosen = pictures
    if named:
        chosen = []
        for name in named if isinstance(named, list) else [named]:
            fits = [m for m in pictures if m.name == name or m.name.rpartition("/")[2] == name or m.name.partition(".")[2] == name]
            if len(fits) != 1:
                raise UserError(f"{where}: {len(fits)} members fit the image {name!r}", "name each by the rest of its name: jpg, 0.png")
            chosen += fits
    return [tar_name(path.resolve().name, member.offset_data, member.size, member.name) for member in chosen]


def _parquet(path: Path, out: BinaryIO) -> tuple[int, ...]:
    parquet = need_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if "messages" not in names:
                raise UserError(f"{path}: no column 'messages'", f"its columns must be among {', '.join(_COLUMNS)}")
            if names - set(_COLUMNS):
                raise UserError(f"{path}: unknown columns {', '.join(sorted(names - set(_COLUMNS)))}", "drop them when writing the table")
            inside = "images" in names and _holds_bytes(file.schema_arrow.field("images").type)
            wanted = [name for name in _COLUMNS if name in names and not (inside and name == "images")]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=wanted)
                counts = _counts(file, group) if inside else None
                for row, item in enumerate(table.to_pylist()):
                    _line(out, _plain(item, path.resolve().name, group, row, counts))
            return tuple(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)) if inside else ()
    except (ValueError, OSError) as error:  # Arrow's own errors are ValueErrors
        raise UserError(f"{path}: not a parquet file that can be read: {error}", "write it again") from error


def _holds_bytes(kind: Any) -> bool:
    return "binary" in str(kind)


def _counts(file: Any, group: int) -> list[int]:
    """Pictures of each row of a group; reads only the paths beside the bytes where there are any."""
    kind = str(file.schema_arrow.field("images").type)
    leaves = [file.schema.column(n).path for n in range(len(file.schema)) if file.schema.column(n).path.startswith("images.")]
    cheap = [leaf for leaf in leaves if leaf.endswith(".path")] if "struct" in kind else []
    column = file.read_row_group(group, columns=cheap or ["images"]).column("images")
    return [count or 0 for count in _pylist_lengths(column)]


def _pylist_lengths(column: Any) -> list[int | None]:
    import pyarrow.compute as compute

    return list(compute.list_value_length(column).to_pylist())


def _plain(item: dict[str, Any], shard: str, group: int, row: int, counts: list[int] | None) -> dict[str, Any]:
    """A row as the record's JSON: absent values left out, columns of JSON text decoded, pictures inside named by their place."""
    found = {key: value for key, value in item.items() if value is not None}
    for key in ("messages", "choices", "tags"):
        if isinstance(found.get(key), str):
            found[key] = parse_json(found[key], f"{shard}: row group {group}, row {row}, {key}")
    if isinstance(found.get("tags"), list):  # Arrow's maps are lists of pairs
        found["tags"] = dict(found["tags"])
    if isinstance(found.get("tags"), dict):
        found["tags"] = {key: value for key, value in found["tags"].items() if value is not None}
    if counts is not None:
        found["images"] = [parquet_name(shard, group, row, number) for number in range(counts[row])]
    return found
