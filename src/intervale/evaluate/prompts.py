"""What a model is asked, and which tokens stand for each of its possible answers. Pure functions; no weights.

Two forms of a question. `open`: the record's own prompt, as it was trained. `mcq`: the same with the choices as lettered lines
and the instruction to answer with a letter. The pictures stay where they stand. Cost: a few tokeniser calls an item.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import replace

from intervale.core.records import Message, Record
from intervale.data.prompt import Template, Tokenizer

Decode = Callable[[list[int]], str]
LETTERS = string.ascii_uppercase
# OpenGVLab/InternVL asks its own multiple-choice benchmarks (MMBench) with these two sentences, so the models know them.
_INSTRUCTION = {"en": "Answer with the option's letter from the given choices directly.", "zh": "请直接回答选项字母。"}
_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def mcq_messages(record: Record) -> tuple[Message, ...]:
    """The prompt with `A. choice` lines and the instruction after the last user turn; Chinese when the question has Chinese in it."""
    *before, asked = record.prompt()
    instruction = _INSTRUCTION["zh" if _CJK.search(record.question()) else "en"]
    lines = [f"{LETTERS[n]}. {choice.strip()}" for n, choice in enumerate(record.choices)]
    return (*before, replace(asked, content="\n".join([asked.content.rstrip(), *lines, instruction])))


def messages_for(record: Record, prompt: str) -> tuple[Message, ...]:
    """The conversation to ask: `prompt` is 'open' or 'mcq'."""
    return mcq_messages(record) if prompt == "mcq" else record.prompt()


def answer_tail(record: Record) -> str:
    """What the data's own answer puts after the right choice, or '' when nothing follows or it does not start with the choice."""
    assert record.answer is not None
    right = record.choices[record.answer].strip()
    said = record.reference().strip()
    return said[len(right) :] if said.startswith(right) else ""


def open_continuations(record: Record, tokenizer: Tokenizer, template: Template, decode: Decode) -> list[list[int]]:
    """For every choice the ids of that choice *as a finished answer*: its text and what ends it.

    Without an end, 酸 could never be less likely than 酸辣, of which it is a prefix. The end is what the data's answers put after a
    choice: the first character of `answer_tail` (in the tutorial's data "，"), else the template's end token; it is the same for all
    choices of an item. Training encodes an answer as one piece, and a tokeniser may join characters across that seam, so the
    choice is encoded together with the whole tail and cut after the token that completes the end's first character.
    """
    tail = answer_tail(record)
    found = []
    for choice in record.choices:
        text = choice.strip()
        if not tail:
            found.append([*tokenizer.encode(text), tokenizer.control(template.end)])
            continue
        ids = tokenizer.encode(text + tail)
        wanted = text + tail[0]
        cut = next((n for n in range(1, len(ids) + 1) if decode(ids[:n]).startswith(wanted)), None)
        # A tokeniser that rewrites text (NFC) never gives `wanted` back; then the pair alone is the nearest thing.
        found.append(ids[:cut] if cut else tokenizer.encode(wanted))
    return found


def letter_continuations(count: int, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each of the first `count` letters, directly after the assistant's header."""
    return [tokenizer.encode(letter) for letter in LETTERS[:count]]


def continuations(record: Record, prompt: str, tokenizer: Tokenizer, template: Template, decode: Decode) -> list[list[int]]:
    """One token sequence a choice, for `likelihood`."""
    if prompt == "mcq":
        return letter_continuations(len(record.choices), tokenizer)
    return open_continuations(record, tokenizer, template, decode)
