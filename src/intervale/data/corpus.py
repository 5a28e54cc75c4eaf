"""The items a run learns from: one file or many, small ones read, large ones indexed, several mixed by weight.

Promises: the same items in the same order whether they are read or indexed; of a mix each source gives `weight` x its items an
epoch, and what an epoch leaves out comes in the next. Memory: a list of records for small files; else a row an item on the disk
(`data.index`) and 8 bytes an item for the order.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from intervale.core.errors import UserError
from intervale.core.files import sha256_file
from intervale.core.lang import say
from intervale.core.records import Record, data_digest, read_records
from intervale.data.index import Index, open_index
from intervale.data.order import Order, Part
from intervale.data.stored import ARCHIVES, GROUPS_KEPT

READ_AT_MOST = 64 << 20  # bytes of JSONL that are read as a whole when nobody says
_BLOCK_GUESS = 64 << 20  # bytes of a parquet row group, if its file says nothing better


@dataclass(frozen=True)
class SourceSpec:
    """A source as a recipe names it: a file or a pattern of files, and how often an epoch shows its items."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class _Source:
    """A source that is open: its records in memory, or the indexes of its files; `take` of its items are an epoch's."""

    files: tuple[Path, ...]
    records: list[Record] | None
    indexes: tuple[Index, ...]
    take: int
    digest: str

    @property
    def count(self) -> int:
        return len(self.records) if self.records is not None else sum(len(index) for index in self.indexes)


class Corpus(Sequence[Record]):
    """All items of a run, numbered source after source; an item is read when it is asked for. Safe across threads and forks."""

    def __init__(self, sources: Sequence[_Source], weights: Sequence[float]) -> None:
        self._sources = tuple(sources)
        self._weights = tuple(weights)
        self._places = [
            (entry, number)
            for entry, source in enumerate(sources)
            for number in range(1 if source.records is not None else len(source.indexes))
        ]
        counts = [
            source.count if source.records is not None else len(source.indexes[number])
            for source, number in ((sources[entry], number) for entry, number in self._places)
        ]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    @property
    def indexed(self) -> bool:
        """Is any of it read item by item?"""
        return any(source.records is None for source in self._sources)

    @property
    def digest(self) -> str:
        """A short name for exactly these items: of one file that `prepare` wrote, `data_digest` of its records."""
        return self._named([source.digest for source in self._sources])

    def _named(self, told: Sequence[str]) -> str:
        if len(told) == 1 and self._weights == (1.0,):
            return told[0]
        named = [f"{digest} x {weight}" for digest, weight in zip(told, self._weights, strict=True)]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]

    def is_named(self, digest: str) -> bool:
        """Is this a name of exactly these items? Records are named as they are written out, an index by its file's bytes; the same for what
        `prepare` wrote, two names for a file by another hand. Cost: nothing if it is `digest`, else one read of all."""
        if digest == self.digest:
            return True
        both = []
        first = 0
        for source in self._sources:
            if source.records is not None:
                other = _joined([file_digest(file) for file in source.files])
            else:
                other = data_digest(self[first + number] for number in range(source.count))
            both.append((source.digest, other))
            first += source.count
        return any(self._named(told) == digest for told in itertools.product(*both))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, number: int) -> Record: ...
    @overload
    def __getitem__(self, number: slice) -> list[Record]: ...
    def __getitem__(self, number: int | slice) -> Record | list[Record]:
        """An item, or a list of them. Raises: UserError when it does not parse (its file changed meanwhile)."""
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        place = int(np.searchsorted(self._ends, number, "right"))
        entry, file = self._places[place]
        source, inside = self._sources[entry], int(number - self._starts[place])
        if source.records is not None:
            return source.records[inside]
        before = int(self._starts[place] - self._starts[self._places.index((entry, 0))])
        return source.indexes[file].read(inside, before)

    def order(self, seed: int, together: bool = False) -> Order:
        """The order of the steps; with `together` items about the same pictures follow each other."""
        parts = []
        for source in self._sources:
            blocks = tuple(size for index in source.indexes for size in (index.blocks or (len(index),)))
            inside = any(index.blocks for index in source.indexes)
            parts.append(Part(source.count, source.take, blocks if inside else (), _window(source) if inside else 1))
        return Order(parts, seed, self.groups() if together else None)

    def groups(self) -> np.ndarray:
        """For each item the number of its group: items about the same pictures are one, text alone is its own."""
        found = []
        first = 0
        for source in self._sources:
            if source.records is not None:
                numbers: dict[object, int] = {}
                named = [
                    numbers.setdefault((record.root, record.images) if record.images else at, len(numbers))
                    for at, record in enumerate(source.records)
                ]
                own = np.array(named, np.int64)
            else:
                keys = _picture_keys(source)
                alone = keys == 0
                keys[alone] = np.flatnonzero(alone).astype(np.uint64) << np.uint64(1)  # even: no picture's key is
                _, own = np.unique(keys, return_inverse=True)
            found.append(own + first)
            first += int(own.max()) + 1
        return np.concatenate(found)

    def first_of_pictures(self) -> np.ndarray:
        """The numbers of the first items about each distinct list of pictures, in order: enough to meet every picture."""
        found, start = [], 0
        for source in self._sources:
            if source.records is not None:
                seen: dict[object, int] = {}
                for at, record in enumerate(source.records):
                    if record.images:
                        seen.setdefault((record.root, record.images), at)
                own = np.array(list(seen.values()), np.int64)
            else:
                keys = _picture_keys(source)
                places = np.flatnonzero(keys)
                _, first = np.unique(keys[places], return_index=True)
                own = np.sort(places[first])
            found.append(own + start)
            start += source.count
        return np.concatenate(found)

    def largest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of `count` items with the longest text, and of those with the most pictures, in any order. Indexed items only."""
        found: dict[str, list[np.ndarray]] = {"text": [], "images": []}
        for (entry, file), first in zip(self._places, self._starts, strict=True):
            source = self._sources[entry]
            for key, numbers in found.items():
                if source.records is None:
                    column = source.indexes[file].rows[key]
                    numbers.append(first + np.argpartition(column, max(0, len(column) - count))[-count:])
        return np.unique(np.concatenate(found["text"])), np.unique(np.concatenate(found["images"]))

    def shown(self, numbers: np.ndarray) -> np.ndarray:
        """How often an epoch shows these items, on average over epochs."""
        ends = np.cumsum([source.count for source in self._sources])
        each = np.array([source.take / source.count for source in self._sources])
        return each[np.searchsorted(ends, numbers, "right")]

    def weights_of(self, numbers: np.ndarray, tokens_a_byte: float, tokens_a_picture: float) -> np.ndarray:
        """About how many tokens items take, from their text's bytes and number of pictures alone."""
        costs = np.empty(len(numbers))
        for at, number in enumerate(numbers):
            place = int(np.searchsorted(self._ends, number, "right"))
            entry, file = self._places[place]
            source = self._sources[entry]
            if source.records is not None:
                record = source.records[int(number - self._starts[place])]
                text, images = sum(len(message.content.encode()) for message in record.messages), len(record.images)
            else:
                row = source.indexes[file].rows[int(number - self._starts[place])]
                text, images = int(row["text"]), int(row["images"])
            costs[at] = text * tokens_a_byte + images * tokens_a_picture
        return costs


