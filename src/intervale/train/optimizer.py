"""The optimizers of a run behind one face: AdamW, or Muon for the matrices with AdamW for the rest.

Promises: weight decay on matrices only; one learning rate, given at every step, for all; the state is kept by parameter, as
checkpoints store it. Cost: AdamW one fused pass over two moments; Muon one moment and 15 products for all matrices of a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from intervale.train.recipe import TrainRecipe
from intervale.train.state import trainable

# What Muon is not for (Jordan et al., 2024): tables that are looked up, the output layer; vectors and kernels are not 2-D anyway.
_NOT_MATRICES = ("embed_tokens", "lm_head", "position_embedding", "cls_token")


# Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/: five steps of this quintic bring singular values near 1.
_QUINTIC, _ROUNDS = (3.4445, -4.7750, 2.0315), 5


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's step (Nesterov momentum, the update made orthogonal, the length of AdamW's steps), matrices of one shape
    together: one by one, nano's 78 took 77 ms a step on an H100 (tests hold it to torch's)."""

    def __init__(self, params: Sequence[torch.Tensor], weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in shapes.items():
                # Liu et al. (2025), "Muon is scalable for LLM training": with this factor AdamW's rate serves both.
                self._step_alike(parameters, group, group["lr"] * 0.2 * max(shape) ** 0.5)

    def _step_alike(self, parameters: list[torch.Tensor], group: dict[str, Any], rate: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=-rate)


def orthogonal(matrices_NRC: torch.Tensor) -> torch.Tensor:
    """Each matrix with its singular values brought near 1 (Newton and Schulz's iteration), on a GPU in bfloat16."""
    first, second, third = _QUINTIC
    wide_NRC = matrices_NRC.bfloat16() if matrices_NRC.is_cuda else matrices_NRC.float()  # few CPUs multiply bfloat16 faster
    tall = wide_NRC.shape[1] > wide_NRC.shape[2]
    if tall:
        wide_NRC = wide_NRC.mT
    wide_NRC = wide_NRC / wide_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram_NRR = wide_NRC @ wide_NRC.mT
        change_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=second, alpha=third)
        wide_NRC = torch.baddbmm(wide_NRC, change_NRR, wide_NRC, beta=first)
    return wide_NRC.mT if tall else wide_NRC


class Optimizers:
    """Several optimizers on different parameters, stepped together; with one it is that one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self.state: Any = parts[0].state
        for part in parts[1:]:
            part.state = parts[0].state  # one table by parameter: no parameter is in two parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._by_muon = {id(p) for part in parts if isinstance(part, Muon) for group in part.param_groups for p in group["params"]}

    def moments_of(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        """The names of what is kept for a parameter: another optimizer's moments in a checkpoint are nothing to this one."""
        return ("momentum_buffer",) if id(parameter) in self._by_muon else ("exp_avg", "exp_avg_sq", "step")

    def only(self) -> torch.optim.Optimizer:
        """The one optimizer behind this face, for an engine that takes one."""
        (part,) = self._parts
        return part

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
        parts.append(Muon(muon, recipe.train.weight_decay))
    return Optimizers(*parts)


def _is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 2 and not any(part in name for part in _NOT_MATRICES)
