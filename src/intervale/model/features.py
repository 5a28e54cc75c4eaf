"""What a frozen vision tower makes of a picture, kept: by name, on the disk, in memory, or both.

Promises: an entry is the exact tensor that was put under its key or it is absent (half-written, cut short, flipped bits, another
picture's file under this name: all absent, told once, written again); a key changes with everything the features depend on and with
nothing else; no trouble with the disk stops a run. Cost: a read is one copy from the page cache, and one crc32 the first time.

The file: 128 bytes of header (magic, type, key, shape, crc32 of the rest and of itself), then the tensor's bytes as they lie in
memory. It is not flushed to the disk one by one as `core.files` does: after a power cut the checksum finds what was lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import torch
from transformers import InternVLConfig

from intervale.core.files import SLACK
from intervale.core.lang import say
from intervale.data.tiling import IMAGENET_MEAN, IMAGENET_STD, Tiling
from intervale.model import families, layout
from intervale.model.adapt import PARTS
from intervale.model.feature_plan import HEAD, free_disk
from intervale.model.load import DTYPE_NAMES
from intervale.model.source import Source, open_source

Used = TypeVar("Used")
Stage = Literal["tower", "projected"]  # before the projector (which learns), or after it (frozen too)
Kept = Literal["disk", "ram", "none"]
PREPROCESSING_VERSION = 1  # raise it with any change to what data.images, data.tiling or forward.normalise make of a file's bytes
_VISION_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "attention_bias", "use_qk_norm", "hidden_act", "norm_type",
    "layer_norm_eps", "image_size", "patch_size", "num_channels", "use_absolute_position_embeddings", "use_mean_pooling",
)  # fmt: skip
_MAGIC = b"IVFEAT1\n"
_FIELDS = struct.Struct("<8s16s20sI3QQ")  # magic, type, key, crc32 of the tensor, shape, bytes; padded, then the crc32 of these
_KEY = re.compile(r"[0-9a-f]{40}")
_TOUCH_SECONDS = 3600  # how stale "last used" (the file's mtime) may be
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES.values()}
_PARTIAL_SECONDS = 86400


def _parts_of(source: Source, prefixes: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """The native tensors below these prefixes; no other is read."""
    with source.checkpoint.reader() as read:
        if source.kind == "hf":
            for name in source.checkpoint.tensors:
                if layout.from_disk(name).startswith(prefixes):
                    yield layout.from_disk(name), read(name)
            return
        heads = families.heads_of(source.config)
        for move in source.moves:
            if move.natives[0].startswith(prefixes):
                yield from layout.split(move, read(move.official), heads).items()


def tower_digest(source: Source | Path, *, projector: bool = False) -> str:
    """32 hex digits that name a vision tower: its weights (types too) and the settings it computes with; `projector` adds its own.

    The same for both formats, any sharding and any language model. Cost: one read of these tensors (1.5 GB/s or so).
    Raises: UserError when the folder is not a model.
    """
    source = source if isinstance(source, Source) else open_source(source)
    config = source.config
    vision = {key: getattr(config.vision_config, key) for key in _VISION_KEYS}
    settings = {
        "vision": {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in vision.items()},
        "layer": config.vision_feature_layer,
        "ratio": config.downsample_ratio,
        "projector": config.projector_hidden_act if projector else None,
    }
    tensors = {}
    for name, tensor in _parts_of(source, (str(PARTS["vision"]), *([str(PARTS["projector"])] if projector else []))):
        content = hashlib.sha256(_bytes_of(tensor.contiguous())).hexdigest()
        tensors[name] = [str(tensor.dtype), list(tensor.shape), content]
    assert tensors, "open_source has found them"
    return hashlib.sha256(json.dumps([settings, tensors], sort_keys=True).encode()).hexdigest()[:32]


def picture_key(file_sha256: str, tiling: Tiling, tower: str, stage: Stage, dtype: torch.dtype) -> str:
    """40 hex digits for the features of a picture file by this tiling, tower (`tower_digest`), stage and compute type."""
    what = [PREPROCESSING_VERSION, IMAGENET_MEAN, IMAGENET_STD, file_sha256, asdict(tiling), tower, stage, str(dtype)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:40]


def feature_width(config: InternVLConfig, stage: Stage) -> int:
    """Numbers a token has at a stage."""
    if stage == "projected":
        return int(config.text_config.hidden_size)
    return int(config.vision_config.hidden_size) * int(1 / config.downsample_ratio) ** 2


def bytes_needed(config: InternVLConfig, tiling: Tiling, tiles: int, pictures: int, stage: Stage, dtype: torch.dtype) -> int:
    """Bytes that the features of `pictures` pictures with `tiles` tiles in all take, headers included. Nothing is opened."""
    return tiles * tiling.tokens_per_tile * feature_width(config, stage) * dtype.itemsize + pictures * HEAD


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


_Head = tuple[torch.dtype, tuple[int, int, int], int]  # type, shape, crc32 of the tensor


class _DamagedError(Exception):
    """An entry that is not what its name says."""


def _pack(key: str, tensor: torch.Tensor) -> bytes:
    name = str(tensor.dtype).removeprefix("torch.").encode()
    fields = _FIELDS.pack(_MAGIC, name, bytes.fromhex(key), zlib.crc32(_bytes_of(tensor)), *tensor.shape, tensor.nbytes)
    body = fields.ljust(HEAD - 4, b"\0")
    return body + zlib.crc32(body).to_bytes(4, "little")


def _unpack(file: BinaryIO, key: str) -> _Head:
    """What an open entry's header says; leaves the file at the tensor."""
    head = file.read(HEAD)
    if len(head) < HEAD or zlib.crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
        raise _DamagedError("its header is damaged")
    magic, name, own, crc, *shape, nbytes = _FIELDS.unpack_from(head)
    dtype = _TYPES.get(name.rstrip(b"\0").decode("ascii", "replace"))
    if magic != _MAGIC or dtype is None or own.hex() != key or nbytes != math.prod(shape) * dtype.itemsize:
        raise _DamagedError("it is another file under this name")
    if os.fstat(file.fileno()).st_size != HEAD + nbytes:
        raise _DamagedError("it is cut short")
    return dtype, (shape[0], shape[1], shape[2]), crc


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Every file of a store's folder, partial ones too; what vanishes meanwhile is left out."""
    with contextlib.suppress(OSError), os.scandir(folder) as shards:
        for shard in shards:
            if len(shard.name) == 2:
                with contextlib.suppress(OSError), os.scandir(shard.path) as files:
                    yield from files