def file_digest(path: Path) -> str:
    """What an index calls a JSONL file: sha256 of its bytes, 16 hex digits."""
    return sha256_file(path)[:16]


def _joined(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _picture_keys(source: _Source) -> np.ndarray:
    """What names each item's pictures, folder included; 0 for text alone, else odd."""
    parts = []
    for index in source.indexes:
        keys = np.array(index.rows["pictures"])
        folder = np.uint64(zlib.crc32(str(index.root.resolve()).encode()) << 1)
        parts.append(np.where(keys == 0, keys, keys ^ folder))
    return np.concatenate(parts)


def _window(source: _Source) -> int:
    """How many row groups are shuffled together: as many as a process keeps."""
    sizes = [index.lines.stat().st_size for index in source.indexes]
    archives = [Path(index.name).stat().st_size for index in source.indexes]
    groups = sum(len(index.blocks) or 1 for index in source.indexes)
    mean = max(1, (sum(archives) or _BLOCK_GUESS * len(sizes)) // groups)
    return max(1, GROUPS_KEPT // 2 // mean)


def _files(spec: str) -> list[Path]:
    path = Path(spec)
    if path.is_dir():
        raise UserError(f"{path} is a folder", f"name the file, for example {path / 'train.jsonl'}, or a pattern: {path / '*.tar'}")
    if path.exists() or not glob.has_magic(spec):
        return [path]
    found = sorted(Path(name) for name in glob.glob(spec))
    if not found:
        raise UserError(f"{spec}: no file fits", "check the pattern; * stands for any text within a name")
    return found


def reads_whole(files: Sequence[Path]) -> bool:
    """Are these read as a whole when nobody says otherwise: one JSONL file of at most READ_AT_MOST bytes?"""
    return len(files) == 1 and files[0].suffix not in ARCHIVES and (not files[0].exists() or files[0].stat().st_size <= READ_AT_MOST)


def open_corpus(specs: Sequence[SourceSpec], index: str, tell: Callable[[str], None], cache: Path | None = None) -> Corpus:
    """Open the sources. `index`: 'on', 'off', or 'auto' (large files, archives and patterns). Raises: UserError at the first fault."""
    assert specs
    sources = []
    for spec in specs:
        files = _files(spec.path)
        whole = index == "off" or (index == "auto" and reads_whole(files))
        if whole and any(file.suffix in ARCHIVES for file in files):
            raise UserError(f"{spec.path}: an archive is read through its index", "set data.index to auto")
        if whole:
            records: list[Record] = []
            for file in files:
                records += read_records(file, len(records))
            sources.append(_Source(tuple(files), records, (), _share(spec, len(records)), data_digest(records)))
            continue
        indexes = tuple(open_index(file, cache) for file in files)
        count = sum(len(found) for found in indexes)
        digest = _joined([found.digest for found in indexes])
        sources.append(_Source(tuple(files), None, indexes, _share(spec, count), digest))
        tell(
            say(
                f"indexed: {count:,} items in {len(files)} file{'s' * (len(files) != 1)} ({spec.path})",
                f"已索引：{len(files)} 个文件，{count:,} 条（{spec.path}）",
            )
        )
    return Corpus(sources, [spec.weight for spec in specs])


def _share(spec: SourceSpec, count: int) -> int:
    return max(1, round(spec.weight * count))
