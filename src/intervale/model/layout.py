"""Tensor names: official InternVLChatModel <-> transformers' InternVLForConditionalGeneration, total and strict.

One table (RENAMES) serves both directions. Three fused tensors are split or joined by pure reshapes, so a round trip is
equal byte for byte. Legend: H heads, K key/value heads, G = H/K heads a group, D head size.

Three name spaces: `official` (the checkpoint of OpenGVLab), `native` (transformers' module in memory), `disk` (how
transformers, LMDeploy and vLLM want the native format in its files).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from intervale.core.errors import UserError

_VIT, _PROJECTOR, _LLM = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
EMBEDDING, HEAD = _LLM + "embed_tokens.weight", "lm_head.weight"  # one tensor when the model is tied
_LAYER = "vision_model.encoder.layers.{n}."
_NATIVE_LAYER = _VIT + "encoder.layer.{n}."

# (official, native ...): {n} a layer number, {w} "weight" or "bias", {rest} anything. Several natives: the official one is fused.
_VISION: list[tuple[str, ...]] = [
    ("vision_model.embeddings.class_embedding", _VIT + "embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", _VIT + "embeddings.position_embeddings"),
    ("vision_model.embeddings.patch_embedding.{w}", _VIT + "embeddings.patch_embeddings.projection.{w}"),
    (_LAYER + "attn.qkv.{w}", *(_NATIVE_LAYER + f"attention.{p}_proj.{{w}}" for p in "qkv")),
    (_LAYER + "attn.proj.{w}", _NATIVE_LAYER + "attention.projection_layer.{w}"),
    (_LAYER + "attn.q_norm.{w}", _NATIVE_LAYER + "attention.q_norm.{w}"),
    (_LAYER + "attn.k_norm.{w}", _NATIVE_LAYER + "attention.k_norm.{w}"),
    (_LAYER + "norm1.{w}", _NATIVE_LAYER + "layernorm_before.{w}"),
    (_LAYER + "norm2.{w}", _NATIVE_LAYER + "layernorm_after.{w}"),
    (_LAYER + "ls1", _NATIVE_LAYER + "lambda_1"),
    (_LAYER + "ls2", _NATIVE_LAYER + "lambda_2"),
    (_LAYER + "mlp.{rest}", _NATIVE_LAYER + "mlp.{rest}"),
    ("mlp1.0.{w}", _PROJECTOR + "layer_norm.{w}"),
    ("mlp1.1.{w}", _PROJECTOR + "linear_1.{w}"),
    ("mlp1.3.{w}", _PROJECTOR + "linear_2.{w}"),
]
_INTERNLM2_LAYER, _NATIVE_LLM_LAYER = "language_model.model.layers.{n}.", _LLM + "layers.{n}."
_INTERNLM2: list[tuple[str, ...]] = [
    ("language_model.model.tok_embeddings.weight", _LLM + "embed_tokens.weight"),
    (_INTERNLM2_LAYER + "attention.wqkv.{w}", *(_NATIVE_LLM_LAYER + f"self_attn.{p}_proj.{{w}}" for p in "qkv")),
    (_INTERNLM2_LAYER + "attention.wo.{w}", _NATIVE_LLM_LAYER + "self_attn.o_proj.{w}"),
    (_INTERNLM2_LAYER + "feed_forward.w1.{w}", _NATIVE_LLM_LAYER + "mlp.gate_proj.{w}"),
    (_INTERNLM2_LAYER + "feed_forward.w3.{w}", _NATIVE_LLM_LAYER + "mlp.up_proj.{w}"),
    (_INTERNLM2_LAYER + "feed_forward.w2.{w}", _NATIVE_LLM_LAYER + "mlp.down_proj.{w}"),
    (_INTERNLM2_LAYER + "attention_norm.{w}", _NATIVE_LLM_LAYER + "input_layernorm.{w}"),
    (_INTERNLM2_LAYER + "ffn_norm.{w}", _NATIVE_LLM_LAYER + "post_attention_layernorm.{w}"),
    ("language_model.model.norm.weight", _LLM + "norm.weight"),
    ("language_model.output.weight", "lm_head.weight"),
]
_SAME_NAMES: list[tuple[str, ...]] = [
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("language_model.model.{rest}", _LLM + "{rest}"),
]
RENAMES = {"internlm2": _VISION + _INTERNLM2, "same": _VISION + _SAME_NAMES}

# native prefix -> disk prefix (what transformers' own save_pretrained writes, and the only names LMDeploy's TurboMind takes)
_DISK = [
    (_LLM, "language_model.model."),
    (_VIT, "vision_tower."),
    (_PROJECTOR, "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
]


@dataclass(frozen=True)
class Heads:
    """The shape of the language model's attention, for the fused wqkv."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Move:
    """One official tensor and the native ones it holds (three when it is fused)."""

    official: str
    natives: tuple[str, ...]

    @property
    def fused(self) -> str:
        """'' or 'vit' (q, k, v stacked) or 'wqkv' (InternLM2: a group of query heads, its key, its value, and so on)."""
        if len(self.natives) == 1:
            return ""
        return "vit" if self.official.startswith("vision_model.") else "wqkv"


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    for field, rule in (("n", r"(?P<n>\d+)"), ("w", r"(?P<w>weight|bias)"), ("rest", r"(?P<rest>.+)")):
        text = text.replace(re.escape("{" + field + "}"), rule, 1)
    return re.compile(text)


