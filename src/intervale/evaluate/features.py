"""Pictures to the features that the language model sees, batch after batch of an evaluation.

Promises: a picture goes through the vision tower once as long as its questions are in the same or in neighbouring batches; which
pictures share a pass is `tower_schedule`'s, so a continued evaluation sees the same numbers. Cost: a decode a picture, then the
tower, eight tiles a pass; of the features only those are kept that a later batch is to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from intervale.data.images import load_picture
from intervale.data.tiling import cut_tiles
from intervale.engine.decode import encode_tiles
from intervale.evaluate.batches import Question, tower_schedule
from intervale.model.load import Model

_DECODERS = 4  # threads: Pillow releases the interpreter's lock


class Features:
    """The features of each batch's pictures; batches are taken in order, any of them left out."""

    def __init__(self, model: Model, batches: Sequence[Sequence[Question]]) -> None:
        self.batches = batches
        self._model, self._schedule = model, tower_schedule(batches)
        self._until = {place: number for number, wanted in enumerate(self._schedule) for place in wanted.items()}  # the last use
        self._held: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, number: int) -> dict[str, torch.Tensor]:
        """(tiles, tokens a tile, width) of each picture of batch `number`, by file. Raises: UserError when one cannot be read."""
        wanted = self._schedule[number]
        for group in dict.fromkeys(wanted.values()):
            if any((picture, group) not in self._held for picture, own in wanted.items() if own == group):
                self._held |= self._encoded(group)
        found = {picture: self._held[picture, group] for picture, group in wanted.items()}
        self._held = {place: features.clone() for place, features in self._held.items() if self._until[place] > number}
        return found

    def _encoded(self, group: int) -> dict[tuple[str, int], torch.Tensor]:
        """The pictures that go through the tower with batch `group`, all of them."""
        where: dict[str, str] = {}
        for question in self.batches[group]:
            for picture, image in zip(question.pictures(), question.record.images, strict=True):
                if self._schedule[group][picture] == group:
                    where.setdefault(picture, f"{question.record.where}: {image}")
        with ThreadPoolExecutor(_DECODERS) as pool:
            tiles = list(pool.map(lambda picture: cut_tiles(load_picture(Path(picture), where[picture]), self._model.tiling), where))
        features = encode_tiles(self._model, np.concatenate(tiles)).split([len(part) for part in tiles])
        return {(picture, group): part for picture, part in zip(where, features, strict=True)}
