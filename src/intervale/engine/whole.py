"""Whole answers of an OpenAI-compatible server, many at a time: for evaluation, where nobody reads along.

Promises: a request is asked again, with growing pauses, when the server is busy (its Retry-After is kept to, by all requests), away,
slow, fails, or replies with something that is no answer; what it refuses is told, never retried. At most `concurrency` requests are
open. Log-probabilities are what the server gives, or an error: never something else in their place. Cost: a connection a request.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from intervale.core.wire import to_json
from intervale.engine.api import EngineError, Request, UpstreamRefusedError
from intervale.engine.remote import RetryError, refusal, request_json

_LONGEST_PAUSE = 120.0  # seconds, also where the server asks for more
_LONGEST_REPLY = 16 << 20  # bytes


@dataclass(frozen=True)
class Server:
    """Where to ask and how patiently. `extra` goes into every request's JSON (None takes a key out); the key is never shown."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    concurrency: int = 8
    retries: int = 6
    pause: float = 1.0
    seconds: float = 120.0
    extra: dict[str, Any] = field(default_factory=dict)
    transport: httpx.AsyncBaseTransport | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Whole:
    """One answer. `first` are the likeliest first tokens with their log-probabilities (None: not asked for). Counts are None where untold."""

    text: str
    finish: str
    prompt_tokens: int | None
    tokens: int | None
    first: tuple[tuple[str, float], ...] | None
    seconds: float


@dataclass(frozen=True)
class Ask:
    """A request to make when its turn comes (its pictures are read then), how many likeliest first tokens are wanted with it, and
    what more goes into its JSON."""

    key: str
    make: Callable[[], Request]
    top: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


Answered = tuple[str, Whole | UpstreamRefusedError]


def ask_all(server: Server, asks: Sequence[Ask]) -> Generator[list[Answered], None, None]:
    """Every ask's answer, or how it was refused, as they come. Close the generator when you leave it: that closes the connections.

    Raises: EngineError when the server stays away, or answers what is no use to anybody (a wrong key, an unknown model).
    """
    loop = asyncio.new_event_loop()
    came: asyncio.Queue[Answered | Exception] = asyncio.Queue()
    crowd = loop.create_task(_crowd(server, asks, came))
    try:
        left = len(asks)
        while left:
            together = [loop.run_until_complete(came.get())]
            while not came.empty():
                together.append(came.get_nowait())
            good = [one for one in together if not isinstance(one, Exception)]
            left -= len(good)
            if good:
                yield good
            for one in together:
                if isinstance(one, Exception):
                    raise one
    finally:
        left_over = {crowd, *asyncio.all_tasks(loop)}  # after a Ctrl-C also what was being waited for
        for task in left_over:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left_over, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _crowd(server: Server, asks: Sequence[Ask], came: asyncio.Queue[Answered | Exception]) -> None:
    """`concurrency` workers on one list and one client; the first failure is passed on and ends them all."""
    todo = iter(asks)
    gate = _Gate()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=server.concurrency)
    timeout = httpx.Timeout(server.seconds, connect=min(10.0, server.seconds))
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {server.key}"} if server.key else {})
    async with httpx.AsyncClient(timeout=timeout, limits=limits, headers=headers, transport=server.transport, trust_env=False) as client:

        async def work() -> None:
            for ask in todo:
                try:
                    came.put_nowait((ask.key, await _answer(client, server, ask, gate)))
                except UpstreamRefusedError as refused:
                    came.put_nowait((ask.key, refused))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(server.concurrency, len(asks))):
                    group.create_task(work())
        except* Exception as failed:
            came.put_nowait(_first(failed))


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    one = group.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one


