"""Several prompts in the network at once: prefill, greedy answers and scores, row by row what `engine.decode` gives for one.

Promises: a row's numbers are those of its own, unpadded computation up to float rounding. Prompts are padded on the left, so
that every answer continues at the right edge; continuations are padded on the right, where causality hides the padding. Cost: a
padded position costs what a real one does, so rows should be about equally long; rows that ended leave the batch at once.
Legend: B rows, S positions (prompts and what followed), T tokens of a continuation, D width, V vocabulary, N real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import DynamicCache

from intervale.engine.decode import context_of, refuse_long
from intervale.model.forward import embed
from intervale.model.load import Model

_SCORED_AT_ONCE = 256  # rows of logits: 95 MB of float32 with a vocabulary of 92,553


@dataclass(frozen=True)
class PrefilledBatch:
    """Prompts in the network: their cache, which of its positions are real (None: all), their lengths, the logits that follow."""

    cache: DynamicCache
    mask_BS: torch.Tensor | None
    lengths: tuple[int, ...]
    logits_BV: torch.Tensor


@torch.inference_mode()
def prefill_batch(model: Model, prompts: Sequence[np.ndarray], features: Sequence[torch.Tensor | None]) -> PrefilledBatch:
    """Run prompts (ids int64 each) with their pictures' features through the network once.

    Raises: UserError when one is longer than the model's context.
    """
    lengths = tuple(len(ids_S) for ids_S in prompts)
    for length in lengths:
        refuse_long(model, length)
    widest = max(lengths)
    picture = model.network.config.image_token_id
    ids_BS = np.full((len(prompts), widest), 0 if picture else 1, np.int64)  # padding is anything but a picture's token
    for row, ids_S in enumerate(prompts):
        ids_BS[row, widest - len(ids_S) :] = ids_S
    places_S, starts_B1 = torch.arange(widest), widest - torch.tensor(lengths)[:, None]
    positions_BS = (places_S - starts_B1).clamp(min=0).to(model.device)
    real_BS = (places_S >= starts_B1).to(model.device)
    pictures = [part for part in features if part is not None]
    embedded_BSD = embed(
        model.network, torch.from_numpy(ids_BS).to(model.device), torch.cat(pictures) if pictures else None, picture
    ).masked_fill(~real_BS.unsqueeze(-1), 0)  # zeros stay finite in every layer; 0 x inf in the attention would spoil real rows
    mask_BS = None if min(lengths) == widest else real_BS.long()
    cache = DynamicCache()
    hidden_BSD = _hidden(model, cache, embedded_BSD, positions_BS, mask_BS)
    return PrefilledBatch(cache, mask_BS, lengths, model.network.lm_head(hidden_BSD[:, -1]).float())


def _hidden(
    model: Model, cache: DynamicCache, embedded_BSD: torch.Tensor, positions_BS: torch.Tensor, mask_BS: torch.Tensor | None
) -> torch.Tensor:
    """The last hidden state of what is embedded, which extends the cache. `mask_BS` covers the cache and this."""
    return model.network.model.language_model(
        inputs_embeds=embedded_BSD, attention_mask=mask_BS, position_ids=positions_BS, past_key_values=cache, use_cache=True
    ).last_hidden_state


def _longer(mask_BS: torch.Tensor | None, more: int) -> torch.Tensor | None:
    """The mask with `more` real positions at its right."""
    return None if mask_BS is None else torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), more)], 1)


@torch.inference_mode()
def generate_batch(model: Model, start: PrefilledBatch, max_new_tokens: int) -> list[list[int]]:
    """Each prompt's greedy answer, a stop token last if it comes within `max_new_tokens` and the context. Uses the cache up."""
    stops = set(model.stop_ids)
    room = [min(max_new_tokens, context_of(model) - length) for length in start.lengths]
    answers: list[list[int]] = [[] for _ in start.lengths]
    rows = [row for row, left in enumerate(room) if left > 0]  # the answers that the rows of the tensors belong to
    logits_BV, mask_BS = start.logits_BV, start.mask_BS
    while rows:
        tokens = logits_BV.argmax(-1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            answers[row].append(token)
        going = [at for at, row in enumerate(rows) if tokens[at] not in stops and len(answers[row]) < room[row]]
        if len(going) < len(rows):
            # At once: the next step copies the whole cache anyway, and a row at the end of the context has no next position.
            rows = [rows[at] for at in going]
            if not rows:
                break
            kept = torch.tensor(going, device=model.device)
            start.cache.batch_select_indices(kept)
            mask_BS = None if mask_BS is None else mask_BS[kept]
        ids_B1 = torch.tensor([answers[row][-1:] for row in rows], device=model.device)
        positions_B1 = torch.tensor([[start.lengths[row] + len(answers[row]) - 1] for row in rows], device=model.device)
        mask_BS = _longer(mask_BS, 1)
        hidden_B1D = _hidden(model, start.cache, model.network.get_input_embeddings()(ids_B1), positions_B1, mask_BS)
        logits_BV = model.network.lm_head(hidden_B1D[:, -1]).float()
    return answers


@torch.inference_mode()
def score_batch(model: Model, start: PrefilledBatch, continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float]]]:
    """For each prompt, for each of its continuations: the log-probability of every token, directly after the prompt.

    One short pass a place in the lists; the cache is left as it was. Prompts may have different numbers of continuations.
    """
    assert len(continuations) == len(start.lengths)
    first_BV = torch.log_softmax(start.logits_BV, -1)
    scored: list[list[list[float]]] = [[] for _ in continuations]
    for place in range(max(map(len, continuations))):
        asked = [own[place] if place < len(own) else None for own in continuations]
        assert all(ids is None or ids for ids in asked), "a continuation has at least one token"
        rest = _score_rest(model, start, [[] if ids is None else list(ids) for ids in asked])
        rows = [row for row, ids in enumerate(asked) if ids]
        picked = first_BV[rows, [ids[0] for ids in asked if ids]].tolist()
        for row, value in zip(rows, picked, strict=True):
            scored[row].append([value, *rest[row]])
    return scored


