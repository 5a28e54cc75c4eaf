"""Parameters, gradients and optimizer state in parts on several processes: torch's FSDP2, or DeepSpeed's ZeRO-1, 2 and 3.

Promises: the step of `train.strategy`; whole tensors in checkpoints. A frozen tower (and a frozen projector) stays whole on every
process: it is small beside the language model, and pictures need not be alike on all of them. Cost: every process first reads the
whole model, to the CPU. Both engines need every process to make as many passes: those without work make one of weight 0.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.model.forward import picture_features
from intervale.train.batches import Batch
from intervale.train.optimizer import Optimizers, make_optimizer
from intervale.train.parallel import BUCKET, World
from intervale.train.prepare import keeps_gradient
from intervale.train.recipe import TrainRecipe
from intervale.train.state import MOMENTS, Tensors, trainable
from intervale.train.step import Losses, batch_losses

_OLDEST = (0, 18, 3)  # of DeepSpeed's versions


class StepModule(torch.nn.Module):
    """A micro-batch's losses as one module, which is what the engines wrap.

    A pass without pictures sends a blank tile through what sees and adds 0 of it to the text: the engines exchange gradients in the
    order in which they come, for every parameter or none, so a pass must look alike on all processes.
    """

    def __init__(self, network: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.network = network
        self._sees = any(parameter.requires_grad for part in _eyes(network) for parameter in part.parameters())

    def forward(self, batch: Batch, compute: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of every target, is it the most likely token)."""
        if batch.slots or not self._sees:
            return batch_losses(self.network, batch, compute)
        edge = self.network.config.vision_config.image_size[0]
        with compute.autocast():
            blank = picture_features(self.network, torch.zeros(1, 3, edge, edge, device=batch.ids_1T.device, dtype=compute.dtype))

        def add(module: torch.nn.Module, given: Any, embedded: torch.Tensor) -> torch.Tensor:
            return embedded + 0.0 * blank.sum().to(embedded.dtype)

        handle = self.network.get_input_embeddings().register_forward_hook(add)
        try:
            return batch_losses(self.network, batch, compute)
        finally:
            handle.remove()


def _eyes(network: InternVLForConditionalGeneration) -> list[torch.nn.Module]:
    return [network.model.vision_tower, network.model.multi_modal_projector]


def set_apart(network: InternVLForConditionalGeneration, device: torch.device) -> None:
    """Move frozen tower and projector to the device and out of the module tree's sight, so that no engine takes them apart."""
    core: Any = network.model
    for name in ("vision_tower", "multi_modal_projector"):
        part = getattr(core, name)
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.to(device).eval()
            del core._modules[name]
            core.__dict__[name] = part


