"""The suite's askings put to a model in this process.

Promises: one prefill an asking serves all modes: the letters are scored directly after the prompt and its forced prefix, then the
greedy answer goes on from there. Batches and shared tower passes follow from all askings alone, so a continued suite gives the
numbers of a straight one. Cost: as `evaluate.ask`, with the prefill shared by both ways.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import Record
from intervale.data.foodie_items import LETTERS
from intervale.data.prompt import Template, Tokenizer, encode_turns, turns_of
from intervale.data.tiling import Tiling
from intervale.engine.batch import generate_batch, score_and_generate, score_batch
from intervale.engine.decode import context_of, refuse_long, rotary_turn
from intervale.engine.tree import Prompt
from intervale.evaluate.ask import outline_of
from intervale.evaluate.batches import Question, batches_of, rows_of
from intervale.evaluate.features import Features
from intervale.evaluate.foodieqa import Asking
from intervale.evaluate.kept_features import FEATURES, begun_with, kept_features
from intervale.evaluate.provenance import model_identity
from intervale.evaluate.suite import Answers, Tell
from intervale.model.load import Model, as_device, as_dtype, load_model, load_text_side, narrow, resolve_model

Rows = Sequence[Sequence[Prompt]]
_FIX = "lower the tiles a picture with --max-tiles"


def prompt_ids(record: Record, template: Template, tokenizer: Tokenizer, picture_tokens: Sequence[int]) -> np.ndarray:
    """The ids of the conversation up to the assistant's header, and of what its answer is forced to begin with."""
    ids_S = encode_turns(turns_of(record.prompt(), picture_tokens), template, tokenizer, answer_next=True).ids_S
    prefix = record.reference()
    return np.concatenate([ids_S, np.array(tokenizer.encode(prefix), np.int64)]) if prefix else ids_S


