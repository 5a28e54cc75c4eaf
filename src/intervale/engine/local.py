"""The engine in this process: transformers on the CPU or one GPU.

Promises: an answer depends on its request alone, not on what was asked before or beside it (up to float rounding: a turn
that goes on computes its new tokens only). Pictures' features are kept by content, a conversation's keys and values for its next
turn; both are bounded in bytes. Several models may share one network (`model.pair`): whichever is asked is switched on
before each step, so answers of both may be made in turn on one thread. Not thread-safe: `engine.scheduler` owns the thread.
Legend: S positions, T tokens of a picture, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from intervale.core.errors import nearest
from intervale.data.images import PictureError, load_picture
from intervale.data.prompt import Picture, Turn, encode_turns
from intervale.data.tiling import Tiling, cut_tiles
from intervale.engine.api import ChatTurn, Delta, EngineError, Likely, Photo, RefusedError, Request
from intervale.engine.decode import Prefilled, encode_tiles, generate, prefill, refuse_long, rotary_turn
from intervale.engine.reuse import Conversations, Features, Kept, Span
from intervale.engine.text import spoken
from intervale.model.load import Model, narrow
from intervale.model.pair import Pair
from intervale.model.tokenizer import Tokenizer

FEATURE_BYTES = 512 << 20  # about 40 pictures of 13 tiles for InternVL2-2B in float32
CACHE_BYTES = 1 << 30  # about 10,000 tokens for InternVL2-2B in bfloat16
_AT_ONCE = 512  # prompt tokens a step: between two steps others get their turn, and a cancel is seen
_CPU_TILES, _GPU_TILES = 2, 8  # tiles a step; a 448-pixel tile takes about 4 s on two cores


@dataclass(frozen=True)
class Face:
    """One of the engine's models. `enter` makes its network compute as this one; `eyes` names how it sees: pictures' features are kept by it."""

    model: Model
    enter: Callable[[], None] = lambda: None
    eyes: str = ""


def faces_of(pair: Pair, tuned: str, base: str) -> dict[str, Face]:
    """The two models of a pair under their names, the tuned one first."""
    return {
        tuned: Face(pair.tuned, lambda: pair.switch(True), "" if pair.same_eyes else "tuned"),
        base: Face(pair.base, lambda: pair.switch(False)),
    }


@dataclass(frozen=True)
class _Asked:
    """A request as the network takes it: ids, pictures with their places and tilings; is there a begun answer to go on with?"""

    ids_S: np.ndarray
    spans: tuple[Span, ...]
    pictures: tuple[tuple[Image.Image | Photo, Tiling], ...]
    begun: bool


class LocalEngine:
    """Answers requests with a Model, or with one of several."""

    def __init__(
        self,
        model: Model,
        faces: Mapping[str, Face] | None = None,
        *,
        feature_bytes: int = FEATURE_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.model = model
        self.faces = dict(faces or {model.name: Face(model)})
        self._features = Features(feature_bytes)
        self._conversations = Conversations(cache_bytes)

    def stream(self, request: Request) -> Iterator[Delta]:
        """The answer, piece by piece. Raises: RefusedError when the prompt does not fit, PictureError for a damaged picture."""
        face = self._face(request.model)
        asked = _asked(face, request)
        turn = rotary_turn(face.model)
        beyond = turn is not None and len(asked.ids_S) > turn  # keys of such prompts and of shorter ones do not go together
        owner = (request.visitor, request.model or next(iter(self.faces)), beyond)
        cache = self._conversations.take(owner, asked.ids_S, asked.spans)
        reused = cache.get_seq_length()
        made: list[int] = []
        try:
            start = None
            for start in self._prefilled(face, asked, cache):
                if start is None:
                    yield Delta("", 0)
            assert start is not None
            likely: list[Likely] = []
            tokens, tokenizer = self._tokens(face, start, request, made, likely), face.model.tokenizer
            decode = tokenizer.decode_on if asked.begun else tokenizer.decode
            for text, count, finish in spoken(tokens, decode, face.model.stop_ids, request.sampling.stop):
                yield Delta(text, count, finish, len(asked.ids_S), reused, tuple(likely))
                likely.clear()
        except torch.OutOfMemoryError as error:
            self.forget()
            raise EngineError("the engine ran out of memory", "try again, with fewer or smaller pictures", "out_of_memory", 5) from error
        except GeneratorExit:
            self._keep(owner, asked, made, cache, None if beyond else turn)
            raise
        self._keep(owner, asked, made, cache, None if beyond else turn)

    def _tokens(self, face: Face, start: Prefilled, request: Request, made: list[int], likely: list[Likely]) -> Iterator[int]:
        """The answer's tokens, also noted in `made`, and in `likely` if asked for; whatever others did in between, each step computes with this face."""
        most, tokenizer = request.sampling.likely, face.model.tokenizer

        def heard(token: int, logits_V: torch.Tensor) -> None:
            likely.append(_likely(tokenizer, token, logits_V, most or 0))

        tokens = generate(face.model, start, request.sampling, None if most is None else heard)
        while True:
            face.enter()
            token = next(tokens, None)
            if token is None:
                return
            made.append(token)
            yield token

    def _keep(self, owner: Hashable, asked: _Asked, made: list[int], cache: DynamicCache, most: int | None) -> None:
        length = cache.get_seq_length()
        if most is not None and length > most:
            cache.crop(most - length)
            length = most
        ids_S = np.concatenate([asked.ids_S, np.array(made, np.int64)])[:length]
        self._conversations.put(Kept(owner, ids_S, asked.spans, min(len(asked.ids_S), length), cache))

    def forget(self) -> None:
        """Drop every kept picture and conversation."""
        self._features.clear()
        self._conversations.clear()

    def _face(self, name: str) -> Face:
        if not name:
            return next(iter(self.faces.values()))
        if name not in self.faces:
            known = ", ".join(self.faces)
            raise RefusedError(f"there is no model {name[:80]!r}{nearest(name[:80], self.faces)}", f"use one of {known}", "model_not_found")
        return self.faces[name]

    def _prefilled(self, face: Face, asked: _Asked, cache: DynamicCache) -> Iterator[Prefilled | None]:
        """None after each step of reading the prompt, then the prompt in the network."""
        past = cache.get_seq_length()
        unseen: list[torch.Tensor] = []  # (T, D) a picture, what of it is not in the cache
        for span, (picture, tiling) in zip(asked.spans, asked.pictures, strict=True):
            if span.start + span.length > past:
                known = self._features.get(span.key)
                if known is None:
                    parts = []
                    tiles_PHWC = cut_tiles(_decoded(picture), tiling)
                    few = _GPU_TILES if face.model.device.type == "cuda" else _CPU_TILES
                    for first in range(0, len(tiles_PHWC), few):
                        face.enter()
                        parts.append(encode_tiles(face.model, tiles_PHWC[first : first + few]))
                        yield None
                    known = torch.cat(parts)
                    self._features.put(span.key, known)
                unseen.append(known.flatten(0, 1)[max(0, past - span.start) :])
        features_TD = torch.cat(unseen) if unseen else None
        token, used, at = face.model.network.config.image_token_id, 0, past
        turn = rotary_turn(face.model) or 0
        least = turn + 1 if len(asked.ids_S) > turn else 0  # the first pass of such a prompt must reach beyond the turn, as all others do
        while at < len(asked.ids_S):
            ids_S = asked.ids_S[at : max(at + _AT_ONCE, least)]
            count = int((ids_S == token).sum())
            face.enter()
            start = prefill(face.model, ids_S, None if features_TD is None or not count else features_TD[None, used : used + count], cache)
            used, at = used + count, at + len(ids_S)
            yield start if at == len(asked.ids_S) else None