class Fsdp:
    """torch's fully_shard (FSDP2): a layer's parameters are whole only while it computes."""

    uniform = True

    def __init__(self, network: InternVLForConditionalGeneration, recipe: TrainRecipe, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        self._module = StepModule(network)
        for module in (*network.model.language_model.layers, self._module):  # a learning tower is whole while a pass goes on
            fully_shard(module, mesh=mesh)
        for buffer in network.buffers():
            buffer.data = buffer.data.to(world.device)
        self._network, self.world = network, world
        self.optimizer = make_optimizer(network, recipe)

    def losses(self, plain: Losses, batch: Batch, compute: Any, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Through the sharded module."""
        found: tuple[torch.Tensor, torch.Tensor] = self._module(batch, compute)
        return found

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Gradients are averaged and dealt out layer by layer on the way; the loss has its divisor already, so they must add up."""
        (loss * self.world.size).backward()

    def clip(self, most: float) -> float:
        """Over all shards."""
        norm: Any = torch.nn.utils.clip_grad_norm_(list(trainable(self._network).values()), most or math.inf)
        return float(norm.full_tensor())

    def step(self) -> None:
        """Each process its shards."""
        self.optimizer.step()

    def tensors(self) -> Tensors:
        """Gathered one after another; what the first does not write, the others do not keep."""
        self._module.reshard()  # type: ignore[operator]  # a pass without gradients leaves the outermost parameters whole
        named = trainable(self._network)
        first = self.world.first
        weights = {name: _whole(parameter, first) for name, parameter in named.items()}
        moments = {
            name: {key: _whole(torch.as_tensor(value), first) for key, value in self.optimizer.state.get(parameter, {}).items()}
            for name, parameter in named.items()
        }
        return Tensors(weights, moments)

    def restore_moments(self, stored: dict[str, dict[str, torch.Tensor]]) -> None:
        """Each process keeps its shards."""
        from torch.distributed.tensor import distribute_tensor

        for name, parameter in trainable(self._network).items():
            own: Any = parameter
            self.optimizer.state[parameter] = {
                key: value if value.dim() == 0 else distribute_tensor(value.to(self.world.device), own.device_mesh, own.placements)
                for key, value in stored.get(name, {}).items()
            }


def _whole(tensor: torch.Tensor, keep: bool) -> torch.Tensor:
    """Every process must ask; nothing where the answer is not kept."""
    gather = getattr(tensor.detach(), "full_tensor", None)
    whole: torch.Tensor = gather() if gather else tensor.detach()
    if not keep:
        return torch.empty(0)
    return whole.to("cpu", copy=True)  # what was not gathered is the parameter itself, and the next step changes it


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What DeepSpeed prints goes to stderr, where everything goes that is no result; its notes stay out."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def need_deepspeed() -> Any:
    """The package. Raises: UserError with the extra's name when it is not installed, or older than the extra asks for: before 0.18.3 ZeRO-2
    forgets all passes of a step but the last where its caller tells which that is."""
    try:
        with _quiet():
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"parallel.strategy is deepspeed, which cannot be loaded: {error}", "pip install 'intervale[deepspeed]', or use fsdp or ddp"
        ) from error
    if _numbers(deepspeed.__version__) < _OLDEST:
        raise UserError(
            f"parallel.strategy is deepspeed, but DeepSpeed {deepspeed.__version__} may leave gradients out",
            "pip install 'intervale[deepspeed]' (0.18.3 or newer), or use fsdp or ddp",
        )
    return deepspeed


def zero_settings(recipe: TrainRecipe, device: torch.device, version: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Gradients are sent beside the way back where that is right: before 0.19.3 ZeRO-1 and 2 sent what was not
    all written yet (DeepSpeed's issue 8061), with compiled layers above all."""
    stage = recipe.parallel.zero_stage
    sound = stage == 3 or _numbers(version) >= (0, 19, 3)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop tells which pass is a step's last
        "gradient_clipping": recipe.train.max_norm,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": device.type == "cuda" and sound,
            "reduce_bucket_size": BUCKET,  # by default all gradients of LoRA go into one, at the end of the way back
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }


def _spare_the_host(optimizer: Any, device: torch.device) -> None:
    """Two things that DeepSpeed's ZeRO-1 and 2 do after a step's last pass, parameter by parameter, while the GPUs wait for the host: the
    norm (3 kernels a parameter) is made of all at once here, and the parameters, which are views of one buffer, are not made such views again."""

    def norm(gradients: Iterable[torch.Tensor], parameters: object, norm_type: float = 2.0) -> torch.Tensor:
        """As get_grad_norm_direct, over all processes; but inf or nan, not -1, of which older versions make 1, and step, where it is no number."""
        own = [gradient.detach() for gradient in gradients]
        assert norm_type == 2.0
        squares = torch.nn.utils.get_total_norm(own).square() if own else torch.zeros((), device=device)
        dist.all_reduce(squares)
        return squares.sqrt()

    for name, ours in (("get_grad_norm_direct", norm), ("_update_model_bit16_weights", lambda group: None)):
        if hasattr(optimizer, name):  # of a version that calls it otherwise
            setattr(optimizer, name, ours)


class Zero:
    """DeepSpeed's ZeRO: optimizer state (1), gradients too (2), parameters too (3) in parts.

    With 1 and 2 every process holds whole parameters, so all passes of a step but the last are made beside the engine, and gradients are
    sent once a step instead of once a pass (where they are small: see `keeps_gradient`). ZeRO-2 sends what the last pass reaches, so every
    pass must reach the same parameters, as `StepModule`'s do.
    """

    uniform = True

    def __init__(self, network: InternVLForConditionalGeneration, recipe: TrainRecipe, world: World, spare: Batch, compute: Any) -> None:
        deepspeed = need_deepspeed()
        self._network, self.world, self._spare, self._compute = network, world, spare, compute
        self.optimizer: Optimizers = make_optimizer(network, recipe)
        self._inner = self.optimizer.only()
        for parameter in network.parameters():
            if not parameter.requires_grad:
                # DeepSpeed's word for what each process has as its own. All have read the same files, so nothing need be sent; and of what
                # is part of a larger matrix nothing can be.
                parameter.ds_optim_param = True
        settings, stage = zero_settings(recipe, world.device, deepspeed.__version__), recipe.parallel.zero_stage
        with _quiet():
            self._module = StepModule(network.to(world.device))
            self._engine: Any = deepspeed.initialize(model=self._module, optimizer=self._inner, config=settings)[0]
        self._names = {parameter: name for name, parameter in trainable(network).items()}
        self._keeps = keeps_gradient(sum(parameter.numel() for parameter in self._names), stage)
        if stage < 3:
            _spare_the_host(self._engine.optimizer, world.device)

    def losses(self, plain: Losses, batch: Batch, compute: Any, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Through the engine, or beside it."""
        passing = self._engine if last or not self._keeps else self._module
        found: tuple[torch.Tensor, torch.Tensor] = passing(batch, compute)
        return found

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """DeepSpeed divides by the number of processes: undone here, because the loss has its divisor already."""
        loss = loss * self.world.size
        if self._keeps and not last:
            self._keep(loss)
            return
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def _keep(self, loss: torch.Tensor) -> None:
        """Add this pass's gradients where the last pass will find them, without the engine's hooks hearing of it."""
        parameters = list(self._names)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:  # copied: what autograd gives for one parameter may be another's too, or lie transposed
                parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
            else:
                parameter.grad.add_(gradient)

    def clip(self, most: float) -> float:
        """Clips and steps in one; where the norm is no number DeepSpeed leaves the step out."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return math.inf if norm is None else float(norm)

    def step(self) -> None:
        """Done by `clip`."""

    def tensors(self) -> Tensors:
        """Gathered one after another."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        steps = [state["step"] for state in self._inner.state.values() if "step" in state]
        weights, moments = {}, {}
        for parameter, name in self._names.items():
            weights[name] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
            moments[name] = {key: safe_get_full_optimizer_state(parameter, key).detach().cpu().clone() for key in MOMENTS[:2]}
            moments[name]["step"] = torch.as_tensor(steps[0]).detach().float().cpu().clone()
        return Tensors(weights, moments)

    def restore_moments(self, stored: dict[str, dict[str, torch.Tensor]]) -> None:
        """DeepSpeed makes its state at the first step: one of rate 0 on no gradient, and then the state is filled in."""
        from deepspeed.utils import safe_set_full_optimizer_state

        losses_N, _ = self.losses(batch_losses, self._spare.to(self.world.device), self._compute, True)
        self.backward(losses_N.sum() * 0.0, True)
        for group in self._inner.param_groups:
            group["lr"] = 0.0
        self.clip(0.0)
        self._link()
        for parameter, name in self._names.items():
            for key in MOMENTS[:2]:
                if key in stored.get(name, {}):
                    safe_set_full_optimizer_state(parameter, stored[name][key].to(self.world.device), key)
        made = next((float(entry["step"]) for entry in stored.values() if "step" in entry), 0.0)
        for state in self._inner.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), made)

    def _link(self) -> None:
        """Show DeepSpeed where its moments are: ZeRO-1 and 2 look after the first group's first step, when the others have none yet."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        inner = self._engine.optimizer
        groups = getattr(inner, "single_partition_of_fp32_groups", None)
        for parameters, flat in zip(inner.bit16_groups, groups, strict=True) if groups else ():
            lazy_init_hp_params_optimizer_state(parameters, flat, inner.optimizer.state)