def letter_ids(prefix: str, count: int, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of the first `count` letters directly after `prefix`, as the tokenizer writes them there.

    A tokenizer that joins the two ("(A") gives the letter's own ids: the prompt's ids are those that an answer goes on from.
    """
    before = tokenizer.encode(prefix) if prefix else []
    found = []
    for letter in LETTERS[:count]:
        whole = tokenizer.encode(prefix + letter)
        joined = whole[: len(before)] != before or len(whole) == len(before)
        found.append(tokenizer.encode(letter) if joined else whole[len(before) :])
    return found


@dataclass(frozen=True)
class LocalAsker:
    """A model in this process. `text` and `letters`: which ways of answering are wanted; `features` as in `run.Plan`."""

    name: str
    folder: Path
    tiling: Tiling
    device: str
    dtype: torch.dtype
    max_new_tokens: int
    text: bool
    letters: bool
    features: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be one."""
        precision = str(self.dtype).removeprefix("torch.")
        return {**model_identity(self.folder), "min_tiles": self.tiling.min_tiles, "precision": precision}

    def about(self) -> dict[str, Any]:
        """The model, for summaries."""
        return {"name": self.name, "folder": str(self.folder.resolve()), **self.identity(), "device": self.device}

    def protocol(self) -> dict[str, Any]:
        """How it is asked."""
        return {"max_new_tokens": self.max_new_tokens if self.text else None, "max_tiles": self.tiling.max_tiles}

    def tiles_of(self, size: tuple[int, int]) -> int:
        """Into how many tiles a picture of (width, height) is cut."""
        return self.tiling.tiles_of(*size)

    def answers(self, askings: Sequence[Asking], sizes: dict[Path, tuple[int, int]], done: set[str], out: Path, tell: Tell) -> Answers:
        """The answers of every batch that is not all in `done`. Raises: UserError naming what cannot be asked."""
        model = load_model(self.folder, dtype=self.dtype, device=self.device, max_tiles=self.tiling.max_tiles)
        by_record = {id(asking.record): asking for asking in askings}
        batches = batches_of([self._question(model, asking, sizes) for asking in askings])
        own = [[by_record[id(question.record)] for question in batch] for batch in batches]
        kept = kept_features(model, [asking.record for asking in askings], self.features, begun_with(out, len(done)), tell)
        return Answers(
            self._batches(model, Features(model, batches, kept, tell), own, done), {} if kept is None else {FEATURES: kept.told()}
        )

    def price(self, prompt_tokens: int, tokens: int) -> float | None:
        """Nobody sends a bill."""
        return None

    def _batches(
        self, model: Model, features: Features, batches: list[list[Asking]], done: set[str]
    ) -> Generator[list[dict[str, Any]], None, None]:
        for number, own in enumerate(batches):
            if not all(asking.key in done for asking in own):
                yield self._ask(model, features, number, own)

    def _question(self, model: Model, asking: Asking, sizes: dict[Path, tuple[int, int]]) -> Question:
        record = asking.record
        paths = [inside(record.root, image, record.where) for image in record.images]
        counts = tuple(self.tiles_of(sizes[path]) * model.tiling.tokens_per_tile for path in paths)
        ids_S = prompt_ids(record, model.template, model.tokenizer, counts)
        tokens, longest = len(ids_S), max([1, *map(len, self._letters(model, record))])
        try:
            refuse_long(model, tokens + longest - 1)
        except UserError as error:
            raise UserError(f"{record.where}: prompt {asking.prompt}: {error.what}", _FIX) from error
        new = max(longest, min(self.max_new_tokens, context_of(model) - tokens)) if self.text else longest
        outline = outline_of(ids_S, counts, model.network.config.image_token_id)
        return Question(record, tokens, sum(counts), new, (), outline, counts, rotary_turn(model))

    def _letters(self, model: Model, record: Record) -> list[list[int]]:
        return letter_ids(record.reference(), len(record.choices), model.tokenizer) if self.letters else []

    def _answered(
        self, model: Model, rows: Rows, letters: list[list[list[int]]], crosses: bool
    ) -> tuple[list[list[list[float]]], list[list[int]]]:
        """(the letters' log-probabilities, the answers' ids) of a batch, as far as they are wanted."""
        if self.letters and self.text and not crosses:
            return score_and_generate(model, rows, letters, self.max_new_tokens)
        scored = (_one_by_one if crosses else score_batch)(model, rows, letters) if self.letters else []
        return scored, generate_batch(model, rows, self.max_new_tokens) if self.text else []

    def _ask(self, model: Model, features: Features, number: int, askings: Sequence[Asking]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        batch, of = features.batches[number], features.of(number)
        rows = [[_prompt(model, question, of) for question in row] for row in rows_of(batch)]
        prompts = [prompt for row in rows for prompt in row]
        letters = [self._letters(model, question.record) for question in batch]
        scored, answers = self._answered(model, rows, letters, batch[0].crosses)
        found: list[dict[str, Any]] = [{"key": asking.key} for asking in askings]
        for line, asking, values in zip(found, askings, scored, strict=False):
            line["scores"] = _sums(values, asking)
        for line, ids in zip(found, answers, strict=False):
            line |= _told(model, ids)
        seconds = round((time.perf_counter() - began) / len(batch), 4)
        for line, prompt in zip(found, prompts, strict=True):
            line |= {"tokens": line.get("tokens", len(line.get("scores", ()))), "prompt_tokens": len(prompt.ids_S), "seconds": seconds}
        return found


def _one_by_one(model: Model, rows: Rows, letters: list[list[list[int]]]) -> list[list[list[float]]]:
    """A single prompt whose letters may cross into another rotary embedding: each decides for itself which it gets."""
    return [[score_batch(model, rows, [[ids]])[0][0] for ids in own] for own in letters]


def _prompt(model: Model, question: Question, of: Mapping[str, torch.Tensor]) -> Prompt:
    """Its picture tokens are counted again, from what was decoded: a file may have changed since its header was read."""
    pictures = tuple((picture, of[picture]) for picture in question.pictures())
    counts = [part.shape[0] * part.shape[1] for _, part in pictures]
    return Prompt(prompt_ids(question.record, model.template, model.tokenizer, counts), pictures)


def _sums(values: Sequence[Sequence[float]], asking: Asking) -> list[float]:
    sums = [math.fsum(own) for own in values]
    if not all(map(math.isfinite, sums)):
        what = f"{asking.record.where}: prompt {asking.prompt}: the model's log-probabilities are not numbers"
        raise UserError(what, "use --precision float32 or bfloat16")
    return sums


def _told(model: Model, ids: list[int]) -> dict[str, Any]:
    stopped = bool(ids) and ids[-1] in model.stop_ids
    raw = model.tokenizer.decode(ids[:-1] if stopped else ids)
    return {"raw": raw, "finish": "stop" if stopped else "length", "tokens": len(ids)}


def local_asker(
    model: str,
    *,
    max_new_tokens: int,
    max_tiles: int | None,
    device: str | None,
    precision: str,
    text: bool,
    letters: bool,
    features: Path | None = None,
) -> LocalAsker:
    """The asker of MODEL, its weights not read yet. Raises: UserError for a model that is not there or a wrong setting."""
    tiling = narrow(load_text_side(model).tiling, None, max_tiles)
    device = str(as_device(device))
    dtype = as_dtype(precision) if precision != "auto" else torch.bfloat16 if device.startswith("cuda") else torch.float32
    return LocalAsker(model, resolve_model(model), tiling, device, dtype, max_new_tokens, text, letters, features)
