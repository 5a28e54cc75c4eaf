"""Randomly initialised official-format folders: for tests, benchmarks and pre-training.

Promises: deterministic in the seed (each tensor draws from a generator of its own, so a preset's tensors do not depend on
their order), complete (a tokenizer that works comes with it), and loadable like any other checkpoint.
Sources of the shapes: the published config.json of OpenGVLab/InternVL2-1B and -2B. Cost: the draw and one write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend

from intervale.core.errors import UserError, nearest
from intervale.core.files import need_space, staged_folder
from intervale.model import families, layout
from intervale.model.source import NO_IMAGE_TOKEN, build_network
from intervale.model.tokenizer import INTERNLM2_SPECIALS, VISION_SPECIALS, byte_level, from_sentencepiece

_VIT_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448}
_INTERNLM2_1_8B = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "bias": False, "rope_theta": 1000000,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_QWEN2_0_5B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "use_sliding_window": False,
}  # fmt: skip


def _internlm2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return _INTERNLM2_1_8B | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}


def _vit(hidden: int, layers: int, heads: int, image_size: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "image_size": image_size}


# name -> (vision, language, template, max tiles, context, stored type, vocabulary or None: the tokenizer's own size)
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any], str, int, int, str, int | None]] = {
    "tiny": (_vit(64, 2, 2, 56), _internlm2(64, 128, 2, 4, 2), "internlm2-chat", 4, 2048, "float32", None),
    "nano": (_vit(192, 8, 3, 112), _internlm2(256, 512, 4, 4, 2), "internlm2-chat", 6, 4096, "float32", None),
    "internvl2-1b": (_VIT_300M, _QWEN2_0_5B, "Hermes-2", 12, 32768, "bfloat16", 151655),
    "internvl2-2b": (_VIT_300M, _INTERNLM2_1_8B, "internlm2-chat", 12, 32768, "bfloat16", 92553),
}


def _specials(arch: str, size: int | None) -> dict[int, str]:
    """The control tokens at the family's ids; without a fixed size, right after 3 + 256 byte tokens."""
    if arch == "Qwen2ForCausalLM":
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_SPECIALS]
        return dict(enumerate(names, 151643))
    names = [*INTERNLM2_SPECIALS.values(), *VISION_SPECIALS]
    start = 3 + 256 if size is None else size - len(names)
    return {0: "<unk>", 1: "<s>", 2: "</s>", **dict(enumerate(names, start))}


def _tokenizer(preset: str, given: Path | None) -> Backend:
    _, llm, _, _, _, _, size = PRESETS[preset]
    if given is None:
        specials = _specials(llm["architectures"][0], size)
        return byte_level(size or max(specials) + 1, specials)
    if not given.is_file():
        raise UserError(f"{given}: no such tokenizer file", "give a tokenizer.model or a tokenizer.json")
    if given.suffix == ".model":
        backend = from_sentencepiece(given)
    else:
        try:
            backend = Backend.from_file(str(given))
        except Exception as error:
            raise UserError(f"{given}: not a tokenizer.json: {error}", "give a tokenizer.model or a tokenizer.json") from error
    have = backend.get_vocab_size(with_added_tokens=True)
    if size is not None and have > size:
        raise UserError(f"{given}: {have} tokens, but {preset} has room for {size}", "use the tokenizer of this family")
    for token in ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"):
        if backend.token_to_id(token) is None:
            raise UserError(f"{given}: no {token} in the vocabulary", "use an InternVL tokenizer")
    return backend


def preset_config(preset: str, vocabulary: int) -> dict[str, Any]:
    """The official config.json of a preset."""
    vision, llm, template, tiles, context, dtype, _ = PRESETS[preset]
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"],
        "llm_config": llm
        | {"vocab_size": vocabulary, "max_position_embeddings": context, "tie_word_embeddings": False, "torch_dtype": dtype},
        "max_dynamic_patch": tiles,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "num_channels": 3,
            "patch_size": 14,
            "qk_normalization": False,
            "qkv_bias": True,
            "torch_dtype": dtype,
            **vision,
        },
    }


def _draw(name: str, shape: tuple[int, ...], seed: int, layers: int) -> torch.Tensor:
    """One native tensor: norms 1, biases 0, layer scale 1, the rest normal with a variance that keeps activations at one size.

    Matrices that write into the residual stream are scaled down by the depth (GPT-2), so that a fresh model trains.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    deviation = 0.02 if "embed" in name and "projection" not in name else 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith(("o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight")):
        deviation /= math.sqrt(2 * layers)
    return torch.empty(shape).normal_(0, deviation, generator=generator)


def init_model(dst: Path, preset: str, tokenizer: Path | None = None, seed: int = 0) -> int:
    """Write a randomly initialised official folder; returns its number of parameters.

    Raises: UserError for an unknown preset, a tokenizer that does not fit, or a `dst` that holds something.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}", f"use one of {', '.join(PRESETS)}")
    dtype = getattr(torch, PRESETS[preset][5])
    backend = _tokenizer(preset, tokenizer)
    vocabulary = PRESETS[preset][6] or backend.get_vocab_size(with_added_tokens=True)
    official = preset_config(preset, vocabulary)
    _arch, backbone = families.backbone_of(official, preset)
    config = families.native_config(official, NO_IMAGE_TOKEN, preset)
    shapes = {name: tuple(tensor.shape) for name, tensor in build_network(config).state_dict().items()}
    count = sum(math.prod(shape) for shape in shapes.values())
    need_space(dst, count * dtype.itemsize)
    heads = families.heads_of(config)
    depth = {"model.vision_tower": config.vision_config.num_hidden_layers}
    with staged_folder(dst) as folder:

        def drawn(move: layout.Move) -> torch.Tensor:
            layers = depth.get(move.natives[0][:18], config.text_config.num_hidden_layers)
            return layout.join(move, [_draw(name, shapes[name], seed, layers).to(dtype) for name in move.natives], heads)

        moves = layout.plan_moves(shapes, backbone.style)
        # Each tensor has a generator of its own, so threads may draw them in any order; drawing lets go of Python's lock.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            tensors = dict(zip((move.official for move in moves), pool.map(drawn, moves), strict=True))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_text_files(folder, official, backend, tokenizer)
    return count


def _write_text_files(folder: Path, official: dict[str, Any], backend: Backend, tokenizer: Path | None) -> None:
    (folder / "config.json").write_text(json.dumps(official, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    backend.save(str(folder / "tokenizer.json"))
    if tokenizer is not None and tokenizer.suffix == ".model":
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    internlm2 = backend.token_to_id("<s>") is not None
    end = "</s>" if internlm2 else "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": internlm2, "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"bos_token": "<s>"} if internlm2 else {}), indent=2) + "\n", encoding="utf-8"
    )
    stops = [backend.token_to_id(token) for token in ("<|im_end|>", "<|im_start|>", end)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}, indent=2) + "\n", encoding="utf-8")
