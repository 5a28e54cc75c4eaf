"""A micro-batch as rows, and questions on one picture as rows that hold their common beginning once.

Promises: every item's own tokens, positions and targets; a row of one item is that item. Sharing changes which tokens are computed
twice, never what a token sees: a branch sees the common beginning and itself. Rows of about one length stand together in a group and
are filled up to one shape, so that attention sees a plain batch and nothing is copied for it; what is filled in has no target and is
seen by nobody. Branches of a row have one length too: where filling up a short one to a long one would take more tokens than the common
beginning has, they stand in rows of their own. Cost: at most about `_WASTE` of the rows' tokens, more only where there would be more than
`_MOST_GROUPS` groups. NumPy only.
Legend: T tokens of all rows, S tokens of one item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intervale.data.dataset import Item, ItemPicture

_WASTE = 0.03  # share of filled-in tokens that a group may have
_ALIGNED = 16  # tokens
_MOST_GROUPS = 8  # attention is one call a group

Tokens = tuple[np.ndarray, np.ndarray]  # ids and targets


@dataclass(frozen=True)
class Group:
    """Rows of one shape: `common` tokens, then `branches` times `branch` tokens, filled up where a row has fewer."""

    rows: int
    common: int
    branches: int = 0
    branch: int = 0

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.common + self.branches * self.branch


@dataclass(frozen=True)
class Rows:
    """Rows one after another, group by group. `begins` is every row's own number of common tokens; `targets_T` the id that must follow a
    token, or -1; `tokens` counts without what was filled in. `pictures` has one entry for each picture's place, in order; the same
    picture may stand in several."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    targets_T: np.ndarray
    groups: tuple[Group, ...]
    begins: tuple[int, ...]
    tokens: int
    pictures: tuple[ItemPicture, ...]

    @property
    def shared(self) -> bool:
        """Does any row hold more than one item?"""
        return any(group.branches for group in self.groups)


