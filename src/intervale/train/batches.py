"""From items to packed micro-batches, a step at a time, made ahead of the step that needs them.

On a CPU by threads: Pillow and NumPy release the interpreter lock while they work, and one tile cache serves all. Beside a GPU by
processes: there the lock is what the thread that launches kernels waits for. Legend: T tokens, P tiles.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from intervale.core.errors import UserError
from intervale.core.records import Record
from intervale.data.dataset import Item
from intervale.data.packing import pack
from intervale.model.attention import Layout, layout_of

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A micro-batch without padding. `targets_1T`: the id that must follow each token, or -1. `tiles_of` says
    how many tiles each distinct picture has; those of `live` ones stand in `tiles_PHWC`, of the others the features are kept under their
    key. `slots` names the picture of each place in the text."""

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    targets_1T: torch.Tensor
    layout: Layout
    tiles_PHWC: torch.Tensor
    keys: tuple[str, ...]
    tiles_of: tuple[int, ...]
    live: tuple[bool, ...]
    slots: tuple[int, ...]
    ids: tuple[str, ...]  # the items' own

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return int((self.targets_1T >= 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        ids, positions, targets, tiles = (
            t.to(device, non_blocking=True) for t in (self.ids_1T, self.positions_1T, self.targets_1T, self.tiles_PHWC)
        )
        return replace(self, ids_1T=ids, positions_1T=positions, targets_1T=targets, tiles_PHWC=tiles, layout=self.layout.to(device))


@dataclass(frozen=True)
class Loaded:
    """A step's micro-batches, and the items that could not be read: (id, why)."""

    batches: list[Batch]
    bad: list[tuple[str, UserError]]


def collate(items: Sequence[Item], image_token: int, share: bool = False) -> Batch:
    """The items as one pack; with `share` questions on the same pictures hold their common beginning once."""
    rows = pack(items, share, image_token)
    positions_T, branch_T = torch.from_numpy(rows.positions_T), torch.from_numpy(rows.branch_T)
    distinct = {picture.key: picture for picture in rows.pictures}
    number = {key: at for at, key in enumerate(distinct)}
    tiles = [picture.tiles_PHWC for picture in distinct.values() if picture.tiles_PHWC is not None]
    return Batch(
        torch.from_numpy(rows.ids_T)[None],
        positions_T[None],
        torch.from_numpy(rows.targets_T)[None],
        layout_of(rows.lengths, positions_T, branch_T, rows.shared),
        torch.from_numpy(np.concatenate(tiles)) if tiles else torch.zeros((0, 1, 1, 3), dtype=torch.uint8),
        tuple(distinct),
        tuple(picture.count for picture in distinct.values()),
        tuple(picture.tiles_PHWC is not None for picture in distinct.values()),
        tuple(number[picture.key] for picture in rows.pictures),
        tuple(item.id for item in items),
    )


def load_step(
    records: Sequence[Record], load: Callable[[Record], Item], indices: Sequence[int], size: int, image_token: int, share: bool
) -> Loaded:
    """A step's items in micro-batches of `size`; items that cannot be read are told, not raised: the caller decides."""
    items: list[Item] = []
    bad: list[tuple[str, UserError]] = []
    for index in indices:
        name = str(index + 1)
        try:
            record = records[index]
            name = record.id
            items.append(load(record))
        except UserError as error:
            bad.append((name, error))
    return Loaded([collate(items[at : at + size], image_token, share) for at in range(0, len(items), size)], bad)


class _Steps(Dataset[Loaded]):
    """The steps from `start` on, for the loader's processes."""

    def __init__(self, load: Callable[[int], Loaded], start: int, total: int) -> None:
        self._load, self._start, self._total = load, start, total

    def __len__(self) -> int:
        return self._total - self._start

    def __getitem__(self, number: int) -> Loaded:
        return self._load(self._start + number)


def _leave_signals(worker: int) -> None:
    """A Ctrl-C reaches the whole group; the run's own process decides when loading ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_it_is(loaded: Any) -> Any:
    return loaded


def load_ahead(load: Callable[[int], Loaded], start: int, total: int, workers: int, processes: bool) -> Iterator[Loaded]:
    """Steps `start` to `total` in order, `workers` threads or processes making the next ones (0: made when asked)."""
    if workers == 0:
        yield from map(load, range(start, total))
    elif processes:
        # Forked, so that the records are shared and nothing is imported again; the children never touch the GPU.
        yield from DataLoader(
            _Steps(load, start, total),
            batch_size=None,
            num_workers=min(workers, max(1, total - start)),
            collate_fn=_as_it_is,
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals,
            prefetch_factor=_STEPS_AHEAD,
        )
    else:
        yield from _by_threads(load, start, total, workers)


def _by_threads(load: Callable[[int], Loaded], start: int, total: int, workers: int) -> Iterator[Loaded]:
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        waiting: deque[Future[Loaded]] = deque()
        try:
            for number in range(start, total):
                waiting.append(pool.submit(load, number))
                if len(waiting) > max(workers, _STEPS_AHEAD):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
