"""Items to lines of predictions.jsonl: ask the model a batch of them, score what it says.

Promises: answers are greedy and likelihoods exact, so the same model, data and software give the same lines (but for their
times); an item is asked whole or refused by name. Cost a batch: one pass over the beginnings that its items share, one over what they go on
with (likelihood: all choices too), then (strict, official) a decoding step a token of its longest answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from intervale.core.errors import UserError
from intervale.core.records import Record
from intervale.data.prompt import encode_turns, turns_of
from intervale.engine.batch import generate_batch, score_batch
from intervale.engine.decode import context_of, refuse_long, rotary_turn
from intervale.engine.tree import Prompt
from intervale.evaluate.batches import Question, rows_of
from intervale.evaluate.features import Features
from intervale.evaluate.free import HEADLINE, score_free, without_choices
from intervale.evaluate.prompts import continuations, messages_for
from intervale.evaluate.score import cut_tail, match_choice, most_likely, parse_letter, parse_official
from intervale.model.load import Model


@dataclass(frozen=True)
class Protocol:
    """How every item is asked and scored. `max_new_tokens` and `headline` are None where the mode has no use for them."""

    prompt: str  # open | mcq
    mode: str  # strict | likelihood | official
    max_new_tokens: int | None
    max_tiles: int
    headline: str | None  # of likelihood: which of a choice's scores decides; of open answers: which measure counts as right


def _prompt_ids(model: Model, record: Record, prompt: str, picture_tokens: Sequence[int]) -> np.ndarray:
    """The prompt's ids. Raises: UserError naming the item when it does not fit the model's context."""
    turns = turns_of(messages_for(record, prompt), picture_tokens)
    ids_S = encode_turns(turns, model.template, model.tokenizer, answer_next=True).ids_S
    try:
        refuse_long(model, len(ids_S))
    except UserError as error:
        raise UserError(f"{record.where}: item {record.id!r}: {error.what}", "lower the tiles a picture with --max-tiles") from error
    return ids_S


def outline_of(ids_S: np.ndarray, counts: Sequence[int], picture: int) -> tuple[int, ...]:
    """The ids with a single -1 in place of each picture's tokens."""
    places = np.flatnonzero(ids_S == picture)
    starts = places[np.cumsum([0, *counts])[:-1]] if len(places) else places
    numbers_S = ids_S.astype(np.int64)
    numbers_S[starts] = -1
    return tuple(numbers_S[numbers_S != picture].tolist())


def question_of(model: Model, record: Record, tiles: Sequence[int], protocol: Protocol) -> Question:
    """An item as it will be asked, its pictures having that many tiles each by their headers.

    Raises: UserError naming the item when prompt and choices do not fit the model's context.
    """
    counts = tuple(n * model.tiling.tokens_per_tile for n in tiles)
    ids_S = _prompt_ids(model, record, protocol.prompt, counts)
    tokens = len(ids_S)
    outline = outline_of(ids_S, counts, model.network.config.image_token_id)

    def asked(new: int, choices: Sequence[Sequence[int]] = ()) -> Question:
        return Question(record, tokens, sum(counts), new, tuple(map(tuple, choices)), outline, counts, rotary_turn(model))

    room = context_of(model) - tokens
    if protocol.mode != "likelihood":
        assert protocol.max_new_tokens is not None
        return asked(min(protocol.max_new_tokens, room))
    choices = continuations(record, protocol.prompt, model.tokenizer, model.template, model.tokenizer.decode)
    longest = max(map(len, choices))
    if longest > room:
        raise UserError(
            f"{record.where}: item {record.id!r}: the prompt has {tokens} tokens and a choice {longest}; the model's context is {context_of(model)}",
            "lower the tiles a picture with --max-tiles",
        )
    return asked(longest, choices)


def _greedy(model: Model, ids: list[int], record: Record, protocol: Protocol) -> dict[str, Any]:
    stopped = bool(ids) and ids[-1] in model.stop_ids
    raw = model.tokenizer.decode(ids[:-1] if stopped else ids)
    finish = "stop" if stopped else "length"
    if not record.choices:
        told = score_free(raw, record.reference())
        return {"reference": cut_tail(record.reference()), "raw": raw, "finish": finish, "parsed": None, "tokens": len(ids), **told}
    if protocol.prompt == "open":
        parsed = match_choice(raw, record.choices)
    elif protocol.mode == "official":
        parsed = parse_official(raw, record.choices)
    else:
        parsed = parse_letter(raw, record.choices)
    return {"raw": raw, "finish": finish, "parsed": parsed, "tokens": len(ids)}