def _likely(tokenizer: Tokenizer, token: int, logits_V: torch.Tensor, most: int) -> Likely:
    logprobs_V = torch.log_softmax(logits_V, -1)
    best = torch.topk(logprobs_V, min(most, len(logprobs_V)))
    top = tuple(_told(tokenizer, at, value) for at, value in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return replace(_told(tokenizer, token, float(logprobs_V[token])), top=top)


def _told(tokenizer: Tokenizer, token: int, logprob: float) -> Likely:
    raw = tokenizer.bytes_of(token)
    return Likely(raw.decode("utf-8", "replace"), raw, logprob)


def _decoded(picture: Image.Image | Photo) -> Image.Image:
    if not isinstance(picture, Photo):
        return picture
    decoded = load_picture(picture.data, "the picture")
    if decoded.size != picture.size:  # its tokens were counted by the header
        raise PictureError("the picture: its header and its content disagree about the size", "save it again with an image editor")
    return decoded


def _asked(face: Face, request: Request) -> _Asked:
    """The request as ids and places. Raises: RefusedError when nobody is asked to speak, or for a prompt beyond the context."""
    asked, begun = request.turns, ""
    if asked and asked[-1].role == "assistant":  # a begun answer, to go on with
        asked, begun = asked[:-1], "".join(part for part in asked[-1].parts if isinstance(part, str))
    if not asked or asked[-1].role != "user":
        raise RefusedError("the conversation must end with the user's turn", "ask something", "invalid_messages")
    model = face.model
    pictures: list[tuple[Image.Image | Photo, Tiling]] = []
    keys: list[Hashable] = []
    counts: list[int] = []
    for turn in asked:
        for part in turn.parts:
            if not isinstance(part, str):
                limit = part.max_tiles if isinstance(part, Photo) else None
                tiling = model.tiling if limit is None else narrow(model.tiling, None, min(limit, model.tiling.max_tiles))
                pictures.append((part, tiling))
                keys.append((face.eyes, id(model.network), tiling, _digest(part)))
                counts.append(tiling.tokens_of(*part.size))
    left = iter(counts)
    turns = [_turn(turn, left) for turn in asked]
    ids_S = encode_turns(turns, model.template, model.tokenizer, answer_next=True).ids_S
    ids_S = np.concatenate([ids_S, np.array(model.tokenizer.encode(begun), np.int64)])
    refuse_long(model, len(ids_S))
    places = np.flatnonzero(ids_S == model.network.config.image_token_id)
    starts = np.cumsum([0, *counts])[:-1]
    spans = tuple(Span(int(places[at]), count, key) for at, count, key in zip(starts, counts, keys, strict=True))
    return _Asked(ids_S, spans, tuple(pictures), bool(begun))


def _digest(picture: Image.Image | Photo) -> bytes:
    if isinstance(picture, Photo):
        return picture.digest
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()


def _turn(turn: ChatTurn, counts: Iterator[int]) -> Turn:
    return Turn(turn.role, tuple(part if isinstance(part, str) else Picture(next(counts)) for part in turn.parts))


def answer(engine: LocalEngine, request: Request) -> tuple[str, int, str]:
    """(whole text, tokens made, finish) of a request."""
    text, last = "", Delta("", 0)
    for last in engine.stream(request):
        text += last.text
    return text, last.tokens, last.finish
