"""From items to padded micro-batches, loaded ahead of the step by threads.

Pillow and NumPy release the interpreter lock while they work, so threads are enough and share one tile cache.
Legend: B samples, S positions, P tiles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from intervale.data.dataset import Item

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. `targets_BS`: the id that must follow each position, or -1; `mask_BS` None when nothing is padded."""

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor | None
    targets_BS: torch.Tensor
    tiles_PHWC: torch.Tensor
    keys: tuple[str, ...]  # the items' ids, and how many tiles each has
    tiles_of: tuple[int, ...]

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return int((self.targets_BS >= 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        move = [t.to(device, non_blocking=True) for t in (self.ids_BS, self.targets_BS, self.tiles_PHWC)]
        mask = None if self.mask_BS is None else self.mask_BS.to(device, non_blocking=True)
        return Batch(move[0], mask, move[1], move[2], self.keys, self.tiles_of)


def collate(items: Sequence[Item]) -> Batch:
    """Pad on the right; a target stands one position before the token it names."""
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
    )


def load_ahead(steps: Iterable[Sequence[int]], load: Callable[[int], Item | None], workers: int) -> Iterator[list[Item]]:
    """The items of every step in order, `workers` threads loading the next ones (0: load when asked). None items are left out.

    An exception of `load` is raised at its step, not before.
    """
    if workers == 0:
        for step in steps:
            yield [item for index in step if (item := load(index)) is not None]
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        waiting: deque[list[Future[Item | None]]] = deque()
        try:
            for step in steps:
                waiting.append([pool.submit(load, index) for index in step])
                if len(waiting) > _STEPS_AHEAD:
                    yield [item for future in waiting.popleft() if (item := future.result()) is not None]
            while waiting:
                yield [item for future in waiting.popleft() if (item := future.result()) is not None]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
