"""A desk in front of one Engine: one thread makes every token, visitors take turns.

Promises: up to `active` answers grow a token each in turn; the others wait in a bounded queue from which the visitor with the fewest
running answers is served next, in turn among equals; no visitor takes more than half of `active` or three quarters of the queue. Leaving
an answer stops it within one token, wherever it stands, and frees its place. One request's fault ends that request alone.
Cost: two thread switches a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from intervale.core.errors import UserError
from intervale.engine.api import Delta, Engine, EngineError, Load, Request

ACTIVE, WAITING = 4, 128


@dataclass(eq=False)
class _Job:
    """One request on its way. `left` is set by whoever asked, read by the thread."""

    request: Request
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Delta | Exception]
    left: bool = False
    stream: Iterator[Delta] | None = None

    def tell(self, piece: Delta | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the visitor's event loop has ended
            self.left = True


@dataclass
class _Floor:
    """What the lock guards: who waits, by visitor, and who is being answered."""

    waiting: OrderedDict[str, deque[_Job]] = field(default_factory=OrderedDict)
    running: list[_Job] = field(default_factory=list)
    closed: bool = False

    def count(self) -> int:
        return sum(map(len, self.waiting.values()))


class Scheduler:
    """Answers many visitors with one Engine, on one thread."""

    def __init__(self, engine: Engine, models: tuple[str, ...], *, active: int = ACTIVE, waiting: int = WAITING) -> None:
        self.engine, self.models = engine, models
        self._active, self._room = active, waiting
        self._floor = _Floor()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="intervale-engine", daemon=True)
        self._thread.start()

    def load(self) -> Load:
        """How busy it is now."""
        with self._changed:
            return Load(len(self._floor.running), self._floor.count(), self._room)

    def fault(self) -> str:
        """'' while the thread lives."""
        return "" if self._thread.is_alive() and not self._floor.closed else "the engine has stopped"

    def close(self) -> None:
        """Stop: what runs or waits ends with an error; returns when the thread has ended (after the token it is at)."""
        with self._changed:
            self._floor.closed = True
            self._changed.notify()
        self._thread.join(timeout=30)

    async def answer(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece; closing the generator cancels it. Raises: EngineError 'busy', and what the engine raises."""
        job = _Job(request, asyncio.get_running_loop(), asyncio.Queue())
        self._enter(job)
        try:
            while True:
                piece = await job.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            self._leave(job)

    def _enter(self, job: _Job) -> None:
        floor = self._floor
        with self._changed:
            if floor.closed:
                raise EngineError("the server is stopping", "try again later", "engine_unavailable", 5)
            waiting, own = floor.count(), len(floor.waiting.get(job.request.visitor, ()))
            crowded = waiting + len(floor.running) >= self._active
            if crowded and (waiting >= self._room or own >= max(1, self._room * 3 // 4)):
                what = f"{waiting} requests are waiting already, {own} of them yours; the limit is {self._room}, three quarters of it for one visitor"
                raise EngineError(what, "try again in a few seconds", "busy", 2)
            floor.waiting.setdefault(job.request.visitor, deque()).append(job)
            self._admit()
            self._changed.notify()

    def _leave(self, job: _Job) -> None:
        with self._changed:
            job.left = True
            queue = self._floor.waiting.get(job.request.visitor)
            if queue and job in queue:
                queue.remove(job)
                if not queue:
                    del self._floor.waiting[job.request.visitor]
            self._changed.notify()

    def _admit(self) -> None:
        """Let waiting jobs in while there is room; the lock is held."""
        floor = self._floor
        while floor.waiting and len(floor.running) < self._active:
            counts = Counter(job.request.visitor for job in floor.running)
            visitor = min(floor.waiting, key=lambda name: counts[name])  # the first of equals: they stand in turn
            if counts[visitor] >= max(1, self._active // 2):
                return
            queue = floor.waiting.pop(visitor)
            floor.running.append(queue.popleft())
            if queue:
                floor.waiting[visitor] = queue  # to the end of the line

    def _work(self) -> None:
        floor = self._floor
        while True:
            with self._changed:
                self._admit()
                while not floor.running and not floor.closed:
                    self._changed.wait()
                    self._admit()
                if floor.closed:
                    jobs = [*floor.running, *(job for queue in floor.waiting.values() for job in queue)]
                    floor.running, floor.waiting = [], OrderedDict()
                    break
                running = list(floor.running)
            done = [job for job in running if not self._step(job)]
            if done:
                with self._changed:
                    floor.running = [job for job in floor.running if job not in done]
            del running, done  # while it waits for the next request, this thread holds nothing of the last
        for job in jobs:
            self._end(job)
            job.tell(EngineError("the server is stopping", "try again later", "engine_unavailable", 5))

    def _step(self, job: _Job) -> bool:
        """One piece of one answer; False when it has ended."""
        if job.left:
            self._end(job)
            return False
        try:
            if job.stream is None:
                job.stream = iter(self.engine.stream(job.request))
            piece = next(job.stream, None)
        except UserError as error:
            job.tell(error)
            return False
        except Exception as error:
            fault = EngineError("the engine failed on this request", "try again; the server's log has the reason", "engine_failed")
            fault.__cause__ = error
            job.tell(fault)
            return False
        if piece is None:
            job.tell(EngineError("the engine's answer has no end", "try again", "engine_failed"))
            return False
        job.tell(piece)
        if piece.finish:
            self._end(job)
        return not piece.finish

    def _end(self, job: _Job) -> None:
        stream, job.stream = job.stream, None
        close = getattr(stream, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):
                close()
