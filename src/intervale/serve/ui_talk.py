"""A visitor's conversation on the page, and asking for it: plain values in, plain values out; no widget is known here.

Promises: a conversation is a value that belongs to one visitor; whoever leaves an answer (Stop, a closed tab) cancels it within one
token; every error is told in words. Pictures are held as files of the page's own folder and read when they are asked about.
Cost: one task an answer; the page is told of new text at most every `EVERY` seconds, and of none at least every `LIFE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from intervale.data.images import load_picture
from intervale.engine.api import ChatTurn, Desk, Photo, Request, Sampling
from intervale.serve.app import Serving
from intervale.serve.errors import ApiError, as_api_error, bad
from intervale.serve.limits import Limits
from intervale.serve.media import checked_photo
from intervale.serve.metrics import Metrics
from intervale.serve.schema import MOST_LETTERS, MOST_MESSAGES
from intervale.serve.ui_words import pick

log = logging.getLogger("intervale.serve.page")
EVERY, LIFE = 0.06, 1.0
_STRIP, _GAP, _A_ROW = 240, 12, 4  # of the pictures shown beside a question: pixels high, between them, in a row


@dataclass(frozen=True)
class Exchange:
    """One question, its pictures (files; `shown`: what the page shows of them), and what became of it. `end`: '' while it runs, then stop, length, stopped, error."""

    text: str
    pictures: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    answer: str = ""
    end: str = ""
    note: str = ""


Talk = tuple[Exchange, ...]


@dataclass(frozen=True)
class Settings:
    """What the visitor chose. `seed` None: another each time."""

    model: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    most: int = 512
    tiles: int | None = None
    seed: int | None = None
    system: str = ""


@dataclass
class Side:
    """One answer on its way: its text so far, and how long it took."""

    text: str = ""
    tokens: int = 0
    finish: str = ""
    prompt_tokens: int = 0
    reused: int = 0
    fault: ApiError | None = None
    first: float | None = None
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def over(self) -> bool:
        """Has it ended, well or not?"""
        return bool(self.finish) or self.fault is not None


def checked_settings(
    limits: Limits, model: object, temperature: object, top_p: object, most: object, tiles: object, seed: object, system: object
) -> Settings:
    """What the widgets hold as Settings; a browser can send anything. Raises: ApiError with the limits."""
    try:
        heat, share, length = float(temperature), float(top_p), int(most)  # type: ignore[call-overload,arg-type]
        cut = int(tiles) if tiles else None  # type: ignore[call-overload]
        number = None if seed is None or seed == "" else int(seed)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        raise bad("invalid_value", "a setting is not a number") from None
    if not 0 <= heat <= 2 or not 0 < share <= 1:
        raise bad("invalid_value", "temperature goes from 0 to 2, top-p from just above 0 to 1")
    if not 1 <= length <= limits.new_tokens:
        raise bad("invalid_value", f"the longest answer goes from 1 to {limits.new_tokens:,} tokens")
    if number is not None and not 0 <= number < 2**31:
        raise bad("invalid_value", "the seed goes from 0 to 2,147,483,647")
    if cut is not None and cut < 1:
        raise bad("invalid_value", "a picture has at least 1 tile")
    return Settings(str(model or ""), heat, share, length, cut, number, str(system or "").strip())


def refuse_long(talk: Talk, chosen: Settings = Settings()) -> None:
    """Raise an ApiError when a conversation, its failed questions too, is longer than the API takes: its length is everybody's time."""
    if len(talk) > MOST_MESSAGES // 2:
        what = f"the conversation has {len(talk)} questions; the limit is {MOST_MESSAGES // 2}; begin a new one"
        raise bad("context_length_exceeded", what)
    letters = len(chosen.system) + sum(len(one.text) + len(one.answer) for one in talk)
    if letters > MOST_LETTERS:
        raise bad("context_length_exceeded", f"the texts have {letters:,} characters; the limit is {MOST_LETTERS:,}")


def read_photos(files: Sequence[str], folder: Path, serving: Serving, tiles: int | None) -> list[Photo]:
    """The pictures behind files of the page's folder. Raises: ApiError for what is not there, not ours or not a picture."""
    if len(files) > serving.media.pictures:
        raise bad("too_many_images", f"the conversation has {len(files)} pictures; the limit is {serving.media.pictures}")
    photos, pixels = [], 0
    for number, name in enumerate(files, 1):
        path = Path(name).resolve()
        if not path.is_relative_to(folder):
            raise bad("invalid_image", "this picture was not uploaded here")
        try:
            data = path.read_bytes()
            path.touch()  # asked about: not old yet
        except OSError:
            raise bad("expired", "the pictures of this conversation were deleted after a while; please send them again") from None
        photo = checked_photo(data, f"picture {number}", serving.media, tiles)
        pixels += photo.size[0] * photo.size[1]
        if pixels > serving.media.request_pixels:
            raise bad("image_too_large", f"the pictures have {pixels:,} pixels together; the limit is {serving.media.request_pixels:,}")
        photos.append(photo)
    return photos


