"""The features of all pictures of a data set, computed once, before the first step, in large batches.

Promises: identical files are one picture; what the store holds already is skipped; an unreadable picture is listed, not raised; a
Ctrl-C loses nothing that is stored; which pictures share a batch changes no feature by more than float rounding. Pictures are read,
decoded and tiled ahead: by threads on a CPU, by processes beside a GPU (there the interpreter lock is what the thread that launches
kernels waits for). Cost: one read of every file to name it; one decode and one pass of the tower for each that is new.
Legend: P tiles, H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.core.lang import say
from intervale.data.pictures import Picture, hash_pictures, load_tiles
from intervale.data.tiling import Tiling
from intervale.model.features import FeatureStore, Kept, Stage, picture_key
from intervale.model.forward import normalise, picture_features, tower_features

Tell = Callable[[str], None]
_TELL_SECONDS = 5.0
_AHEAD = 2  # pictures waiting, a worker
_WRITERS, _MOST_WRITES = 4, 32  # threads that store, pictures that wait for them


@dataclass(frozen=True)
class Encoded:
    """What the pre-pass did. `keys` names every readable picture, stored or not; `bad` lists the others with the reason."""

    keys: dict[Path, str]
    bad: list[tuple[Path, UserError]]
    computed: int  # distinct pictures computed now
    left: int  # distinct pictures the store had no room for: they are computed live
    seconds: float
    distinct: dict[str, Picture]  # by key


class _Pictures(Dataset[Any]):
    """The pictures, for the loader's processes."""

    def __init__(self, pictures: Sequence[Picture], tiling: Tiling) -> None:
        self._pictures, self._tiling = pictures, tiling

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, number: int) -> torch.Tensor | UserError:
        tiles = load_tiles(self._pictures[number], self._tiling)
        return tiles if isinstance(tiles, UserError) else torch.from_numpy(np.require(tiles, requirements="W"))


def _leave_signals(worker: int) -> None:
    """A Ctrl-C reaches the whole group; the run's own process decides when loading ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _tiles_ahead(
    pictures: Sequence[Picture], tiling: Tiling, workers: int, processes: bool
) -> Generator[torch.Tensor | UserError, None, None]:
    """Every picture's tiles in order, `workers` threads or processes making the next ones (0: made when asked)."""
    source = _Pictures(pictures, tiling)
    if workers == 0:
        for number in range(len(source)):
            yield source[number]
    elif processes:
        yield from DataLoader(
            source,
            batch_size=None,
            num_workers=min(workers, max(1, len(source))),
            collate_fn=_as_it_is,
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals,
            prefetch_factor=_AHEAD,
        )
    else:
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            waiting: deque[Future[torch.Tensor | UserError]] = deque()
            try:
                for number in range(len(source)):
                    waiting.append(pool.submit(source.__getitem__, number))
                    if len(waiting) > _AHEAD * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


Forward = Callable[[torch.Tensor], torch.Tensor]


def forward_of(
    network: InternVLForConditionalGeneration, stage: Stage, dtype: torch.dtype, device: torch.device, compiled: bool = False
) -> Forward:
    """uint8 `tiles_PHWC` on the device to features, computed as a training step computes them."""
    features = tower_features if stage == "tower" else picture_features

    def plain(tiles_PHWC: torch.Tensor) -> torch.Tensor:
        return features(network, normalise(tiles_PHWC, dtype))

    inner = torch.compile(plain, dynamic=False) if compiled else plain

    def forward(tiles_PHWC: torch.Tensor) -> torch.Tensor:
        autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with torch.no_grad(), autocast:
            return inner(tiles_PHWC)

    return forward


