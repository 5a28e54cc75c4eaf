"""From items to packed micro-batches, a step at a time, made ahead of the step that needs them.

On a CPU by threads: Pillow and NumPy release the interpreter lock while they work, and one tile cache serves all. Beside a GPU by
processes: there the lock is what the thread that launches kernels waits for. Legend: T tokens, N tokens
with a target, P tiles.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from intervale.core.errors import UserError
from intervale.core.records import Record
from intervale.data.dataset import Item
from intervale.data.packing import grouped, pack, row_tokens
from intervale.model.attention import Layout, layout_of

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A micro-batch. `labelled_N`: the places of tokens that have a target, `targets_N` the id that must follow each. `tiles_of` says
    how many tiles each distinct picture has; those of `live` ones stand in `tiles_PHWC`, of the others the features are kept under their
    key. `slots` names the picture of each place in the text, `places_P` are those of the picture tokens. `tokens` counts without what fills
    rows up. `features`: kept ones that are on the device already, by key."""

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    labelled_N: torch.Tensor
    targets_N: torch.Tensor
    layout: Layout
    tiles_PHWC: torch.Tensor
    keys: tuple[str, ...]
    tiles_of: tuple[int, ...]
    live: tuple[bool, ...]
    slots: tuple[int, ...]
    places_P: torch.Tensor
    tokens: int
    ids: tuple[str, ...]  # the items' own
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return len(self.targets_N)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor], layout: Layout) -> Batch:
        own = (self.ids_1T, self.positions_1T, self.labelled_N, self.targets_N, self.tiles_PHWC, self.places_P)
        ids, positions, labelled, targets, tiles, places = map(change, own)
        return replace(
            self,
            ids_1T=ids,
            positions_1T=positions,
            labelled_N=labelled,
            targets_N=targets,
            tiles_PHWC=tiles,
            places_P=places,
            layout=layout,
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), self.layout.to(device))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of the batch."""
        yield from (self.ids_1T, self.positions_1T, self.labelled_N, self.targets_N, self.tiles_PHWC, self.places_P)
        yield from self.layout.tensors()
        yield from self.features.values()

    def pin_memory(self) -> Batch:
        """The batch in memory from which a GPU can copy while it computes."""
        return self._with(torch.Tensor.pin_memory, self.layout)


@dataclass(frozen=True)
class Loaded:
    """A step's micro-batches, and the items that could not be read: (id, why)."""

    batches: list[Batch]
    bad: list[tuple[str, UserError]]

    def pin_memory(self) -> Loaded:
        """The loader's last act beside a GPU."""
        return Loaded([batch.pin_memory() for batch in self.batches], self.bad)


@dataclass(frozen=True)
class Packing:
    """How a step's items become micro-batches: `items` in the order of the step, or with `tokens` as many as have room, best fit.
    `share`: questions on the same pictures hold their common beginning once. `shapes`: lengths an octave, 0 for any (`data.packing`).
    `apart`: a picture is seen anew for every place it stands in, because the tower draws dropout masks."""

    items: int
    tokens: int = 0
    share: bool = False
    shapes: int = 0
    apart: bool = False


def collate(items: Sequence[Item], image_token: int, share: bool = False, shapes: int = 0, apart: bool = False) -> Batch:
    """The items as one pack; with `share` questions on the same pictures hold their common beginning once. `shapes`: see `pack`;
    `apart`: see `Packing`."""
    rows = pack(items, share, image_token, shapes)
    positions_T, targets_T = torch.from_numpy(rows.positions_T), torch.from_numpy(rows.targets_T)
    labelled_N = (targets_T >= 0).nonzero()[:, 0]
    names = [str(at) if apart else picture.key for at, picture in enumerate(rows.pictures)]
    distinct = dict(zip(names, rows.pictures, strict=True))
    number = {name: at for at, name in enumerate(distinct)}
    tiles = [picture.tiles_PHWC for picture in distinct.values() if picture.tiles_PHWC is not None]
    return Batch(
        torch.from_numpy(rows.ids_T)[None],
        positions_T[None],
        labelled_N,
        targets_T[labelled_N],
        layout_of(rows.groups, rows.begins, positions_T),
        torch.from_numpy(np.concatenate(tiles)) if tiles else torch.zeros((0, 1, 1, 3), dtype=torch.uint8),
        tuple(picture.key for picture in distinct.values()),
        tuple(picture.count for picture in distinct.values()),
        tuple(picture.tiles_PHWC is not None for picture in distinct.values()),
        tuple(number[name] for name in names),
        torch.from_numpy(np.flatnonzero(rows.ids_T == image_token)),
        rows.tokens,
        tuple(item.id for item in items),
    )


def _pieces(group: list[Item], packing: Packing, image_token: int) -> list[tuple[int, list[Item]]]:
    """(tokens, items) of a group, in halves until each fits into a pack or is a single item."""
    size = row_tokens(group, packing.share, image_token)
    if len(group) == 1 or size <= packing.tokens:
        return [(size, group)]
    ordered, half = sorted(group, key=lambda item: -len(item.ids_S)), len(group) // 2
    return _pieces(ordered[:half], packing, image_token) + _pieces(ordered[half:], packing, image_token)


def _bins(items: Sequence[Item], packing: Packing, image_token: int) -> list[list[Item]]:
    """The items in packs of at most `packing.tokens` tokens (one item may have more), largest first, each where it fits best."""
    together = grouped(items) if packing.share else [[item] for item in items]
    sizes = [piece for group in together for piece in _pieces(group, packing, image_token)]
    bins: list[list[Item]] = []
    room: list[int] = []
    for size, group in sorted(sizes, key=lambda one: -one[0]):
        fits = [(left - size, at) for at, left in enumerate(room) if left >= size]
        if fits:
            at = min(fits)[1]
        else:
            at = len(bins)
            bins.append([])
            room.append(packing.tokens)
        bins[at] += group
        room[at] -= size
    return bins


def load_step(
    records: Sequence[Record], load: Callable[[Record], Item], indices: Sequence[int], packing: Packing, image_token: int
) -> Loaded:
    """A step's items in micro-batches; items that cannot be read are told, not raised: the caller decides."""
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
    size = packing.items
    parts = _bins(items, packing, image_token) if packing.tokens else [items[at : at + size] for at in range(0, len(items), size)]
    return Loaded([collate(part, image_token, packing.share, packing.shapes, packing.apart) for part in parts], bad)


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
            pin_memory=torch.cuda.is_available(),
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
