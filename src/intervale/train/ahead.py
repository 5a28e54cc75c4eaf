"""The LoRA kernels of the first step, built in threads: building leaves the interpreter lock alone most of the time.

Promises: nothing that a step computes depends on it; a build that fails is left for the step to meet and to tell. Cost: nothing is
saved while pictures are encoded, where every launch of a kernel takes that lock (14.7 instead of 9.6 s for 256 pictures, docs/log.md):
so they are built while the layers are compiled, which is one thread's work, or all at once before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_THREADS = 4


class Beside:
    """Works for a GPU, each in a thread. `wait`: `begin` ends with them, for who would need them at once."""

    def __init__(self, works: Sequence[Callable[[], None]] = (), device: torch.device | None = None, wait: bool = False) -> None:
        self._works, self._device, self._wait = list(works), device, wait
        self._pool: ThreadPoolExecutor | None = None

    def begin(self) -> None:
        """Start them, the first time it is called. Processes that load pictures must be there already: threads and forks do not mix."""
        if self._works:
            self._pool = ThreadPoolExecutor(min(_THREADS, len(self._works)), thread_name_prefix="build")
            for work in self._works:
                self._pool.submit(self._make, work)
            self._works = []
            if self._wait:
                self.finish()

    def finish(self) -> None:
        """Wait for what was begun."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _make(self, work: Callable[[], None]) -> None:
        gpu = self._device is not None and self._device.type == "cuda"
        with contextlib.suppress(Exception), torch.cuda.device(self._device) if gpu else contextlib.nullcontext():  # else the first GPU
            work()
