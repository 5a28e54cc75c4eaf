"""What our launcher changes in LMDeploy 0.18 before it starts, for speed. Loaded by path, in LMDeploy's environment; nothing of intervale is there.

Promises: answers stay what they were, token by token. Each change is a function that says whether it was made; where this LMDeploy is built
otherwise it changes nothing. All are made; `INTERVALE_ENGINE_PATCHES=off` makes none, names with commas those alone: to measure what they bring.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import secrets
import sys
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

_CONTEXT = 16  # tokens of the prompt that the first token's text is read after
_A_STREAM, _LONGEST, _WORTH = 0.0003, 0.02, 0.001  # seconds between two reads: for each live stream, at most, and the least worth a pause
_LOOK = 0.1  # seconds between two looks at what the event loop's thread computes
_BUSY, _FREE = 0.7, 0.5  # its share of the time above which it is too much, and below which it is not


@dataclass(eq=False)
class _Turn:
    need: int
    come: asyncio.Future[bool]
    dropped: bool = False


class Gate:
    """Room that callers share, first come, first served; one that needs more than there is goes in alone. For one event loop."""

    def __init__(self, room: int) -> None:
        self.room, self.taken = room, 0
        self.line: deque[_Turn] = deque()
        self._turns: dict[Any, _Turn] = {}

    async def enter(self, need: int, who: Any) -> bool:
        """Wait until `need` fits, and take it; False, with nothing taken, when `drop(who)` came first. A cancel takes nothing either."""
        if not self.line and self._fits(need):
            self.taken += need
            return True
        turn = self._turns[who] = _Turn(need, asyncio.get_running_loop().create_future())
        self.line.append(turn)
        try:
            granted = await turn.come
        except BaseException:
            if turn in self.line:
                self.line.remove(turn)
                self._admit()  # smaller ones may have waited behind it
            elif turn.come.done() and not turn.come.cancelled() and turn.come.result():
                self.leave(need)  # let in and cancelled in one turn of the loop
            raise
        finally:
            self._turns.pop(who, None)
        if granted and turn.dropped:
            self.leave(need)
        return granted and not turn.dropped

    def drop(self, who: Any) -> bool:
        """End the waiting of `who`; False when it does not wait."""
        turn = self._turns.get(who)
        if turn is None:
            return False
        turn.dropped = True
        if turn in self.line:
            self.line.remove(turn)
            if not turn.come.done():
                turn.come.set_result(False)
            self._admit()
        return True

    def leave(self, need: int) -> None:
        """Give the room back."""
        self.taken -= need
        self._admit()

    def _fits(self, need: int) -> bool:
        return not self.taken or self.taken + need <= self.room

    def _admit(self) -> None:
        while self.line and self._fits(self.line[0].need):
            turn = self.line.popleft()
            if not turn.come.done():  # a cancelled one has not noticed yet
                self.taken += turn.need
                turn.come.set_result(True)


def gate() -> bool:
    """Pictures are prefilled whole: let in only while their prompts fit one forward pass together; text passes by.

    TurboMind splits a prompt at the pass's budget, and encodes a picture anew in each pass that has a part of it (internvit.cc). Prompts start
    at token 0 there (a session keeps nothing), so what a prompt takes is its length. Its room is free again with its first token.
    """
    import lmdeploy.turbomind.turbomind as module

    kind = getattr(module, "TurboMindInstance", None)
    infer, cancel = getattr(kind, "async_stream_infer", None), getattr(kind, "async_cancel", None)
    cancelled = getattr(getattr(module, "ResponseType", None), "CANCEL", None)
    if kind is None or cancelled is None or not hasattr(module, "EngineOutput"):
        return False
    if not inspect.isasyncgenfunction(infer) or not inspect.iscoroutinefunction(cancel):
        return False
    if [*inspect.signature(infer).parameters][:3] != ["self", "session_id", "input_ids"]:
        return False
    gates: weakref.WeakKeyDictionary[Any, Gate] = weakref.WeakKeyDictionary()

    def gate_of(instance: Any) -> Gate | None:
        model = getattr(instance, "tm_model", None)
        config = getattr(model, "engine_config", None)
        room = getattr(config, "max_prefill_token_num", None)
        if not room or getattr(config, "dp", 1) != 1:  # several engines, each with a budget of its own
            return None
        return gates.setdefault(model, Gate(room))

    async def gated(door: Gate, self: Any, session_id: Any, input_ids: Any, *words: Any, **named: Any) -> AsyncGenerator[Any, None]:
        held = len(input_ids)
        if not await door.enter(held, self):
            yield module.EngineOutput(cancelled, [])  # as of one that is aborted in TurboMind's own queue
            return
        try:
            async with aclosing(infer(self, session_id, input_ids, *words, **named)) as answers:
                async for answer in answers:
                    if held:
                        door.leave(held)
                        held = 0
                    yield answer
        finally:
            if held:
                door.leave(held)

    @functools.wraps(infer)
    def async_stream_infer(self: Any, session_id: Any, input_ids: Any, *words: Any, **named: Any) -> AsyncGenerator[Any, None]:
        # Without stream_output the first sign of life is the whole answer: room would be held far too long.
        door = gate_of(self) if named.get("multimodal") and named.get("stream_output") else None
        if door is None:
            return infer(self, session_id, input_ids, *words, **named)
        return gated(door, self, session_id, input_ids, *words, **named)

    @functools.wraps(cancel)
    async def async_cancel(self: Any, *words: Any, **named: Any) -> None:
        door = gate_of(self)
        if door is None or not door.drop(self):
            await cancel(self, *words, **named)

    kind.async_stream_infer, kind.async_cancel = async_stream_infer, async_cancel
    return True


def fingerprints() -> bool:
    """A picture's fingerprint is made while it is tiled, not on the event loop: a random one, or LMDeploy's own where it caches prefixes.

    LMDeploy hashes 15.6 MB for 13 tiles, 10 to 16 ms in which nothing else is served; only the prefix cache reads the hash.
    """
    import lmdeploy.vl.engine as module
    from lmdeploy.turbomind.models.internvl import _resolve_fingerprint as own

    encoder = getattr(module, "ImageEncoder", None)
    if encoder is None or own({"fingerprint": b"given"}) != b"given":
        return False
    made = encoder.__init__
    if not {"backend", "backend_config"} <= set(inspect.signature(made).parameters):
        return False

    @functools.wraps(made)
    def make(self: Any, *words: Any, **named: Any) -> None:
        made(self, *words, **named)
        given = inspect.signature(made).bind(self, *words, **named).arguments
        model, config = self.model, given.get("backend_config")
        if given.get("backend") != "turbomind" or not type(model).__module__.rpartition(".")[2].startswith("internvl"):
            return
        tile, cached = model.preprocess, bool(getattr(config, "enable_prefix_caching", False))

        @functools.wraps(tile)
        def preprocess(*words: Any, **named: Any) -> Any:
            messages = tile(*words, **named)
            for message in messages:
                if message.get("role") == "preprocess":
                    for item in message["content"]:
                        item.setdefault("fingerprint", own(item) if cached else secrets.token_bytes(32))
            return messages

        model.preprocess = preprocess

    encoder.__init__ = make
    return True


def detokenizer() -> bool:
    """The first token's text is read after the prompt's last 16 tokens instead of all of them (4.5 ms for the 3,451 of 13 tiles)."""
    import lmdeploy.tokenizer as module

    kind, state_of = _detokenizer(module)
    if kind is None:
        return False
    old = kind.detokenize_incrementally

    @functools.wraps(old)
    def detokenize_incrementally(self: Any, all_input_ids: Any, state: Any, *words: Any, **named: Any) -> Any:
        cut = state.ids_offset - _CONTEXT
        if state.prev_tokens is not None or cut <= 0:
            return old(self, all_input_ids, state, *words, **named)
        # Something to be read must stand before it: at the very beginning of a text, some tokenizers leave out a blank.
        if not self.model.convert_ids_to_tokens(all_input_ids[cut : state.ids_offset], skip_special_tokens=True):
            return old(self, all_input_ids, state, *words, **named)
        text, after = old(self, all_input_ids[cut:], state_of(_CONTEXT), *words, **named)
        after.ids_offset += cut
        return text, after

    kind.detokenize_incrementally = detokenize_incrementally
    return True


class Busy:
    """How large a pause between two reads the event loop's thread needs, 0 to 1: more while it computes most of the time, less while it does not."""

    def __init__(self) -> None:
        self.level, self._at, self._used = 0.0, 0.0, 0.0

    def look(self, now: float, used: Callable[[], float]) -> float:
        """The level at `now` seconds; `used` tells the seconds that the thread has computed."""
        since = now - self._at
        if since >= _LOOK:
            used_now = used()
            share = (used_now - self._used) / since
            change = 0.25 if share > _BUSY else -0.25 if share < _FREE else 0.0
            self.level = 0.0 if since > 10 * _LOOK else min(1.0, max(0.0, self.level + change))  # nothing was read for long
            self._at, self._used = now, used_now
        return self.level


