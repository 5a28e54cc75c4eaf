"""A micro-batch as rows without padding, and questions on one picture as one row that holds their common beginning once.

Promises: every item's own tokens, positions and targets, in the order of its kind; a row of one item is that item. Sharing changes
which tokens are computed twice, never what a token sees: a branch sees the common beginning and itself. NumPy only.
Legend: T tokens of all rows, S tokens of one item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intervale.data.dataset import Item, ItemPicture


@dataclass(frozen=True)
class Rows:
    """Rows one after another. `branch_T` is 0 in a row's common beginning and 1, 2, ... in what follows it; `targets_T` the id that
    must follow a token, or -1. `pictures` has one entry for each picture's place, in order; the same picture may stand in several."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    branch_T: np.ndarray
    targets_T: np.ndarray
    lengths: tuple[int, ...]
    pictures: tuple[ItemPicture, ...]

    @property
    def shared(self) -> bool:
        """Does any row hold more than one item?"""
        return bool((self.branch_T > 1).any())


def _targets(item: Item) -> np.ndarray:
    """`targets_S`: at each token the next one if that is trained, else -1."""
    targets_S = np.full(len(item.ids_S), -1, np.int64)
    targets_S[:-1] = np.where(item.trained_S[1:], item.ids_S[1:], -1)
    return targets_S


def common_beginning(items: Sequence[Item], image_token: int) -> int:
    """How many tokens the items have in common at their start, if that holds all their pictures and nothing trained; else 0."""
    shortest = min(len(item.ids_S) for item in items)
    first = items[0].ids_S[:shortest]
    same = np.logical_and.reduce([first == item.ids_S[:shortest] for item in items[1:]])
    length = int(same.argmin()) if not same.all() else shortest
    # The token before the first target belongs to the branch: it is where that target is predicted.
    length = min(length, *(int(item.trained_S.argmax()) - 1 for item in items))
    last_picture = int(np.flatnonzero(items[0].ids_S == image_token)[-1])
    return length if length > last_picture else 0


def _grouped(items: Sequence[Item]) -> list[list[Item]]:
    """Items about the same pictures together, in the order of their first; text alone is a group of its own."""
    groups: dict[object, list[Item]] = {}
    for number, item in enumerate(items):
        groups.setdefault(tuple(picture.key for picture in item.pictures) or number, []).append(item)
    return list(groups.values())


def _shared_row(items: Sequence[Item], length: int) -> list[tuple[np.ndarray, ...]]:
    """(ids, positions, branch, targets) of the common beginning and of each item's rest."""
    begin = np.arange(length)
    parts: list[tuple[np.ndarray, ...]] = [(items[0].ids_S[:length], begin, np.zeros(length, np.int64), np.full(length, -1, np.int64))]
    for number, item in enumerate(items, 1):
        rest = len(item.ids_S) - length
        parts.append((item.ids_S[length:], length + np.arange(rest), np.full(rest, number), _targets(item)[length:]))
    return parts


def pack(items: Sequence[Item], share: bool, image_token: int) -> Rows:
    """The items as rows; with `share` items about the same pictures become one row where their beginnings agree."""
    rows: list[list[tuple[np.ndarray, ...]]] = []
    pictures: list[ItemPicture] = []
    for group in _grouped(items) if share else [[item] for item in items]:
        length = common_beginning(group, image_token) if len(group) > 1 and group[0].pictures else 0
        if length:
            rows.append(_shared_row(group, length))
            pictures += group[0].pictures
        else:
            for item in group:
                size = len(item.ids_S)
                rows.append([(item.ids_S, np.arange(size), np.ones(size, np.int64), _targets(item))])
                pictures += item.pictures
    flat = [part for row in rows for part in row]
    ids_T, positions_T, branch_T, targets_T = (np.concatenate([part[at] for part in flat]) for at in range(4))
    lengths = tuple(sum(len(part[0]) for part in row) for row in rows)
    return Rows(ids_T, positions_T, branch_T, targets_T, lengths, tuple(pictures))