class _Encoder:
    """Pictures' tiles in, features into the store: batches of `size` tiles that cross the borders of pictures.

    On a GPU a batch's way back and its storing overlap with the next batch.
    """

    def __init__(self, forward: Forward, store: FeatureStore, device: torch.device, size: int, pad: bool) -> None:
        self._forward, self._store, self._device, self._size, self._pad = forward, store, device, size, pad
        self._waiting: deque[tuple[str, torch.Tensor]] = deque()  # tiles without features yet, by key
        self._count = 0
        self._running: deque[tuple[torch.Tensor, torch.cuda.Event | None, list[tuple[str, int]]]] = deque()
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._missing: dict[str, int] = {}  # tiles a picture still waits for
        self._pool = ThreadPoolExecutor(min(_WRITERS, os.cpu_count() or 1), thread_name_prefix="store")
        self._writes: deque[Future[Kept]] = deque()
        self.done = self.kept = 0
        self.full = False

    def add(self, key: str, tiles_PHWC: torch.Tensor) -> None:
        """Take a picture; runs the tower when a batch is full."""
        self._missing[key], self._parts[key] = len(tiles_PHWC), []
        self._waiting.append((key, tiles_PHWC))
        self._count += len(tiles_PHWC)
        while self._count >= self._size:
            self._run(self._size)

    def finish(self) -> None:
        """Run what is left and wait until everything is stored."""
        if self._count:
            self._run(self._count)
        while self._running:
            self._collect()
        while self._writes:
            self._written()

    def close(self) -> None:
        """Let the writes that have begun end."""
        self._pool.shutdown()

    def _take(self, count: int) -> tuple[torch.Tensor, list[tuple[str, int]]]:
        """The next `count` tiles, and whose they are."""
        parts, owners = [], []
        self._count -= count
        while count:
            key, tiles = self._waiting.popleft()
            part, rest = tiles[:count], tiles[count:]
            if len(rest):
                self._waiting.appendleft((key, rest))
            parts.append(part)
            owners.append((key, len(part)))
            count -= len(part)
        return torch.cat(parts), owners

    def _run(self, count: int) -> None:
        tiles, owners = self._take(count)
        if self._pad and count < self._size:  # a compiled tower knows one shape
            tiles = torch.cat([tiles, tiles.new_zeros(self._size - count, *tiles.shape[1:])])
        if self._device.type != "cuda":
            self._running.append((self._forward(tiles.to(self._device))[:count].cpu(), None, owners))
            self._collect()
            return
        features = self._forward(tiles.pin_memory().to(self._device, non_blocking=True))[:count]
        back = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        back.copy_(features, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._running.append((back, event, owners))
        if len(self._running) > 1:
            self._collect()

    def _collect(self) -> None:
        """The oldest batch's features to their pictures; complete ones go to the store."""
        features, event, owners = self._running.popleft()
        if event is not None:
            event.synchronize()
        for (key, count), part in zip(owners, features.split([count for _, count in owners]), strict=True):
            self._parts[key].append(part)
            self._missing[key] -= count
            if self._missing[key] == 0:
                del self._missing[key]
                parts = self._parts.pop(key)
                self._writes.append(self._pool.submit(self._store.put, key, parts[0] if len(parts) == 1 else torch.cat(parts)))
        while len(self._writes) > _MOST_WRITES or (self._writes and self._writes[0].done()):
            self._written()

    def _written(self) -> None:
        kept = self._writes.popleft().result() != "none"
        self.done += 1
        self.kept += kept
        self.full = self.full or not kept


class _Progress:
    """A line every few seconds: pictures, pictures a second, time left."""

    def __init__(self, total: int, tell: Tell) -> None:
        self._total, self._tell, self._begun, self._told = total, tell, time.monotonic(), time.monotonic()

    def at(self, done: int) -> None:
        """Tell if it is time."""
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS or not done:
            return
        self._told = now
        rate = done / (now - self._begun)
        left = int((self._total - done) / rate)
        clock = f"{left // 60}:{left % 60:02d}"
        self._tell(
            say(
                f"features: {done} of {self._total} pictures, {rate:.1f} pictures/s, {clock} left",
                f"特征：{done}/{self._total} 张图片，每秒 {rate:.1f} 张，剩余 {clock}",
            )
        )


@contextlib.contextmanager
def _evaluating(network: InternVLForConditionalGeneration) -> Iterator[None]:
    """Tower and projector without dropout; afterwards as they were."""
    parts = (network.model.vision_tower, network.model.multi_modal_projector)
    before = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _named(error: UserError, first: str, other: str) -> UserError:
    """The same fault of a second file with the same bytes."""
    return type(error)(error.what.replace(first, other, 1), error.fix)


def _fill(
    pictures: Sequence[Picture], loaded: Iterator[torch.Tensor | UserError], encoder: _Encoder, tell: Tell
) -> tuple[dict[str, UserError], int]:
    """(faults by key, pictures not tried because the store was full)."""
    faults: dict[str, UserError] = {}
    progress = _Progress(len(pictures), tell)
    tried = 0
    try:
        for picture, tiles in zip(pictures, loaded, strict=True):
            tried += 1
            if isinstance(tiles, UserError):
                faults[picture.key] = tiles
            else:
                encoder.add(picture.key, tiles)
            if encoder.full:  # what comes now would be computed for nothing
                break
            progress.at(encoder.done + len(faults))
        encoder.finish()
    finally:
        encoder.close()
    return faults, len(pictures) - tried


def encode_pictures(
    pictures: Mapping[Path, str] | Iterable[Path],
    network: InternVLForConditionalGeneration,
    tiling: Tiling,
    store: FeatureStore,
    *,
    digest: str,
    dtype: torch.dtype,
    device: torch.device,
    stage: Stage = "tower",
    workers: int = 2,
    batch_tiles: int = 64,
    tell: Tell = print,
    compile: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Encoded:
    """Fill the store with the features of all distinct pictures (paths, or what `pictures_of` gives: {path: what errors call it}).

    `digest` is `tower_digest` of what `network` was loaded from (with the projector for the stage "projected"). When the store is
    full the pass ends, and the rest is left to be computed live. `compile`: torch.compile, on CUDA alone. `share` (rank, size): of
    several processes with one folder each computes its part and names all (a fault in another's part is not in `bad`). Call it
    before signals are taken over: a KeyboardInterrupt ends it, and what is stored stays. Raises: nothing for a picture's sake.
    """
    assert batch_tiles > 0
    begun = time.monotonic()
    named = dict(pictures) if isinstance(pictures, Mapping) else {path: str(path) for path in pictures}
    keys: dict[Path, str] = {}
    bad: dict[Path, UserError] = {}
    distinct: dict[str, Picture] = {}
    for path, sha in hash_pictures(named, tell).items():
        if isinstance(sha, UserError):
            bad[path] = sha
            continue
        keys[path] = key = picture_key(sha, tiling, digest, stage, dtype)
        distinct.setdefault(key, Picture(key, path, sha, named[path]))
    mine = list(distinct.values())[share[0] :: share[1]]  # before looking into the store, which the others are filling
    todo = [picture for picture in mine if picture.key not in store]
    whose = (f" (this process's of {len(distinct)})", f"（共 {len(distinct)} 张，此为本进程的部分）") if share[1] > 1 else ("", "")
    tell(
        say(
            f"features: {len(mine)} pictures{whose[0]}, {len(mine) - len(todo)} of them kept already",
            f"特征：{len(mine)} 张图片{whose[1]}，其中 {len(mine) - len(todo)} 张已有缓存",
        )
    )
    compiled = compile and device.type == "cuda"
    encoder = _Encoder(forward_of(network, stage, dtype, device, compiled), store, device, batch_tiles, compiled)
    with _evaluating(network), contextlib.closing(_tiles_ahead(todo, tiling, workers, device.type == "cuda")) as loaded:
        faults, untried = _fill(todo, loaded, encoder, tell)
    for path, key in list(keys.items()):
        if key in faults:
            first = distinct[key]
            bad[path] = faults[key] if path == first.path else _named(faults[key], first.where, named[path])
            del keys[path]
    left, seconds = untried + encoder.done - encoder.kept, time.monotonic() - begun
    _tell_end(encoder, left, len(bad), seconds, store, tell)
    return Encoded(keys, [(path, bad[path]) for path in named if path in bad], encoder.done, left, seconds, distinct)


def _tell_end(encoder: _Encoder, left: int, bad: int, seconds: float, store: FeatureStore, tell: Tell) -> None:
    if not encoder.done and not left and not bad:
        return
    room = f"{store.bytes_on_disk / 2**30:.2f} + {store.bytes_in_ram / 2**30:.2f} GiB"
    tell(
        say(
            f"features: {encoder.kept} pictures computed and kept in {seconds:.1f} s ({room} on the disk and in memory)"
            + (f"; {left} have no room and are computed live" if left else "")
            + (f"; {bad} cannot be read" if bad else ""),
            f"特征：已计算并保存 {encoder.kept} 张图片，用时 {seconds:.1f} 秒（磁盘与内存 {room}）"
            + (f"；{left} 张放不下，将实时计算" if left else "")
            + (f"；{bad} 张无法读取" if bad else ""),
        )
    )
