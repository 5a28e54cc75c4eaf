"""What the first step on a GPU waits for and processes can make while the pictures are encoded: torch's compilers and the LoRA kernels.

Promises: nothing that a step computes depends on it; what fails here is left for the step to meet and to tell; no process of ours
outlives the block. Cost: processes and not threads, because a thread takes the interpreter lock from the encoding, which needs it for
every launch of a kernel, and from the compiling of the layers (docs/log.md).
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from intervale.model.decoder import Walk, start_compilers
from intervale.train.builder import build_all

_PATIENCE = 5.0  # seconds for the last kernel; what is missing then is built here
_BUILDER = ("-m", "intervale.train.builder")


@contextlib.contextmanager
def made_ahead(walk: Walk, device: torch.device, builder: bool = True) -> Iterator[None]:
    """Around what comes before the first step. `builder`: whether this process starts one that builds; on a machine one is enough."""
    if device.type != "cuda":
        yield
        return
    if walk.compiled:
        with contextlib.suppress(Exception):
            start_compilers()
    works = walk.adapter.builds() if walk.adapter is not None else []
    with building(works, device) if builder else contextlib.nullcontext():
        yield
    build_all(works, device)  # out of the cache on the disk, where the other process was in time


@contextlib.contextmanager
def building(works: Sequence[Callable[[], None]], device: torch.device) -> Iterator[None]:
    """A process that makes `works` (functions that can be pickled) beside the block. It is ended where it takes longer, or the block fails."""
    child = _start(works, device) if works else None
    try:
        yield
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_PATIENCE)
    finally:
        if child is not None and child.poll() is None:
            child.kill()
            child.wait()


def _start(works: Sequence[Callable[[], None]], device: torch.device) -> subprocess.Popen[bytes] | None:
    quiet = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        child = subprocess.Popen([sys.executable, *_BUILDER], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
        assert child.stdin is not None
        with contextlib.suppress(OSError), child.stdin:  # it has ended already: its own fault, met again here
            child.stdin.write(pickle.dumps((str(device), list(works))))
        return child
    return None
