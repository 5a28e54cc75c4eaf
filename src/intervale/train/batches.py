"""From items to padded micro-batches, a step at a time, made ahead of the step that needs them.

On a CPU by threads: Pillow and NumPy release the interpreter lock while they work, and one tile cache serves all. Beside a GPU by
processes: there the lock is what the thread that launches kernels waits for. Legend: B samples, S positions, P tiles.
"""

from __future__ import annotations

import hashlib
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
from intervale.data.dataset import Item

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. `targets_BS`: the id that must follow each position, or -1; `mask_BS` None when nothing is padded."""

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor | None
    targets_BS: torch.Tensor
    tiles_PHWC: torch.Tensor
    ids: tuple[str, ...]  # the items' own
    tiles_of: tuple[int, ...]  # how many tiles each item has, and (asked for) a digest of them
    tile_keys: tuple[bytes, ...] = ()

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return int((self.targets_BS >= 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        move = [t.to(device, non_blocking=True) for t in (self.ids_BS, self.targets_BS, self.tiles_PHWC)]
        mask = None if self.mask_BS is None else self.mask_BS.to(device, non_blocking=True)
        return replace(self, ids_BS=move[0], mask_BS=mask, targets_BS=move[1], tiles_PHWC=move[2])


@dataclass(frozen=True)
class Loaded:
    """A step's micro-batches, and the items that could not be read: (id, why)."""

    batches: list[Batch]
    bad: list[tuple[str, UserError]]


def collate(items: Sequence[Item], keyed: bool = False) -> Batch:
    """Pad on the right; a target stands one position before the token it names. `keyed` adds the digests of the tiles."""
    longest = max(len(item.ids_S) for item in items)
    ids_BS = np.zeros((len(items), longest), np.int64)
    mask_BS = np.zeros((len(items), longest), np.int64)
    targets_BS = np.full((len(items), longest), -1, np.int64)
    for row, item in enumerate(items):
        length = len(item.ids_S)
        ids_BS[row, :length] = item.ids_S
        mask_BS[row, :length] = 1
        targets_BS[row, : length - 1] = np.where(item.trained_S[1:], item.ids_S[1:], -1)
    return Batch(
        torch.from_numpy(ids_BS),
        None if mask_BS.all() else torch.from_numpy(mask_BS),
        torch.from_numpy(targets_BS),
        torch.from_numpy(np.concatenate([item.tiles_PHWC for item in items])),
        tuple(item.id for item in items),
        tuple(len(item.tiles_PHWC) for item in items),
        tuple(hashlib.blake2b(item.tiles_PHWC.tobytes(), digest_size=16).digest() for item in items) if keyed else (),
    )


def load_step(ids: Sequence[str], load: Callable[[int], Item], indices: Sequence[int], size: int, keyed: bool) -> Loaded:
    """A step's items in micro-batches of `size`; items that cannot be read are told, not raised: the caller decides."""
    items: list[Item] = []
    bad: list[tuple[str, UserError]] = []
    for index in indices:
        try:
            items.append(load(index))
        except UserError as error:
            bad.append((ids[index], error))
    return Loaded([collate(items[at : at + size], keyed) for at in range(0, len(items), size)], bad)


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
