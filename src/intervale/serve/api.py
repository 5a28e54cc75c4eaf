"""OpenAI's API: /v1/chat/completions (whole or streamed), /v1/models; and /health and /metrics.

Promises: what is wrong with a request is said with a 4xx before the first byte of an answer; a client that goes away, streaming or
not, stops its answer within one token; an error in the middle of a stream is an event of its own, after which the stream ends. Prompts and
answers are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from intervale.core.errors import nearest
from intervale.core.wire import to_json
from intervale.engine.api import ChatTurn, Delta, Desk, Likely, Photo, Request, Sampling, joined
from intervale.serve.errors import ApiError, as_api_error, bad
from intervale.serve.limits import Limits, read_body
from intervale.serve.media import MediaLimits, fetch_picture, photos_of
from intervale.serve.metrics import Metrics
from intervale.serve.schema import ChatBody, read_chat

log = logging.getLogger("intervale.serve")
_T = TypeVar("_T")
_SMALL = 1 << 20  # bytes of a body that are read faster than a thread is found for it
_CROWD, _PACE = 8, 0.01  # with more answers than that, events of a stream come at most every so many seconds


class _GoneError(Exception):
    """The client went away."""


@dataclass
class _Answering:
    """One request on its way: what the log and the counters will say."""

    number: str
    model: str = "?"
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: Delta = field(default_factory=lambda: Delta("", 0))
    outcome: str = "cancelled"

    def saw(self, piece: Delta) -> None:
        if piece.tokens and self.first is None:
            self.first = time.perf_counter() - self.began
        self.last = piece if piece.tokens or piece.prompt_tokens else self.last


def add_api(app: FastAPI, desk: Desk, limits: Limits, media: MediaLimits, metrics: Metrics) -> None:
    """Put the routes onto the app."""
    born = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": born, "owned_by": "intervale"}

    @app.get("/health")
    async def health() -> JSONResponse:
        fault = desk.fault()
        return JSONResponse({"status": "unavailable" if fault else "ok"}, 503 if fault else 200)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in desk.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return entry(_known(desk, name))

    async def chat(http: HttpRequest) -> Response:
        doing = _Answering(http.state.request_id)
        try:
            return await _chat(http, desk, limits, media, metrics, doing)
        except (_GoneError, ConnectionError, asyncio.CancelledError) as error:
            _finish(metrics, doing)
            if isinstance(error, asyncio.CancelledError):
                raise
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            raise _failed(error, metrics, doing) from error

    # A plain route: the body is read by `_chat`, and FastAPI has nothing to fill in.
    app.add_route("/v1/chat/completions", chat, methods=["POST"])


async def _chat(http: HttpRequest, desk: Desk, limits: Limits, media: MediaLimits, metrics: Metrics, doing: _Answering) -> Response:
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        # Also what keeps other sites out: a browser sends this type only after asking, and we never say yes.
        raise ApiError(415, "unsupported_media_type", "send the request with Content-Type: application/json")
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_media_type", "send the request without compression")
    raw = await read_body(http.receive)
    body = read_chat(raw) if len(raw) < _SMALL else await asyncio.to_thread(read_chat, raw)
    doing.model = _known(desk, body.model)
    pieces, first = await _unless_gone(http, _begun(_asked(body, limits, media, http.state.visitor), desk, doing))
    if not body.stream:
        async with contextlib.aclosing(pieces):
            whole = await _unless_gone(http, _whole(pieces, first, doing))
        answer = _completion(doing, whole, body.likely() is not None)  # before it is finished: then its number is gone
        _finish(metrics, doing, "done")
        return JSONResponse(answer)
    usage = body.stream_options is not None and body.stream_options.include_usage
    steady = _paced(first, pieces) if desk.load().active > _CROWD else _from(first, pieces)
    return _Events(pieces, _events(steady, doing, metrics, usage))


def _known(desk: Desk, name: str) -> str:
    if name not in desk.models:
        models = ", ".join(desk.models)
        raise ApiError(
            404, "model_not_found", f"there is no model {name[:80]!r}{nearest(name[:80], desk.models)}; there is {models}", "model"
        )
    return name


async def _asked(body: ChatBody, limits: Limits, media: MediaLimits, visitor: str) -> Request:
    """The engine's request. A picture stands where its part does, a line break after it, as in the official form."""
    most = body.most_tokens()
    if most is not None and most > limits.new_tokens:
        raise bad("invalid_value", f"max_tokens is {most:,}; the limit is {limits.new_tokens:,}", "max_tokens")
    urls = [
        (f"messages[{at}].content[{number}]", part.image_url.url, 1 if part.image_url.detail == "low" else None)
        for at, message in enumerate(body.messages)
        for number, part in enumerate(message.content)
        if part.type == "image_url"
    ]

    async def fetch(url: str) -> bytes:
        return await fetch_picture(url, media)

    photos = iter(await photos_of(urls, media, fetch))
    turns = []
    for message in body.messages:
        parts: list[str | Photo] = []
        for part in message.content:
            parts += [part.text] if part.type == "text" else [next(photos), "\n"]
        turns.append(ChatTurn("system" if message.role == "developer" else message.role, tuple(parts)))
    sampling = Sampling(
        max_new_tokens=most or min(limits.default_new_tokens, limits.new_tokens),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=body.seed,
        stop=tuple(body.stop or ()),
        likely=body.likely(),
    )
    return Request(tuple(turns), sampling, body.model, visitor)


