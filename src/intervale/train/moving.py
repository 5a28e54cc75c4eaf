"""A step's batches and kept features on their way to the GPU while it makes the step before.

Promises: the same batches in the same order; on a CPU nothing happens. Cost: the next step's tensors are on the GPU a step early
(0.2 GiB for eight pictures of 13 tiles).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from intervale.train.batches import Batch, Loaded
from intervale.train.step import Compute


def moved(steps: Iterator[Loaded], compute: Compute) -> Iterator[Loaded]:
    """The steps with their batches on the device; those of the next one are being copied when a step is handed out."""
    if compute.device.type != "cuda":
        yield from steps
        return
    stream, here = torch.cuda.Stream(compute.device), torch.cuda.current_stream(compute.device)
    waiting: tuple[Loaded, torch.cuda.Event] | None = None
    for loaded in steps:
        with torch.cuda.stream(stream):
            coming = Loaded([_on_device(batch, compute) for batch in loaded.batches], loaded.bad)
        if waiting is not None:
            yield _arrived(*waiting, here)
        waiting = coming, stream.record_event()
    if waiting is not None:
        yield _arrived(*waiting, here)


def _on_device(batch: Batch, compute: Compute) -> Batch:
    features = {}
    if compute.kept is not None:
        missing = [key for key, live in zip(batch.keys, batch.live, strict=True) if not live]
        features = {key: compute.kept.get(key).to(compute.device, non_blocking=True) for key in missing}
    return replace(batch.to(compute.device), features=features)


def _arrived(loaded: Loaded, event: torch.cuda.Event, here: torch.cuda.Stream) -> Loaded:
    """The step for the stream that computes: it waits for the copies, and their memory is not given away before it has used them."""
    here.wait_event(event)
    for batch in loaded.batches:
        for tensor in batch.tensors():
            tensor.record_stream(here)
    return loaded