def pace() -> bool:
    """With many streams on a busy event loop, each is read every 0.3 ms times their number, at most every 20 ms: an event carries the tokens come meanwhile.

    Nothing is lost by it: TurboMind leaves the newest state to be taken (request.h), and the first token and lone clients are read at once. An event of
    several tokens with parts of a character is read token by token: LMDeploy holds back the text before them as well, which is lost where the answer ends.
    """
    import lmdeploy.tokenizer as texts
    import lmdeploy.turbomind.turbomind as module

    kind, tokens = getattr(module, "StreamingSemaphore", None), _detokenizer(texts)[0]
    reads = set(inspect.unwrap(module.TurboMindInstance.async_stream_infer).__code__.co_names)
    if kind is None or tokens is None or not {"StreamingSemaphore", "consume", "acquire"} <= reads:
        return False
    if not inspect.iscoroutinefunction(kind.acquire):
        return False
    old = tokens.detokenize_incrementally
    live: weakref.WeakSet[Any] = weakref.WeakSet()  # streams past their second token
    busy = Busy()

    class Paced(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *words: Any, **named: Any) -> None:
            super().__init__(*words, **named)
            self.seen, self.at = 0, 0.0

        async def acquire(self) -> None:
            clock = asyncio.get_running_loop()
            if self.seen > 1:
                live.add(self)
                now = clock.time()
                pause = self.at + busy.look(now, time.thread_time) * min(_LONGEST, _A_STREAM * len(live)) - now
                if pause > _WORTH:
                    await asyncio.sleep(pause)
            await super().acquire()
            self.seen, self.at = self.seen + 1, clock.time()

    @functools.wraps(old)
    def detokenize_incrementally(self: Any, all_input_ids: Any, state: Any, *words: Any, **named: Any) -> Any:
        start, kept = state.ids_offset, None if state.prev_tokens is None else len(state.prev_tokens)
        text, after = old(self, all_input_ids, state, *words, **named)
        new = len(all_input_ids) - start
        if new < 2 or (text and "\ufffd" not in text and not any(token.startswith("<0x") for token in after.prev_tokens[-new:])):
            return text, after
        if kept is not None:
            del state.prev_tokens[kept:]  # it was made longer in place
        said = []
        for end in range(start + 1, len(all_input_ids) + 1):
            text, state = old(self, all_input_ids[:end], state, *words, **named)
            said.append(text)
        return "".join(said), state

    module.StreamingSemaphore, tokens.detokenize_incrementally = Paced, detokenize_incrementally
    return True


