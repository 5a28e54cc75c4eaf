"""Which items stand in which step: a function of seed and step alone, so that a resumed run replays nothing.

Promises: an epoch shows every item once (of a mix: each source as often as its weight says); a smaller last step, no item left out.
Sources whose pictures lie in blocks (parquet) are shuffled block by block, so that a block is read once.
Cost: 8 bytes an item and epoch, made when an epoch begins (1 M items: 20 ms).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Part:
    """A source as the order sees it: its items, how many of them an epoch takes, and, where it is read in blocks, the number of
    items of each block with how many blocks are shuffled together."""

    count: int
    take: int
    blocks: tuple[int, ...] = ()
    window: int = 1


def _random(seed: int, part: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed + (part << 32), number]))


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's items: a permutation that depends on nothing but its arguments."""
    return _random(seed, 0, epoch).permutation(count)


def _one_pass(part: Part, seed: int, number: int, index: int) -> np.ndarray:
    """Every item of a part once, in the order of pass `number`."""
    if not part.blocks:
        return epoch_order(part.count, seed, number) if index == 0 else _random(seed, index, number).permutation(part.count)
    random = _random(seed, index, number)
    ends = np.cumsum(part.blocks)
    drawn = random.permutation(len(ends))
    windows = []
    for at in range(0, len(drawn), part.window):
        inside = [np.arange(ends[block] - part.blocks[block], ends[block]) for block in drawn[at : at + part.window]]
        windows.append(random.permutation(np.concatenate(inside)))
    return np.concatenate(windows)


def _stretch(part: Part, seed: int, epoch: int, index: int) -> np.ndarray:
    """The `take` items of an epoch: the next ones of a part's passes, one after another."""
    start, end = epoch * part.take, (epoch + 1) * part.take
    found = []
    for number in range(start // part.count, -(-end // part.count)):
        begin = number * part.count
        found.append(_one_pass(part, seed, number, index)[max(0, start - begin) : min(part.count, end - begin)])
    return found[0] if len(found) == 1 else np.concatenate(found)


def mixed_order(parts: Sequence[Part], seed: int, epoch: int) -> np.ndarray:
    """An epoch over several parts, numbered one after another: each in its own order, their places drawn."""
    if len(parts) == 1:
        return _stretch(parts[0], seed, epoch, 0)
    labels = np.repeat(np.arange(len(parts)), [part.take for part in parts])
    labels = np.random.Generator(np.random.Philox(key=[seed | 1 << 63, epoch])).permutation(labels)
    order = np.empty(len(labels), np.int64)
    first = 0
    for index, part in enumerate(parts):
        order[labels == index] = _stretch(part, seed, epoch, index) + first
        first += part.count
    return order


def grouped(order: np.ndarray, together: np.ndarray) -> np.ndarray:
    """The same items with each group's together: groups as they are first met in `order`, items within as there."""
    groups_N = together[order]
    _, first, inverse = np.unique(groups_N, return_index=True, return_inverse=True)
    return order[np.argsort(first[inverse], kind="stable")]


class Order:
    """The order of a run. `together` names each item's group (its pictures); items of a group then follow each other."""

    def __init__(self, parts: Sequence[Part], seed: int, together: np.ndarray | None = None) -> None:
        assert parts
        assert all(part.take > 0 and sum(part.blocks) in (0, part.count) for part in parts)
        self._parts, self._seed, self._together = tuple(parts), seed, together
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Items an epoch."""
        return sum(part.take for part in self._parts)

    def epoch(self, number: int) -> np.ndarray:
        """The items of an epoch (from 0), in order; the last two are kept."""
        with self._lock:
            if number not in self._epochs:
                order = mixed_order(self._parts, self._seed, number)
                if len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[number] = order if self._together is None else grouped(order, self._together)
            return self._epochs[number]

    def step(self, per_step: int, step: int) -> np.ndarray:
        """The items of optimizer step `step` (from 0). An epoch's last step may be smaller; no item is left out or doubled."""
        epoch, place = divmod(step, -(-len(self) // per_step))
        return self.epoch(epoch)[place * per_step : (place + 1) * per_step]


def step_items(count: int, per_step: int, seed: int, step: int, together: Sequence[int] = ()) -> np.ndarray:
    """`Order.step` of a single source of `count` items."""
    return Order([Part(count, count)], seed, np.array(together) if len(together) else None).step(per_step, step)


def deal(items: np.ndarray, costs: np.ndarray, processes: int, groups: np.ndarray | None = None) -> list[np.ndarray]:
    """A step's items to processes: as many items each (one more or less), `costs` (tokens, by item) as even as that allows.

    Heaviest first, to whoever has the least (Graham's rule) and a place left; items of one group stay together where places allow.
    Each share keeps the step's order. A function of its arguments, so that a resumed step is dealt as before.
    """
    if processes == 1:
        return [items]
    places = [len(items) // processes + (number < len(items) % processes) for number in range(processes)]
    loads = [0.0] * processes
    owner = np.empty(len(items), np.int64)
    keys = groups if groups is not None else np.arange(len(items))
    bundles: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        bundles.setdefault(int(key), []).append(place)
    weigh = {key: float(costs[members].sum()) for key, members in bundles.items()}
    for key in sorted(bundles, key=lambda key: (-weigh[key], key)):
        members = bundles[key]
        while members:
            fits = [number for number in range(processes) if places[number] >= len(members)]
            open_ = fits or [max(range(processes), key=lambda number: places[number])]
            chosen = min(open_, key=lambda number: (loads[number], number))
            now, members = members[: places[chosen]], members[places[chosen] :]
            owner[now] = chosen
            places[chosen] -= len(now)
            loads[chosen] += float(costs[now].sum())
    return [items[owner == number] for number in range(processes)]