def plan_moves(native_names: Iterable[str], style: str) -> list[Move]:
    """The official tensor of every native name. `style`: 'internlm2' or 'same' (Qwen2, Llama, Phi3 keep their names).

    The table is ours and the names are the module's: a name without a rule is a bug, not the user's fault.
    """
    names = list(native_names)
    known = set(names)
    rules = [(_pattern(row[1]), row) for row in RENAMES[style]]
    moves: dict[str, Move] = {}
    covered: set[str] = set()
    for name in names:
        for pattern, row in rules:
            match = pattern.fullmatch(name)
            if match:
                fields = match.groupdict()
                natives = tuple(part.format(**fields) for part in row[1:])
                assert all(part in known for part in natives), f"{name} lacks its partners"
                official = row[0].format(**fields)
                assert official not in moves, f"two natives claim {official}"
                moves[official] = Move(official, natives)
                covered.update(natives)
                break
    left = known - covered
    assert not left, f"no rule for {sorted(left)[:5]}"
    return list(moves.values())


def official_shape(move: Move, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The official tensor's shape from its natives': fused tensors add up their rows."""
    parts = [shapes[name] for name in move.natives]
    return (sum(part[0] for part in parts), *parts[0][1:])


def split(move: Move, tensor: torch.Tensor, heads: Heads) -> dict[str, torch.Tensor]:
    """An official tensor as its native ones."""
    if not move.fused:
        return {move.natives[0]: tensor}
    if move.fused == "vit":
        parts = tensor.chunk(3, 0)
    else:
        group = heads.heads // heads.kv_heads
        rows = tensor.reshape(heads.kv_heads, group + 2, heads.head_dim, *tensor.shape[1:])
        parts = tuple(part.reshape(-1, *tensor.shape[1:]) for part in (rows[:, :group], rows[:, -2], rows[:, -1]))
    return {name: part.contiguous() for name, part in zip(move.natives, parts, strict=True)}


def join(move: Move, parts: list[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The exact inverse of `split`."""
    if not move.fused:
        return parts[0]
    if move.fused == "vit":
        return torch.cat(parts, 0)
    group, tail = heads.heads // heads.kv_heads, parts[0].shape[1:]
    query = parts[0].reshape(heads.kv_heads, group, heads.head_dim, *tail)
    key, value = (part.reshape(heads.kv_heads, 1, heads.head_dim, *tail) for part in parts[1:])
    return torch.cat([query, key, value], 1).reshape(-1, *tail)


def to_disk(native: str) -> str:
    """The native name as it stands in files."""
    for prefix, disk in _DISK:
        if native.startswith(prefix):
            return disk + native[len(prefix) :]
    raise AssertionError(f"no disk name for {native}")


def from_disk(name: str) -> str:
    """A name of a native-format file as the module has it; files may already use the module's names."""
    if name.startswith("model.") or name.startswith("lm_head."):
        return name
    for prefix, disk in _DISK:
        if name.startswith(disk):
            return prefix + name[len(disk) :]
    return name


def compare_names(where: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], optional: set[str]) -> None:
    """Raise a UserError naming every missing, unknown or misshapen tensor (the first five of each kind)."""
    missing = sorted(expected.keys() - found.keys() - optional)
    unknown = sorted(found.keys() - expected.keys())
    wrong = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    lines = []
    for kind, names in (("missing", missing), ("unknown", unknown), ("misshapen", wrong)):
        if names:
            told = [f"{name} {list(found[name])}, not {list(expected[name])}" if kind == "misshapen" else name for name in names[:5]]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{len(names)} {kind}: {', '.join(told)}{more}")
    if lines:
        raise UserError(
            f"{where}: the tensors do not fit config.json: {'; '.join(lines)}",
            "take config.json and all weight files from one complete source; nothing was written",
        )