def metrics() -> bool:
    """Without LMDeploy's own metrics, which it keeps by the token: our gateway has its own, and nothing of ours reads them."""
    from lmdeploy.cli.utils import ArgumentHelper

    if not hasattr(ArgumentHelper, "disable_metrics"):  # an option it does not know would end it
        return False
    if "--disable-metrics" not in sys.argv:
        sys.argv.append("--disable-metrics")
    return True


def _detokenizer(module: Any) -> tuple[Any, Any]:
    """LMDeploy's tokenizer around transformers' and the state it is read with; two Nones where they are built otherwise."""
    kind, state = getattr(module, "HuggingFaceTokenizer", None), getattr(module, "DetokenizeState", None)
    old = getattr(kind, "detokenize_incrementally", None)
    if old is None or state is None or [*inspect.signature(old).parameters][:3] != ["self", "all_input_ids", "state"]:
        return None, None
    fits = [*inspect.signature(state).parameters][:2] == ["ids_offset", "prev_tokens"]
    return (kind, state) if fits else (None, None)


EVERYWHERE: dict[str, Callable[[], bool]] = {"detokenizer": detokenizer, "metrics": metrics}  # also before LMDeploy's PyTorch engine
TURBOMIND: dict[str, Callable[[], bool]] = {"gate": gate, "fingerprints": fingerprints, "pace": pace}


def apply(backend: str) -> None:
    """Make the changes that hold for this backend, and say which."""
    known = EVERYWHERE | TURBOMIND
    named = os.environ.get("INTERVALE_ENGINE_PATCHES")
    asked = [*known] if named is None else [name for name in named.split(",") if name]
    made = []
    for name in asked:
        if name not in known:
            if name != "off":
                print(f"intervale: INTERVALE_ENGINE_PATCHES: there is no {name!r}, there are {', '.join(known)} and off", flush=True)
        elif name in EVERYWHERE or backend == "turbomind":
            why = ""
            try:
                done = known[name]()
            except Exception as error:  # whatever an LMDeploy built otherwise raises: it is served as it is
                done, why = False, f" ({type(error).__name__}: {str(error)[:200]})"
            if done:
                made.append(name)
            else:
                print(f"intervale: this LMDeploy is built otherwise; served without the change {name!r}{why}", flush=True)
    print(f"intervale: changes to LMDeploy: {', '.join(made) or 'none'}", flush=True)