async def _unless_gone(http: HttpRequest, work: Awaitable[_T]) -> _T:
    """The work's result, or _GoneError as soon as the client disconnects."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError
        return task.result()
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await one


async def _begun(asked: Awaitable[Request], desk: Desk, doing: _Answering) -> tuple[AsyncGenerator[Delta, None], Delta]:
    """An answer and its first piece that says something: until then a refusal can still be a 4xx."""
    pieces = desk.answer(await asked)
    try:
        async for piece in pieces:
            doing.saw(piece)
            if piece.tokens or piece.finish:
                return pieces, piece
        raise RuntimeError("an answer without an end")
    except BaseException:
        await pieces.aclose()
        raise


async def _whole(pieces: AsyncGenerator[Delta, None], first: Delta, doing: _Answering) -> Delta:
    """The answer as one piece."""
    told = [first]
    if not first.finish:
        async for piece in pieces:
            doing.saw(piece)
            told.append(piece)
    doing.last = joined(told, doing.last)
    return doing.last


class _Events(StreamingResponse):
    """Server-sent events; however it ends, and even if it never begins, the answer is left."""

    def __init__(self, pieces: AsyncGenerator[Delta, None], events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._pieces, self._events = pieces, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._pieces.aclose()


async def _events(pieces: AsyncGenerator[Delta, None], doing: _Answering, metrics: Metrics, usage: bool) -> AsyncGenerator[bytes, None]:
    """The stream's events; the role first, then the text, then the reason it ended. What there is to say at one time is sent at once."""

    def chunk(delta: dict[str, str], finish: str | None = None, likely: tuple[Likely, ...] = ()) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": _logprobs(likely) if likely else None, "finish_reason": finish}
        return _event(_head(doing, "chat.completion.chunk") | {"choices": [choice]} | ({"usage": None} if usage else {}))

    said = chunk({"role": "assistant", "content": ""})
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                doing.saw(piece)
                if piece.text or piece.likely:
                    said += chunk({"content": piece.text}, likely=piece.likely)
                if piece.finish:
                    said += chunk({}, piece.finish)
                elif said:
                    yield said
                    said = b""
        if usage:
            said += _event(_head(doing, "chat.completion.chunk") | {"choices": [], "usage": _usage(doing.last)})
        yield said + b"data: [DONE]\n\n"
        _finish(metrics, doing, "done")
    except Exception as error:
        yield said + _event(_failed(error, metrics, doing).body())
    finally:
        _finish(metrics, doing)


