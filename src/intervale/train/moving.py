"""A step's batches and kept features on their way to the GPU while it makes the step before.

Promises: the same batches in the same order; what cannot be read is told where its own step would begin; on a CPU nothing happens. A
thread does it, because features may come from the disk (0.2 GiB for eight pictures of 13 tiles). Cost: the next step's tensors are on the
GPU a step early, where it has room, and page-locked memory for the features of two pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from intervale.train.batches import Batch, Loaded
from intervale.train.step import Compute


class Staging:
    """Page-locked memory through which features go to the GPU. To lock every picture's own, or to copy it as it lies, would keep the thread
    that trains from the driver for 11 or 3 ms a picture, at the start of a step (bench/host_copies.py); through this no call takes long."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device, self._stream = device, stream
        self._pieces = [torch.empty(0, dtype=torch.uint8)] * 2
        self._sent: list[torch.cuda.Event | None] = [None, None]  # when what was last in a piece had left it
        self._next = 0

    def up(self, features: torch.Tensor) -> torch.Tensor:
        """A copy on the device, complete when the stream has come so far."""
        number, self._next = self._next, 1 - self._next
        sent = self._sent[number]
        if sent is not None:
            sent.synchronize()
        if len(self._pieces[number]) < features.nbytes:
            self._pieces[number] = torch.empty(features.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        staged = self._pieces[number][: features.nbytes].view(features.dtype).view(features.shape)
        staged.copy_(features)
        there = torch.empty_like(staged, device=self._device).copy_(staged, non_blocking=True)
        self._sent[number] = self._stream.record_event()
        return there


def moved(steps: Iterator[Loaded], compute: Compute) -> Iterator[Loaded]:
    """The steps with their batches on the device; those of the next one are being read and copied when a step is handed out."""
    if compute.device.type != "cuda":
        yield from steps
        return
    stream, here = torch.cuda.Stream(compute.device), torch.cuda.current_stream(compute.device)
    staging = Staging(compute.device, stream)
    coming: Future[tuple[Loaded, torch.cuda.Event | None]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="move") as pool:
        for loaded in steps:
            following = pool.submit(_move, loaded, compute, stream, staging)
            if coming is not None:
                yield _arrived(*coming.result(), here)
            coming = following
        if coming is not None:
            yield _arrived(*coming.result(), here)


def _move(loaded: Loaded, compute: Compute, stream: torch.cuda.Stream, staging: Staging) -> tuple[Loaded, torch.cuda.Event | None]:
    """In the thread. Without room beside the running step they stay where they are: the step moves what it finds elsewhere."""
    try:
        with torch.cuda.device(compute.device), torch.cuda.stream(stream):
            coming = Loaded([_on_device(batch, compute, staging) for batch in loaded.batches], loaded.bad)
            return coming, stream.record_event()
    except torch.OutOfMemoryError:
        return loaded, None


def _on_device(batch: Batch, compute: Compute, staging: Staging) -> Batch:
    features = {}
    if compute.kept is not None:
        missing = [key for key, live in zip(batch.keys, batch.live, strict=True) if not live]
        features = {key: staging.up(compute.kept.get(key)) for key in missing}
    return replace(batch.to(compute.device), features=features)


def _arrived(loaded: Loaded, event: torch.cuda.Event | None, here: torch.cuda.Stream) -> Loaded:
    """The step for the stream that computes: it waits for the copies, and their memory is not given away before it has used them."""
    if event is None:
        return loaded
    here.wait_event(event)
    for batch in loaded.batches:
        for tensor in batch.tensors():
            tensor.record_stream(here)
    return loaded
