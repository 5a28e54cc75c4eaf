"""The table of InternVL families: text backbones, and config.json in both directions.

Promises: an unsupported setting is refused by name, never ignored. The defaults are those of the official configuration
classes (a key missing in config.json means the class's default, which is often not the common value).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from intervale.core.errors import UserError, nearest
from intervale.model.layout import Heads


@dataclass(frozen=True)
class Backbone:
    """A text model: its native architecture, its names in the checkpoint, and the linear layers LoRA tunes."""

    native: str
    style: str  # a key of layout.RENAMES
    template: str  # when config.json names none
    linears: tuple[str, ...]


_LLAMA_LINEARS = tuple(f"self_attn.{p}_proj" for p in "qkvo") + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
_PHI3_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
BACKBONES = {
    "InternLM2ForCausalLM": Backbone("LlamaForCausalLM", "internlm2", "internlm2-chat", _LLAMA_LINEARS),
    "LlamaForCausalLM": Backbone("LlamaForCausalLM", "same", "Hermes-2", _LLAMA_LINEARS),
    "Qwen2ForCausalLM": Backbone("Qwen2ForCausalLM", "same", "Hermes-2", _LLAMA_LINEARS),
    "Qwen3ForCausalLM": Backbone("Qwen3ForCausalLM", "same", "internvl2_5", _LLAMA_LINEARS),
    "Phi3ForCausalLM": Backbone("Phi3ForCausalLM", "same", "phi3-chat", _PHI3_LINEARS),
}
_NATIVE_TYPES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_REQUIRED_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")


def backbone_of(official: dict[str, Any], where: str) -> tuple[str, Backbone]:
    """(architecture, Backbone) of an official config. Raises: UserError for one that is not in the table."""
    llm = official.get("llm_config")
    architectures = llm.get("architectures") if isinstance(llm, dict) else None
    if not isinstance(architectures, list) or not architectures:
        raise UserError(f"{where}: no llm_config.architectures", "use the config.json of an InternVL chat model")
    name = str(architectures[0])
    if name not in BACKBONES:
        raise UserError(
            f"{where}: the text backbone {name} is not supported{nearest(name, BACKBONES)}", f"supported: {', '.join(BACKBONES)}"
        )
    return name, BACKBONES[name]


def refuse_unsupported(official: dict[str, Any], where: str) -> None:
    """Raise a UserError for settings that the native model would silently compute otherwise."""
    version = official.get("ps_version", "v1")
    if version != "v2":
        raise UserError(
            f"{where}: ps_version is {version!r}; only 'v2' is supported",
            "use InternVL 1.5 or newer (1.1 and 1.2 shuffle pixels otherwise)",
        )
    if official.get("pad2square"):
        raise UserError(f"{where}: pad2square is set, which is not supported", "use a model that tiles its pictures")
    for key in ("force_image_size", "min_dynamic_patch", "max_dynamic_patch"):
        value = official.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{where}: {key} is {value!r}", "it must be a positive whole number; take config.json from the model's source")
    vision = official.get("vision_config") or {}
    if vision.get("qk_normalization", True) and vision.get("layer_norm_eps", 1e-6) != 1e-6:
        raise UserError(
            f"{where}: vision_config.layer_norm_eps is {vision['layer_norm_eps']} with qk_normalization, which the native tower computes with 1e-6",
            "only towers with layer_norm_eps 1e-6 (all published ones) can be loaded with qk_normalization",
        )
    for key in ("use_backbone_lora", "use_llm_lora"):
        if official.get(key):
            raise UserError(
                f"{where}: {key} is set: the checkpoint still carries LoRA weights", "merge them first (InternVL's tools/merge_lora.py)"
            )


def _need(config: Any, keys: tuple[str, ...], where: str, section: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise UserError(f"{where}: no {section}", "use the config.json of an InternVL chat model")
    for key in keys:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(
                f"{where}: {section}.{key} is {value!r}", "it must be a positive whole number; take config.json from the model's source"
            )
    return config


def _rope(llm: dict[str, Any], default_theta: float, arch: str) -> dict[str, Any]:
    """rope_theta and rope_scaling {'type', ...} as transformers 5's rope_parameters."""
    given = llm.get("rope_parameters")
    if isinstance(given, dict):
        return dict(given)
    rope: dict[str, Any] = {"rope_theta": float(llm.get("rope_theta", default_theta)), "rope_type": "default"}
    scaling = llm.get("rope_scaling")
    if isinstance(scaling, dict):
        rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        rope |= {"rope_type": "longrope" if kind == "su" else kind, **rest}
        if arch == "Phi3ForCausalLM" and kind == "yarn":
            # What the official Phi3 code calls yarn has longrope's frequencies and yarn's attention factor.
            stretch = llm["max_position_embeddings"] / llm.get("original_max_position_embeddings", 4096)
            rope |= {"rope_type": "longrope", "attention_factor": 0.1 * math.log(stretch) + 1.0 if stretch > 1 else 1.0}
    return rope


