"""What makes two items the same, a division of a data set that keeps such items on one side, and what a division kept apart.

Items are the same in part when they share a picture (its bytes, or its decoded pixels), a dish, or, without a picture, the
words of the question. Promises: the division is a function of the items and the seed; no such tie crosses it. Cost: every
distinct picture is decoded once, in a few threads; the rest is linear.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from intervale.core.errors import UserError
from intervale.core.machine import free_ram
from intervale.core.records import IMAGE, Record
from intervale.data.images import load_picture, max_pixels, picture_size

MAX_THREADS = 8
_A_PIXEL = 12  # bytes that it may take for a moment: as read, turned, and RGB; measured with 8,000 x 5,000 of RGB, RGBA and CMYK


@dataclass(frozen=True)
class Look:
    """One picture file: sha256 of its bytes and of its upright pixels, sizes in pixels and bytes, or (what, fix) if it is unusable."""

    file_sha: str = ""
    pixel_sha: str = ""
    width: int = 0
    height: int = 0
    size: int = 0
    fault: tuple[str, str] | None = None


def _look(path: Path) -> Look:
    try:
        if not path.exists():
            return Look(fault=("no such picture", "check the path, or put the picture there"))
        if not path.is_file():
            # A pipe or a device would block the read for ever.
            return Look(fault=("not a file", "name the picture file itself"))
        picture_size(path)  # refuses a bomb or a foreign file before it is read
        data = path.read_bytes()
        picture = load_picture(data, str(path))
    except UserError as error:
        return Look(fault=(error.what.removeprefix(f"{path}: "), error.fix))
    except OSError as error:
        return Look(fault=(f"cannot be read: {error.strerror}", "check the path and its permissions"))
    width, height = picture.size
    pixels = hashlib.sha256(f"{width}x{height}:".encode() + picture.tobytes()).hexdigest()
    return Look(hashlib.sha256(data).hexdigest(), pixels, width, height, len(data))


def _threads() -> int:
    """As many as half of the free memory holds pictures of the largest size that is let in."""
    return min(MAX_THREADS, max(2, os.cpu_count() or 2), max(1, free_ram() // (2 * _A_PIXEL * max_pixels())))


def look_at(paths: Iterable[Path]) -> dict[Path, Look]:
    """Decode every distinct picture once. Never raises for a picture: its Look tells the fault."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(distinct, pool.map(_look, distinct), strict=True))


def normal_text(text: str) -> str:
    """Text as it is compared: compatibility forms and case folded; white space and punctuation gone."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] not in "ZPC")


def question_key(record: Record) -> str:
    """The words of all user turns, normalised; empty when there are none."""
    return normal_text(" ".join(m.content.replace(IMAGE, " ") for m in record.messages if m.role == "user"))


def tag_value(record: Record, tag: str) -> str:
    """A tag's value as it is compared; empty when the item has none."""
    value = record.tags.get(tag, "").strip()
    return normal_text(value) or value


def ties_of(record: Record, looks: Sequence[Look], *, dishes: bool = True) -> set[str]:
    """What ties an item to others: each of its pictures (twice: bytes, pixels), its dish, or its question if it has no picture."""
    ties = {f"file {look.file_sha}" for look in looks} | {f"pixels {look.pixel_sha}" for look in looks}
    dish = tag_value(record, "food_name")
    if dish and dishes:
        ties.add(f"dish {dish}")
    question = question_key(record)
    if question and not record.images:
        ties.add(f"question {question}")
    return ties


def groups_of(ties: Sequence[set[str]]) -> list[list[int]]:
    """The connected groups of items (by position), each in order; groups in the order of their first item."""
    parent = list(range(len(ties)))

    def top(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    holder: dict[str, int] = {}
    for item, own in enumerate(ties):
        for tie in own:
            low, high = sorted((top(item), top(holder.setdefault(tie, item))))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for item in range(len(ties)):
        groups.setdefault(top(item), []).append(item)
    return list(groups.values())


@dataclass(frozen=True)
class Division:
    """Positions of the items on both sides, in order; how many tied groups there are and the size of the largest."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    groups: int
    largest: int


def divide(ids: Sequence[str], ties: Sequence[set[str]], fraction: float, seed: int) -> Division:
    """Hold out about `fraction` (0..1) of the items, whole tied groups only.

    Groups are taken in an order drawn from the seed and the ids while they fit; a last one may overshoot if that is nearer.
    Raises: UserError when everything is tied together.
    """
    groups = groups_of(ties)
    largest = max(len(group) for group in groups)
    if len(groups) < 2:
        raise UserError(
            f"no part of these {len(ids)} items can be held out: shared pictures, dishes or questions tie them all together",
            "add items with other pictures and dishes, or keep everything for training (--all, or --eval-fraction 0) and bring an evaluation set of your own",
        )
    drawn = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{min(ids[i] for i in group)}".encode()).digest())
    wanted = min(max(1, round(fraction * len(ids))), len(ids) - 1)
    taken: list[list[int]] = []
    left: list[list[int]] = []
    total = 0
    for group in drawn:
        fits = total + len(group) <= wanted
        (taken if fits else left).append(group)
        total += len(group) if fits else 0
    nearest = min(left, key=lambda group: abs(total + len(group) - wanted), default=None)
    if nearest and len(left) > 1 and (not taken or abs(total + len(nearest) - wanted) < abs(total - wanted)):
        taken.append(nearest)
    held_out = {item for group in taken for item in group}
    train = tuple(item for item in range(len(ids)) if item not in held_out)
    return Division(train, tuple(sorted(held_out)), len(groups), largest)


def tag_values(records: Iterable[Record], tag: str) -> dict[str, str]:
    """The values of a tag, as they are compared, and where each stands first."""
    found: dict[str, str] = {}
    for record in records:
        if value := tag_value(record, tag):
            found.setdefault(value, record.where)
    return found


def tags_apart(train: Sequence[Record], held_out: Sequence[Record]) -> tuple[list[str], list[str]]:
    """(tags no value of which stands on both sides, tags with a value that does), each in alphabetical order.

    Only a tag of every item can be apart, and not one whose values are as many as the items: a number is no common trait.
    """
    every = [*train, *held_out]
    items = len({record.where for record in every})  # an item that is asked in two languages makes two records
    apart, shared = [], []
    for tag in sorted({tag for record in every for tag in record.tags}):
        left, right = tag_values(train, tag), tag_values(held_out, tag)
        if left.keys() & right.keys():
            shared.append(tag)
        elif all(tag_value(record, tag) for record in every) and len(left) + len(right) < items:
            apart.append(tag)
    return apart, shared
