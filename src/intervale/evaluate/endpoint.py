"""A model behind an OpenAI-compatible server, asked the same questions as one in this process.

Promises: the pictures' pixels are those that training and local evaluation see (upright; a file that is upright and of a common
format goes byte for byte); a request that the server refuses (a content filter) is a wrong answer that is counted, but only once
the server has answered others; likelihood comes from the server's own log-probabilities or is refused. What an endpoint was
trained on is not known, and is said so. Cost: a request an asking.
"""

from __future__ import annotations

import functools
import io
import math
import unicodedata
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.special import logsumexp

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import IMAGE, Message, Record
from intervale.data.images import load_picture, picture_size
from intervale.engine.api import ChatTurn, Photo, Request, Sampling, UpstreamRefusedError
from intervale.engine.whole import Answered, Ask, Server, Whole, ask_all
from intervale.evaluate.foodieqa import Asking
from intervale.evaluate.suite import Answers, Tell

Stream = Generator[list[Answered], None, None]
TOP = 20  # likeliest tokens asked for: the most that OpenAI gives
_UPRIGHT = 1
_COMMON = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_ORIENTATION = 0x0112
_BLANKS = "▁Ġ"  # a space, as LMDeploy tells a vocabulary's token
_HELD = 10  # refusals that may come before the first answer
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}  # vLLM's and SGLang's words for a forced prefix


@functools.lru_cache(maxsize=16)
def photo_of(path: Path, where: str) -> Photo:
    """A picture as it is sent: its own bytes when they are upright JPEG, PNG or WebP without frames, else upright RGB as JPEG 95 or PNG.

    Raises: PictureError naming `where`.
    """
    size = picture_size(path, where)
    with Image.open(path) as picture:
        kind = picture.format or ""
        plain = picture.getexif().get(_ORIENTATION, _UPRIGHT) == _UPRIGHT and getattr(picture, "n_frames", 1) == 1
        plain = plain and picture.mode in ("RGB", "L")  # alpha is dropped here, and composited elsewhere
    load_picture(path, where)  # a damaged file is an error here, as it is for a model in this process
    if plain and kind in _COMMON:
        return Photo(path.read_bytes(), _COMMON[kind], size)
    out = io.BytesIO()
    lossy = kind in ("JPEG", "MPO")
    load_picture(path, where).save(out, "JPEG" if lossy else "PNG", **({"quality": 95, "subsampling": 0} if lossy else {}))
    return Photo(out.getvalue(), "image/jpeg" if lossy else "image/png", size)


def turns_of(messages: Sequence[Message], record: Record) -> tuple[ChatTurn, ...]:
    """A conversation with its pictures read, in the order they stand."""
    left = list(record.images)
    turns = []
    for message in messages:
        parts: list[str | Photo] = []
        for number, text in enumerate(message.content.split(IMAGE)):
            if number:
                image = left.pop(0)
                parts.append(photo_of(inside(record.root, image, record.where), f"{record.where}: {image}"))
            if text:
                parts.append(text)
        turns.append(ChatTurn(message.role, tuple(parts)))
    return tuple(turns)


def letter_scores(first: Sequence[tuple[str, float]], count: int) -> list[float] | None:
    """Log-probabilities of the first `count` letters as the answer's first token; None when none of them is among `first`.

    Tokens that are the letter but for blanks (also as vocabularies write them: ▁, Ġ), brackets and punctuation around it count together. A letter that is not among the
    likeliest tokens is less likely than all of them, so the most likely letter is right as long as one is there; it gets the next number
    below the least of `first`, which is an upper bound.
    """
    found: dict[str, list[float]] = {}
    for token, value in first:
        plain = unicodedata.normalize("NFKC", token.lstrip(_BLANKS))
        bare = "".join(char for char in plain if not char.isspace() and unicodedata.category(char)[0] != "P")
        if len(bare) == 1:
            found.setdefault(bare, []).append(value)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    if not any(letter in found for letter in letters):
        return None
    below = math.nextafter(min(value for _, value in first), -math.inf)
    # logsumexp: servers write -9999 for next to nothing, which exp makes 0.
    return [float(logsumexp(found[letter])) if letter in found else below for letter in letters]


