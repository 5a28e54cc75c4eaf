"""A run and the model it stands on, from one copy of the weights: the tuned side is the base with its changes switched on.

Promises: each side computes exactly what it would when loaded alone. LoRA is switched by a flag a layer, tensors that were
trained whole by exchanging the storage, so only those exist twice. A switch takes microseconds; whoever shares the network
between threads must not switch while another computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from intervale.core.errors import UserError
from intervale.core.files import read_object
from intervale.model.adapt import BASE, PARTS, TRAINED, adapted_network, base_folder, checkpoint_of, trained_tiles
from intervale.model.load import Model, load_model, narrow, resolve_model
from intervale.model.source import fingerprint


@dataclass(frozen=True)
class Pair:
    """Two models on one network. `switch(True)` makes it compute as the tuned one. `same_eyes`: pictures look the same to both."""

    tuned: Model
    base: Model
    switch: Callable[[bool], None]
    same_eyes: bool


def load_pair(
    run: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    max_tiles: int | None = None,
) -> Pair:
    """The pair of a training run or checkpoint; `base` names its base model where that has moved.

    Raises: UserError when `run` is a plain model, or `base` is not the model it was trained on.
    """
    folder = resolve_model(run)
    checkpoint = checkpoint_of(folder)
    if checkpoint is None:
        raise UserError(f"{run}: a plain model, not a training run or checkpoint", "serve it alone, or beside another with --base")
    if base is None:
        below = base_folder(folder)
    else:
        below = resolve_model(base)
        if fingerprint(below) != read_object(checkpoint / BASE, "fingerprint")["fingerprint"]:
            raise UserError(f"{run}: it was not trained on {base}", "name the model it was trained on, or leave it out")
    plain = load_model(below, dtype=dtype, device=device, max_tiles=max_tiles)
    own = dict(plain.network.named_parameters())
    names = _stored_names(checkpoint / TRAINED)
    before = {name: own[name].detach().clone() for name in names if name in own}
    adapted_network(plain.network, folder)
    after = {name: own[name].detach() for name in before}
    layers = {name: module for name, module in plain.network.named_modules() if isinstance(module, LoraLayer)}
    tiling = narrow(narrow(plain.tiling, *trained_tiles(folder)), None, max_tiles)
    tuned = replace(plain, tiling=tiling, name=str(run), folder=folder)
    state = [True]

    def switch(to_tuned: bool) -> None:
        if state[0] == to_tuned:
            return
        for layer in layers.values():
            layer._disable_adapters = not to_tuned  # `enable_adapters` would also make the adapter trainable again
        for name, value in (after if to_tuned else before).items():
            own[name].data = value
        state[0] = to_tuned

    seeing = (PARTS["vision"], PARTS["projector"])
    return Pair(tuned, replace(plain, name=str(base or below)), switch, not any(name.startswith(seeing) for name in [*before, *layers]))


def _stored_names(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with safe_open(path, "pt") as stored:
        return list(stored.keys())
