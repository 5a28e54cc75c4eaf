"""Several prompts in the network at once: greedy answers and scores, prompt by prompt what `engine.decode` gives for one.

Prompts come in rows. Those of a row share what they have in common: its beginning (system text, pictures) goes through the network once,
and what they go on with (questions, the choices of a question, answers) stands behind it in the same row, each token once, seeing
only what is on its own way (`engine.tree`). Promises: the numbers are those of each prompt alone, up to float rounding.

Cost: one pass over the rows' beginnings, padded on the left to the longest; one over what follows, padded on the right (none when
nothing follows); decoding adds a pass a token, with one position a living answer. A padded position costs what a real one does, so
rows should be about equally long; answers that ended take no further part.
Legend: B rows, W positions of the padded trunks, N nodes behind them (node 0: the trunk's end), T positions of a pass, K keys, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from intervale.engine.decode import context_of, refuse_long
from intervale.engine.tree import Prompt, Seen, Tree, common_length
from intervale.model.forward import embed
from intervale.model.load import Model

_SCORED_AT_ONCE = 256  # rows of logits: 95 MB of float32 with a vocabulary of 92,553
_NEAR = 32  # trunks that differ by no more are cut alike: a few more nodes instead of padding and its mask

Mask = torch.Tensor | dict[str, torch.Tensor] | None


@dataclass(frozen=True)
class _Planted:
    """Rows in the network: what each node gave and may see, and where every prompt ends."""

    cache: DynamicCache
    positions_BK: torch.Tensor  # of every key
    nodes_BND: torch.Tensor  # last hidden states
    seen_BNK: torch.Tensor
    trees: list[Tree]
    ends: list[tuple[int, int]]  # (row, node) of each prompt's last token, the rows' prompts one after another
    lengths: list[int]


def _hidden(model: Model, cache: DynamicCache, embedded_BTD: torch.Tensor, positions_BT: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The last hidden state of what is embedded, which extends the cache."""
    return model.network.model.language_model(
        inputs_embeds=embedded_BTD, attention_mask=mask, position_ids=positions_BT, past_key_values=cache, use_cache=True
    ).last_hidden_state


def _mask(model: Model, seen_BTK: torch.Tensor, positions_BT: torch.Tensor, positions_BK: torch.Tensor) -> Mask:
    """What may be seen as the network takes it, less what a sliding window hides: that counts positions, not places in the row."""
    config = model.network.config.text_config
    window = getattr(config, "sliding_window", None)
    if window is None:
        return seen_BTK[:, None]
    near_BTK = seen_BTK & (positions_BT[:, :, None] - positions_BK[:, None, :] < window)
    kinds = getattr(config, "layer_types", None)  # Qwen's layers differ, Phi3's do not
    return near_BTK[:, None] if kinds is None else {"full_attention": seen_BTK[:, None], "sliding_attention": near_BTK[:, None]}


def _embedded(model: Model, seen: Seen, numbers: np.ndarray) -> torch.Tensor:
    ids, features = seen.embedded_as(numbers)
    return embed(model.network, torch.from_numpy(ids).to(model.device), features, model.network.config.image_token_id)


