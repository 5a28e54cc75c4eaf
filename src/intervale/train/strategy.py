"""How a step's passes, gradients and checkpoints are made by one process or several: the same mathematics, whoever holds the tensors.

Promises: a step's loss is the mean over all its target tokens, its gradient their sum over processes, its norm the whole gradient's;
a checkpoint holds whole tensors under their own names, so that any strategy reads any other's. `Plain` is one process, or DDP: every
process holds everything and gradients are added up once a step. What shards is in `train.sharded`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration

from intervale.data.dataset import Item
from intervale.train.batches import Batch, collate
from intervale.train.optimizer import Optimizers
from intervale.train.parallel import World, sum_gradients
from intervale.train.state import Tensors, moments_by_name, put_moments, trainable
from intervale.train.step import Losses


class Strategy(Protocol):
    """What the loop asks of whoever holds the parameters."""

    uniform: bool  # does a pass need all processes, so that each must make as many?

    def losses(self, plain: Losses, batch: Batch, compute: Any, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of a micro-batch; `plain` computes them where nothing is sharded, `last`: the step's last."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch; `last`: the step's last."""
        ...

    def clip(self, most: float) -> float:
        """Norm of the step's whole gradient, which is shortened to `most` (0: left). Not finite: the parameters stay as they are."""
        ...

    def step(self) -> None:
        """Change the parameters."""
        ...

    def tensors(self) -> Tensors:
        """Everything that learns and its moments, whole; every process must ask. Only the first needs the answer."""
        ...

    def restore_moments(self, stored: dict[str, dict[str, torch.Tensor]]) -> None:
        """Put back the moments of parameters by name."""
        ...


@dataclass
class Plain:
    """One process, or several with everything each."""

    network: InternVLForConditionalGeneration
    optimizer: Optimizers
    world: World
    uniform = False

    def losses(self, plain: Losses, batch: Batch, compute: Any, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's own."""
        return plain(self.network, batch, compute)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """torch's."""
        loss.backward()

    def clip(self, most: float) -> float:
        """Adds the gradients up over the processes first. What nothing reached has the gradient 0, with one process as with several."""
        parameters = list(trainable(self.network).values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_gradients(self.world, parameters)
        return float(torch.nn.utils.clip_grad_norm_(parameters, most or math.inf))

    def step(self) -> None:
        """The optimizer's."""
        self.optimizer.step()

    def tensors(self) -> Tensors:
        """Copies where the memory has room for them, so that they are written while the steps go on; else the parameters themselves."""
        if not self.world.first:
            return Tensors({}, {})
        named = trainable(self.network)
        return Tensors(dict(named), moments_by_name(named, self.optimizer), live=True).copied()

    def restore_moments(self, stored: dict[str, dict[str, torch.Tensor]]) -> None:
        """Onto each parameter's device."""
        put_moments(trainable(self.network), self.optimizer, stored)


def idle_passes(own: int, most: float, strategy: Strategy, spare: Batch) -> list[Batch]:
    """What to go through besides `own` micro-batches where passes need all processes; `most`: as many has the busiest of them."""
    return [spare] * (int(most) - own) if strategy.uniform else []


def spare_batch() -> Batch:
    """The smallest micro-batch: text alone, one target."""
    return collate([Item("", np.ones(3, np.int64), np.array([False, True, True]), ())], image_token=-1)
