"""Any OpenAI-compatible server as an engine: LMDeploy, vLLM, SGLang, or a model behind somebody's API.

Promises: a request is tried again, with growing pauses, only as long as no token has come; leaving an answer closes its connection,
which is what such servers stop on. Pictures go as data URLs, encoded ones byte for byte. What the other server says about an error is
for the terminal (`fix`), never for a gateway's clients (`what`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pybase64
from PIL import Image

from intervale.core.errors import UserError, nearest
from intervale.core.wire import from_json, to_json
from intervale.engine.api import ChatTurn, Delta, EngineError, Likely, Load, Photo, RefusedError, Request, UpstreamRefusedError, joined
from intervale.engine.upstream import Upstream, web_address

_AGAIN = (408, 429, 502, 503, 504)  # the server was busy or away: it did not look at the request
_LONGEST_PAUSE = 30.0  # seconds, also where the server asks for more
_LONGEST_EVENT = 4 << 20  # bytes of one line
_LAST_WORD = 0.2  # seconds for the end of an answer after its last event


@dataclass(eq=False)
class RetryError(Exception):
    """Not now; `after` seconds if the server said so, and what to tell when it stays that way."""

    told: EngineError
    after: float | None = None


class RemoteEngine:
    """Both an Engine (`stream`, for the terminal) and a Desk (`answer`, for a gateway) in front of a server at `base_url`."""

    def __init__(
        self,
        base_url: str,
        models: tuple[str, ...],
        key: str = "",
        *,
        room: int = 256,
        retries: int = 3,
        pause: float = 0.5,
        seconds: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url, self.models = web_address(base_url), models
        if key and httpx.URL(self.url).userinfo:
            raise UserError("there is a key, and a name in --base-url; a request has room for one of them", "leave one of them out")
        if not (key.isascii() and key.isprintable()):
            raise UserError("the key for the engine's server has characters that no request can carry", "set it anew, without a line break")
        self._asking = httpx.URL(f"{self.url}/chat/completions")
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
        self._headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self._room, self._retries, self._pause = room, retries, pause
        self._timeout = httpx.Timeout(seconds, connect=10.0).as_dict()
        self._given = transport
        self._active, self._fault, self._closed = 0, "", False
        self._ways: dict[asyncio.AbstractEventLoop, Upstream] = {}

    def load(self) -> Load:
        """How busy it is; what waits, waits at the other server."""
        return Load(self._active, 0, self._room)

    def fault(self) -> str:
        """What went wrong when the server could not be reached the last time; '' since it answered."""
        return "the engine has stopped" if self._closed else self._fault

    def close(self) -> None:
        """Take no more requests."""
        self._closed = True

    def stream(self, request: Request) -> Iterator[Delta]:
        """`answer` for a caller without an event loop."""
        loop = asyncio.new_event_loop()
        pieces = self.answer(request)
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(pieces))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(pieces.aclose())
            loop.run_until_complete(self._leave())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def answer(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece; closing the generator closes the connection."""
        if self._closed:
            raise EngineError("the server is stopping", "try again later", "engine_unavailable", 5)
        if self._active >= self._room:
            raise EngineError(f"{self._active} requests are being answered; the limit is {self._room}", "try again soon", "busy", 2)
        model = request.model or self.models[0]
        if model not in self.models:
            known = ", ".join(self.models)
            raise RefusedError(
                f"there is no model {model[:80]!r}{nearest(model[:80], self.models)}", f"use one of {known}", "model_not_found"
            )
        if request.turns and request.turns[-1].role != "user":  # LMDeploy would take it as a finished answer, without a word
            raise RefusedError("this engine's server cannot go on with a begun answer", "end with the user's turn", "unsupported_value")
        self._active += 1
        try:
            large = any(isinstance(part, Image.Image) for turn in request.turns for part in turn.parts)  # to be compressed
            body = await asyncio.to_thread(_body, request, model) if large else _body(request, model)
            for attempt in range(self._retries + 1):
                try:
                    async with aclosing(self._attempt(body, request.sampling.likely)) as pieces:
                        async for piece in pieces:
                            yield piece
                    return
                except RetryError as again:
                    self._fault = again.told.what if again.told.code == "engine_unavailable" else ""
                    if attempt == self._retries:
                        raise again.told from again
                    pause = self._pause * 2**attempt * (1 + random.random() / 4) if again.after is None else again.after
                    await asyncio.sleep(min(pause, _LONGEST_PAUSE))
        finally:
            self._active -= 1

    async def _attempt(self, body: bytes, likely: int | None) -> AsyncGenerator[Delta, None]:
        """One try. Raises: RetryError while nothing has been said."""
        begun = False
        # Straight to the transport: there is nothing to sign, to redirect to or to remember, which is what a client would look after.
        asked = httpx.Request("POST", self._asking, headers=self._headers, content=body, extensions={"timeout": self._timeout})
        try:
            async with aclosing(await self._transport().handle_async_request(asked)) as got:
                if got.status_code != 200:
                    raise await refusal(got)
                self._fault = ""
                async with aclosing(_pieces(got, likely)) as pieces:
                    async for piece in pieces:
                        begun = True  # also by a token that has no text yet
                        yield piece
        except httpx.HTTPError as error:
            if begun:
                what = "the engine's server broke off in the middle of the answer"
                raise EngineError(what, "ask again", "engine_interrupted") from error
            what = (
                "the engine's server cannot be reached" if isinstance(error, httpx.ConnectError) else "the engine's server does not answer"
            )
            raise RetryError(EngineError(what, f"is it running at {self.url}?", "engine_unavailable", 5)) from error

    def _transport(self) -> httpx.AsyncBaseTransport:
        """One an event loop: its connections are kept, and belong to the loop."""
        if self._given is not None:
            return self._given
        loop = asyncio.get_running_loop()
        if loop not in self._ways:
            for other in [*self._ways]:  # a copy: loops of other threads come and go meanwhile
                if other.is_closed():
                    self._ways.pop(other, None)
            self._ways[loop] = Upstream(self._asking.scheme == "https")
        return self._ways[loop]

    async def _leave(self) -> None:
        way = self._ways.pop(asyncio.get_running_loop(), None)
        if way is not None:
            await way.aclose()