def text_config(llm: dict[str, Any], arch: str) -> Any:
    """The native text configuration of an official `llm_config`."""
    common: dict[str, Any] = {key: llm[key] for key in _REQUIRED}
    common |= {
        "num_key_value_heads": llm.get("num_key_value_heads") or llm["num_attention_heads"],
        "hidden_act": llm.get("hidden_act", "silu"),
        "rms_norm_eps": llm.get("rms_norm_eps", 1e-5 if arch == "Phi3ForCausalLM" else 1e-6),
        "initializer_range": llm.get("initializer_range", 0.02),
        "rope_parameters": _rope(llm, 10000.0, arch),
        "tie_word_embeddings": bool(llm.get("tie_word_embeddings", False)),
        "attention_dropout": llm.get("attention_dropout", 0.0),
        "architectures": [BACKBONES[arch].native],
        **{key: llm.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if arch == "InternLM2ForCausalLM":  # its class's default for `bias` is True; the published 2B and 8B say false
        return LlamaConfig(attention_bias=bool(llm.get("bias", True)), mlp_bias=False, **common)
    if arch == "LlamaForCausalLM":
        bias = {key: bool(llm.get(key, False)) for key in ("attention_bias", "mlp_bias")}
        return LlamaConfig(head_dim=llm.get("head_dim"), **bias, **common)
    window = {"sliding_window": llm.get("sliding_window")}
    if arch == "Phi3ForCausalLM":
        if window["sliding_window"] is not None:
            window["sliding_window"] += 1  # the official mask keeps the token itself and W before it, the native one W in all
        drops = {key: llm.get(key, 0.0) for key in ("resid_pdrop", "embd_pdrop")}
        return Phi3Config(original_max_position_embeddings=llm.get("original_max_position_embeddings", 4096), **drops, **window, **common)
    window |= {"use_sliding_window": bool(llm.get("use_sliding_window", False)), "max_window_layers": llm.get("max_window_layers", 28)}
    if arch == "Qwen3ForCausalLM":
        return Qwen3Config(head_dim=llm.get("head_dim", 128), attention_bias=bool(llm.get("attention_bias", False)), **window, **common)
    return Qwen2Config(**window, **common)


def vision_config(vision: dict[str, Any]) -> InternVLVisionConfig:
    """The native vision configuration; the official class's defaults are those of the 6B tower."""
    return InternVLVisionConfig(
        **{key: vision[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        attention_bias=bool(vision.get("qkv_bias", False)),
        use_qk_norm=bool(vision.get("qk_normalization", True)),
        norm_type=vision.get("norm_type", "rms_norm"),
        hidden_act=vision.get("hidden_act", "gelu"),
        hidden_dropout_prob=vision.get("dropout", 0.0),
        projection_dropout=vision.get("dropout", 0.0),
        attention_dropout=vision.get("attention_dropout", 0.0),
        initializer_range=vision.get("initializer_range", 0.02),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        layer_scale_init_value=vision.get("initializer_factor", 0.1),
        image_size=[vision["image_size"]] * 2,
        patch_size=[vision["patch_size"]] * 2,
        num_channels=vision.get("num_channels", 3),
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # no final norm, as in the official tower
    )


def native_config(official: dict[str, Any], image_token_id: int, where: str) -> InternVLConfig:
    """transformers' configuration for an official config.json. Raises: UserError for what cannot be represented."""
    refuse_unsupported(official, where)
    arch, backbone = backbone_of(official, where)
    llm = _need(official["llm_config"], _REQUIRED, where, "llm_config")
    vision = _need(official.get("vision_config"), _REQUIRED_VISION, where, "vision_config")
    return InternVLConfig(
        vision_config=vision_config(vision),
        text_config=text_config(llm, arch),
        image_token_id=image_token_id,
        image_seq_length=tokens_per_tile(official),
        downsample_ratio=official.get("downsample_ratio", 0.5),
        projector_hidden_act="gelu",
        vision_feature_layer=official.get("select_layer", -1),
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(llm.get("tie_word_embeddings", False)),  # the class's default is True
        architectures=["InternVLForConditionalGeneration"],
        template=official.get("template") or backbone.template,
        **tiling_keys(official),
    )


def tiling_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The tiling settings of a config.json, with the official defaults; kept by name in the native format too."""
    return {
        "force_image_size": config.get("force_image_size") or config["vision_config"]["image_size"],
        "min_dynamic_patch": config.get("min_dynamic_patch", 1),
        "max_dynamic_patch": config.get("max_dynamic_patch", 6),
        "dynamic_image_size": bool(config.get("dynamic_image_size", False)),
        "use_thumbnail": bool(config.get("use_thumbnail", False)),
    }


def tokens_per_tile(official: dict[str, Any]) -> int:
    """(tile / patch)^2 * ratio^2: 256 for 448 pixels, 14 pixels a patch, ratio 0.5."""
    vision = official["vision_config"]
    edge = (official.get("force_image_size") or vision["image_size"]) // vision["patch_size"]
    return int(edge**2 * official.get("downsample_ratio", 0.5) ** 2)


def heads_of(config: InternVLConfig) -> Heads:
    """The attention shape of the language model."""
    text = config.text_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Heads(text.num_attention_heads, text.num_key_value_heads, dim)


def native_backbone(config: dict[str, Any], where: str) -> str:
    """The official architecture a native config.json corresponds to by its text model's type."""
    kind = (config.get("text_config") or {}).get("model_type", "")
    if kind not in _NATIVE_TYPES:
        raise UserError(f"{where}: text_config.model_type {kind!r} is not supported", f"supported: {', '.join(_NATIVE_TYPES)}")
    return _NATIVE_TYPES[kind]


def official_config(config: InternVLConfig, arch: str, dtype: str) -> dict[str, Any]:
    """An official config.json for a native folder that never had one (InternVL 2.5 and newer, by others)."""
    text, vision = config.text_config.to_dict(), config.vision_config
    rope = dict(text.pop("rope_parameters", None) or {})
    text["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    text["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if arch == "Phi3ForCausalLM":  # the reverse of text_config's three rules
        if kind == "longrope":
            name = "yarn" if "attention_factor" in rope else "su"
            text["rope_scaling"] = {"type": name, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
            text["original_max_position_embeddings"] = rope.get(
                "original_max_position_embeddings", text["original_max_position_embeddings"]
            )
        if text.get("sliding_window") is not None:
            text["sliding_window"] -= 1
    text |= {"architectures": [arch], "torch_dtype": dtype}
    own = {key: getattr(config, key, None) for key in ("force_image_size", "min_dynamic_patch", "max_dynamic_patch", "template")}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": own["force_image_size"] or vision.image_size[0],
        "llm_config": text,
        "max_dynamic_patch": own["max_dynamic_patch"] or 12,
        "min_dynamic_patch": own["min_dynamic_patch"] or 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": config.vision_feature_layer,
        "template": own["template"] or "internvl2_5",
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **{key: getattr(vision, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
            **{
                key: getattr(vision, key) for key in ("attention_dropout", "hidden_act", "initializer_range", "layer_norm_eps", "norm_type")
            },
            "dropout": vision.hidden_dropout_prob,
            "drop_path_rate": 0.0,
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "num_channels": vision.num_channels,
            "initializer_factor": vision.layer_scale_init_value,
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
            "torch_dtype": dtype,
        },
    }
