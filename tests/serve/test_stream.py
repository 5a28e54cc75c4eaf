"""How a stream's pieces become events: nothing is held back that could be told, and many streams are told in fewer events."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from intervale.engine.api import Delta, EngineError, Load
from intervale.serve import api
from intervale.serve.metrics import Metrics


class Desk:
    models = ("m",)

    def load(self) -> Load:
        return Load(0, 0, 1)


async def pieces(*told: Delta | float | Exception) -> AsyncGenerator[Delta, None]:
    """These; a number is a wait, an exception is raised."""
    for one in told:
        if isinstance(one, Exception):
            raise one
        if isinstance(one, Delta):
            yield one
        else:
            await asyncio.sleep(one)


def sent(*told: Delta | Exception, usage: bool = False) -> list[list[Any]]:
    """The events of each send."""

    async def run() -> list[bytes]:
        doing = api._Answering("n", "m")
        return [part async for part in api._events(pieces(*told), doing, Metrics(Desk()), usage)]  # type: ignore[arg-type]

    def event(data: str) -> Any:
        return data if data == "[DONE]" else json.loads(data)

    return [[event(one.removeprefix("data: ")) for one in part.decode().split("\n\n")[:-1]] for part in asyncio.run(run())]


def deltas(part: list[Any]) -> list[Any]:
    return [one if one == "[DONE]" or "error" in one else (one["choices"] or [{"delta": "usage"}])[0]["delta"] for one in part]


ROLE = {"role": "assistant", "content": ""}


def test_what_is_told_at_one_time_is_sent_at_once() -> None:
    parts = sent(Delta("a", 1), Delta("b", 2), Delta("", 3), Delta("c", 4, "stop", 7), usage=True)
    assert [deltas(part) for part in parts] == [[ROLE, {"content": "a"}], [{"content": "b"}], [{"content": "c"}, {}, "usage", "[DONE]"]]
    assert parts[-1][1]["choices"][0]["finish_reason"] == "stop"
    assert parts[-1][2]["usage"]["completion_tokens"] == 4
    assert [deltas(part) for part in sent(Delta("", 1), Delta("ab", 2), Delta("", 2, "length"))] == [
        [ROLE],
        [{"content": "ab"}],
        [{}, "[DONE]"],
    ]
    assert [deltas(part) for part in sent(Delta("", 0, "stop"))] == [[ROLE, {}, "[DONE]"]]


def test_an_error_ends_the_events_after_all_that_was_said() -> None:
    parts = sent(Delta("a", 1), EngineError("it broke", "ask again", "engine_interrupted"))
    assert deltas(parts[0]) == [ROLE, {"content": "a"}]
    assert [one["error"]["code"] for one in parts[1]] == ["engine_interrupted"]
    assert len(parts) == 2


async def paced(first: Delta, rest: AsyncIterator[Delta]) -> tuple[list[Delta], float]:
    began = time.monotonic()
    async with aclosing(api._paced(first, rest)) as steady:
        return [piece async for piece in steady], time.monotonic() - began


def test_paced_pieces_are_joined_and_the_end_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_PACE", 20.0)
    told, took = asyncio.run(paced(Delta("a", 1), pieces(Delta("b", 2), 0.01, Delta("c", 3), 0.01, Delta("", 3, "stop", 7))))
    assert told == [Delta("a", 1), Delta("bc", 3, "stop", 7)]
    assert took < 10
    assert asyncio.run(paced(Delta("a", 1, "stop"), pieces()))[0] == [Delta("a", 1, "stop")]


def test_a_fault_ends_a_paced_stream_after_all_that_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_PACE", 20.0)

    async def run() -> None:
        steady = api._paced(Delta("a", 1), pieces(Delta("b", 2), 0.01, EngineError("it broke", "x", "engine_interrupted")))
        assert [await anext(steady), await anext(steady)] == [Delta("a", 1), Delta("b", 2)]
        with pytest.raises(EngineError, match="it broke"):
            await anext(steady)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_pace_goes_on_while_there_is_something_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_PACE", 0.03)
    words = [one for number in range(40) for one in (0.004, Delta(f"{number} ", number + 2))]
    told, _ = asyncio.run(paced(Delta("a", 1), pieces(*words, Delta("", 41, "length", 5))))
    assert "".join(piece.text for piece in told) == "a" + "".join(f"{number} " for number in range(40))
    assert told[-1].finish == "length"
    assert 3 < len(told) < 25  # about 0.16 s and more, a piece each 0.03


def test_a_paced_stream_that_is_left_leaves_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_PACE", 20.0)
    left = []

    async def endless() -> AsyncGenerator[Delta, None]:
        try:
            while True:
                yield Delta("x", 2)
                await asyncio.sleep(0.001)
        finally:
            left.append(True)

    async def run() -> None:
        steady = api._paced(Delta("a", 1), endless())
        assert await anext(steady) == Delta("a", 1)
        waiting = asyncio.ensure_future(anext(steady))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await steady.aclose()
        assert left == [True]

    asyncio.run(run())
