"""Several processes on one optimizer step (started by us, torchrun or accelerate): who they are, and sums across them.

The step's mathematics do not depend on their number: each takes its share of the step's items, losses are divided by the
target tokens of the whole step, and gradients are added up. One process: every function here is the identity. On one machine numbers
that the hosts know go from host to host: through the GPUs each sum would wait for all that they were given before, and leave them without
work. Several machines have one connection, that of the GPUs: a second one would need a network of its own settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from intervale.core.errors import OutsideError, UserError

BUCKET = 1 << 25  # elements a gradient message carries: 128 MiB in float32


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, its device. `hosts`: the group through which the hosts talk where the devices have
    another one; None: there is only one."""

    rank: int
    size: int
    device: torch.device
    hosts: Any = None

    @property
    def first(self) -> bool:
        """The process that writes files and speaks."""
        return self.rank == 0

    @property
    def numbers(self) -> torch.device:
        """Where numbers lie that are to be added up."""
        return self.device if self.hosts is None else torch.device("cpu")


def started() -> int:
    """How many processes were started together, by us, torchrun or accelerate; 0 where nobody says."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def join_world(strategy: str, device: str) -> World:
    """Join the processes that were started with this one. Raises: UserError when recipe, launcher and machine disagree."""
    size = started()
    if size <= 1:
        return World(0, 1, torch.device(device))
    if strategy == "single":
        raise UserError(
            f"{size} processes were started, but parallel.strategy is 'single'", "set parallel.strategy to ddp, fsdp or deepspeed"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if here.type == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"process {local + 1} of this machine has no GPU of its own: there are {count}", f"start {count} processes here"
            )
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    together = os.environ.get("LOCAL_WORLD_SIZE") == str(size)  # all on this machine
    hosts = dist.new_group(backend="gloo") if here.type == "cuda" and together else None
    return World(dist.get_rank(), size, here, hosts)


@contextmanager
def left_together(world: World) -> Iterator[None]:
    """Close the connection between the processes at the end. Not after an error, whose process only ends: closing NCCL waits for the
    others, and they may be waiting for this one in the middle of a pass."""
    yield
    if world.size > 1:
        dist.destroy_process_group()


@contextmanager
def hearing_of_others(world: World) -> Iterator[None]:
    """A connection that breaks because another process has ended is told as that: why is in the other's own words."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        raise OutsideError(
            "another process of this run has ended", "its own words say why; --resume goes on from the last checkpoint"
        ) from error


def sum_values(world: World, values: list[float]) -> list[float]:
    """Each value added up over all processes."""
    return [sum(each) for each in of_all(world, values)]


def of_all(world: World, values: list[float]) -> list[tuple[float, ...]]:
    """For each value those of all processes, in their order."""
    if world.size == 1:
        return [(value,) for value in values]
    own = torch.tensor(values, dtype=torch.float64, device=world.numbers)
    found = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(found, own, group=world.hosts)
    return [tuple(each) for each in torch.stack(found, dim=1).tolist()]  # read once: each reading of a GPU is a wait


def sum_gradients(world: World, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add every gradient up over all processes, in place; each parameter has one."""
    if world.size == 1:
        return
    bucket: list[torch.Tensor] = []
    filled = 0
    for parameter in parameters:
        assert parameter.grad is not None
        bucket.append(parameter.grad)
        filled += parameter.numel()
        if filled >= BUCKET:
            _sum_bucket(bucket)
            bucket, filled = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    dist.all_reduce(flat)
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()


def wait(world: World) -> None:
    """Until every process is here."""
    if world.size > 1:
        dist.barrier(world.hosts)
