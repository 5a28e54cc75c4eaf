"""The language model's layers over a pack, as training walks them: compiled or not, recomputed or not, the last one only where it is read.

Promises: transformers' own layers with their own arithmetic; what is left out is what nobody reads: behind the last attention only
the tokens with a label go on, which saves most of a layer. Cost of `compiled`: some 16 seconds at the first step, once for all layers
and all lengths. Legend: T tokens of a pack, N tokens with a label, D width.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint
from transformers import InternVLForConditionalGeneration

from intervale.model.attention import NAME, Layout, packed_attention, preferred

_COMPILERS = 8  # processes; torch would start one a core, which takes longer than one layer's code
_LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class Adapter(Protocol):
    """LoRA layers with a training pass of their own (`model.fast_lora.FastLora`)."""

    def refresh(self) -> None:
        """Take over the parameters' values; after every change of them."""

    def draw(self) -> None:
        """Draw the dropout masks of a micro-batch."""

    def builds(self) -> list[Callable[[], None]]:
        """What builds its kernels ahead of the first pass, for the current GPU; it can be pickled."""


@dataclass(frozen=True)
class Walk:
    """How the layers are walked: compiled, recomputed on the way back (activations of one layer at a time), with fast LoRA layers.

    `whole`: each layer is called as one, the last too, for engines that gather a layer's parameters when it is called.
    """

    compiled: bool = False
    recompute: bool = False
    adapter: Adapter | None = None
    whole: bool = False


def _whole(layer: torch.nn.Module, hidden_1TD: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    if _splits(layer):
        return _mlp_part(layer, _attention_part(layer, hidden_1TD, options))
    return _called(layer, hidden_1TD, options)


def _called(layer: torch.nn.Module, hidden_1TD: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    seen: torch.Tensor = layer(hidden_1TD, attention_mask=None, past_key_values=None, use_cache=False, **options)
    return seen


def _attention_part(layer: Any, hidden_1TD: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    normed_1TD = layer.input_layernorm(hidden_1TD)
    if hasattr(layer.self_attn, "together") and torch.is_grad_enabled():
        return hidden_1TD + _attend_together(layer.self_attn, normed_1TD, options)
    seen, _ = layer.self_attn(hidden_states=normed_1TD, attention_mask=None, past_key_values=None, **options)
    together: torch.Tensor = hidden_1TD + seen
    return together


def _attend_together(attention: Any, normed_1TD: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """transformers' attention of Llama, Qwen2 and Qwen3 with query, key and value from one product."""
    heads = (*normed_1TD.shape[:-1], -1, attention.head_dim)
    query, key, value = (one.view(heads) for one in attention.together(normed_1TD))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = rotate(query, key, *options["position_embeddings"])
    extra = {} if getattr(attention, "sliding_window", None) is None else {"sliding_window": attention.sliding_window}
    dropout = attention.attention_dropout if attention.training else 0.0
    seen, _ = packed_attention(
        attention, query, key, value, None, layout=options["layout"], scaling=attention.scaling, dropout=dropout, **extra
    )
    out: torch.Tensor = attention.o_proj(seen.reshape(*normed_1TD.shape[:-1], -1))
    return out


def _mlp_part(layer: Any, hidden_ND: torch.Tensor) -> torch.Tensor:
    normed_ND, mlp = layer.post_attention_layernorm(hidden_ND), layer.mlp
    if hasattr(mlp, "together") and torch.is_grad_enabled():
        gate, up = mlp.together(normed_ND)
        seen: torch.Tensor = hidden_ND + mlp.down_proj(mlp.act_fn(gate) * up)
    else:
        seen = hidden_ND + mlp(normed_ND)
    return seen


def start_compilers() -> None:
    """Start the processes in which torch compiles kernels. Until they are there it compiles one after the other, in this one."""
    from torch._inductor.async_compile import AsyncCompile

    _few_compilers()
    AsyncCompile.warm_pool()
    AsyncCompile.wakeup()


def _few_compilers() -> None:
    """No more than are of use, and no more than the machine has cores or TORCHINDUCTOR_COMPILE_THREADS says, which torch has looked at."""
    inductor.compile_threads = min(_COMPILERS, inductor.compile_threads or 1)


@cache
def _compiled(part: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One compiled function for all layers and lengths."""
    _few_compilers()
    function: Callable[..., torch.Tensor] = torch.compile(part, dynamic=True)
    return function


def _splits(layer: torch.nn.Module) -> bool:
    """Is the layer the plain pre-norm block without dropout (Llama, Qwen2, Qwen3; Phi3)?"""
    dropouts = [getattr(layer, name, None) for name in ("resid_attn_dropout", "resid_mlp_dropout")]
    quiet = not any(getattr(one, "p", 0) for one in dropouts)
    return quiet and all(hasattr(layer, part) for part in _LAYER_PARTS)


@torch.no_grad()
def rotary_of(text: Any, embedded_1TD: torch.Tensor, positions_1T: torch.Tensor, layout: Layout) -> Any:
    """The rotary embedding's (cosine, sine). A dynamic one asks the device for the last position, and the host waits for all that it was
    given before; no position reaches a row's length, so what is no longer than the unscaled context needs no answer."""
    rotary = text.rotary_emb
    if getattr(rotary, "rope_type", None) == "dynamic":
        known = rotary.original_max_seq_len
        if rotary.max_seq_len_cached <= known and max(group.length for group in layout.groups) <= known:
            return inspect.unwrap(type(rotary).forward)(rotary, embedded_1TD, positions_1T)
    return rotary(embedded_1TD, position_ids=positions_1T)


def hidden_at_targets(
    network: InternVLForConditionalGeneration,
    embedded_1TD: torch.Tensor,
    positions_1T: torch.Tensor,
    layout: Layout,
    labelled_N: torch.Tensor,
    walk: Walk,
) -> torch.Tensor:
    """`hidden_ND` behind the last norm, at the tokens `labelled_N` (places in the pack) only.

    The language model must use packed attention (`model.attention.use_packed_attention`), or the rows would see each other.
    """
    text = network.model.language_model
    assert text.config._attn_implementation == NAME, "rows of a pack would see each other"
    rotary = rotary_of(text, embedded_1TD, positions_1T, layout)
    window = getattr(text.config, "sliding_window", None)
    options = {"position_embeddings": rotary, "layout": layout.single(window) or layout}
    *layers, last = text.layers[: text.config.num_hidden_layers]
    training = torch.is_grad_enabled()

    def run(function: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
        recompute = walk.recompute and training
        seen: torch.Tensor = checkpoint(function, *given, use_reentrant=False) if recompute else function(*given)
        return seen

    hidden_1TD = embedded_1TD
    compiled = walk.compiled and training
    plain = _called if walk.whole else _whole
    whole = _compiled(plain) if compiled else plain
    with preferred(embedded_1TD.device) if compiled else nullcontext():
        for layer in layers:
            hidden_1TD = run(whole, layer, hidden_1TD, options)
    if walk.whole or not _splits(last):
        return text.norm(run(plain, last, hidden_1TD, options)[0, labelled_N])
    hidden_ND = run(_attention_part, last, hidden_1TD, options)[0, labelled_N]
    return text.norm(_mlp_part(last, hidden_ND))
