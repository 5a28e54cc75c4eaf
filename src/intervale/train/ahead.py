"""What the first step on a GPU waits for and processes can make while the pictures are encoded: torch's compilers and the LoRA kernels.

Promises: nothing that a step computes depends on it; what fails here is left for the step to meet and to tell; the process that builds
kernels ends with the block, torch's compilers with this process, both also where it is killed. Cost: processes and not threads, because a
thread takes the interpreter lock from the encoding, which needs it for every launch of a kernel (docs/log.md).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from intervale.model.decoder import Walk, start_compilers
from intervale.train.builder import build_all
from intervale.train.launch import PARENT, PYTHON, python_environment

_PATIENCE = 5.0  # seconds at most for the last kernel; what is missing then is built here
_BUILDER = ("-m", "intervale.train.builder")


@contextlib.contextmanager
def made_ahead(walk: Walk, device: torch.device) -> Iterator[None]:
    """Around what comes before the first step. On a machine one process builds for all: that of the first GPU starts it."""
    if device.type != "cuda":
        yield
        return
    if walk.compiled:
        with contextlib.suppress(Exception):
            start_compilers()
    works = walk.adapter.builds() if walk.adapter is not None else []
    with contextlib.nullcontext() if device.index else building(works, device):
        yield
    build_all(works, device)  # out of the cache on the disk, where the other process was in time


@contextlib.contextmanager
def building(works: Sequence[Callable[[], None]], device: torch.device) -> Iterator[None]:
    """A process that makes `works` (functions that can be pickled) beside the block. It is ended where it takes longer, or the block fails.

    Behind the block it is waited for as long as the block took, `_PATIENCE` at most: one that has only begun would be no help.
    """
    begun = time.monotonic()
    child = _start(works, device) if works else None
    try:
        yield
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(min(_PATIENCE, time.monotonic() - begun))
    finally:
        if child is not None and child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it runs
            child.wait()


def _start(works: Sequence[Callable[[], None]], device: torch.device) -> subprocess.Popen[bytes] | None:
    given, quiet = pickle.dumps((str(device), list(works))), subprocess.DEVNULL
    environment = python_environment() | {PARENT: str(os.getpid())}
    with contextlib.suppress(OSError):
        child = subprocess.Popen(
            [*PYTHON, *_BUILDER], env=environment, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
        )
        assert child.stdin is not None
        with contextlib.suppress(OSError), child.stdin:  # it has ended already: its own fault, met again here
            child.stdin.write(given)
        return child
    return None
