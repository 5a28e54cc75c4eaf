"""The engine in this process: transformers on the CPU or one GPU.

Pictures' features are kept by content, so that a second turn or another model's prompt does not run the tower again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from PIL import Image

from intervale.core.errors import UserError
from intervale.data.prompt import Picture, Turn, encode_turns
from intervale.data.tiling import cut_tiles
from intervale.engine.api import ChatTurn, Delta, Request
from intervale.engine.decode import encode_tiles, generate, prefill
from intervale.model.load import Model

_KEPT_PICTURES = 32
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the decoder gives for half of a character


class LocalEngine:
    """Answers one request at a time with a Model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def features(self, picture: Image.Image) -> torch.Tensor:
        """A picture's projected features (tiles, tokens a tile, width)."""
        key = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
        if key not in self._features:
            self._features[key] = encode_tiles(self.model, cut_tiles(picture, self.model.tiling))
            while len(self._features) > _KEPT_PICTURES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]

    def stream(self, request: Request) -> Iterator[Delta]:
        """The answer, piece by piece. Raises: UserError when the prompt does not fit the context."""
        if not request.turns or request.turns[-1].role != "user":
            raise UserError("the conversation must end with the user's turn", "ask something")
        features = [self.features(part) for turn in request.turns for part in turn.parts if isinstance(part, Image.Image)]
        counts = iter([part.shape[0] * part.shape[1] for part in features])
        turns = [_turn(turn, counts) for turn in request.turns]
        prompt = encode_turns(turns, self.model.template, self.model.tokenizer, answer_next=True)
        joined = torch.cat(features) if features else None
        yield from self._answer(request, prompt.ids_S, joined)

    def _answer(self, request: Request, ids_S, features: torch.Tensor | None) -> Iterator[Delta]:  # type: ignore[no-untyped-def]
        model = self.model
        stops = set(model.stop_ids)
        ids: list[int] = []
        told = 0
        for token in generate(model, prefill(model, ids_S, features), request.sampling):
            ids.append(token)
            if token in stops:
                break
            text = model.tokenizer.decode(ids)
            if not text.endswith(_INCOMPLETE):
                yield Delta(text[told:], len(ids))
                told = len(text)
        stopped = bool(ids) and ids[-1] in stops
        text = model.tokenizer.decode(ids[:-1] if stopped else ids)
        yield Delta(text[told:], len(ids), "stop" if stopped else "length")


def _turn(turn: ChatTurn, counts: Iterator[int]) -> Turn:
    return Turn(turn.role, tuple(part if isinstance(part, str) else Picture(next(counts)) for part in turn.parts))


def answer(engine: LocalEngine, request: Request) -> tuple[str, int, str]:
    """(whole text, tokens made, finish) of a request."""
    text, last = "", Delta("", 0)
    for last in engine.stream(request):
        text += last.text
    return text, last.tokens, last.finish