class _Gate:
    """Until when nobody may ask, because the server said so."""

    def __init__(self) -> None:
        self._until = 0.0

    async def wait(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def close(self, seconds: float) -> None:
        self._until = max(self._until, time.monotonic() + seconds)


async def _answer(client: httpx.AsyncClient, server: Server, ask: Ask, gate: _Gate) -> Whole:
    """One answer, asked for as often as it takes. Raises: EngineError, UpstreamRefusedError."""
    request = await asyncio.to_thread(ask.make)
    body = await asyncio.to_thread(_body, server, request, ask)
    for attempt in range(server.retries + 1):
        await gate.wait()
        began = time.monotonic()
        try:
            return await _try(client, server, body, ask.top, began)
        except RetryError as again:
            if attempt == server.retries:
                raise again.told from again
            if again.after is not None:
                gate.close(min(again.after, _LONGEST_PAUSE))
            else:
                await asyncio.sleep(min(server.pause * 2**attempt * (1 + random.random() / 4), _LONGEST_PAUSE))
    raise AssertionError("the last attempt returns or raises")


def _body(server: Server, request: Request, ask: Ask) -> bytes:
    body = request_json(request, server.model) | {"stream": False}
    body |= {"logprobs": True, "top_logprobs": ask.top} if ask.top else {}
    body |= ask.extra | server.extra
    return to_json({name: value for name, value in body.items() if value is not None})


async def _try(client: httpx.AsyncClient, server: Server, body: bytes, top: int, began: float) -> Whole:
    try:
        # httpx's timeouts are for each piece; a server that drips bytes would never meet one.
        async with asyncio.timeout(server.seconds), client.stream("POST", f"{server.url}/chat/completions", content=body) as got:
            if got.status_code != 200:
                told = await refusal(got)
                if got.status_code >= 500 and isinstance(told, EngineError):  # for a reader it is an error; here there is time
                    raise RetryError(told)
                raise told
            raw = bytearray()
            async for part in got.aiter_bytes():
                raw += part
                if len(raw) > _LONGEST_REPLY:
                    raise _malformed("it is too long")
    except (httpx.HTTPError, TimeoutError) as error:
        away = isinstance(error, httpx.ConnectError)
        what = "the server cannot be reached" if away else f"the server did not answer within {server.seconds:g} s, or broke off"
        fix = f"is it running at {server.url}? --timeout waits longer; the same command goes on"
        raise RetryError(EngineError(what, fix, "engine_unavailable", 5)) from error
    return _read(bytes(raw), top, round(time.monotonic() - began, 4))


def _malformed(why: str) -> RetryError:
    what = f"the server's reply is not a chat completion: {why}"
    return RetryError(EngineError(what, "check --base-url: it should end in /v1 as a rule", "malformed_reply"))


def _read(raw: bytes, top: int, seconds: float) -> Whole:
    """A reply's content. Raises: RetryError for one that is none, EngineError when log-probabilities were asked for and are not there."""
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        text, finish = choice["message"].get("content") or "", choice.get("finish_reason") or "stop"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed(repr(raw[:80])[2:-1]) from error
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(part["text"] for part in text if isinstance(part, dict) and isinstance(part.get("text"), str))
    if not isinstance(text, str) or not isinstance(finish, str):
        raise _malformed("its content is no text")
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
    counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    return Whole(_characters(text), _characters(finish), counts[0], counts[1], _first_tokens(choice) if top else None, seconds)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _characters(text: str) -> str:
    """Half a surrogate pair (an emoji cut by the token limit) is no character and cannot be written down: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _first_tokens(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """The likeliest first tokens; none where the answer has no token. One of no probability at all (minus infinity) is none of them.

    Raises: EngineError when the server gives none: nothing stands in; RetryError when they are not numbers.
    """
    try:
        places = choice["logprobs"]["content"]
        if places == []:
            return ()
        tops = places[0]["top_logprobs"]
        found = [(str(one["token"]), float(one["logprob"])) for one in tops]
        if {"token", "logprob"} <= places[0].keys() and places[0]["token"] not in [token for token, _ in found]:
            found.append((str(places[0]["token"]), float(places[0]["logprob"])))  # LMDeploy lists the others only
        if not found:
            raise KeyError("top_logprobs")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise EngineError(
            "the server gives no log-probabilities (logprobs.content[0].top_logprobs), so likelihood cannot be scored there",
            "use --modes strict,official (or --mode strict), or a server that gives them",
            "no_logprobs",
        ) from None
    if any(math.isnan(value) or value == math.inf for _, value in found):
        raise _malformed("its log-probabilities are not numbers")
    return tuple(sorted((pair for pair in found if pair[1] > -math.inf), key=lambda pair: -pair[1]))