def _likelihood(scored: list[list[float]], record: Record) -> dict[str, Any]:
    sums = [math.fsum(values) for values in scored]
    means = [total / len(values) for total, values in zip(sums, scored, strict=True)]
    if not all(map(math.isfinite, sums)):
        raise UserError(
            f"{record.where}: item {record.id!r}: the model's log-probabilities are not numbers", "use --precision float32 or bfloat16"
        )
    return {
        "scores": [{"sum": s, "mean": m, "tokens": len(v)} for s, m, v in zip(sums, means, scored, strict=True)],
        "parsed": most_likely(sums),
        "parsed_mean": most_likely(means),
        "tokens": sum(map(len, scored)),
    }


def _prompt(model: Model, question: Question, of: Mapping[str, torch.Tensor], protocol: Protocol) -> Prompt:
    """An item's prompt, its picture tokens counted again from what was decoded: a file may have changed since its header was read."""
    pictures = tuple((picture, of[picture]) for picture in question.pictures())
    counts = [part.shape[0] * part.shape[1] for _, part in pictures]
    return Prompt(_prompt_ids(model, question.record, protocol.prompt, counts), pictures)


def _scores(model: Model, batch: Sequence[Question], rows: Sequence[Sequence[Prompt]]) -> list[list[list[float]]]:
    if batch[0].crosses:  # alone in its batch; each choice decides for itself which rotary embedding it gets
        return [[score_batch(model, rows, [[ids]])[0][0] for ids in batch[0].continuations]]
    return score_batch(model, rows, [question.continuations for question in batch])


def ask(model: Model, features: Features, number: int, protocol: Protocol) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl of batch `number` of `features`.

    `parsed` is None when nothing was recognised, or (likelihood) on a tie. Each line has an equal share of the batch's time.
    Raises: UserError naming the item when a picture cannot be read, its prompt does not fit the model's context, or its scores
    are not numbers.
    """
    began = time.perf_counter()
    batch, of = features.batches[number], features.of(number)
    rows = [[_prompt(model, question, of, protocol) for question in row] for row in rows_of(batch)]
    prompts = [prompt for row in rows for prompt in row]
    records = [question.record for question in batch]
    if protocol.mode == "likelihood":
        found = [_likelihood(values, record) for values, record in zip(_scores(model, batch, rows), records, strict=True)]
    else:
        assert protocol.max_new_tokens is not None
        answers = generate_batch(model, rows, protocol.max_new_tokens)
        found = [_greedy(model, ids, record, protocol) for ids, record in zip(answers, records, strict=True)]
    seconds = round((time.perf_counter() - began) / len(batch), 4)
    return [
        {
            "id": record.id,
            "question": record.question(),
            "images": list(record.images),
            "choices": list(record.choices),
            "answer": record.answer,
            "prompt": protocol.prompt,
            "mode": protocol.mode,
            **told,
            "correct": told["parsed"] == record.answer if record.choices else told[HEADLINE],
            "prompt_tokens": len(prompt.ids_S),
            "seconds": seconds,
            "tags": record.tags,
        }
        for record, told, prompt in zip(records, found, prompts, strict=True)
    ]


def refuse_unscorable(records: Sequence[Record], where: str, prompt: str, mode: str) -> bool:
    """Is this data of open answers? Raises: UserError that counts and names the items that cannot be scored; none is left out silently."""
    free = without_choices(records, where, prompt, mode)
    lacking = [r for r in records if not free and (len(r.choices) < 2 or r.answer is None)]
    if lacking:
        raise UserError(
            f"{where}: {_some(lacking)} of {len(records)} items have no 'choices' (two or more) with an 'answer'",
            'give every item "choices": [...] and "answer": INDEX, or none of them choices (open answers)',
        )
    empty = [r for r in records if not all(choice.strip() for choice in r.choices)]
    if empty:
        raise UserError(f"{where}: {_some(empty)} of {len(records)} items have an empty choice", "write every choice's text")
    many = [r for r in records if prompt == "mcq" and len(r.choices) > 26]
    if many:
        raise UserError(f"{where}: {_some(many)} of {len(records)} items have more choices than letters", "use --prompt open for this data")
    silent = [r for r in records if not r.prompt() or r.prompt()[-1].role != "user"]
    if silent:
        raise UserError(f"{where}: {_some(silent)} of {len(records)} items ask nothing", "end the prompt with a user turn")
    return free


def _some(records: Sequence[Record]) -> str:
    named = ", ".join(record.where.rpartition(":")[2] for record in records[:5])
    return f"{len(records)} (line{'s' if len(records) > 1 else ''} {named}{', ...' if len(records) > 5 else ''})"