def _body(request: Request, model: str) -> bytes:
    """The request as OpenAI's JSON, to be answered as a stream."""
    return to_json(request_json(request, model) | {"stream": True, "stream_options": {"include_usage": True}})


def request_json(request: Request, model: str) -> dict[str, Any]:
    """The request as OpenAI's JSON object, without a word on how the answer is to come."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": turn.role, "content": _content(turn)} for turn in request.turns],
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    optional = {"top_k": sampling.top_k or None, "seed": sampling.seed, "stop": list(sampling.stop) or None}
    if sampling.likely is not None:
        optional |= {"logprobs": True, "top_logprobs": max(1, sampling.likely)}  # LMDeploy gives none for 0
    return body | {name: value for name, value in optional.items() if value is not None}


def _content(turn: ChatTurn) -> str | list[dict[str, Any]]:
    """A turn's content: a plain text where it has no picture, since not every template takes parts."""
    if all(isinstance(part, str) for part in turn.parts):
        return "".join(part for part in turn.parts if isinstance(part, str))
    parts: list[dict[str, Any]] = []
    after_picture = False
    for part in turn.parts:
        if isinstance(part, str):
            # The line break after a picture is the template's, which is the other server's here.
            text = part.removeprefix("\n") if after_picture else part
            if text:
                parts.append({"type": "text", "text": text})
        else:
            low = {"detail": "low"} if isinstance(part, Photo) and part.max_tiles == 1 else {}
            parts.append({"type": "image_url", "image_url": {"url": _data_url(part)} | low})
        after_picture = not isinstance(part, str)
    return parts


def _data_url(picture: Image.Image | Photo) -> str:
    if isinstance(picture, Photo):
        return f"data:{picture.media};base64,{pybase64.b64encode_as_string(picture.data)}"
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return f"data:image/png;base64,{pybase64.b64encode_as_string(out.getvalue())}"


async def refusal(got: httpx.Response) -> Exception:
    """What an answer that is not 200 means."""
    raw = bytearray()
    async for part in got.aiter_bytes():
        raw += part
        if len(raw) > 20_000:
            break
    said, code = bytes(raw[:300]).decode("utf-8", "replace"), ""
    try:
        value = from_json(bytes(raw))
        error = value.get("error", value)
        said, code = str(error.get("message", said))[:300], str(error.get("code", ""))
    except (ValueError, AttributeError):
        pass
    status = got.status_code
    if status in _AGAIN:
        after = got.headers.get("retry-after", "")
        busy = status == 429
        what = "the engine's server is busy" if busy else f"the engine's server is not ready ({status})"
        told = EngineError(what, f"try again in a few seconds; it said: {said}", "busy" if busy else "engine_unavailable", 5)
        return RetryError(told, _seconds(after))
    if status in (400, 413, 422):
        known = code if code in ("context_length_exceeded", "invalid_image") else "upstream_refused"
        return UpstreamRefusedError(f"the engine's server refused the request ({status})", f"it said: {said}", known)
    return EngineError(
        f"the engine's server answered {status}", f"check --base-url, the model's name and the key; it said: {said}", "upstream_failed"
    )


