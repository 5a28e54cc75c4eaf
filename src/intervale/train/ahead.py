"""What the first step needs besides its data, made while the pictures are encoded: torch's compiler, the LoRA kernels.

Promises: nothing that a step computes depends on it; what fails here is left for the step to meet and to tell. Cost: threads that are
done before the first step; while they run the interpreter lock is passed on every 0.2 ms instead of 5, since launching a batch of the
tower's kernels takes it some 600 times.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_THREADS = 3  # more of them would only wait for the lock, and keep the encoding from it
_SWITCH = 2e-4  # seconds


@contextlib.contextmanager
def made_ahead(works: Sequence[Callable[[], None]], device: torch.device) -> Iterator[Callable[[], None]]:
    """Gives what starts the works, which is to be called once processes are no longer forked; the block's end waits for them.

    Not called, nothing is done. Where the block is left by an error nobody waits.
    """
    begun: list[ThreadPoolExecutor] = []
    before = sys.getswitchinterval()

    def make(work: Callable[[], None]) -> None:
        place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()  # a thread begins on the first GPU
        with contextlib.suppress(Exception), place:
            work()

    def begin() -> None:
        if works and not begun:
            sys.setswitchinterval(_SWITCH)
            begun.append(ThreadPoolExecutor(min(_THREADS, len(works)), thread_name_prefix="ahead"))
            for work in works:
                begun[0].submit(make, work)

    try:
        yield begin
        for pool in begun:
            pool.shutdown()
    finally:
        for pool in begun:
            pool.shutdown(wait=False, cancel_futures=True)
        sys.setswitchinterval(before)
