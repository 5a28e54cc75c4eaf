"""Pictures to the features that the language model sees, batch after batch of an evaluation.

Promises: a picture goes through the vision tower once as long as its questions are in the same or in neighbouring batches, and not at
all where its features are on file (`evaluate.kept_features`); which pictures share a pass is `tower_schedule`'s, so a continued
evaluation sees the same numbers. Cost: a decode a picture, then the tower, eight tiles a pass (on file: one read, and the projector);
of the features only those are kept that a later batch is to use.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from intervale.core.errors import UserError
from intervale.core.lang import say
from intervale.data.images import load_picture
from intervale.data.pictures import load_tiles
from intervale.data.tiling import cut_tiles
from intervale.engine.decode import encode_tiles, projected, tower_tiles
from intervale.evaluate.batches import Question, tower_schedule
from intervale.evaluate.kept_features import Kept, Tell
from intervale.model.load import Model

_DECODERS = 4  # threads: Pillow releases the interpreter's lock


class Features:
    """The features of each batch's pictures; batches are taken in order, any of them left out."""

    def __init__(self, model: Model, batches: Sequence[Sequence[Question]], kept: Kept | None = None, tell: Tell = lambda _: None) -> None:
        self.batches = batches
        self._model, self._kept, self._tell = model, kept, tell
        self._found = kept.found if kept else {}
        self._schedule = tower_schedule(batches, self._found)
        self._until = {place: number for number, wanted in enumerate(self._schedule) for place in wanted.items()}  # the last use
        self._held: dict[tuple[str, int], torch.Tensor] = {}
        self._read: dict[str, torch.Tensor] = {}  # those of the batch before

    def of(self, number: int) -> dict[str, torch.Tensor]:
        """(tiles, tokens a tile, width) of each picture of batch `number`, by file. Raises: UserError when one cannot be read."""
        wanted = self._schedule[number]
        for group in dict.fromkeys(wanted.values()):
            if any((picture, group) not in self._held for picture, own in wanted.items() if own == group):
                self._held |= self._encoded(group)
        found = {picture: self._held[picture, group] for picture, group in wanted.items()}
        self._held = {place: features.clone() for place, features in self._held.items() if self._until[place] > number}
        on_file = self._where(number, self._found)
        self._read = {picture: self._read[picture] if picture in self._read else self._from_file(picture, on_file) for picture in on_file}
        return found | self._read

    def _where(self, number: int, among: Container[str]) -> dict[str, str]:
        """Those pictures of batch `number` that are `among` some, and what an error calls each."""
        where: dict[str, str] = {}
        for question in self.batches[number]:
            for picture, image in zip(question.pictures(), question.record.images, strict=True):
                if picture in among:
                    where.setdefault(picture, f"{question.record.where}: {image}")
        return where

    def _from_file(self, picture: str, where: dict[str, str]) -> torch.Tensor:
        assert self._kept is not None
        key, stage = self._found[picture]
        features = self._kept.store.get(key)
        if features is None:
            self._tell(say(f"{where[picture]}: its features are on file no more and are computed again; last digits may differ",
                           f"{where[picture]}：缓存的特征已不在，将重新计算；末位数字可能不同"))  # fmt: skip
            return encode_tiles(self._model, cut_tiles(load_picture(Path(picture), where[picture]), self._model.tiling))
        features = features.to(self._model.device)
        return features if stage == "projected" else projected(self._model, features)

    def _tiles(self, picture: str, where: str) -> np.ndarray:
        """A picture's tiles; of one that is to be written, only if its file is still the one its key was made of."""
        if self._kept is None or picture not in self._kept.writable:
            return cut_tiles(load_picture(Path(picture), where), self._model.tiling)
        tiles = load_tiles(self._kept.writable[picture], self._model.tiling)
        if isinstance(tiles, UserError):
            raise tiles
        return tiles

    def _encoded(self, group: int) -> dict[tuple[str, int], torch.Tensor]:
        """The pictures that go through the tower with batch `group`, all of them."""
        where = self._where(group, [picture for picture, own in self._schedule[group].items() if own == group])
        with ThreadPoolExecutor(_DECODERS) as pool:
            tiles = list(pool.map(self._tiles, where, where.values()))
        together, counts = np.concatenate(tiles), [len(part) for part in tiles]
        if self._kept is None or not self._kept.writable:
            features = encode_tiles(self._model, together)
        else:
            tower = tower_tiles(self._model, together)
            for picture, part in zip(where, tower.split(counts), strict=True):
                if picture in self._kept.writable:
                    self._kept.store.put(self._kept.writable[picture].key, part)
            features = projected(self._model, tower)
        return {(picture, group): part for picture, part in zip(where, features.split(counts), strict=True)}