@dataclass(frozen=True)
class EndpointAsker:
    """An endpoint for the suite. An asking's forced prefix is sent as the assistant's begun answer, with the words of vLLM and SGLang for it.

    Prices are per million tokens, in whatever money; None where they are not known.
    """

    server: Server
    max_new_tokens: int
    text: bool
    letters: bool
    prices: tuple[float, float] | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be one. The key is not in it."""
        name = f"{self.server.model} at {self.server.url}"
        return {"endpoint": self.server.url, "fingerprint": name, "checkpoint": None, "checkpoint_fingerprint": None, "precision": None}

    def about(self) -> dict[str, Any]:
        """The model, for summaries."""
        return {"name": self.server.model, "folder": None, **self.identity(), "device": "endpoint"}

    def protocol(self) -> dict[str, Any]:
        """How it is asked."""
        extra = {"extra": self.server.extra} if self.server.extra else {}
        return {"max_new_tokens": self.max_new_tokens if self.text else None, "max_tiles": None, **extra}

    @property
    def folder(self) -> None:
        """There is none."""

    def tiles_of(self, size: tuple[int, int]) -> int | None:
        """What a server makes of a picture is its own."""
        return None

    def price(self, prompt_tokens: int, tokens: int) -> float | None:
        """In the money of `prices`."""
        return None if self.prices is None else (prompt_tokens * self.prices[0] + tokens * self.prices[1]) / 1e6

    def answers(self, askings: Sequence[Asking], sizes: dict[Path, tuple[int, int]], done: set[str], out: Path, tell: Tell) -> Answers:
        """The answers of what is not in `done`. Raises: EngineError when the server cannot be used; UpstreamRefusedError when it refuses all."""
        left = {asking.key: asking for asking in askings if asking.key not in done}
        new = self.max_new_tokens if self.text else 1
        asks = [
            Ask(key, functools.partial(self._request, asking, new), TOP if self.letters else 0, self._forced(asking))
            for key, asking in left.items()
        ]
        return Answers(self._lines(once_answered(ask_all(self.server, asks), bool(done)), left))

    def _forced(self, asking: Asking) -> dict[str, Any]:
        return CONTINUE if asking.record.reference() else {}

    def _request(self, asking: Asking, new: int) -> Request:
        record = asking.record
        return Request(turns_of(record.messages, record), Sampling(max_new_tokens=new))

    def _lines(self, answered: Stream, askings: dict[str, Asking]) -> Generator[list[dict[str, Any]], None, None]:
        try:
            with closing(answered):
                for together in answered:
                    yield [self._line(key, told, askings[key]) for key, told in together]
        except UpstreamRefusedError as refused:
            if not self.letters:
                raise
            hint = "a server that gives no log-probabilities cannot be asked by likelihood: use strict"
            raise UpstreamRefusedError(refused.what, f"{refused.fix}; {hint}", refused.code) from None

    def _line(self, key: str, told: Whole | UpstreamRefusedError, asking: Asking) -> dict[str, Any]:
        line: dict[str, Any] = {"key": key, **line_of(told)}
        if self.letters:
            whole = isinstance(told, Whole) and told.first is not None
            line["scores"] = letter_scores(told.first, len(asking.record.choices)) if whole else None  # type: ignore[union-attr, arg-type]
        return line


def line_of(told: Whole | UpstreamRefusedError) -> dict[str, Any]:
    """raw, finish, tokens, prompt_tokens, seconds of an answer; of a refusal an empty answer, and `refused` with the server's words."""
    if isinstance(told, UpstreamRefusedError):
        words = f"{told.what}; {told.fix}"
        return {"raw": "", "finish": "refused", "refused": words, "tokens": None, "prompt_tokens": None, "seconds": 0.0}
    filtered = {"refused": "finish_reason content_filter"} if told.finish == "content_filter" else {}
    return {
        "raw": told.text, "finish": told.finish, **filtered,
        "tokens": told.tokens, "prompt_tokens": told.prompt_tokens, "seconds": told.seconds,
    }  # fmt: skip


def once_answered(answered: Stream, before: bool) -> Stream:
    """Pass answers on; hold refusals back until something was answered, so that a request nobody could answer is no score of 0%.

    Raises: the first refusal when `_HELD` came before any answer, or nothing but refusals came.
    """
    held: list[Answered] = []
    good = before
    with closing(answered):
        for together in answered:
            good = good or any(isinstance(told, Whole) for _, told in together)
            held += together
            if good:
                yield held
                held = []
            elif len(held) >= _HELD:
                break
    refused = [told for _, told in held if isinstance(told, UpstreamRefusedError)]
    if refused:
        raise refused[0]


def parse_extra(text: str) -> dict[str, Any]:
    """`--extra`'s JSON object. Raises: UserError when it is none, or touches what the evaluation itself decides."""
    from intervale.core.files import parse_json

    value = parse_json(text, "--extra") if text else {}
    if not isinstance(value, dict):
        raise UserError("--extra is not a JSON object", "write --extra '{\"top_k\": 1}'")
    for name in ("messages", "model", "stream", "n"):
        if name in value:
            raise UserError(f"--extra may not set {name!r}", "leave it to the evaluation")
    return value
