"""What every engine takes and gives: a conversation with pictures in, pieces of text out.

An `Engine` is anything with `stream`; leaving the generator early cancels the answer within one token. A `Desk` answers many
visitors at once: `engine.scheduler` puts one in front of an Engine, `engine.remote` is one by itself. Nothing a visitor says
is kept on a shared object, except under that visitor's own name.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from PIL import Image

from intervale.core.errors import OutsideError, UserError


class RefusedError(UserError):
    """A request that no engine can answer. `code` is stable: programs may rely on it."""

    def __init__(self, what: str, fix: str, code: str) -> None:
        super().__init__(what, fix)
        self.code = code

    def __reduce__(self) -> tuple[type[UserError], tuple[str, ...]]:  # type: ignore[override]
        return type(self), (self.what, self.fix, self.code)


class UpstreamRefusedError(RefusedError):
    """A request that another server refused. Its words stand in `fix`: for a terminal, not for a gateway's clients."""


class EngineError(OutsideError):
    """The engine itself failed, or has no room. `code` is stable; `retry_after` (seconds) is set where trying again may help."""

    def __init__(self, what: str, fix: str, code: str, retry_after: int | None = None) -> None:
        super().__init__(what, fix)
        self.code, self.retry_after = code, retry_after

    def __reduce__(self) -> tuple[type[UserError], tuple[object, ...]]:  # type: ignore[override]
        return type(self), (self.what, self.fix, self.code, self.retry_after)


@dataclass(frozen=True)
class Photo:
    """A picture still encoded (its header was checked), decoded when its turn comes: a waiting request holds bytes, not pixels.

    `media` is its type ('image/jpeg'), `size` its upright (width, height) by the header, `max_tiles` a lower limit than the model's.
    """

    data: bytes = field(repr=False)
    media: str
    size: tuple[int, int]
    max_tiles: int | None = None

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the bytes: what makes two pictures the same."""
        return hashlib.sha256(self.data).digest()


@dataclass(frozen=True)
class ChatTurn:
    """One turn: its role and its parts, texts and pictures (upright RGB, or encoded), in the order they are shown."""

    role: str
    parts: tuple[str | Image.Image | Photo, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy: always the most likely token. `stop`: texts that end the answer, not in it.

    `likely`: how many of the likeliest tokens are to be told beside each token's own log-probability; None: not even that.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    likely: int | None = None


@dataclass(frozen=True)
class Request:
    """One question: the turns so far, the user's last, or after it the beginning of an answer that is to be gone on with.

    `model` names one of the engine's models ('': its first), `visitor` whose question it is: fairness and reuse go by it.
    """

    turns: tuple[ChatTurn, ...]
    sampling: Sampling = Sampling()
    model: str = ""
    visitor: str = ""


@dataclass(frozen=True)
class Likely:
    """A token, its bytes (None: not told; one token may be half of a character), its natural log-probability in the model's own
    distribution, before temperature and cuts; and the likeliest tokens in its place, the most likely first."""

    token: str
    raw: bytes | None
    logprob: float
    top: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of the answer. `finish`: '' while it goes on, then 'stop' or 'length'; `tokens` made so far.

    A piece may be empty: a sign of life while pictures are read. `prompt_tokens` is known from the first token on, and so is
    `reused`, how many of them came from an earlier turn. `likely` are the tokens since the last piece, the one that ends the
    answer with them, where the request asks for that.
    """

    text: str
    tokens: int
    finish: str = ""
    prompt_tokens: int = 0
    reused: int = 0
    likely: tuple[Likely, ...] = ()


def joined(pieces: Sequence[Delta], counted: Delta | None = None) -> Delta:
    """Pieces that follow each other as one, with the counts of the last or of `counted`."""
    last = counted or pieces[-1]
    likely = tuple(one for piece in pieces for one in piece.likely)
    return Delta("".join(piece.text for piece in pieces), last.tokens, pieces[-1].finish, last.prompt_tokens, last.reused, likely)


class Engine(Protocol):
    """Answers requests."""

    def stream(self, request: Request) -> Iterator[Delta]:
        """The answer, piece by piece; the last Delta has a `finish`."""
        ...


@dataclass(frozen=True)
class Load:
    """How busy a desk is: requests being answered, requests waiting, and how many may wait."""

    active: int
    waiting: int
    room: int


class Desk(Protocol):
    """Answers many visitors at once."""

    @property
    def models(self) -> tuple[str, ...]:
        """The names a Request may ask for, the default first."""
        ...

    def answer(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece; closing the generator cancels it, wherever it stands.

        Raises: RefusedError, or EngineError (code 'busy' when the queue is full), both at the first piece.
        """
        ...

    def load(self) -> Load:
        """How busy it is now."""
        ...

    def fault(self) -> str:
        """'' when it can answer, else what is wrong with it."""
        ...

    def close(self) -> None:
        """Stop answering; running answers end with an error."""
        ...
