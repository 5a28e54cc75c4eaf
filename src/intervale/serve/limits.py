"""How much a client may send, and reading it within that.

Promises: bytes are counted as they arrive, whatever a header claims; a body that is too large, too slow, or one too many for
the memory set aside for all of them ends with a 4xx that gives the numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from intervale.serve.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


@dataclass(frozen=True)
class Limits:
    """Of one request: bytes and seconds of the body, tokens of the answer; of all requests together: bytes held of their bodies."""

    body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    held_bytes: int = 512 << 20
    new_tokens: int = 4096
    default_new_tokens: int = 512


def too_large(most: int) -> ApiError:
    """The 413."""
    return ApiError(413, "body_too_large", f"the body is larger than the limit of {most:,} bytes; send smaller or fewer pictures")


@dataclass
class Counter:
    """Bytes of bodies that this process holds now; one event loop, so no lock."""

    limits: Limits
    held: int = 0

    def counted(self, receive: Receive) -> tuple[Receive, Callable[[], None]]:
        """`receive` that counts, and what gives the bytes back when the request is over."""
        state = _Body()

        async def counting() -> Message:
            if state.ended:
                return await receive()
            try:
                async with asyncio.timeout_at(state.until(self.limits.body_seconds)):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not come within {self.limits.body_seconds:g} s"
                raise ApiError(408, "body_too_slow", what) from None
            size = len(message.get("body", b""))
            state.bytes += size
            self.held += size
            state.ended = not message.get("more_body", False)
            if state.bytes > self.limits.body_bytes:
                raise too_large(self.limits.body_bytes)
            if self.held > self.limits.held_bytes:
                what = f"the server holds {self.limits.held_bytes:,} bytes of requests already, its limit; try again in a few seconds"
                raise ApiError(429, "busy", what, None, 2)
            return message

        def give_back() -> None:
            self.held -= state.bytes
            state.bytes = 0

        return counting, give_back


@dataclass
class _Body:
    bytes: int = 0
    ended: bool = False
    deadline: float = field(default=0.0)

    def until(self, seconds: float) -> float:
        """When the body must be here, counted from the first look at it."""
        self.deadline = self.deadline or asyncio.get_running_loop().time() + seconds
        return self.deadline


async def read_body(receive: Receive) -> bytes:
    """The whole body, through a counting `receive`. Raises: ConnectionError when the client is gone."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
