"""One optimizer step, and the held-out loss: the mathematics of training, in one place.

A step's loss is the mean over all target tokens of the step, across micro-batches and processes, whatever their sizes: the
sums are divided once, by the step's own count. Legend: T tokens of a pack, P tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import InternVLForConditionalGeneration

from intervale.model.forward import embed, normalise, target_losses, tower_features
from intervale.train.batches import Batch


@dataclass(frozen=True)
class Compute:
    """How a forward pass is computed: type, device, and the kept tower features (None: the tower runs every time)."""

    dtype: torch.dtype
    device: torch.device
    image_token_id: int
    kept: dict[str, torch.Tensor] | None = None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 where it is safe; nothing in float32."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()


@dataclass
class Sums:
    """Added up over micro-batches: loss, correct targets, targets, positions; `each` is the loss of every micro-batch."""

    loss: float = 0.0
    correct: int = 0
    targets: int = 0
    positions: int = 0
    samples: int = 0
    each: list[float] = field(default_factory=list)


def _features(network: InternVLForConditionalGeneration, batch: Batch, compute: Compute) -> torch.Tensor | None:
    """The projected features of a batch's tiles, each picture's once, the tower's part from memory where it was seen before."""
    if not batch.slots:
        return None
    tiles = batch.tiles_PHWC.split(list(batch.tiles_of))
    if compute.kept is None:
        towers = tower_features(network, normalise(batch.tiles_PHWC, compute.dtype)).split(list(batch.tiles_of))
    else:
        for key, own in zip(batch.keys, tiles, strict=True):
            if key not in compute.kept:
                with torch.no_grad():
                    compute.kept[key] = tower_features(network, normalise(own, compute.dtype)).cpu()
        towers = tuple(compute.kept[key].to(compute.device, non_blocking=True) for key in batch.keys)
    projected = network.model.multi_modal_projector(torch.cat(towers)).split(list(batch.tiles_of))
    return torch.cat([projected[slot] for slot in batch.slots])


def batch_losses(network: InternVLForConditionalGeneration, batch: Batch, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of every target, is it the most likely token), row by row."""
    with compute.autocast():
        features = _features(network, batch, compute)
        embedded_1TD = embed(network, batch.ids_1T, features, compute.image_token_id)
        return target_losses(network, embedded_1TD, batch.positions_1T, batch.layout, batch.targets_1T)


def accumulate(network: InternVLForConditionalGeneration, batches: Iterable[Batch], compute: Compute, step_targets: int) -> Sums:
    """Add the gradients of (sum of losses / `step_targets`) of every micro-batch; `step_targets` is the whole step's count."""
    sums = Sums()
    for batch in batches:
        losses_N, correct_N = batch_losses(network, batch.to(compute.device), compute)
        (losses_N.sum() / step_targets).backward()
        _count(sums, batch, losses_N, correct_N)
    return sums


@torch.no_grad()
def held_out(network: InternVLForConditionalGeneration, batches: Iterable[Batch], compute: Compute) -> Sums:
    """The same sums without gradients; the network should be in eval mode."""
    sums = Sums()
    for batch in batches:
        losses_N, correct_N = batch_losses(network, batch.to(compute.device), compute)
        _count(sums, batch, losses_N, correct_N)
    return sums


def _count(sums: Sums, batch: Batch, losses_N: torch.Tensor, correct_N: torch.Tensor) -> None:
    sums.each.append(float(losses_N.detach().sum()))
    sums.loss += sums.each[-1]
    sums.correct += int(correct_N.sum())
    sums.targets += len(losses_N)
    sums.positions += batch.ids_1T.numel()
    sums.samples += len(batch.ids)
