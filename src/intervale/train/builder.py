"""`python -m intervale.train.builder`: a process that builds kernels into the compiler's cache on the disk, for the one that started it.

It reads (place of the GPU, works) from its input, as its parent pickled them, says nothing and ends with its parent; a work that fails is
left for that one to meet. Cost: the start of torch, and half a GiB of the GPU until it ends.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from intervale.train.launch import end_with_parent

_THREADS = 4


def build_all(works: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Each in a thread; ends with them. What fails is left out."""

    def make(work: Callable[[], None]) -> None:
        gpu = device.type == "cuda"
        with contextlib.suppress(Exception), torch.cuda.device(device) if gpu else contextlib.nullcontext():  # else the first GPU
            work()

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="build") as pool:
        list(pool.map(make, works))


if __name__ == "__main__":
    end_with_parent()
    place, works = pickle.load(sys.stdin.buffer)
    build_all(works, torch.device(place))
