"""A base in 4 bits under LoRA (QLoRA), through bitsandbytes: about a quarter of bfloat16's memory for the language model's layers.

Promises: only the frozen matrices of the layers are quantised (NF4 with double quantisation, Dettmers et al. 2023); embeddings, output
layer, norms, tower and projector stay as they are. What is learned is merged into the full-precision base at export, never into
the rounded one. Cost: a pass over the matrices when loading, one dequantisation a matrix and pass.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError

BYTES_A_WEIGHT = 0.5 + (1 + 4 / 256) / 64  # 4 bits; an 8-bit scale for 64 of them; a float for 256 scales


def need_bitsandbytes() -> Any:
    """The package. Raises: UserError with the extra's name when it is not installed or does not load."""
    try:
        with _quiet():
            import bitsandbytes
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"lora.quantize needs bitsandbytes, which cannot be loaded: {error}",
            "pip install 'intervale[quantize]', or leave lora.quantize out",
        ) from error
    return bitsandbytes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its notes on kernels that would be faster on a CPU."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def is_quantised_later(name: str) -> bool:
    """Is this parameter, by its native name, one that `quantize_layers` makes small?"""
    return ".language_model.layers." in f".{name}" and name.endswith(".weight") and ".lora_" not in name and "norm" not in name


def quantize_layers(network: InternVLForConditionalGeneration, dtype: torch.dtype, device: torch.device) -> int:
    """Replace the layers' linear modules by 4-bit ones, in place, and move everything to the device; returns how many.

    The network should lie on the CPU: then no more than one matrix is ever on the device in full. Call it before LoRA is attached.
    """
    bitsandbytes = need_bitsandbytes()
    count = 0
    for name, module in list(network.named_modules()):
        if not isinstance(module, torch.nn.Linear) or not is_quantised_later(f"{name}.weight"):
            continue
        small = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        weight = module.weight.detach().to("cpu")
        small.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        if module.bias is not None:
            small.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, small.to(device))
        count += 1
    network.to(device)
    network.is_loaded_in_4bit = True  # PEFT looks here for which LoRA layer fits
    return count
