"""One item to one line of predictions.jsonl: ask the model, score what it says.

Promises: answers are greedy and likelihoods exact, so the same model, data and software give the same lines (but for their
times); a picture goes through the vision tower once while it stays among the last few; an item is asked whole or refused by name.
Cost an item: one prefill, then a decoding step a token (strict, official) or one short pass a choice (likelihood).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import Record
from intervale.data.dataset import TileCache
from intervale.data.prompt import encode_turns, turns_of
from intervale.engine.api import Sampling
from intervale.engine.decode import Prefilled, encode_tiles, generate, prefill, score_continuations
from intervale.evaluate.prompts import continuations, messages_for
from intervale.evaluate.score import match_choice, most_likely, parse_letter, parse_official
from intervale.model.load import Model

_KEPT_PICTURES = 16  # 13 tiles of InternVL2-2B's features are 14 MB in bfloat16


@dataclass(frozen=True)
class Protocol:
    """How every item is asked and scored. `max_new_tokens` and `headline` are None where the mode has no use for them."""

    prompt: str  # open | mcq
    mode: str  # strict | likelihood | official
    max_new_tokens: int | None
    max_tiles: int
    headline: str | None  # of likelihood: which of a choice's scores decides


class Features:
    """Projected features of the last few pictures, by file."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tiles = TileCache(0)  # what is kept are the features; the tiles they came from are not needed again
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()

    def of(self, record: Record, image: str) -> torch.Tensor:
        """(tiles, tokens a tile, width) of a record's picture. Raises: UserError when it cannot be read."""
        key = str(inside(record.root, image, record.where))
        if key not in self._held:
            self._held[key] = encode_tiles(self._model, self._tiles.tiles(record, image, self._model.tiling))
            while len(self._held) > _KEPT_PICTURES:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def _prefilled(model: Model, features: Features, record: Record, prompt: str) -> Prefilled:
    parts = [features.of(record, image) for image in record.images]
    counts = [part.shape[0] * part.shape[1] for part in parts]
    turns = turns_of(messages_for(record, prompt), counts)
    ids_S = encode_turns(turns, model.template, model.tokenizer, answer_next=True).ids_S
    try:
        return prefill(model, ids_S, torch.cat(parts) if parts else None)
    except UserError as error:
        raise UserError(f"{record.where}: item {record.id!r}: {error.what}", "lower the tiles a picture with --max-tiles") from error


def _greedy(model: Model, start: Prefilled, record: Record, protocol: Protocol) -> dict[str, Any]:
    assert protocol.max_new_tokens is not None
    ids = list(generate(model, start, Sampling(max_new_tokens=protocol.max_new_tokens)))
    stopped = bool(ids) and ids[-1] in model.stop_ids
    raw = model.tokenizer.decode(ids[:-1] if stopped else ids)
    if protocol.prompt == "open":
        parsed = match_choice(raw, record.choices)
    elif protocol.mode == "official":
        parsed = parse_official(raw, record.choices)
    else:
        parsed = parse_letter(raw, record.choices)
    return {"raw": raw, "finish": "stop" if stopped else "length", "parsed": parsed, "tokens": len(ids)}


def _likelihood(model: Model, start: Prefilled, record: Record, protocol: Protocol) -> dict[str, Any]:
    asked = continuations(record, protocol.prompt, model.tokenizer, model.template, model.tokenizer.decode)
    scored = score_continuations(model, start, asked)
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


def ask(model: Model, features: Features, record: Record, protocol: Protocol) -> dict[str, Any]:
    """The item's line of predictions.jsonl. `parsed` is None when nothing was recognised, or (likelihood) on a tie.

    Raises: UserError naming the item when a picture cannot be read or the prompt does not fit the model's context.
    """
    began = time.perf_counter()
    start = _prefilled(model, features, record, protocol.prompt)
    found = (_likelihood if protocol.mode == "likelihood" else _greedy)(model, start, record, protocol)
    return {
        "id": record.id,
        "question": record.question(),
        "choices": list(record.choices),
        "answer": record.answer,
        "prompt": protocol.prompt,
        "mode": protocol.mode,
        **found,
        "correct": found["parsed"] == record.answer,
        "prompt_tokens": start.length,
        "seconds": round(time.perf_counter() - began, 4),
        "tags": record.tags,
    }


def refuse_unscorable(records: Sequence[Record], where: str, prompt: str) -> None:
    """Raise a UserError that counts and names the items that cannot be scored: nothing is left out silently."""
    lacking = [r for r in records if len(r.choices) < 2 or r.answer is None]
    if lacking:
        raise UserError(
            f"{where}: {_some(lacking)} of {len(records)} items have no 'choices' (two or more) with an 'answer'",
            'give every item "choices": [...] and "answer": INDEX, or put the others into a file of their own; free answers are not scored yet',
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


def _some(records: Sequence[Record]) -> str:
    named = ", ".join(record.where.rpartition(":")[2] for record in records[:5])
    return f"{len(records)} (line{'s' if len(records) > 1 else ''} {named}{', ...' if len(records) > 5 else ''})"
