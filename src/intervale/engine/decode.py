"""Prefill, next tokens and scores of one prompt: the few primitives that answers are made of (`engine.batch`: of several).

Greedy decoding gives the tokens of transformers' own `generate`. A prompt's keys and values are computed once and serve every
continuation that is scored after it. Legend: S positions, V vocabulary, T tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from intervale.engine.api import RefusedError, Sampling
from intervale.model.forward import embed, normalise, picture_features, tower_features
from intervale.model.load import Model

_TILES_AT_ONCE = 8  # a tower pass over 8 tiles of 448 pixels keeps about 0.3 GiB alive in float32


@dataclass(frozen=True)
class Prefilled:
    """A prompt in the network: its cache, its length, and the logits that follow it."""

    cache: DynamicCache
    length: int
    logits_V: torch.Tensor


@torch.inference_mode()
def encode_tiles(model: Model, tiles_PHWC: np.ndarray) -> torch.Tensor:
    """(tiles, tokens a tile, width): the tiles' features, a few tiles at a time."""
    dtype = model.network.dtype
    parts = []
    for chunk in torch.tensor(tiles_PHWC).split(_TILES_AT_ONCE):
        parts.append(picture_features(model.network, normalise(chunk.to(model.device), dtype)))
    return torch.cat(parts)


@torch.inference_mode()
def tower_tiles(model: Model, tiles_PHWC: np.ndarray) -> torch.Tensor:
    """(tiles, tokens a tile, tower width x shuffle): what `projected` makes `encode_tiles` of, bit by bit."""
    chunks = torch.tensor(tiles_PHWC).split(_TILES_AT_ONCE)
    return torch.cat([tower_features(model.network, normalise(chunk.to(model.device), model.network.dtype)) for chunk in chunks])


@torch.inference_mode()
def projected(model: Model, tower: torch.Tensor) -> torch.Tensor:
    """The features that the language model sees, of the tower's."""
    return torch.cat([model.network.model.multi_modal_projector(part) for part in tower.split(_TILES_AT_ONCE)])


def context_of(model: Model) -> int:
    """How many tokens a prompt and its answer may have together."""
    return int(model.network.config.text_config.max_position_embeddings)


def rotary_turn(model: Model) -> int | None:
    """The length beyond which a pass computes its rotary embedding with other frequencies (Phi3's longrope), or None: there is none.

    Keys of a pass up to it and keys of a pass beyond it do not go together. (InternLM2's dynamic one turns at the end of the context.)
    """
    rope = getattr(model.network.config.text_config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def refuse_long(model: Model, tokens: int) -> None:
    """Raise a UserError when a prompt of that many tokens leaves no room for an answer in the model's context."""
    if tokens >= context_of(model):
        raise RefusedError(
            f"the prompt has {tokens} tokens; the model's context is {context_of(model)}",
            "shorten the text, use fewer or smaller pictures, or lower the tiles",
            "context_length_exceeded",
        )


@torch.inference_mode()
def prefill(model: Model, ids_S: np.ndarray, features: torch.Tensor | None, past: DynamicCache | None = None) -> Prefilled:
    """Run a prompt through the network once. Raises: UserError when it is longer than the model's context.

    `past` holds the keys and values of what stands before `ids_S`; it grows. `features` are those of the pictures in `ids_S`.
    """
    cache = DynamicCache() if past is None else past  # an empty one is false
    length = cache.get_seq_length() + len(ids_S)
    refuse_long(model, length)
    ids_BS = torch.from_numpy(ids_S)[None].to(model.device)
    embedded = embed(model.network, ids_BS, features, model.network.config.image_token_id)
    hidden = model.network.model.language_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).last_hidden_state
    return Prefilled(cache, length, model.network.lm_head(hidden[0, -1]).float())


@torch.inference_mode()
def _advance(model: Model, cache: DynamicCache, ids: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) after each of `ids`, which extend the cache."""
    ids_BS = torch.tensor([list(ids)], device=model.device)
    hidden = model.network.model.language_model(
        inputs_embeds=model.network.get_input_embeddings()(ids_BS), past_key_values=cache, use_cache=True
    ).last_hidden_state
    return model.network.lm_head(hidden[0]).float()


_COLDEST = 1e-4  # below it the softmax is the argmax in float32, and the division would overflow


def _chooser(sampling: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.temperature > _COLDEST:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def generate(model: Model, start: Prefilled, sampling: Sampling, heard: Callable[[int, torch.Tensor], None] | None = None) -> Iterator[int]:
    """The answer's token ids, one at a time, a stop token last if it comes within `max_new_tokens`.

    The cache grows with them. The same seed gives the same answer. `heard` is told each token and the logits (V) it was chosen by.
    """
    warpers = _chooser(sampling)
    generator = torch.Generator(device=model.device)
    if sampling.seed is not None:
        generator.manual_seed(sampling.seed)
    else:
        generator.seed()
    stops = set(model.stop_ids)
    room = context_of(model) - start.length
    logits_V = start.logits_V
    for made in range(1, min(sampling.max_new_tokens, room) + 1):
        if sampling.temperature <= _COLDEST:
            token = int(logits_V.argmax())
        else:
            weights = torch.softmax(warpers(None, logits_V[None]), -1)
            token = int(torch.multinomial(weights[0], 1, generator=generator))
        if heard is not None:
            heard(token, logits_V)
        yield token
        if token in stops:
            return
        if made < min(sampling.max_new_tokens, room):
            logits_V = _advance(model, start.cache, [token])[-1]


def score_continuations(model: Model, start: Prefilled, continuations: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every token of every continuation, each directly after the prompt; the cache is left as it was."""
    scored = []
    first_V = torch.log_softmax(start.logits_V, -1)
    for ids in continuations:
        assert ids, "a continuation has at least one token"
        values = [float(first_V[ids[0]])]
        if len(ids) > 1:
            logits_TV = torch.log_softmax(_advance(model, start.cache, ids[:-1]), -1)
            values += [float(logits_TV[at, token]) for at, token in enumerate(ids[1:])]
            start.cache.crop(1 - len(ids))  # negative: take that many away
        scored.append(values)
    return scored
