"""Set a network up for a recipe: what learns, in which precision, with which optimizer; and what that will cost."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.core.machine import free_ram
from intervale.model.adapt import PARTS, attach_lora
from intervale.model.attention import use_packed_attention
from intervale.model.decoder import Adapter
from intervale.model.quantize import BYTES_A_WEIGHT, is_quantised_later
from intervale.train.recipe import TrainRecipe
from intervale.train.state import trainable

GIB = 1 << 30
_GRADIENT_BYTES, _MOMENT_BYTES = 4, 4 + 4  # a parameter's, in float32
_WHOLE_GRADIENT = 2 * GIB
_LAYERS = "model.language_model.layers."
# Activations a layer keeps for the backward pass, in units of (tokens x hidden): measured shapes of a pre-norm block with a
# gated MLP of ratio 4 (inputs of 2 norms, q k v, attention output, 3 MLP activations of 4 x hidden); with checkpointing, one.
_KEPT_PER_LAYER, _KEPT_CHECKPOINTED = 18, 1
# PEFT's LoRA keeps its own float32 inputs beside them (measured: 28 GiB at 4 x 1,550 tokens, InternVL2-2B, LoRA 128, H100); the fused
# layers keep bfloat16 ones, of which most are there anyway.
_KEPT_WITH_LORA, _KEPT_WITH_FUSED_LORA = 38, 21
# What a run must still have to do for a compiled step to pay: compiling takes 16 seconds, twice where packs come
# in groups of several shapes, and saves 0.3 of a step (an H100 and its machine).
_WORTH_COMPILING_S, _GPU_FLOPS = 90.0, 3e14


@dataclass(frozen=True)
class Cost:
    """Parameters and bytes of a training step, estimated before it runs."""

    parameters: int
    trainable: int
    weights: int
    layers: int  # of them the language model's layers
    optimizer: int
    kept: float  # bytes of activations a token
    recomputed: float  # the same with checkpointing

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: what learns and its two moments, in float32."""
        return 3 * 4 * self.trainable


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """The compute type: 'auto' is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def freeze_and_adapt(network: InternVLForConditionalGeneration, recipe: TrainRecipe) -> None:
    """Mark what learns and attach LoRA. What learns is float32 (the optimizer's master copy); the rest keeps its type.

    The fresh LoRA matrices depend on the recipe's seed alone.
    """
    network.requires_grad_(False)
    use_packed_attention(network)
    if targets := recipe.lora_targets():
        torch.manual_seed(recipe.train.seed)
        attach_lora(network, recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout, targets)
    for part, setting in (("vision", recipe.train.vision), ("projector", recipe.train.projector), ("llm", recipe.train.llm)):
        for name, parameter in network.named_parameters():
            if ".lora_" not in name and name.startswith(PARTS[part]):
                parameter.requires_grad_(setting == "full")
                if setting == "full":
                    parameter.data = parameter.data.float()
    assert trainable(network), "the recipe's own check guarantees that something learns"


def set_modes(network: InternVLForConditionalGeneration, recipe: TrainRecipe, training: bool) -> None:
    """Dropout and checkpointing on for training; a frozen tower stays in eval mode."""
    network.train(training)
    if recipe.train.vision == "frozen":
        network.model.vision_tower.eval()


def draws_masks(part: torch.nn.Module) -> bool:
    """Does dropout (LoRA's or its own) make this part see the same thing differently each time?"""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 and module.training for module in part.modules())


def estimate(network: InternVLForConditionalGeneration, recipe: TrainRecipe, dtype: torch.dtype, fused: bool = False) -> Cost:
    """Bytes of weights and optimizer, and of activations a token; `fused`: LoRA by our kernels."""
    small = recipe.lora.quantize != "none"
    # Quantised already (two weights a byte), or only planned to be: the same count.
    counts = {name: p.numel() * (2 if p.dtype == torch.uint8 else 1) for name, p in network.named_parameters()}
    learns = set(trainable(network))
    learning = sum(counts[name] for name in learns)

    def each_of(name: str) -> float:
        if small and is_quantised_later(name):
            return BYTES_A_WEIGHT
        return 4 if name in learns else dtype.itemsize

    weights, layers = (
        int(sum(count * each_of(name) for name, count in counts.items() if name.startswith(beginning))) for beginning in ("", _LAYERS)
    )
    optimizer = learning * (_GRADIENT_BYTES + _MOMENT_BYTES)
    with_lora = _KEPT_WITH_FUSED_LORA if fused else _KEPT_WITH_LORA
    units = with_lora if recipe.train.llm == "lora" else _KEPT_PER_LAYER
    kept, recomputed = (_activations(network, recipe, number) * dtype.itemsize for number in (units, _KEPT_CHECKPOINTED))
    return Cost(sum(counts.values()), learning, weights, layers, optimizer, kept, recomputed)


def keeps_gradient(trainable: int, stage: int) -> bool:
    """Does a process of ZeRO-1 or 2 add a step's gradient up whole, to send it once? As long as it is LoRA's size: ZeRO-2 is for those
    that are too large for that."""
    return stage < 3 and trainable * _GRADIENT_BYTES <= _WHOLE_GRADIENT


def of_each(cost: Cost, recipe: TrainRecipe, processes: int) -> Cost:
    """What one of several processes holds. FSDP and ZeRO-3 deal out layers, gradients and moments, ZeRO-2 moments and gradients (where
    they are large), ZeRO-1 moments; DeepSpeed also deals out a second copy of what learns."""
    strategy = recipe.parallel.strategy
    stage = {"fsdp": 3, "deepspeed": recipe.parallel.zero_stage}.get(strategy, 0) if processes > 1 else 0
    if not stage:
        return cost
    parts = processes if stage > 1 and not keeps_gradient(cost.trainable, stage) else 1
    copy, gradients = 4 if strategy == "deepspeed" else 0, _GRADIENT_BYTES / parts
    optimizer = cost.trainable * ((_MOMENT_BYTES + copy) / processes + gradients)
    layers = cost.layers // processes if stage == 3 else cost.layers
    return replace(cost, weights=cost.weights - cost.layers + layers, layers=layers, optimizer=int(optimizer))


def _activations(network: InternVLForConditionalGeneration, recipe: TrainRecipe, units: int) -> float:
    """Numbers kept a token: the language model's, and the tower's where it learns."""
    text, vision = network.config.text_config, network.config.vision_config
    numbers = float(text.hidden_size * text.num_hidden_layers * units)
    if recipe.train.vision != "frozen":
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2 + 1
        numbers += patches * vision.hidden_size * vision.num_hidden_layers * units / network.config.image_seq_length
    return numbers


def free_memory(device: torch.device) -> int:
    """Bytes free on the device (for the CPU: what this process may take of the machine's)."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_ram()


def used_memory(device: torch.device) -> float:
    """GiB at the peak so far: on the GPU what torch held, on the CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def recompute_tower(network: InternVLForConditionalGeneration, recipe: TrainRecipe) -> None:
    """Gradient checkpointing for a vision tower that learns; the language model's layers are recomputed where they are walked."""
    if recipe.train.vision != "frozen":
        tower = network.model.vision_tower
        # transformers 5.23 renamed it; 5.17 knows the old name only.
        enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def fused_lora(network: InternVLForConditionalGeneration, recipe: TrainRecipe) -> Adapter | None:
    """LoRA by our kernels where the device has them (CUDA with Triton, bfloat16) and the recipe does not forbid it."""
    if recipe.train.fused_lora == "off" or not can_fuse(network.device):
        return None
    from intervale.model.fast_lora import make_fast

    return make_fast(network, network.model.language_model)


def can_fuse(device: torch.device) -> bool:
    """Can Triton's kernels run on the device? (Triton compiles what starts them.)"""
    if device.type != "cuda" or find_spec("triton") is None or not has_compiler(device):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def has_compiler(device: torch.device) -> bool:
    """Is there the compiler that torch.compile needs: beside a GPU one of C, for a CPU one of C++?"""
    named, known = ("CC", ("cc", "gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    return bool(os.environ.get(named)) or any(shutil.which(name) for name in known)


def need_compiler(recipe: TrainRecipe, device: torch.device) -> None:
    """Raise a UserError when layers shall be compiled and nothing is there to do it."""
    if recipe.train.compile == "on" and not has_compiler(device):
        kind = "C compiler (gcc)" if device.type == "cuda" else "C++ compiler (g++)"
        raise UserError(f"train.compile is on, but this machine has no {kind}", "install one, or set train.compile to auto or off")


def worth_compiling(recipe: TrainRecipe, device: torch.device, parameters: int, tokens: int) -> bool:
    """Are the layers compiled? 'auto': on a GPU with Triton and a C compiler, when `tokens` more are enough work to win back the time."""
    if recipe.train.compile != "auto":
        return recipe.train.compile == "on"
    seconds = 4 * parameters * tokens / _GPU_FLOPS  # forward, and backward without the frozen weights' gradients
    return can_fuse(device) and seconds > _WORTH_COMPILING_S