def _seconds(after: str) -> float | None:
    """A Retry-After header: seconds, or a date. None when it says nothing."""
    try:
        return max(0.0, float(after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


async def _pieces(got: httpx.Response, likely: int | None = None) -> AsyncGenerator[Delta, None]:
    """The deltas of an event stream, those that came together as one; the last one carries the finish and the counts.

    Raises: EngineError for an error in the stream; RefusedError where log-probabilities (`likely` beside each) were asked for and do not come.
    """
    reading = _Reading(likely)
    fault: EngineError | RefusedError | httpx.HTTPError | None = None
    async with aclosing(_events(got)) as parts:
        async for events in parts:
            told = list[Delta]()
            try:
                for event in events:
                    told += reading.deltas(event)
            except (EngineError, RefusedError) as error:
                fault = error
            except (AttributeError, TypeError, ValueError) as error:
                fault = httpx.RemoteProtocolError(f"an event of another form: {error}")
            if told:
                yield told[0] if len(told) == 1 else joined(told)
            if fault is not None:
                raise fault
    if not reading.finish:
        raise httpx.RemoteProtocolError("the stream ended without a reason")
    yield Delta("", reading.tokens, reading.finish, reading.prompt, reading.reused)


@dataclass
class _Reading:
    """What was read of one answer so far."""

    likely: int | None
    tokens: int = 0
    prompt: int = 0
    reused: int = 0
    finish: str = ""
    given: bool = False  # log-probabilities have come

    def deltas(self, event: dict[str, Any]) -> Iterator[Delta]:
        """The pieces of text in an event. Raises: as `_pieces`."""
        if event.get("error"):
            raise EngineError("the engine's server failed in the middle of the answer", f"it said: {event['error']}", "engine_interrupted")
        if usage := event.get("usage"):
            self.tokens, self.prompt = int(usage.get("completion_tokens") or self.tokens), int(usage.get("prompt_tokens") or 0)
            self.reused = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        for choice in event.get("choices") or []:
            text = (choice.get("delta") or {}).get("content") or ""
            if not isinstance(text, str):
                raise TypeError("text that is none")
            self.finish = choice.get("finish_reason") or self.finish
            found = () if self.likely is None else _likely(choice, self.likely)
            self.given = self.given or bool(found)
            if text and self.likely is not None and not self.given:
                raise RefusedError("the engine's server gives no log-probabilities", "ask without logprobs", "unsupported_value")
            if text or found:  # text that was held back comes without a token of its own
                self.tokens += 1 if self.likely is None else len(found)
                yield Delta(text, self.tokens, likely=found)


def _likely(choice: dict[str, Any], most: int) -> tuple[Likely, ...]:
    """The tokens of a chunk. Raises: RefusedError when they are not in OpenAI's form."""

    def entry(one: dict[str, Any], top: Sequence[dict[str, Any]] = ()) -> Likely:
        raw = one.get("bytes")
        told = None if raw is None else bytes([*raw])  # of a number alone, bytes() would make as many zeros
        return Likely(str(one["token"]), told, float(one["logprob"]), tuple(entry(other) for other in top))

    def tops(one: dict[str, Any]) -> list[dict[str, Any]]:
        found = list(one.get("top_logprobs") or [])
        if one["token"] not in [other["token"] for other in found]:  # LMDeploy lists the others only
            found = sorted([*found, one], key=lambda other: -float(other["logprob"]))
        return found[:most]

    try:
        told = (choice.get("logprobs") or {}).get("content") or []
        return tuple(entry(one, tops(one)) for one in told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            "the engine's server gives log-probabilities in another form", "ask without logprobs", "unsupported_value"
        ) from error


async def _events(got: httpx.Response) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The events of a stream, as many at once as came at once."""
    async with aclosing(_lines(got)) as parts:
        async for lines in parts:
            events, done = list[dict[str, Any]](), False
            try:
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        done = True
                        break
                    event = _json(data)
                    if isinstance(event, dict):
                        events.append(event)
            except ValueError as error:
                yield events
                raise httpx.RemoteProtocolError("an event that is not JSON") from error
            yield events
            if done:
                await _to_its_end(parts)
                return


def _json(data: bytes) -> Any:
    """The value. Raises: ValueError. Bytes that are no UTF-8 are told as such characters, not refused."""
    try:
        return from_json(data)
    except ValueError:
        return from_json(data.decode("utf-8", "replace"))


async def _to_its_end(parts: AsyncGenerator[list[bytes], None]) -> None:
    """Nothing comes after [DONE] but the end of the answer; only when that was read can its connection serve the next request."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):  # how it ends is no part of the answer
        async with asyncio.timeout(_LAST_WORD):
            async for _ in parts:
                pass


async def _lines(got: httpx.Response) -> AsyncGenerator[list[bytes], None]:
    """The lines of an answer, as many at once as came at once."""
    rest = b""
    async for part in got.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > _LONGEST_EVENT:
            raise httpx.RemoteProtocolError("an event without an end")
        if lines:
            yield lines
    if rest:
        yield [rest]
