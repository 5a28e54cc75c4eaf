"""Checkpoints of a run: complete or absent, no pickle, and enough to continue.

    RUN/checkpoints/step-00000064/   adapter and trained tensors (model.adapt), optimizer.safetensors, state.json, MANIFEST.json

The folder is staged, flushed and renamed, so a crash leaves none or a whole one. Old ones go only after the new one stands.
Random numbers are not stored: every step seeds its own from (seed, step).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from intervale.core.errors import UserError
from intervale.core.files import need_space, read_object, staged_folder, write_json
from intervale.core.machine import free_ram
from intervale.model.adapt import ADAPTER, CHECKPOINTS, TRAINED, load_trained, save_trained, verify_checkpoint, write_manifest

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")


class Stateful(Protocol):
    """An optimizer, as far as a checkpoint sees it: tensors by parameter and name."""

    state: Any


@dataclass(frozen=True)
class Progress:
    """Where a run is: optimizer steps done, samples and target tokens seen, seconds spent."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint holds, whole: everything that learns by name, and the moments of each. `live`: the next step changes them."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    live: bool = False

    def copied(self) -> Tensors:
        """Copies that the next step leaves alone: on the GPU where it has room (a millisecond; the way to the CPU is then the writer's),
        else in the CPU's memory, else these."""
        everything = [*self.weights.values(), *(value for entries in self.moments.values() for value in entries.values())]
        size = sum(tensor.nbytes for tensor in everything)
        if free_ram() < 2 * size:  # as much again to spare, here and there
            return self
        gpu = next((tensor.device for tensor in everything if tensor.is_cuda), None)
        stays = gpu is not None and torch.cuda.mem_get_info(gpu)[0] > 2 * size

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().clone() if stays else tensor.detach().to("cpu", copy=True)

        weights = {name: copy(tensor) for name, tensor in self.weights.items()}
        return Tensors(weights, {name: {key: copy(value) for key, value in own.items()} for name, own in self.moments.items()})


def trainable(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter that learns, by name, in a fixed order."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def moments_by_name(named: dict[str, torch.nn.Parameter], optimizer: Stateful) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state of each parameter."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in named.items():
        entries = optimizer.state.get(parameter, {})
        assert entries.keys() <= set(MOMENTS), f"unknown optimizer state {entries.keys()}"
        found[name] = {key: torch.as_tensor(value) for key, value in entries.items()}
    return found


def save_checkpoint(
    run: Path,
    network: torch.nn.Module,
    optimizer: Stateful,
    progress: Progress,
    identity: dict[str, Any],
    keep: int,
    tensors: Tensors | None = None,
    spared: str | None = None,
) -> Path:
    """Write checkpoint `progress.step`, then drop all but the newest `keep` (-1: keep all) and the one named `spared`.

    `tensors`: what was gathered where the network holds parts only. Raises: UserError on a full disk.
    """
    folder = run / CHECKPOINTS / f"step-{progress.step:08d}"
    if tensors is None:
        named = trainable(network)
        tensors = Tensors(dict(named), moments_by_name(named, optimizer))
    need_space(folder, 3 * sum(tensor.nbytes for tensor in tensors.weights.values()))
    if folder.is_dir():
        if not verify_checkpoint(folder):
            _rotate(folder, keep, spared)  # a kill may have come between the save and this
            return folder
        shutil.rmtree(folder)  # damaged; what is written now takes its place
    with staged_folder(folder) as aside:
        save_trained(aside, network, identity["base"], tensors.weights)
        moments = {
            f"{key}.{name}": value.detach().cpu().contiguous()
            for name, entries in tensors.moments.items()
            for key, value in entries.items()
        }
        save_file(moments, aside / OPTIMIZER)
        write_json(aside / STATE, asdict(progress) | {"identity": identity})
        write_manifest(aside, progress.step)
    _rotate(folder, keep, spared)
    return folder


def _rotate(newest: Path, keep: int, spared: str | None = None) -> None:
    """Keep the newest `keep` up to the one just written, and `spared`. Later ones were found damaged by the resume that led here."""
    if keep < 0:
        return
    names = sorted(path.name for path in newest.parent.glob("step-*"))
    kept = [name for name in names if name <= newest.name][-keep:]
    for name in names:
        if name not in kept and name != spared:
            shutil.rmtree(newest.parent / name)


def choose_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that verifies, what was skipped and why)."""
    skipped: list[str] = []
    for folder in sorted((run / CHECKPOINTS).glob("step-*"), key=lambda path: path.name, reverse=True):
        fault = verify_checkpoint(folder)
        if not fault:
            return folder, skipped
        skipped.append(f"{folder.name}: {fault}")
    return None, skipped


def restore(folder: Path, network: torch.nn.Module, optimizer: Stateful) -> Progress:
    """Put a checkpoint's weights and optimizer state into a network that is prepared for training the same way.

    Raises: UserError when a tensor does not fit; then the network is not to be used.
    """
    progress = restore_weights(folder, network)
    put_moments(trainable(network), optimizer, stored_moments(folder, network))
    return progress


def restore_weights(folder: Path, network: torch.nn.Module) -> Progress:
    """`restore` without the optimizer."""
    if (folder / TRAINED).is_file():
        load_trained(network, folder / TRAINED)
    parameters = dict(network.named_parameters())
    for name, tensor in (load_file(folder / ADAPTER) if (folder / ADAPTER).is_file() else {}).items():
        own = name.removeprefix("base_model.model.").replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        with torch.no_grad():
            _fitting(folder, own, parameters.get(own), tensor).copy_(tensor)
    state = read_object(folder / STATE, "step", "samples", "tokens", "seconds")
    return Progress(state["step"], state["samples"], state["tokens"], state["seconds"])


def stored_moments(folder: Path, network: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The moments of everything that learns, by name; the network must still be whole. Raises: UserError when one does not fit."""
    moments = load_file(folder / OPTIMIZER)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in trainable(network).items():
        found[name] = {key: moments[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in moments}
        for key in found[name].keys() - {"step"}:
            _fitting(folder, name, parameter, found[name][key])
    return found


def put_moments(named: dict[str, torch.nn.Parameter], optimizer: Stateful, stored: dict[str, dict[str, torch.Tensor]]) -> None:
    """Stored moments into an optimizer, on each parameter's device; those of another optimizer's kind are left out."""
    used = getattr(optimizer, "moments_of", lambda parameter: MOMENTS)
    for name, parameter in named.items():
        if entries := {key: value for key, value in stored.get(name, {}).items() if key in used(parameter)}:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in entries.items()}


def _fitting(folder: Path, name: str, own: torch.Tensor | None, stored: torch.Tensor) -> torch.Tensor:
    if own is None or own.shape != stored.shape:
        here = "not in this network" if own is None else f"{list(own.shape)} here"
        raise UserError(
            f"{folder}: {name} is {list(stored.shape)} there and {here}", "undo the change of model, lora or what learns, or use --fresh"
        )
    return own
