"""Items to lines of predictions.jsonl: ask the model a batch of them, score what it says.

Promises: answers are greedy and likelihoods exact, so the same model, data and software give the same lines (but for their
times); an item is asked whole or refused by name. Cost a batch: one prefill, then a decoding step a token of its longest answer
(strict, official) or one short pass a choice (likelihood).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from intervale.core.errors import UserError
from intervale.core.records import Record
from intervale.data.prompt import encode_turns, turns_of
from intervale.engine.batch import generate_batch, prefill_batch, score_batch
from intervale.engine.decode import context_of, refuse_long
from intervale.evaluate.batches import Question
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


def question_of(model: Model, record: Record, tiles: Sequence[int], protocol: Protocol) -> Question:
    """An item as it will be asked, its pictures having that many tiles each by their headers.

    Raises: UserError naming the item when prompt and choices do not fit the model's context.
    """
    counts = [n * model.tiling.tokens_per_tile for n in tiles]
    tokens = len(_prompt_ids(model, record, protocol.prompt, counts))
    room = context_of(model) - tokens
    if protocol.mode != "likelihood":
        assert protocol.max_new_tokens is not None
        return Question(record, tokens, sum(counts), min(protocol.max_new_tokens, room))
    asked = continuations(record, protocol.prompt, model.tokenizer, model.template, model.tokenizer.decode)
    longest = max(map(len, asked))
    if longest > room:
        raise UserError(
            f"{record.where}: item {record.id!r}: the prompt has {tokens} tokens and a choice {longest}; the model's context is {context_of(model)}",
            "lower the tiles a picture with --max-tiles",
        )
    return Question(record, tokens, sum(counts), longest, tuple(map(tuple, asked)))


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


def ask(model: Model, features: Features, number: int, protocol: Protocol) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl of batch `number` of `features`.

    `parsed` is None when nothing was recognised, or (likelihood) on a tie. Each line has an equal share of the batch's time.
    Raises: UserError naming the item when a picture cannot be read, its prompt does not fit the model's context, or its scores
    are not numbers.
    """
    began = time.perf_counter()
    batch, of = features.batches[number], features.of(number)
    prompts, joined = [], []
    for question in batch:
        parts = [of[picture] for picture in question.pictures()]
        # Counted again, from what was decoded: a file may have changed since its header was read.
        prompts.append(_prompt_ids(model, question.record, protocol.prompt, [part.shape[0] * part.shape[1] for part in parts]))
        joined.append(torch.cat(parts) if parts else None)
    start = prefill_batch(model, prompts, joined)
    records = [question.record for question in batch]
    if protocol.mode == "likelihood":
        scored = score_batch(model, start, [question.continuations for question in batch])
        found = [_likelihood(values, record) for values, record in zip(scored, records, strict=True)]
    else:
        assert protocol.max_new_tokens is not None
        answers = generate_batch(model, start, protocol.max_new_tokens)
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
            "prompt_tokens": length,
            "seconds": seconds,
            "tags": record.tags,
        }
        for record, told, length in zip(records, found, start.lengths, strict=True)
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
