"""What every engine takes and gives: a conversation with pictures in, pieces of text out.

An engine is anything with `stream`; leaving the generator early cancels the answer within one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class ChatTurn:
    """One turn: its role and its parts, texts and upright RGB pictures, in the order they are shown."""

    role: str
    parts: tuple[str | Image.Image, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy: always the most likely token."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One question: the turns so far, the user's last."""

    turns: tuple[ChatTurn, ...]
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Delta:
    """A piece of the answer. `finish`: '' while it goes on, then 'stop' or 'length'; `tokens` made so far."""

    text: str
    tokens: int
    finish: str = ""


class Engine(Protocol):
    """Answers requests."""

    def stream(self, request: Request) -> Iterator[Delta]:
        """The answer, piece by piece; the last Delta has a `finish`."""
        ...
