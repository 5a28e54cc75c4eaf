"""The optimizers of a run behind one face: AdamW, or Muon for the matrices with AdamW for the rest.

Promises: weight decay on matrices only; one learning rate, given at every step, for all; the state is kept by parameter, as
checkpoints store it. Cost: AdamW one fused pass over two moments; Muon one moment and 15 small products a matrix.
"""

from __future__ import annotations

from typing import Any

import torch

from intervale.train.recipe import TrainRecipe
from intervale.train.state import trainable

# What Muon is not for (Jordan et al., 2024): tables that are looked up, the output layer; vectors and kernels are not 2-D anyway.
_NOT_MATRICES = ("embed_tokens", "lm_head", "position_embedding", "cls_token")


class Optimizers:
    """Several optimizers on different parameters, stepped together; with one it is that one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self.state: Any = parts[0].state
        for part in parts[1:]:
            part.state = parts[0].state  # one table by parameter: no parameter is in two parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """One step of every part."""
        for part in self._parts:
            part.step()


def make_optimizer(network: torch.nn.Module, recipe: TrainRecipe) -> Optimizers:
    """What the recipe asks for, at learning rate 0: the loop sets it. Norms, biases and layer scales do not decay."""
    named = trainable(network)
    muon = [p for name, p in named.items() if recipe.train.optimizer == "muon" and _is_matrix(name, p)]
    ours = {id(p) for p in muon}
    decayed = [p for p in named.values() if p.dim() >= 2 and id(p) not in ours]
    plain = [p for p in named.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recipe.train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    first, second = recipe.train.betas
    parts: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        parts.append(torch.optim.AdamW(groups, lr=0.0, betas=(first, second), fused=True))
    if muon:
        # The scale of AdamW's steps (Liu et al., 2025, "Muon is scalable for LLM training"), so that one rate serves both.
        parts.append(torch.optim.Muon(muon, lr=0.0, weight_decay=recipe.train.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return Optimizers(*parts)


def _is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 2 and not any(part in name for part in _NOT_MATRICES)
