"""Records to what a network eats: token ids, loss mask and tiles.

Promises: an item is used whole or refused by name, never cut; its length is known from picture headers before anything is
decoded. Tiles stay uint8 (normalised on the device).
Cost: one decode and resize an item, kept in memory up to a limit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import Record
from intervale.data.images import load_picture, picture_size
from intervale.data.prompt import Prompt, Template, Tokenizer, encode_turns, turns_of
from intervale.data.tiling import Tiling, cut_tiles


@dataclass(frozen=True)
class ItemPicture:
    """A picture of an item: what names it in this run, how many tiles it makes, and those uint8 tiles, or None where its features are kept."""

    key: str
    count: int
    tiles_PHWC: np.ndarray | None


@dataclass(frozen=True)
class Item:
    """One training or evaluation item, ready for the device."""

    id: str
    ids_S: np.ndarray
    trained_S: np.ndarray
    pictures: tuple[ItemPicture, ...]


@dataclass(frozen=True)
class Size:
    """What an item costs: tokens in all, target tokens, tiles."""

    tokens: int
    targets: int
    tiles: int


class TileCache:
    """Decoded tiles by file, the least recently used dropped beyond `limit` bytes. Safe to share between threads."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[str, Tiling], np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def tiles(self, record: Record, image: str, tiling: Tiling) -> np.ndarray:
        """`tiles_PHWC` of a record's picture. Raises: UserError when it cannot be read."""
        path = inside(record.root, image, record.where)
        key = (str(path), tiling)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        tiles = cut_tiles(load_picture(path, f"{record.where}: {image}"), tiling)
        with self._lock:
            if key not in self._held and tiles.nbytes <= self._limit:
                self._held[key] = tiles
                self._bytes += tiles.nbytes
                while self._bytes > self._limit:
                    self._bytes -= self._held.popitem(last=False)[1].nbytes
        return tiles


def _prompt(record: Record, counts: Sequence[int], tokenizer: Tokenizer, template: Template, tiling: Tiling) -> Prompt:
    return encode_turns(turns_of(record.messages, [n * tiling.tokens_per_tile for n in counts]), template, tokenizer)


def load_item(
    record: Record,
    tokenizer: Tokenizer,
    template: Template,
    tiling: Tiling,
    cache: TileCache,
    kept: Mapping[str, tuple[str, int]] | None = None,
    max_length: int | None = None,
) -> Item:
    """Tokenise one record; decode and tile its pictures, but for those in `kept` ({path: (key, tiles)}), whose features are known.

    Raises: UserError when a picture cannot be read, or (with `max_length`) the item is longer or has nothing to train on.
    """
    pictures = []
    for image in record.images:
        path = str(record.root / image)
        if kept is not None and path in kept:
            pictures.append(ItemPicture(*kept[path], None))
        else:
            tiles = cache.tiles(record, image, tiling)
            pictures.append(ItemPicture(path, len(tiles), tiles))
    prompt = _prompt(record, [picture.count for picture in pictures], tokenizer, template, tiling)
    if max_length is not None:
        _size_of(record, prompt, sum(picture.count for picture in pictures), tiling, max_length)
    return Item(record.id, prompt.ids_S, prompt.trained_S, tuple(pictures))


def measure(record: Record, tokenizer: Tokenizer, template: Template, tiling: Tiling, max_length: int) -> Size:
    """An item's size from its text and its pictures' headers.

    Raises: UserError when it is longer than `max_length`, has nothing to train on, or a header cannot be read.
    """
    counts = [
        tiling.tiles_of(*picture_size(inside(record.root, image, record.where), f"{record.where}: {image}")) for image in record.images
    ]
    return _size_of(record, _prompt(record, counts, tokenizer, template, tiling), sum(counts), tiling, max_length)


def _size_of(record: Record, prompt: Prompt, tiles: int, tiling: Tiling, max_length: int) -> Size:
    size = Size(len(prompt.ids_S), int(prompt.trained_S.sum()), tiles)
    if any(not message.content.strip() for message in record.messages if message.role == "assistant") or size.targets == 0:
        raise UserError(f"{record.where}: item {record.id!r} has no answer to train on", "give every item a non-empty assistant turn")
    if size.tokens > max_length:
        pictures = size.tiles * tiling.tokens_per_tile
        raise UserError(
            f"{record.where}: item {record.id!r} is {size.tokens} tokens long ({pictures} of them pictures); data.max_length is {max_length}",
            f"raise data.max_length to {size.tokens}, or lower data.max_tiles (now {tiling.max_tiles})",
        )
    return size
