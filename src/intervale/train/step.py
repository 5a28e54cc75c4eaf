"""One optimizer step, and the held-out loss: the mathematics of training, in one place.

A step's loss is the mean over all target tokens of the step, across micro-batches and processes, whatever their sizes: the
sums are divided once, by the step's own count. Legend: B samples, S positions, P tiles.
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
    kept: dict[bytes, torch.Tensor] | None = None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 where it is safe; nothing in float32."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()


@dataclass
class Sums:
    """Added up over micro-batches: loss, correct targets, targets, positions."""

    loss: float = 0.0
    correct: int = 0
    targets: int = 0
    positions: int = 0
    samples: int = field(default=0)


def _features(network: InternVLForConditionalGeneration, batch: Batch, compute: Compute) -> torch.Tensor | None:
    """The projected features of a batch's tiles, the tower's part from memory where it was seen before."""
    if len(batch.tiles_PHWC) == 0:
        return None
    if compute.kept is None:
        tower = tower_features(network, normalise(batch.tiles_PHWC, compute.dtype))
    else:
        parts = []
        for key, tiles in zip(batch.tile_keys, batch.tiles_PHWC.split(list(batch.tiles_of)), strict=True):
            if len(tiles):
                if key not in compute.kept:
                    with torch.no_grad():
                        compute.kept[key] = tower_features(network, normalise(tiles, compute.dtype)).cpu()
                parts.append(compute.kept[key].to(compute.device, non_blocking=True))
        tower = torch.cat(parts)
    return network.model.multi_modal_projector(tower)


def batch_losses(network: InternVLForConditionalGeneration, batch: Batch, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of every target, is it the most likely token), row by row."""
    with compute.autocast():
        features = _features(network, batch, compute)
        embedded_BSD = embed(network, batch.ids_BS, features, compute.image_token_id)
        return target_losses(network, embedded_BSD, batch.mask_BS, batch.targets_BS)


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
    sums.loss += float(losses_N.detach().sum())
    sums.correct += int(correct_N.sum())
    sums.targets += len(losses_N)
    sums.positions += int(batch.ids_BS.numel() if batch.mask_BS is None else batch.mask_BS.sum())
    sums.samples += len(batch.ids)
