"""Where every item of a large file lies, found once: so that training begins, and resumes, without reading the data.

    CACHE/index/<name>-<digest of the path>/   meta.json, items.bin (a row an item), records.jsonl (of an archive: its text)

Promises: complete or absent; made again when the file's size or time changed; every line is checked for what `parse_record` checks,
and the first fault stops with its line. Memory: a row (44 bytes) an item, mapped from the disk. Cost: about 5 us an item and core,
plus one sha256 of the file. An item is parsed strictly, again, when it is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from intervale.core.errors import UserError
from intervale.core.files import disk_errors, parse_json, read_object, staged_folder, write_json
from intervale.core.records import IMAGE, Record, parse_record
from intervale.core.spread import stream
from intervale.data.stored import ARCHIVES

VERSION = 1
META, ITEMS, RECORDS = "meta.json", "items.bin", "records.jsonl"
# offset and size of the line; its number; UTF-8 bytes of all turns and of the answers; pictures; what names the pictures and the id (0: none)
ROW = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("line", "<u4"), ("text", "<u4"), ("answer", "<u4"), ("images", "<u4"), ("pictures", "<u8"), ("id", "<u8")]
)  # fmt: skip
_PACKED = struct.Struct("<QIIIIIQQ")  # a ROW
_CHUNK = 4 << 20  # bytes of a file that a process scans at a time
_KEYS = {"messages", "images", "id", "choices", "answer", "tags"}


def cache_folder() -> Path:
    """Where indexes lie: $INTERVALE_CACHE/index, else ~/.cache/intervale/index."""
    return Path(os.environ.get("INTERVALE_CACHE") or Path.home() / ".cache" / "intervale") / "index"


@dataclass(frozen=True)
class Index:
    """A file's index: `rows` (ROW, mapped), the file its lines are read from, where its pictures' paths start, what errors call it."""

    rows: np.ndarray
    lines: Path
    root: Path
    name: str
    digest: str
    blocks: tuple[int, ...]  # items of each block that is read as a whole (parquet's row groups with pictures in them)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int, first: int = 0) -> Record:
        """Item `number`, checked strictly. `first`: items before this file, for those without an id. Raises: UserError."""
        row = self.rows[number]
        where = f"{self.name}:{int(row['line'])}"
        try:
            handle = os.open(self.lines, os.O_RDONLY)  # opened anew: safe across forks and threads, and thousands of shards stay closed
            try:
                data = os.pread(handle, int(row["size"]), int(row["offset"]))
            finally:
                os.close(handle)
            text = data.decode()
        except OSError as error:
            raise UserError(f"{where}: cannot be read any more: {error.strerror}", "put the file back, then run again") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 any more", "the file changed while the run goes on: put it back") from error
        return parse_record(parse_json(text, where), where, self.root, first + number + 1)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") | 1  # never 0, which means none


def _usual(holds: bool) -> None:
    if not holds:
        raise ValueError("not in the usual form")


def _quick(item: Any) -> tuple[int, int, int, int, int]:
    """(text, answer, images, pictures, id) of an item that keeps to the usual form; any exception: look closer."""
    text = answer = marks = 0
    expected = "user"
    messages = item["messages"]
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        length = len(content.encode())
        text += length
        if role == "user":
            marks += content.count(IMAGE)
        else:
            _usual(IMAGE not in content)
        if number == 0 and role == "system":
            continue
        _usual(role == expected and len(message) == 2)
        if role == "assistant":
            answer += length
        expected = "assistant" if role == "user" else "user"
    images = item.get("images") or ()
    _usual(bool(messages) and marks == len(images) and item.keys() <= _KEYS)
    if "choices" in item or "answer" in item or "tags" in item:
        _quick_extras(item)
    name = item.get("id")
    return text, answer, marks, _hash("\0".join(images)) if images else 0, 0 if name is None else _hash(str(name))


def _quick_extras(item: Any) -> None:
    """Choices, answer and tags in their usual form; any exception: look closer."""
    choices, answer, tags = item.get("choices") or [], item.get("answer"), item.get("tags") or {}
    _usual(type(choices) is list and type(tags) is dict)
    "".join(choices)  # texts, or an exception
    "".join(tags.values())
    _usual(answer is None or (type(answer) is int and 0 <= answer < len(choices)))


def row_values(raw: bytes) -> tuple[int, int, int, int, int]:
    """(text, answer, images, pictures, id) of a line. Raises: UserError for what `parse_record` refuses."""
    try:
        return _quick(orjson.loads(raw))
    except Exception:  # then it is looked at closely, which tells what is wrong if anything is
        pass
    try:
        decoded = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8", "save the file as UTF-8") from error
    item = parse_json(decoded, "")
    record = parse_record(item, "", Path())
    answers = sum(len(message.content.encode()) for message in record.messages if message.role == "assistant")
    return (
        sum(len(message.content.encode()) for message in record.messages),
        answers,
        len(record.images),
        _hash("\0".join(record.images)) if record.images else 0,
        0 if item.get("id") is None else _hash(record.id),
    )


@dataclass(frozen=True)
class _Scan:
    """A chunk of a file: rows with lines counted from its start, its lines, and the (offset, size, line) of its first fault."""

    rows: np.ndarray
    lines: int
    fault: tuple[int, int, int] | None = None


def _scan(path: Path, start: int, size: int) -> _Scan:
    """The lines that begin in `size` bytes from `start`."""
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start and file.read(1) != b"\n":
            size -= len(file.readline())
        offset = file.tell()
        data = file.read(size) if size > 0 else b""
        if data and not data.endswith(b"\n"):
            data += file.readline()
    found: list[bytes] = []
    pack = _PACKED.pack
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    for number, raw in enumerate(lines):
        body = raw[3:] if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else raw
        if body.strip():
            try:
                found.append(pack(offset + len(raw) - len(body), len(body), number, *row_values(body)))
            except UserError:
                return _Scan(_rows(found), len(lines), (offset + len(raw) - len(body), len(body), number))
        offset += len(raw) + 1
    return _Scan(_rows(found), len(lines))


def _rows(packed: list[bytes]) -> np.ndarray:
    return np.frombuffer(bytearray(b"".join(packed)), ROW)  # a bytearray: its line numbers are yet to be raised


def _scan_all(path: Path, name: str, target: Path) -> None:
    """items.bin of a JSONL file, over all cores. Raises: UserError at its first fault."""
    size = path.stat().st_size
    starts = range(0, size, _CHUNK)
    lines = 0
    with open(target, "wb") as out:
        for scan in stream(lambda start: _scan(path, start, min(_CHUNK, size - start)), starts, few=1, chunk=1):
            scan.rows["line"] += lines + 1
            out.write(scan.rows.tobytes())
            if scan.fault is not None:
                _raise_fault(path, f"{name}:{lines + scan.fault[2] + 1}", *scan.fault[:2])
            lines += scan.lines


def _raise_fault(path: Path, where: str, offset: int, size: int) -> None:
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.read(size)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8", "save the file as UTF-8") from error
    parse_record(parse_json(text, where), where, path.parent)
    raise AssertionError("the scan found a fault that parsing does not")


def _refuse_twins(rows: np.ndarray, lines: Path, name: str) -> None:
    """Raise for two items with one id."""
    order = np.argsort(rows["id"], kind="stable")
    ids = rows["id"][order]
    for place in np.flatnonzero((ids[1:] == ids[:-1]) & (ids[1:] != 0)):
        pair = [rows[order[place + number]] for number in (0, 1)]
        with open(lines, "rb") as file:
            told = []
            for row in pair:
                file.seek(int(row["offset"]))
                told.append(str(orjson.loads(file.read(int(row["size"])))["id"]))
        if told[0] == told[1]:
            what = f"{name}:{pair[1]['line']}: the id {told[0]!r} stands already at {name}:{pair[0]['line']}"
            raise UserError(what, "give every item an id of its own")


@contextlib.contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    """Hold `path`; others wait, and then find what was made."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _state(path: Path) -> dict[str, Any]:
    try:
        seen = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from error
    return {"version": VERSION, "file": str(path.resolve()), "size": seen.st_size, "mtime_ns": seen.st_mtime_ns}