@dataclass(frozen=True)
class _Row:
    common: Tokens
    branches: tuple[Tokens, ...]
    pictures: tuple[ItemPicture, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(branches, common tokens, tokens of the longest branch)."""
        return len(self.branches), len(self.common[0]), max((len(ids) for ids, _ in self.branches), default=0)

    @property
    def tokens(self) -> int:
        return len(self.common[0]) + sum(len(ids) for ids, _ in self.branches)

    @property
    def filled(self) -> int:
        """Tokens with every branch as long as the longest."""
        branches, common, branch = self.shape
        return common + branches * branch


def _targets(item: Item) -> np.ndarray:
    """`targets_S`: at each token the next one if that is trained, else -1."""
    targets_S = np.full(len(item.ids_S), -1, np.int64)
    targets_S[:-1] = np.where(item.trained_S[1:], item.ids_S[1:], -1)
    return targets_S


def common_beginning(items: Sequence[Item], image_token: int) -> int:
    """How many tokens the items (two or more) have in common at their start, of which all hold their pictures and nothing trained."""
    shortest = min(len(item.ids_S) for item in items)
    first = items[0].ids_S[:shortest]
    same = np.logical_and.reduce([first == item.ids_S[:shortest] for item in items[1:]])
    length = int(same.argmin()) if not same.all() else shortest
    # The token before the first target belongs to the branch: it is where that target is predicted.
    length = min(length, *(int(item.trained_S.argmax()) - 1 for item in items))
    assert length > int(np.flatnonzero(items[0].ids_S == image_token)[-1]), "parts begin alike up to their last picture"
    return length


def grouped(items: Sequence[Item]) -> list[list[Item]]:
    """Items about the same pictures together, in the order of their first; text alone is a group of its own."""
    groups: dict[object, list[Item]] = {}
    for number, item in enumerate(items):
        groups.setdefault(tuple(picture.key for picture in item.pictures) or number, []).append(item)
    return list(groups.values())


def _alike(items: Sequence[Item], image_token: int) -> list[list[Item]]:
    """Items about the same pictures in parts that begin alike up to the last picture; what is trained before that stands alone."""
    parts: dict[object, list[Item]] = {}
    for number, item in enumerate(items):
        behind = int(np.flatnonzero(item.ids_S == image_token)[-1]) + 1 if item.pictures else 0
        shares = item.pictures and int(item.trained_S.argmax()) > behind
        parts.setdefault(item.ids_S[:behind].tobytes() if shares else number, []).append(item)
    return list(parts.values())


def _by_length(items: Sequence[Item], common: int) -> list[list[Item]]:
    """Items with `common` first tokens in common in rows that are filled up with the fewest tokens: a row costs its beginning once more,
    and its longest branch as often as it has branches."""
    ordered = sorted(items, key=lambda item: -len(item.ids_S))
    rests = [len(item.ids_S) - common for item in ordered]
    best, cut = [0], [0]  # of the first n: the fewest tokens, and where their last row begins
    for end in range(1, len(rests) + 1):
        tried = min((best[start] + common + (end - start) * rests[start], start) for start in range(end))
        best.append(tried[0])
        cut.append(tried[1])
    rows, end = [], len(ordered)
    while end:
        rows.append(ordered[cut[end] : end])
        end = cut[end]
    return rows


def _rows_of(items: Sequence[Item], share: bool, image_token: int) -> list[_Row]:
    """The items as rows; with `share` items about the same pictures become one row where their beginnings agree."""
    parts = [part for group in grouped(items) for part in _alike(group, image_token)] if share else [[item] for item in items]
    rows: list[_Row] = []
    for part in parts:
        split = _by_length(part, common_beginning(part, image_token)) if len(part) > 1 else [part]
        rows += [_row(one, image_token) for one in split]
    return rows


def _row(items: Sequence[Item], image_token: int) -> _Row:
    first = items[0]
    if len(items) == 1:
        return _Row((first.ids_S, _targets(first)), (), first.pictures)
    length = common_beginning(items, image_token)
    rests = tuple((item.ids_S[length:], _targets(item)[length:]) for item in items)
    return _Row((first.ids_S[:length], np.full(length, -1, np.int64)), rests, first.pictures)


def row_tokens(items: Sequence[Item], share: bool, image_token: int) -> int:
    """Tokens of the rows that these items give, with what fills up their branches."""
    return sum(row.filled for row in _rows_of(items, share, image_token))


def _round_up(length: int, shapes: int) -> int:
    """The next of `shapes` lengths an octave, in steps of `_ALIGNED` at least (0: the length itself): few shapes, so that a GPU's kernels
    are set up few times, and even ones, so that one of them serves all."""
    if not shapes or not length:
        return length
    step = max(_ALIGNED, (1 << (length.bit_length() - 1)) // shapes)
    return -(-length // step) * step


def _shape_of(rows: Sequence[_Row], shapes: int) -> Group:
    branches, _, _ = rows[0].shape
    common, branch = (_round_up(max(row.shape[at] for row in rows), shapes) for at in (1, 2))
    return Group(len(rows), common, branches, branch)


def _in_groups(rows: Sequence[_Row], shapes: int) -> list[tuple[Group, list[_Row]]]:
    """The rows, longest first, in groups that fill in no more than they may."""
    ordered = sorted(rows, key=lambda row: row.shape, reverse=True)
    waste = _WASTE
    while True:
        groups: list[list[_Row]] = []
        for row in ordered:
            if groups and groups[-1][0].shape[0] == row.shape[0]:
                tried = [*groups[-1], row]
                group = _shape_of(tried, 0)
                if group.rows * group.length <= (1 + waste) * sum(one.filled for one in tried):
                    groups[-1] = tried
                    continue
            groups.append([row])
        if len(groups) <= max(_MOST_GROUPS, len({row.shape[0] for row in rows})):
            return [(_shape_of(group, shapes), group) for group in groups]
        waste *= 2


def _fill(row: _Row, group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, positions, targets) of a row in its group's shape."""
    begin = len(row.common[0])
    ids = np.full(group.length, row.common[0][0], np.int64)
    targets = np.full(group.length, -1, np.int64)
    positions = np.concatenate([np.arange(group.common), np.tile(begin + np.arange(group.branch), group.branches)])
    places = [(0, row.common), *((group.common + at * group.branch, rest) for at, rest in enumerate(row.branches))]
    for place, (own_ids, own_targets) in places:
        ids[place : place + len(own_ids)] = own_ids
        targets[place : place + len(own_ids)] = own_targets
    return ids, positions, targets


def pack(items: Sequence[Item], share: bool, image_token: int, shapes: int = 0) -> Rows:
    """The items as rows in groups. `shapes`: lengths an octave that a group may have, 0 for any."""
    grouped = _in_groups(_rows_of(items, share, image_token), shapes)
    filled = [_fill(row, group) for group, rows in grouped for row in rows]
    ids_T, positions_T, targets_T = (np.concatenate([parts[at] for parts in filled]) for at in range(3))
    every = [row for _, rows in grouped for row in rows]
    pictures = tuple(picture for row in every for picture in row.pictures)
    begins = tuple(len(row.common[0]) for row in every)
    return Rows(ids_T, positions_T, targets_T, tuple(group for group, _ in grouped), begins, sum(row.tokens for row in every), pictures)
