"""One optimizer step, and the held-out loss: the mathematics of training, in one place.

A step's loss is the mean over all target tokens of the step, across micro-batches and processes, whatever their sizes: the
sums are divided once, by the step's own count. Legend: T tokens of a pack, P tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from transformers import InternVLForConditionalGeneration

from intervale.model.decoder import Walk
from intervale.model.forward import embed, normalise, target_losses, tower_features
from intervale.train.batches import Batch


class Kept(Protocol):
    """Features that were computed before."""

    @property
    def projected(self) -> bool:
        """Are they behind the projector already?"""
        ...

    def get(self, key: str) -> torch.Tensor:
        """(tiles, tokens, width) of a picture, on the CPU."""
        ...


@dataclass(frozen=True)
class Compute:
    """How a forward pass is computed: type, device, and the features that are kept (None: every picture comes with its tiles)."""

    dtype: torch.dtype
    device: torch.device
    image_token_id: int
    kept: Kept | None = None
    walk: Walk = field(default_factory=Walk)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 where it is safe; nothing in float32."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()


Losses = Callable[[InternVLForConditionalGeneration, Batch, Compute], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Sums:
    """Added up over micro-batches. `found`: (loss, correct targets) of each, on the device; the numbers wait for it when they are first
    asked for, so ask late."""

    targets: int = 0
    positions: int = 0
    samples: int = 0
    found: tuple[torch.Tensor, ...] = ()

    @cached_property
    def _numbers(self) -> list[list[float]]:
        numbers: list[list[float]] = torch.stack(self.found).tolist() if self.found else []
        return numbers

    @property
    def each(self) -> list[float]:
        """The loss of every micro-batch, summed over its targets."""
        return [loss for loss, _ in self._numbers]

    @property
    def loss(self) -> float:
        """The loss, summed over all targets."""
        return sum(self.each)

    @property
    def correct(self) -> int:
        """Targets that were the most likely token."""
        return int(sum(correct for _, correct in self._numbers))


def _features(network: InternVLForConditionalGeneration, batch: Batch, compute: Compute) -> torch.Tensor | None:
    """The projected features of a batch's tiles, each picture's once, the tower's part from what is kept where it is."""
    if not batch.slots:
        return None
    counts = [count for count, live in zip(batch.tiles_of, batch.live, strict=True) if live]
    seen = iter(tower_features(network, normalise(batch.tiles_PHWC, compute.dtype)).split(counts)) if counts else iter(())
    parts = [next(seen) if live else _kept(batch, compute, key) for key, live in zip(batch.keys, batch.live, strict=True)]
    project = network.model.multi_modal_projector
    if compute.kept is not None and compute.kept.projected:
        projected = [project(part) if live else part for part, live in zip(parts, batch.live, strict=True)]
    else:
        projected = list(project(torch.cat(parts)).split(list(batch.tiles_of)))
    return torch.cat([projected[slot] for slot in batch.slots])


def _kept(batch: Batch, compute: Compute, key: str) -> torch.Tensor:
    if key in batch.features:
        return batch.features[key]
    assert compute.kept is not None, "a picture without tiles has its features kept"
    return compute.kept.get(key).to(compute.device, non_blocking=True)


def batch_losses(network: InternVLForConditionalGeneration, batch: Batch, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of every target, is it the most likely token), in the order of `batch.targets_N`."""
    with compute.autocast():
        features = _features(network, batch, compute)
        embedded_1TD = embed(network, batch.ids_1T, features, compute.image_token_id, batch.places_P)
        return target_losses(network, embedded_1TD, batch.positions_1T, batch.layout, batch.labelled_N, batch.targets_N, compute.walk)


class Passes(Protocol):
    """Who makes the passes where the network holds only parts of its tensors (`train.strategy`)."""

    def losses(self, plain: Losses, batch: Batch, compute: Compute, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of every target, is it the most likely token); `last`: of the step's micro-batches."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch; `last`: the step's last."""
        ...


def accumulate(
    network: InternVLForConditionalGeneration,
    batches: Sequence[Batch],
    compute: Compute,
    step_targets: int,
    passes: Passes | None = None,
    idle: Sequence[Batch] = (),
) -> Sums:
    """Add the gradients of (sum of losses / `step_targets`) of every micro-batch; `step_targets` is the whole step's count.

    `idle` micro-batches are gone through because others go through as many: they add and count nothing.
    """
    adapter = compute.walk.adapter
    if adapter is not None:
        adapter.refresh()
    found = []
    for number, batch in enumerate((*batches, *idle)):
        if adapter is not None:
            adapter.draw()
        last = number + 1 == len(batches) + len(idle)
        losses_N, correct_N = _pass(network, batch, compute, passes, last)
        loss = losses_N.sum() / step_targets if number < len(batches) else 0.0 * losses_N.sum()
        if passes is None:
            loss.backward()
        else:
            passes.backward(loss, last)
        found.append(_summed(losses_N, correct_N))
    return _count(batches, found[: len(batches)])


def _pass(
    network: InternVLForConditionalGeneration, batch: Batch, compute: Compute, passes: Passes | None, last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = batch.to(compute.device)
    return batch_losses(network, batch, compute) if passes is None else passes.losses(batch_losses, batch, compute, last)


@torch.no_grad()
def held_out(
    network: InternVLForConditionalGeneration,
    batches: Iterable[Batch],
    compute: Compute,
    passes: Passes | None = None,
    idle: Sequence[Batch] = (),
) -> Sums:
    """The same sums without gradients; the network should be in eval mode."""
    seen, found = [], []
    for batch in batches:
        found.append(_summed(*_pass(network, batch, compute, passes, True)))
        seen.append(replace(batch, tiles_PHWC=batch.tiles_PHWC[:0]))
    for batch in idle:
        _pass(network, batch, compute, passes, True)
    return _count(seen, found)


def _summed(losses_N: torch.Tensor, correct_N: torch.Tensor) -> torch.Tensor:
    """(loss, correct targets), on the device: asking for the numbers would wait for it."""
    return torch.stack((losses_N.detach().sum().double(), correct_N.sum().double()))


def _count(batches: Sequence[Batch], found: Sequence[torch.Tensor]) -> Sums:
    counts = ((batch.targets, batch.tokens, len(batch.ids)) for batch in batches)
    targets, tokens, samples = (sum(numbers) for numbers in zip(*counts, strict=True)) if batches else (0, 0, 0)
    return Sums(targets, tokens, samples, tuple(found))