def open_index(path: Path, cache: Path | None = None) -> Index:
    """The index of a JSONL, tar (WebDataset) or parquet file, made if it is not there yet. Raises: UserError at the first fault."""
    state = _state(path)
    label = hashlib.sha256(state["file"].encode()).hexdigest()[:16]
    folder = (cache or cache_folder()) / f"{path.name[:60]}-{label}"
    found = _stored(folder, state)
    if found is None:
        with _waiting_lock(folder.with_name(f".{folder.name}.lock")):
            found = _stored(folder, state) or _build(path, folder, state)
    rows = np.memmap(folder / ITEMS, ROW, "r")
    lines = folder / RECORDS if (folder / RECORDS).is_file() else path
    inside = path.suffix == ".tar" or found["blocks"]  # its pictures are named from where it really lies
    return Index(rows, lines, Path(state["file"]).parent if inside else path.parent, str(path), found["digest"], tuple(found["blocks"]))


def _stored(folder: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    try:
        meta = read_object(folder / META, "digest", "blocks", "items", *state)
    except UserError:
        return None
    whole = (folder / ITEMS).is_file() and (folder / ITEMS).stat().st_size == meta["items"] * ROW.itemsize
    return meta if whole and all(meta[key] == value for key, value in state.items()) else None


def _build(path: Path, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    import shutil

    from intervale.data.shards import write_records

    shutil.rmtree(folder, ignore_errors=True)
    with staged_folder(folder) as aside:
        blocks: tuple[int, ...] = ()
        lines = path
        if path.suffix in ARCHIVES:
            lines = aside / RECORDS
            blocks = write_records(path, lines)
        _scan_all(lines, str(path), aside / ITEMS)
        items = (aside / ITEMS).stat().st_size // ROW.itemsize
        if not items:
            raise UserError(f"{path}: no items", "a data set needs at least one line")
        _refuse_twins(np.memmap(aside / ITEMS, ROW, "r"), lines, str(path))
        with open(lines, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        if _state(path) != state:
            raise UserError(f"{path}: the file changes while it is read", "let whatever writes it finish, then run again")
        meta = state | {"items": items, "digest": digest, "blocks": list(blocks)}
        write_json(aside / META, meta)
    return meta