async def _from(first: Delta, rest: AsyncIterator[Delta]) -> AsyncGenerator[Delta, None]:
    yield first
    if not first.finish:
        async for piece in rest:
            yield piece


async def _paced(first: Delta, rest: AsyncIterator[Delta]) -> AsyncGenerator[Delta, None]:
    """The pieces, those of each hundredth of a second as one: with many streams at once, sending is what costs. The end waits for nothing."""
    yield first
    if first.finish:
        return
    came, due, waiting, faults, over = asyncio.Event(), asyncio.Event(), list[Delta](), list[Exception](), False

    async def read() -> None:
        nonlocal over
        try:
            async for piece in rest:
                waiting.append(piece)
                if piece.finish:
                    break
                came.set()
        except Exception as error:
            faults.append(error)
        over = True
        came.set()
        due.set()

    task = asyncio.create_task(read())
    try:
        while True:
            await came.wait()
            if not over:
                due.clear()
                alarm = asyncio.get_running_loop().call_later(_PACE, due.set)
                await due.wait()
                alarm.cancel()
            came.clear()
            ends, some, waiting[:] = over, list(waiting), []
            if some:
                yield joined(some)
            if faults:
                raise faults[0]
            if ends:
                return
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _head(doing: _Answering, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{doing.number}", "object": kind, "created": int(time.time()), "model": doing.model}


def _usage(last: Delta) -> dict[str, Any]:
    counts = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": last.prompt_tokens + last.tokens}
    return counts | {"prompt_tokens_details": {"cached_tokens": last.reused}}


def _logprobs(likely: tuple[Likely, ...]) -> dict[str, Any]:
    """OpenAI's form. Minus infinity is no JSON; their word for next to nothing is -9999."""

    def entry(one: Likely) -> dict[str, Any]:
        return {"token": one.token, "logprob": max(one.logprob, -9999.0), "bytes": None if one.raw is None else list(one.raw)}

    return {"content": [entry(one) | {"top_logprobs": [entry(other) for other in one.top]} for one in likely], "refusal": None}


def _completion(doing: _Answering, whole: Delta, likely: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": whole.text, "refusal": None}
    logprobs = _logprobs(whole.likely) if likely else None
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": whole.finish}
    return _head(doing, "chat.completion") | {"choices": [choice], "usage": _usage(doing.last)}


def _finish(metrics: Metrics, doing: _Answering, outcome: str = "cancelled") -> None:
    """Count and log a request, once."""
    if doing.number == "":
        return
    seconds = time.perf_counter() - doing.began
    metrics.requests.labels(doing.model, outcome).inc()
    if outcome == "cancelled":
        metrics.cancelled.inc()
    if doing.first is not None:
        metrics.ttft.labels(doing.model).observe(doing.first)
        metrics.seconds.labels(doing.model).observe(seconds)
        metrics.prompt_tokens.labels(doing.model).inc(doing.last.prompt_tokens)
        metrics.reused_tokens.labels(doing.model).inc(doing.last.reused)
        metrics.tokens.labels(doing.model).inc(doing.last.tokens)
    counts = f"{doing.last.prompt_tokens}+{doing.last.tokens} tokens"
    log.info("%s %s %s %s %.2fs", doing.number[:12], doing.model, outcome, counts, seconds)
    doing.number = ""


def _failed(error: Exception, metrics: Metrics, doing: _Answering) -> ApiError:
    """What to tell about an error; what nobody foresaw goes to the log with its traceback, under the request's id."""
    told = as_api_error(error)
    if told is None:
        log.error("request %s failed", doing.number, exc_info=error)
        told = ApiError(500, "internal_error", f"the server failed on this request; its log has the reason under {doing.number}")
    elif told.status >= 500:
        log.error("request %s failed: %s", doing.number, told.message, exc_info=error.__cause__)
    metrics.refused.labels(told.code).inc()
    _finish(metrics, doing, "refused" if told.status < 500 else "failed")
    return told