class FeatureStore:
    """Features by key, on the disk up to `disk_budget` bytes (of all entries in `folder`) and in memory up to `ram_budget`.

    Entries of the present run are never dropped. Threads may share one store, and processes one folder. What `get` returns may be
    shared: it is not to be changed in place. `tell` hears of trouble, once a kind.
    """

    def __init__(self, folder: Path | None, *, disk_budget: int = 0, ram_budget: int = 0, tell: Callable[[str], None] = print) -> None:
        self._folder = folder
        self._disk_budget, self._ram_budget = disk_budget, ram_budget
        self._tell, self._told = tell, set[str]()
        self._ram: dict[str, torch.Tensor] = {}
        self._spare: dict[str, None] = {}  # those of `_ram` that lie on the disk too: they make room for others
        self._ram_bytes = 0
        self._seen: dict[str, tuple[int, int, int]] = {}  # entries whose checksum was right: (inode, size, mtime)
        self._broken: set[str] = set()
        self._writing = folder is not None and disk_budget > 0
        self._lock = threading.Lock()
        self._disk_bytes = self._since_count = 0
        self._count()

    def _count(self) -> None:
        total = 0
        for entry in _entries(self._folder) if self._folder else ():
            with contextlib.suppress(OSError):
                total += entry.stat().st_size
        self._disk_bytes, self._since_count = total, 0

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all entries in the folder: counted when it was opened and now and then since, with what this process added."""
        return self._disk_bytes

    @property
    def bytes_in_ram(self) -> int:
        """Bytes held in this process's memory."""
        return self._ram_bytes

    @property
    def damaged(self) -> int:
        """Damaged entries met and not yet written again."""
        return len(self._broken)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        assert _KEY.fullmatch(key), f"{key!r} is not a picture_key"
        return self._folder / key[:2] / f"{key}.feat"

    def _once(self, kind: str, en: str, zh: str) -> None:
        with self._lock:
            new = kind not in self._told
            self._told.add(kind)
        if new:
            self._tell(say(en, zh))

    def __contains__(self, key: str) -> bool:
        """Is it in memory, or on the disk with a sound header and all its bytes? (Only `get` reads those.)"""
        return key in self._ram or self._on_disk(key)

    def get(self, key: str) -> torch.Tensor | None:
        """(tiles, tokens, width) on the CPU as it was put, or None: compute it. Never raises for what is on the disk."""
        held = self._ram.get(key)
        if held is not None or self._folder is None:
            return held
        found = self._opened(key, lambda file, head: self._read(file, key, head))
        if found is not None:
            self._hold(key, found, spare=True)
        return found

    def _opened(self, key: str, use: Callable[[BinaryIO, _Head], Used]) -> Used | None:
        """`use` of an entry's file behind its header, or None when it is absent or damaged."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                head = _unpack(file, key)
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_SECONDS:
                    with contextlib.suppress(OSError):
                        os.utime(path)
                return use(file, head)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _DamagedError as error:
            self._broken.add(key)
            why = str(error)
            self._once("damaged", f"{path}: damaged feature entry ({why}); it is computed again", f"{path}：特征缓存条目已损坏，将重新计算")
        except OSError as error:
            why = error.strerror or str(error)
            self._once(
                "read", f"{path}: cannot be read ({why}); such features are computed again", f"{path}：无法读取（{why}），将重新计算"
            )
        return None

    def _read(self, file: BinaryIO, key: str, head: _Head) -> torch.Tensor:
        dtype, shape, crc = head
        # Read, not mapped: a file that shrinks under a mapping kills the process, and a first touch costs as much as the copy.
        tensor = torch.empty(shape, dtype=dtype)
        memory, filled = _bytes_of(tensor), 0
        while filled < len(memory):
            got = file.readinto(memory[filled:])  # type: ignore[attr-defined]
            if not got:
                raise _DamagedError("it is cut short")
            filled += got
        state = os.fstat(file.fileno())
        mark = (state.st_ino, state.st_size, state.st_mtime_ns)
        if self._seen.get(key) != mark:
            if zlib.crc32(memory) != crc:
                raise _DamagedError("its checksum is wrong")
            self._seen[key] = mark
        self._broken.discard(key)
        return tensor

    def put(self, key: str, tensor: torch.Tensor) -> Kept:
        """Keep (tiles, tokens, width) under a key: on the disk, else in memory, else nowhere. Never raises for the disk's sake."""
        tensor = tensor.detach().cpu().contiguous()
        assert (tensor.dim(), tensor.dtype in _TYPES.values()) == (3, True), (
            f"{tensor.dtype} {tuple(tensor.shape)} is not a picture's features"
        )
        if self._on_disk(key) or self._save(key, tensor):
            self._hold(key, tensor, spare=True)
            return "disk"
        return "ram" if self._hold(key, tensor, spare=False) else "none"

    def _on_disk(self, key: str) -> bool:
        return self._folder is not None and key not in self._broken and self._opened(key, lambda file, head: True) is True

    def _hold(self, key: str, tensor: torch.Tensor, spare: bool) -> bool:
        """Keep it in memory if it fits; what is on the disk as well makes room for what is not."""
        with self._lock:
            if key in self._ram:
                return True
            if not spare and self._ram_bytes + tensor.nbytes > self._ram_budget >= tensor.nbytes:
                while self._spare and self._ram_bytes + tensor.nbytes > self._ram_budget:
                    self._ram_bytes -= self._ram.pop(self._spare.popitem()[0]).nbytes
            if self._ram_bytes + tensor.nbytes > self._ram_budget:
                return False
            self._ram_bytes += tensor.nbytes
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a part of a batch would keep all of it
        with self._lock:
            if key in self._ram:  # another thread was faster
                self._ram_bytes -= tensor.nbytes
            else:
                self._ram[key] = tensor
                if spare:
                    self._spare[key] = None
        return True

    def _save(self, key: str, tensor: torch.Tensor) -> bool:
        """Write an entry if the folder takes it and the budget allows."""
        if not self._writing:
            return False
        path, size = self._path(key), HEAD + tensor.nbytes
        try:
            old = path.stat().st_size if key in self._broken else 0
        except OSError:
            old = 0
        with self._lock:
            if self._since_count > self._disk_budget // 16:
                self._count()  # other processes write here too
            fits = self._disk_bytes + size - old <= self._disk_budget
            if fits:
                self._disk_bytes += size - old
                self._since_count += size
        if not fits:
            budget = f"{self._disk_budget / 2**30:.1f} GiB"
            self._once(
                "budget", f"{self._folder}: the feature cache has reached its {budget}", f"{self._folder}：特征缓存已达上限 {budget}"
            )
            return False
        try:
            if free_disk(path.parent) < size + SLACK:
                raise OSError(0, say("the disk is full", "磁盘已满"))
            _write_aside(path, _pack(key, tensor), tensor)
        except OSError as error:
            with self._lock:
                self._disk_bytes -= size - old
                self._writing = False
            why = error.strerror or str(error)
            self._once(
                "write",
                f"{self._folder}: features cannot be written ({why}); they are kept in memory as far as they fit",
                f"{self._folder}：无法写入特征缓存（{why}），改为尽量保存在内存中",
            )
            return False
        self._broken.discard(key)
        return True

    def trim(self, budget: int, keep: Container[str] = ()) -> int:
        """Remove the least recently used entries, but none of the keys in `keep`, until `budget` bytes are left; returns bytes removed.

        For before a run: `keep` holds the run's own keys. Another run that works meanwhile computes again what it misses.
        """
        found = []
        for entry in _entries(self._folder) if self._folder else ():
            with contextlib.suppress(OSError):
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.name, entry.path))
        total, removed = sum(size for _, size, _, _ in found), 0
        for used, size, name, path in sorted(found):
            left_behind = name.endswith(".partial")
            if left_behind and time.time() - used < _PARTIAL_SECONDS:
                continue
            if left_behind or (total - removed > budget and name.removesuffix(".feat") not in keep):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    removed += size
        with self._lock:
            self._count()
        return removed


def _write_aside(path: Path, head: bytes, tensor: torch.Tensor) -> None:
    """Write an entry beside its place, then rename it; the name is no other process's (or machine's)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(head)
            file.write(_bytes_of(tensor))
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
