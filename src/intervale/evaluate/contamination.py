"""Does an evaluation ask what a training file has taught? Pictures byte by byte and by look, questions by their words. No torch here.

Promises: an item counts as seen when training holds its question (in normal form) about its pictures, the same bytes or the same look;
what only shares a picture or only a question is counted apart; a picture that cannot be read is counted, never skipped in silence.
Cost: one read and one decode of every distinct picture on both sides (beyond `MOST_DECODED` pictures the look is not compared, and said).

Look: a difference hash of 256 bits (ImageHash), the tint of 4 x 4 fields, for the hash knows no colour, and the grey of 32 x 32 fields, for
it knows no detail either: to it, receipts, forms and dials of one kind are all one picture. By `bench/looks.py`, a copy at
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
from intervale.core.lang import say
from intervale.core.records import Record
from intervale.data.images import load_picture
from intervale.data.pictures import hash_pictures
from intervale.evaluate.score import normalise

MOST_DECODED = 20_000  # pictures of both sides together
_SIDE, _FIELDS, _ROUGH = 16, 4, 256
_MOST_BITS, _MOST_TINT = 16, 32.0  # bits of 256; levels of 255, in the field and channel where they differ most
_GREY, _MOST_GREY = 32, 1.75  # fields a side; standard deviations of a picture's grey, in the field where two differ most
_LEAST_SPREAD = 8.0  # levels: the grey of a picture with less contrast is not blown up to noise
_FLAT = 12  # a hash with fewer bits set (or not set) than this is of a picture without structure: it looks like any other such
_EXAMPLES, _MANY = 20, 1_000  # items named in a summary; pictures that take long enough to say so
Keys = tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """What a picture looks like: `bits_32` (256 bits, packed), `tint_48` (mean RGB of 4 x 4 fields, less each field's brightness),
    `grey_1024` (brightness of 32 x 32 fields, less its mean, in its standard deviations)."""

    bits_32: np.ndarray
    tint_48: np.ndarray
    grey_1024: np.ndarray


def look_of(picture: Image.Image) -> Look | None:
    """The look of an upright RGB picture; None when it has too little structure to be told from others by it."""
    from imagehash import dhash

    bits = dhash(picture, _SIDE).hash
    if not _FLAT <= int(bits.sum()) <= bits.size - _FLAT:
        return None
    fields = np.asarray(picture.resize((_FIELDS, _FIELDS), Image.Resampling.BOX), dtype=np.float32)
    grey = np.asarray(picture.convert("L").resize((_GREY, _GREY), Image.Resampling.BOX), dtype=np.float32).ravel()
    grey = (grey - grey.mean()) / max(float(grey.std()), _LEAST_SPREAD)
    return Look(np.packbits(bits), (fields - fields.mean(-1, keepdims=True)).ravel(), grey)


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


class _Looks:
    """Looks side by side, so that one is compared with all of them at once."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self._bits_N4 = np.stack([look.bits_32 for look in looks]).view(np.uint64)
        self._tint_N48 = np.stack([look.tint_48 for look in looks])
        self._grey_N1024 = np.stack([look.grey_1024 for look in looks])

    def like(self, look: Look, wanted_N: np.ndarray | None = None) -> np.ndarray:
        """The places of those that look the same as `look`, among the `wanted_N` (all of them)."""
        same_N = np.bitwise_count(self._bits_N4 ^ look.bits_32.view(np.uint64)).sum(1) <= _MOST_BITS
        near = np.flatnonzero(same_N if wanted_N is None else same_N & wanted_N)
        near = near[np.abs(self._tint_N48[near] - look.tint_48).max(1) <= _MOST_TINT]
        return near[np.abs(self._grey_N1024[near] - look.grey_1024).max(1) <= _MOST_GREY]


def alike(looks: Sequence[Look], others: Sequence[Look]) -> list[list[int]]:
    """For each of `looks` the places among `others` that look the same."""
    if not looks or not others:
        return [[] for _ in looks]
    among = _Looks(others)
    return [among.like(look).tolist() for look in looks]


def families(looks: Sequence[Look]) -> np.ndarray:
    """A number for each look, the same for two that look alike or have a chain of such between them.

    Pairs that are of one family already are not compared, and none are kept: ten thousand pictures of one look have fifty million.
    """
    labels_N = np.arange(len(looks))
    among = _Looks(looks) if looks else None
    for place, look in enumerate(looks):
        assert among is not None
        near = among.like(look, labels_N != labels_N[place])
        if len(near):
            labels_N[np.isin(labels_N, labels_N[near])] = labels_N[place]
    return labels_N


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
    """(record, the keys of its pictures in an order of their own), None where one has no key. Options shuffled are the same item."""
    for record in records:
        try:
            own = [keys.get(inside(record.root, image, record.where)) for image in record.images]
        except UserError:
            own = [None]
        yield record, None if None in own else tuple(sorted(key for key in own if key is not None))


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


def _families(files: Mapping[Path, str]) -> tuple[dict[Path, str], int]:
    """(every picture named by what looks the same, itself at least, how many pictures could not be decoded).

    Families, not pairs: a copy of a copy is one too. A picture without a look keeps its own name.
    """
    first = {key: path for path, key in reversed(list(files.items()))}  # the same bytes are decoded once
    looks, lost = _looks(list(first.values()))
    keys = [key for key, path in first.items() if path in looks]
    labels = families([looks[first[key]] for key in keys])
    named = {key: f"look {label}" for key, label in zip(keys, labels, strict=True)}
    return {path: named.get(key, key) for path, key in files.items()}, lost


def contamination(records: Sequence[Record], training: Sequence[Record], tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Counts of `records` (items): {items, exact, near, picture, question, unreadable, looks, examples}.

    `exact`: same question, same pictures byte for byte. `near`: not exact, but pictures of the same look. `picture`: neither, but one of its
    pictures is in training too. `question`: none of these, but its words are (usual where many pictures are asked the same).
    `unreadable`: pictures of both sides that could not be compared. `looks`: was the look compared?
    """
    read = [hash_pictures(_paths(side), tell) for side in (records, training)]
    here, there = ({path: key for path, key in side.items() if isinstance(key, str)} for side in read)
    unreadable = sum(len(side) for side in read) - len(here) - len(there)
    pictures = len(here) + len(there)
    looks = pictures <= MOST_DECODED
    if pictures > _MANY:
        en, zh = ("by look too", "包括外观") if looks else ("by their bytes alone", "仅逐字节")
        tell(say(f"comparing with the training items: {pictures:,} pictures, {en}", f"与训练数据比较：{pictures:,} 张图片，{zh}"))
    family, lost = _families({**here, **there}) if looks else ({**here, **there}, 0)
    exact, similar = _Training(training, there), _Training(training, family)
    counts: dict[str, Any] = {"items": len(records), "exact": 0, "near": 0, "picture": 0, "question": 0}
    examples: list[dict[str, str]] = []
    for (record, names), (_, same) in zip(_names(records, here), _names(records, family), strict=True):
        kind, where = _kind(exact, similar, normalise(record.question()), names, same)
        if kind:
            counts[kind] += 1
        if where and len(examples) < _EXAMPLES:
            examples.append({"id": record.id, "how": kind, "training": where})
    return {**counts, "unreadable": unreadable + lost, "looks": looks, "examples": examples}


def _kind(exact: _Training, looks: _Training, question: str, names: Keys | None, same: Keys | None) -> tuple[str, str]:
    """(which count an item adds to, or '', and where its training item stands, or '')."""
    if names is not None and (question, names) in exact.items:
        return "exact", exact.items[question, names]
    if same is not None and (question, same) in looks.items:
        return "near", looks.items[question, same]
    if same is not None and any(key in looks.pictures for key in same):
        return "picture", ""
    return ("question", "") if question in exact.questions else ("", "")
