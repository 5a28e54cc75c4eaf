"""The inside of the sandbox: `python -I pickled_child.py FILE OUT BYTES SECONDS`. Imports nothing of intervale, on purpose.

Reads a pickled checkpoint with torch's tensors-only unpickler and writes OUT/tensors.safetensors and OUT/meta.json. Limits on
memory, processor time and file size hold from before the file is opened; a guard refuses programs, sockets and writing anywhere
else. What a file of mmengine carries beside its tensors (log history) becomes objects that do nothing.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
# Names in mmengine's log history and what numpy pickles itself as. They are never looked up: a stand-in takes their place.
_STAND_INS = (
    _HISTORY, "builtins.getattr", "__builtin__.getattr", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.ndarray", "numpy.dtype", "_codecs.encode",
)  # fmt: skip
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "pty.",
    "ctypes.",
    "shutil.",
    "os.remove",
)
_MOST_CONFIG = 1 << 20  # characters of the config a checkpoint may carry


class RefusedError(Exception):
    """What is wrong and what to do, for the parent to tell."""


class _Nothing:
    """Takes any arguments and any state, and does nothing."""

    def __new__(cls, *values: Any, **named: Any) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *values: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _limit(memory: int, seconds: int, file: int) -> None:
    with open("/proc/self/status", encoding="ascii") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1  # on importing torch
    for kind, most in (
        (resource.RLIMIT_DATA, used + memory),
        (resource.RLIMIT_CPU, spent + seconds),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _guard(out: Path) -> None:
    """Refuse, from now on, whatever a reader of tensors has no business with."""
    own = str(out) + os.sep

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise RefusedError(f"it tried to use {event}")
        if event == "open":
            path, mode, flags = (*values, None, None, None)[:3]
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
            if writes and not str(path).startswith(own):
                raise RefusedError(f"it tried to write {path!s}")

    sys.addaudithook(refuse)


def _check_sums(path: Path) -> None:
    """torch's reader does not look at the zip's checksums; a flipped bit of a weight would pass."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise RefusedError(f"it is damaged ({error})") from error
    if bad is not None:
        raise RefusedError(f"it is damaged: its part {bad[:100]!r} is not what its checksum says")


def _load(path: Path) -> Any:
    allowed: list[Any] = [(_Nothing, name) for name in _STAND_INS]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, RefusedError):
        raise
    except Exception as error:
        text = str(error)
        if "DefaultCPUAllocator" in text or "alloc" in text:
            raise MemoryError from error
        name = re.search(r"GLOBAL (\S+)", text)
        if name:
            raise RefusedError(f"it asks for `{name[1]}`, which is code, not a tensor; nothing of it was run") from error
        # torch's own text advises to read the file without protection: only its last part, on the fault itself, is passed on.
        fault = re.search(r"WeightsUnpickler error: ([^\n]{1,200})", text)
        raise RefusedError(f"it is not a checkpoint of tensors ({fault[1] if fault else type(error).__name__})") from error


def _state(loaded: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by name, the checkpoint's `meta`). Under DeepSpeed the tensors may stand under `module`."""
    if not isinstance(loaded, dict):
        raise RefusedError(f"it holds {type(loaded).__name__}, not tensors by name")
    inner = next((loaded[key] for key in ("state_dict", "module") if isinstance(loaded.get(key), dict)), loaded)
    meta = loaded.get("meta")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in inner.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise RefusedError(f"its entry {str(name)[:100]!r} is {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.dtype.is_floating_point:
            raise RefusedError(f"its tensor {name[:100]!r} is {tensor.dtype}, {tensor.layout}; plain floating-point tensors are expected")
        found[name] = tensor.detach()
    if not found:
        raise RefusedError("it holds no tensors")
    return found, meta if isinstance(meta, dict) else {}


def _facts(meta: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {key: meta[key] for key in ("iter", "epoch", "seed") if type(meta.get(key)) is int and abs(meta[key]) < 1 << 53}
    config = meta.get("cfg")
    return facts | ({"cfg": config} if isinstance(config, str) and len(config) <= _MOST_CONFIG else {})


def main() -> int:
    """Read, check, write; the exit code is 0, or 1 with a line of JSON on stdout."""
    path, out, memory, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    size = path.stat().st_size
    torch.set_num_threads(1)
    try:
        _limit(memory, seconds, 2 * size + (1 << 20))
        _guard(out)
        _check_sums(path)
        tensors, meta = _state(_load(path))
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
            raise RefusedError("its tensors claim more bytes than the file has")
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out / "tensors.safetensors")
        (out / "meta.json").write_text(json.dumps(_facts(meta)), encoding="utf-8")
    except (RefusedError, MemoryError, RecursionError) as error:
        what = str(error) if isinstance(error, RefusedError) else f"reading it needs more than the {memory >> 20:,} MiB it may take"
        print(json.dumps({"what": what}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
