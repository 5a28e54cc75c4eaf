"""Does an evaluation ask what a training file has taught? Pictures byte by byte and by look, questions by their words. No torch here.

Promises: an item counts as seen when training holds its question (in normal form) about its pictures, the same bytes or the same look;
what only shares a picture or only a question is counted apart; a picture that cannot be read is counted, never skipped in silence.
Cost: one read and one decode of every distinct picture on both sides (beyond `MOST_DECODED` pictures the look is not compared, and said).

Look: a difference hash of 256 bits (ImageHash) and the tint of 4 x 4 fields, for the hash knows no colour. By `bench/looks.py`, a copy at
JPEG quality 30, of half the size or 256 pixels wide, or 15% brighter differs in at most 9 bits (20 photographs); different photographs in 95
or more, foodemoji's drawings of different artists in 29 or more. A picture cropped by 2% at each edge differs in up to 47: crops are not found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import Record
from intervale.data.images import load_picture
from intervale.data.pictures import hash_pictures
from intervale.evaluate.score import normalise

MOST_DECODED = 20_000  # pictures of both sides together
_SIDE, _FIELDS, _ROUGH = 16, 4, 256
_MOST_BITS, _MOST_TINT = 16, 32.0  # bits of 256; levels of 255, in the field and channel where they differ most
_FLAT = 12  # a hash with fewer bits set (or not set) than this is of a picture without structure: it looks like any other such
_EXAMPLES = 20
Keys = tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """What a picture looks like: `bits_32` (256 bits, packed), `tint_48` (mean RGB of 4 x 4 fields, less each field's brightness)."""

    bits_32: np.ndarray
    tint_48: np.ndarray


def look_of(picture: Image.Image) -> Look | None:
    """The look of an upright RGB picture; None when it has too little structure to be told from others by it."""
    from imagehash import dhash

    bits = dhash(picture, _SIDE).hash
    if not _FLAT <= int(bits.sum()) <= bits.size - _FLAT:
        return None
    fields = np.asarray(picture.resize((_FIELDS, _FIELDS), Image.Resampling.BOX), dtype=np.float32)
    return Look(np.packbits(bits), (fields - fields.mean(-1, keepdims=True)).ravel())


def _looks(paths: Sequence[Path]) -> tuple[dict[Path, Look], int]:
    """(the look of every picture that has one, how many could not be decoded)."""

    def one(path: Path) -> Look | UserError | None:
        try:
            return look_of(load_picture(path, rough=_ROUGH))
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(paths, pool.map(one, paths), strict=True))
    return {path: look for path, look in found.items() if isinstance(look, Look)}, sum(
        isinstance(look, UserError) for look in found.values()
    )


def alike(looks: Sequence[Look], others: Sequence[Look]) -> list[list[int]]:
    """For each of `looks` the places among `others` that look the same."""
    if not looks or not others:
        return [[] for _ in looks]
    bits_N4 = np.stack([look.bits_32 for look in others]).view(np.uint64)
    tint_N48 = np.stack([look.tint_48 for look in others])
    found = []
    for look in looks:
        near = np.bitwise_count(bits_N4 ^ look.bits_32.view(np.uint64)).sum(1) <= _MOST_BITS
        near &= np.abs(tint_N48 - look.tint_48).max(1) <= _MOST_TINT
        found.append([int(place) for place in np.flatnonzero(near)])
    return found


def _paths(records: Sequence[Record]) -> dict[Path, str]:
    """Every picture file that can be named, and what an error calls it."""
    found: dict[Path, str] = {}
    for record in records:
        for image in record.images:
            try:
                found.setdefault(inside(record.root, image, record.where), f"{record.where}: {image}")
            except UserError:
                continue
    return found


def _names(records: Sequence[Record], keys: Mapping[Path, str]) -> Iterator[tuple[Record, Keys | None]]:
    """(record, the keys of its pictures), None where one has no key."""
    for record in records:
        try:
            own = [keys.get(inside(record.root, image, record.where)) for image in record.images]
        except UserError:
            own = [None]
        yield record, None if None in own else tuple(key for key in own if key is not None)


class _Training:
    """What the training records hold: (question, pictures), pictures alone, questions alone."""

    def __init__(self, records: Sequence[Record], keys: Mapping[Path, str]) -> None:
        self.items: dict[tuple[str, Keys], str] = {}
        self.pictures: set[str] = set()
        self.questions: set[str] = set()
        for record, names in _names(records, keys):
            question = normalise(record.question())
            self.questions.add(question)
            if names is not None:
                self.items.setdefault((question, names), record.where)
                self.pictures.update(names)


def _renamed(here: Mapping[Path, str], there: Mapping[Path, str]) -> tuple[dict[Path, str], int]:
    """(`here` with every picture that looks like one of `there` named as that one, how many pictures could not be decoded).

    A picture that looks like several takes the first: which one matters only where training holds near copies itself.
    """
    (own, lost), (other, gone) = _looks(list(here)), _looks(list(there))
    known, paths = set(there.values()), list(other)
    places = alike(list(own.values()), list(other.values()))
    named = {path: there[paths[near[0]]] for path, near in zip(own, places, strict=True) if near and here[path] not in known}
    return {**here, **named}, lost + gone


def contamination(records: Sequence[Record], training: Sequence[Record], tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Counts of `records` (items): {items, exact, near, picture, question, unreadable, looks, examples}.

    `exact`: same question, same pictures byte for byte. `near`: not exact, but pictures of the same look. `picture`: neither, but one of its
    pictures is in training too. `question`: none of these, but its words are (usual where many pictures are asked the same).
    `unreadable`: pictures of both sides that could not be compared. `looks`: was the look compared?
    """
    read = [hash_pictures(_paths(side), tell) for side in (records, training)]
    here, there = ({path: key for path, key in side.items() if isinstance(key, str)} for side in read)
    unreadable = sum(len(side) for side in read) - len(here) - len(there)
    exact = _Training(training, there)
    looks = len(here) + len(there) <= MOST_DECODED
    alias, lost = _renamed(here, there) if looks else (here, 0)
    counts: dict[str, Any] = {"items": len(records), "exact": 0, "near": 0, "picture": 0, "question": 0}
    examples: list[dict[str, str]] = []
    for (record, names), (_, same) in zip(_names(records, here), _names(records, alias), strict=True):
        question = normalise(record.question())
        kind = _kind(exact, question, names, same)
        if kind is None:
            continue
        counts[kind] += 1
        where = exact.items.get((question, (names if kind == "exact" else same) or ()))
        if where and len(examples) < _EXAMPLES:
            examples.append({"id": record.id, "how": kind, "training": where})
    return {**counts, "unreadable": unreadable + lost, "looks": looks, "examples": examples}


def _kind(training: _Training, question: str, names: Keys | None, same: Keys | None) -> str | None:
    if names is not None and (question, names) in training.items:
        return "exact"
    if same is not None and (question, same) in training.items:
        return "near"
    if same is not None and any(key in training.pictures for key in same):
        return "picture"
    return "question" if question in training.questions else None
