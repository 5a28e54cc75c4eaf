"""One thread, many visitors: fair, bounded, cancellable, and one request's fault is its own."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from intervale.core.errors import UserError
from intervale.engine.api import ChatTurn, Delta, EngineError, Request
from intervale.engine.scheduler import Scheduler


class Parrot:
    """Says the question's letters, one a step; knows who was served in which order and how many steps were made."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.open = 0
        self.gate = threading.Event()
        self.gate.set()

    def stream(self, request: Request) -> Iterator[Delta]:
        text = str(request.turns[-1].parts[0])
        self.open += 1
        try:
            for number, letter in enumerate(text, 1):
                while not self.gate.wait(0.002):
                    yield Delta("", number - 1)  # a sign of life, as while pictures are read
                if letter == "!":
                    raise ZeroDivisionError("secret path /home/x")
                if letter == "?":
                    raise UserError("bad", "do better")
                self.steps.append(request.visitor)
                yield Delta(letter, number, "stop" if number == len(text) else "")
        finally:
            self.open -= 1


def ask(text: str, visitor: str = "") -> Request:
    return Request((ChatTurn("user", (text,)),), visitor=visitor)


async def said(pieces: AsyncIterator[Delta]) -> str:
    return "".join([piece.text async for piece in pieces])


async def until(true: object, what: object) -> None:
    for _ in range(1000):
        if true():  # type: ignore[operator]
            return
        await asyncio.sleep(0.005)
    raise AssertionError(what)


def finish(what: Coroutine) -> Any:
    return asyncio.run(asyncio.wait_for(what, 60))


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def desk(parrot: Parrot) -> Iterator[Scheduler]:
    desk = Scheduler(parrot, ("parrot",), active=4, waiting=8)
    yield desk
    parrot.gate.set()
    desk.close()
    assert not desk._thread.is_alive()


def test_a_fault_ends_its_own_request_alone(desk: Scheduler, parrot: Parrot) -> None:
    async def run() -> list[object]:
        return await asyncio.gather(*(said(desk.answer(ask(text, text))) for text in ("abc", "d!", "e?", "fgh")), return_exceptions=True)

    one, two, three, four = finish(run())
    assert (one, four) == ("abc", "fgh")
    assert isinstance(two, EngineError)
    assert two.code == "engine_failed"
    assert "secret" not in str(two)
    assert isinstance(three, UserError)
    assert three.what == "bad"
    assert parrot.open == 0


def test_visitors_are_served_in_turn_however_much_one_asks(desk: Scheduler, parrot: Parrot) -> None:
    async def run() -> None:
        parrot.gate.clear()
        greedy = [asyncio.create_task(said(desk.answer(ask("x" * 20, "greedy")))) for _ in range(6)]
        await until(lambda: desk.load().active == 2, "no visitor runs more than half")
        modest = asyncio.create_task(said(desk.answer(ask("y" * 3, "modest"))))
        await until(lambda: desk.load().active == 3, "another finds a place at once")
        parrot.gate.set()
        await modest
        await asyncio.gather(*greedy)
        assert parrot.steps[:9].count("modest") == 3  # a step each in turn, not one whole answer after the other

    finish(run())


def test_the_queue_is_bounded_and_says_so(desk: Scheduler, parrot: Parrot) -> None:
    async def run() -> None:
        parrot.gate.clear()
        tasks = []
        for number in range(12):
            tasks.append(asyncio.create_task(said(desk.answer(ask("ab", f"v{number}")))))
            await until(lambda: desk.load().active + desk.load().waiting == len(tasks), "it has a place")
        with pytest.raises(EngineError, match="8 requests are waiting") as told:
            await said(desk.answer(ask("ab", "late")))
        assert (told.value.code, told.value.retry_after) == ("busy", 2)
        parrot.gate.set()
        assert await asyncio.gather(*tasks) == ["ab"] * 12
        assert await said(desk.answer(ask("ab", "late"))) == "ab"

    finish(run())


def test_one_visitor_leaves_room_in_the_queue_for_others(desk: Scheduler, parrot: Parrot) -> None:
    async def run() -> None:
        parrot.gate.clear()
        tasks = [asyncio.create_task(said(desk.answer(ask("ab", "greedy")))) for _ in range(12)]
        await asyncio.sleep(0.05)
        other = asyncio.create_task(said(desk.answer(ask("ab", "other"))))
        await asyncio.sleep(0.01)
        parrot.gate.set()
        assert await other == "ab"
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(one, EngineError) for one in told) == 4  # of 12: 2 ran, 6 waited

    finish(run())


def test_leaving_stops_within_a_token_and_frees_the_place(desk: Scheduler, parrot: Parrot) -> None:
    async def run() -> None:
        for _ in range(200):
            async with aclosing(desk.answer(ask("x" * 10_000, "v"))) as pieces:
                await anext(pieces)
        await until(lambda: desk.load().active == 0, "a place was not given back")
        steps = len(parrot.steps)
        await asyncio.sleep(0.05)
        assert len(parrot.steps) == steps
        assert parrot.open == 0
        assert await said(desk.answer(ask("ok", "v"))) == "ok"

    threads = threading.active_count()
    finish(run())
    assert threading.active_count() <= threads


def test_leaving_while_waiting_needs_no_token(desk: Scheduler, parrot: Parrot) -> None:
    async def run() -> None:
        parrot.gate.clear()
        tasks = [asyncio.create_task(said(desk.answer(ask("abc", "v")))) for _ in range(5)]
        await until(lambda: desk.load().waiting == 3, "three wait")
        tasks[4].cancel()
        await until(lambda: desk.load().waiting == 2, "the one that left is gone")
        parrot.gate.set()
        await asyncio.gather(*tasks[:4])
        assert len(parrot.steps) == 12

    finish(run())


def test_closing_ends_what_runs_with_an_error(parrot: Parrot) -> None:
    desk = Scheduler(parrot, ("parrot",))

    async def run() -> None:
        task = asyncio.create_task(said(desk.answer(ask("x" * 1_000_000))))
        await until(lambda: parrot.steps, "it runs")
        await asyncio.to_thread(desk.close)
        with pytest.raises(EngineError, match="stopping"):
            await task
        with pytest.raises(EngineError, match="stopping"):
            await said(desk.answer(ask("x")))

    finish(run())
    assert desk.fault()
    assert parrot.open == 0


def test_a_visitors_event_loop_may_end_at_any_time(desk: Scheduler, parrot: Parrot) -> None:
    async def run() -> None:
        pieces = desk.answer(ask("x" * 100_000, "v"))
        await anext(pieces)

    finish(run())
    for _ in range(200):
        if desk.load().active == 0:
            break
        time.sleep(0.01)
    assert desk.load().active == 0