def strip_of(files: Sequence[str], folder: Path, serving: Serving) -> tuple[str, ...]:
    """The pictures side by side, small, as one file to show: of any format, also where a browser does not know it.

    Raises: ApiError or PictureError, so that a picture that cannot be read is said before the model is asked.
    """
    small = []
    for photo in read_photos(files, folder, serving, None):
        picture = load_picture(photo.data, "the picture")
        scale = min(_STRIP / picture.height, 3 * _STRIP / picture.width)
        small.append(picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))))
    if not small:
        return ()
    rows = [small[at : at + _A_ROW] for at in range(0, len(small), _A_ROW)]
    width = max(sum(one.width + _GAP for one in row) - _GAP for row in rows)
    heights = [max(one.height for one in row) for row in rows]
    whole = Image.new("RGBA", (width, sum(heights) + _GAP * (len(rows) - 1)))
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for one in row:
            whole.paste(one, (left, top))
            left += one.width + _GAP
        top += height + _GAP
    path = folder / f"strip-{secrets.token_hex(16)}.webp"
    whole.save(path, "WEBP", quality=85)
    return (str(path),)


async def request_of(talk: Talk, chosen: Settings, visitor: str, folder: Path, serving: Serving) -> Request:
    """The engine's request for the last question of `talk`. Exchanges that failed without a word are left out. Raises: ApiError."""
    refuse_long(talk, chosen)
    kept = [one for one in talk[:-1] if one.answer] + [talk[-1]]
    files = [name for one in kept for name in one.pictures]
    photos = iter(await asyncio.to_thread(read_photos, files, folder, serving, chosen.tiles))
    turns = [ChatTurn("system", (chosen.system,))] if chosen.system else []
    for one in kept:
        parts = [part for _ in one.pictures for part in (next(photos), "\n")]
        turns.append(ChatTurn("user", (*parts, one.text)))
        if one is not kept[-1]:
            turns.append(ChatTurn("assistant", (one.answer,)))
    sampling = Sampling(chosen.most, chosen.temperature, chosen.top_p, seed=chosen.seed)
    return Request(tuple(turns), sampling, chosen.model, visitor)


async def answers(
    desk: Desk, requests: Sequence[Request], metrics: Metrics | None = None, every: float = EVERY
) -> AsyncGenerator[list[Side], None]:
    """All answers growing together, until the last has ended; the list is the same one each time. Leaving it cancels them all."""
    sides, news = [Side() for _ in requests], asyncio.Event()

    async def follow(request: Request, side: Side) -> None:
        try:
            async with contextlib.aclosing(desk.answer(request)) as pieces:
                async for piece in pieces:
                    if piece.tokens and side.first is None:
                        side.first = time.perf_counter() - side.began
                    side.text += piece.text
                    side.tokens = max(side.tokens, piece.tokens)
                    if piece.prompt_tokens:
                        side.prompt_tokens, side.reused = piece.prompt_tokens, piece.reused
                    side.seconds = time.perf_counter() - side.began
                    side.finish = piece.finish
                    news.set()
        except Exception as error:
            side.fault = told(error)
        finally:
            _count(metrics, request.model or desk.models[0], side)
            side.finish = side.finish or ("" if side.fault else "stop")
            news.set()

    tasks = [asyncio.create_task(follow(*pair)) for pair in zip(requests, sides, strict=True)]
    try:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LIFE):  # not wait_for: in Python 3.11 it loses a cancel that comes together with the news
                    await news.wait()
            news.clear()
            ended = all(task.done() for task in tasks)
            yield sides  # also without news: only so a visitor who has gone is noticed
            if ended:
                return
            await asyncio.sleep(every)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def told(error: Exception) -> ApiError:
    """What to say about an error; what nobody foresaw goes to the log with its traceback."""
    known = as_api_error(error)
    if known is None or (known.status >= 500 and error.__cause__ is not None):
        log.error("an answer on the page failed", exc_info=error)
    return known or ApiError(500, "internal_error", "the server failed on this question; its log has the reason")


def _count(metrics: Metrics | None, model: str, side: Side) -> None:
    if metrics is None:
        return
    outcome = "done" if side.finish else "cancelled" if side.fault is None else "refused" if side.fault.status < 500 else "failed"
    metrics.requests.labels(model, outcome).inc()
    if outcome == "cancelled":
        metrics.cancelled.inc()
    if side.fault is not None:
        metrics.refused.labels(side.fault.code).inc()
    if side.first is not None:
        metrics.ttft.labels(model).observe(side.first)
        metrics.seconds.labels(model).observe(side.seconds)
        metrics.prompt_tokens.labels(model).inc(side.prompt_tokens)
        metrics.reused_tokens.labels(model).inc(side.reused)
        metrics.tokens.labels(model).inc(side.tokens)


def numbers(side: Side, language: str) -> str:
    """What an answer cost, in one line."""
    if side.first is None:
        return ""
    parts = [
        pick(language, f"{side.tokens} token{'s' * (side.tokens != 1)}", f"{side.tokens} 个 token"),
        pick(language, f"first after {side.first:.1f} s", f"首字 {side.first:.1f} 秒"),
        pick(language, f"{side.seconds:.1f} s in all", f"共 {side.seconds:.1f} 秒"),
    ]
    if side.finish == "length":
        parts.append(pick(language, "cut at the longest answer", "已达最长回答"))
    return " · ".join(parts)


_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
_JOINER = "\u2060"  # has no width


def shown(text: str) -> str:
    """Text for the chat window: nothing in it is markup of the page, so a typed <tag> or control token stays what it is.

    A joiner breaks what would be a tag, and not an entity like &lt;, which a visitor would meet again where he edits or copies.
    """
    pieces = _CODE.split(text)
    return "".join(piece if at % 2 else _MARKUP.sub(lambda found: found[0] + _JOINER, piece) for at, piece in enumerate(pieces))


def typed(text: str) -> str:
    """What `shown` made, as it was."""
    return text.replace(_JOINER, "")