def _score_rest(model: Model, start: PrefilledBatch, asked: Sequence[list[int]]) -> list[list[float]]:
    """The log-probabilities of all tokens but the first of a continuation a row; a row's may be empty."""
    known = [max(len(ids) - 1, 0) for ids in asked]  # tokens that have a follower
    widest = max(known)
    if widest == 0:
        return [[] for _ in asked]
    # Padding repeats the last token, at the last position that is real: never beyond the row's real positions, which a rotary embedding that
    # depends on the longest one would notice in every row.
    ids_BT = torch.tensor([[*ids[:-1], *[(ids or [0])[-1]] * (widest - n)] for ids, n in zip(asked, known, strict=True)])
    places_T, known_B1 = torch.arange(widest), torch.tensor(known)[:, None]
    positions_BT = torch.tensor(start.lengths)[:, None] + places_T.minimum((known_B1 - 1).clamp(min=0))
    embedded_BTD = model.network.get_input_embeddings()(ids_BT.to(model.device))
    hidden_BTD = _hidden(model, start.cache, embedded_BTD, positions_BT.to(model.device), _longer(start.mask_BS, widest))
    start.cache.crop(-widest)
    hidden_ND = hidden_BTD[(places_T < known_B1).to(model.device)]
    wanted_N = torch.tensor([token for ids in asked for token in ids[1:]], device=model.device)
    values: list[float] = []
    for hidden, wanted in zip(hidden_ND.split(_SCORED_AT_ONCE), wanted_N.split(_SCORED_AT_ONCE), strict=True):
        values += torch.log_softmax(model.network.lm_head(hidden).float(), -1).gather(1, wanted[:, None])[:, 0].tolist()
    left = iter(values)
    return [list(islice(left, count)) for count in known]