def _trunks(model: Model, seen: Seen, starts: Sequence[np.ndarray]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cache, which of its places are real (B, W), their positions (B, W), the hidden state of each row's last (B, 1, D))."""
    lengths, widest = [len(numbers) for numbers in starts], max(map(len, starts))
    padding = 0 if model.network.config.image_token_id else 1  # anything but a picture's token
    numbers_BW = np.full((len(starts), widest), padding, np.int64)
    for row, numbers in enumerate(starts):
        numbers_BW[row, widest - len(numbers) :] = numbers
    places_W, begin_B1 = torch.arange(widest), widest - torch.tensor(lengths)[:, None]
    positions_BW = (places_W - begin_B1).clamp(min=0).to(model.device)
    real_BW = (places_W >= begin_B1).to(model.device)
    # Zeros stay finite in every layer; 0 x inf in the attention would spoil real rows.
    embedded_BWD = _embedded(model, seen, numbers_BW).masked_fill(~real_BW.unsqueeze(-1), 0)
    cache = DynamicCache()
    mask = None if min(lengths) == widest else real_BW.long()
    return cache, real_BW, positions_BW, _hidden(model, cache, embedded_BWD, positions_BW, mask)[:, -1:]


def _crowns(model: Model, trees: Sequence[Tree], real_BW: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """(numbers (B, N - 1), positions (B, N - 1), `seen_BNK`) of what stands behind the trunks, padded on the right."""
    most = max(map(len, trees))
    numbers_BN = np.full((len(trees), most), 0 if model.network.config.image_token_id else 1, np.int64)
    positions_BN = np.zeros((len(trees), most), np.int64)
    seen_BNN = np.zeros((len(trees), most, most - 1), bool)
    # Padding sees the trunk, as every node does, so no softmax is empty. Its position is the trunk's end: never beyond the row's real
    # ones, which a rotary embedding that depends on the longest one would notice in every row.
    for row, tree in enumerate(trees):
        numbers_BN[row, 1 : len(tree)] = tree.numbers[1:]
        positions_BN[row] = tree.trunk - 1
        positions_BN[row, : len(tree)] += tree.depths
        seen_BNN[row, : len(tree), : len(tree) - 1] = tree.seen()
    seen_BNK = torch.cat([real_BW[:, None, :].expand(-1, most, -1), torch.from_numpy(seen_BNN).to(model.device)], -1)
    return numbers_BN[:, 1:], torch.from_numpy(positions_BN[:, 1:]).to(model.device), seen_BNK


def _plant(model: Model, rows: Sequence[Sequence[Prompt]], continuations: Sequence[Sequence[Sequence[int]]] | None) -> _Planted:
    """Run the rows through the network, and of the continuations all that some token follows.

    Raises: UserError when a prompt is longer than the model's context.
    """
    for prompt in (prompt for row in rows for prompt in row):
        refuse_long(model, len(prompt.ids_S))
    seen = Seen(model.network.config.image_token_id)
    numbers = [[seen.numbers_of(prompt) for prompt in row] for row in rows]
    trunks = [common_length(row) for row in numbers]
    behind = any(len(numbers_S) > trunk for own, trunk in zip(numbers, trunks, strict=True) for numbers_S in own)
    behind = behind or any(len(ids) > 1 for own in continuations or () for ids in own)
    if behind and max(trunks) - min(trunks) <= _NEAR:
        trunks = [min(trunks)] * len(trunks)
    trees: list[Tree] = []
    ends: list[tuple[int, int]] = []
    lengths: list[int] = []
    for row, (own, trunk) in enumerate(zip(numbers, trunks, strict=True)):
        tree = Tree(trunk)
        for numbers_S in own:
            end = [0, *tree.grow(0, numbers_S[trunk:].tolist())][-1]
            for ids in continuations[len(ends)] if continuations else ():
                assert ids, "a continuation has at least one token"
                tree.grow(end, ids[:-1])
            ends.append((row, end))
            lengths.append(len(numbers_S))
        trees.append(tree)
    cache, real_BW, positions_BW, last_B1D = _trunks(model, seen, [row[0][:trunk] for row, trunk in zip(numbers, trunks, strict=True)])
    numbers_BT, positions_BT, seen_BNK = _crowns(model, trees, real_BW)
    if not behind:
        return _Planted(cache, positions_BW, last_B1D, seen_BNK, trees, ends, lengths)
    positions_BK = torch.cat([positions_BW, positions_BT], 1)
    mask = _mask(model, seen_BNK[:, 1:], positions_BT, positions_BK)
    hidden_BTD = _hidden(model, cache, _embedded(model, seen, numbers_BT), positions_BT, mask)
    return _Planted(cache, positions_BK, torch.cat([last_B1D, hidden_BTD], 1), seen_BNK, trees, ends, lengths)


@torch.inference_mode()
def generate_batch(model: Model, rows: Sequence[Sequence[Prompt]], max_new_tokens: int) -> list[list[int]]:
    """Each prompt's greedy answer, row after row, a stop token last if it comes within `max_new_tokens` and the context.

    Raises: UserError when a prompt is longer than the model's context.
    """
    return _generate(model, rows, _plant(model, rows, None), max_new_tokens)


def _generate(model: Model, rows: Sequence[Sequence[Prompt]], start: _Planted, max_new_tokens: int) -> list[list[int]]:
    assert max_new_tokens > 0
    stops = set(model.stop_ids)
    first = {end: number for number, end in reversed(list(enumerate(start.ends)))}  # equal prompts of a row have one answer
    length, answers = start.lengths, {number: list[int]() for number in first.values()}
    room = {number: min(max_new_tokens, context_of(model) - length[number]) for number in answers}
    living = [[n for (own, _), n in sorted(first.items(), key=lambda e: e[1]) if own == row and room[n] > 0] for row in range(len(rows))]
    nodes = torch.tensor([[own[slot] if slot < len(own) else -1 for slot in range(max(map(len, living)))] for own in living])
    ends_N = torch.tensor([end for _, end in start.ends])
    nodes_BT = torch.where(nodes >= 0, ends_N[nodes], 0).to(model.device)
    hidden_BTD = start.nodes_BND.take_along_dim(nodes_BT[..., None], 1)
    seen_BTK = start.seen_BNK.take_along_dim(nodes_BT[..., None], 1)
    positions_BK, cache = start.positions_BK, start.cache
    while any(living):
        alive = [(row, slot) for row, own in enumerate(living) for slot in range(len(own))]
        at_row, at_slot = (torch.tensor(part, device=model.device) for part in zip(*alive, strict=True))
        tokens = model.network.lm_head(hidden_BTD[at_row, at_slot]).float().argmax(-1).tolist()
        for (row, slot), token in zip(alive, tokens, strict=True):
            answers[living[row][slot]].append(token)
        slots = [[slot for slot, n in enumerate(own) if answers[n][-1] not in stops and len(answers[n]) < room[n]] for own in living]
        kept = [row for row, own in enumerate(slots) if own]
        if not kept:
            break
        if slots != [list(range(len(own))) for own in living]:
            # At once: the next step copies the whole cache anyway, and an answer at the end of the context has no next position.
            most = max(map(len, slots))
            living = [[living[row][slot] for slot in slots[row]] for row in kept]
            slots_BT = torch.tensor([[*slots[row], *[slots[row][0]] * (most - len(slots[row]))] for row in kept], device=model.device)
            kept_B = torch.tensor(kept, device=model.device)
            seen_BTK = seen_BTK[kept_B].take_along_dim(slots_BT[..., None], 1)
            if len(kept) < len(positions_BK):
                cache.batch_select_indices(kept_B)
                positions_BK = positions_BK[kept_B]
        hidden_BTD, seen_BTK, positions_BK = _step(model, cache, living, answers, length, seen_BTK, positions_BK)
    return [answers[first[end]] for end in start.ends]


def _step(
    model: Model,
    cache: DynamicCache,
    living: Sequence[Sequence[int]],
    answers: dict[int, list[int]],
    lengths: Sequence[int],
    seen_BTK: torch.Tensor,
    positions_BK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states (B, T, D), `seen_BTK`, `positions_BK`) with the last token of every living answer; short rows repeat their first."""
    most = max(map(len, living))
    padded = [[*own, *[own[0]] * (most - len(own))] for own in living]
    ids_BT = torch.tensor([[answers[n][-1] for n in own] for own in padded], device=model.device)
    positions_BT = torch.tensor([[lengths[n] + len(answers[n]) - 1 for n in own] for own in padded], device=model.device)
    own_TT = torch.eye(most, dtype=torch.bool, device=model.device)
    seen_BTK = torch.cat([seen_BTK, own_TT.expand(len(padded), -1, -1)], -1)
    positions_BK = torch.cat([positions_BK, positions_BT], 1)
    mask = _mask(model, seen_BTK, positions_BT, positions_BK)
    hidden_BTD = _hidden(model, cache, model.network.get_input_embeddings()(ids_BT), positions_BT, mask)
    return hidden_BTD, seen_BTK, positions_BK


@torch.inference_mode()
def score_batch(
    model: Model, rows: Sequence[Sequence[Prompt]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[list[float]]]:
    """For each prompt, row after row, for each of its continuations: the log-probability of every token, directly after the prompt.

    Prompts may have different numbers of continuations. Raises: UserError when a prompt is longer than the model's context.
    """
    assert len(continuations) == sum(map(len, rows))
    return _scored(model, _plant(model, rows, continuations), continuations)


@torch.inference_mode()
def score_and_generate(
    model: Model, rows: Sequence[Sequence[Prompt]], continuations: Sequence[Sequence[Sequence[int]]], max_new_tokens: int
) -> tuple[list[list[list[float]]], list[list[int]]]:
    """`score_batch` and `generate_batch` of the same prompts; continuations of one token each (letters) cost no pass of their own."""
    if any(len(ids) > 1 for own in continuations for ids in own):
        return score_batch(model, rows, continuations), generate_batch(model, rows, max_new_tokens)
    start = _plant(model, rows, None)
    return _scored(model, start, continuations), _generate(model, rows, start, max_new_tokens)


def _scored(model: Model, start: _Planted, continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float]]]:
    most = start.nodes_BND.shape[1]
    asked: list[tuple[int, int]] = []  # (node before it among those of all rows, token), of every token of every continuation
    for (row, end), own in zip(start.ends, continuations, strict=True):
        for ids in own:
            before = [end, *start.trees[row].grow(end, ids[:-1])]  # they are all there: this finds them
            asked += [(row * most + node, token) for node, token in zip(before, ids, strict=True)]
    values = iter(_logs(model, start.nodes_BND.flatten(0, 1), asked))
    return [[[next(values) for _ in ids] for ids in own] for own in continuations]


def _logs(model: Model, nodes_ND: torch.Tensor, asked: Sequence[tuple[int, int]]) -> list[float]:
    """The log-probability of each token after its node; logits are computed where one is asked for, once."""
    if not asked:
        return []
    nodes, places_Q = torch.tensor([node for node, _ in asked]).unique(return_inverse=True)
    tokens_Q = torch.tensor([token for _, token in asked])
    values_Q = torch.empty(len(asked), dtype=torch.float64)
    for begin in range(0, len(nodes), _SCORED_AT_ONCE):
        logits = model.network.lm_head(nodes_ND[nodes[begin : begin + _SCORED_AT_ONCE].to(nodes_ND.device)]).float()
        here = (places_Q >= begin) & (places_Q < begin + _SCORED_AT_ONCE)
        wanted = ((places_Q[here] - begin).to(logits.device), tokens_Q[here].to(logits.device))
        values_Q[here] = torch.log_softmax(logits, -1)[wanted].cpu().to(values_Q.dtype)
    return values_Q.tolist()
