"""Several prompts as one tree: a common beginning (the trunk), and behind it every token once that any of them goes on with.

Promises: prompts share a position only where all tokens and pictures up to it agree; nothing is assumed about where that ends. Pure
functions on ids; no network. Cost: a comparison of the prompts, and a Python step a token behind the trunk.
Legend: S positions of a prompt, N nodes of a tree, B rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and its pictures in order: what each is, and its features (tiles, tokens a tile, width)."""

    ids_S: np.ndarray
    pictures: tuple[tuple[Hashable, torch.Tensor], ...] = ()


class Seen:
    """The pictures of several prompts: each once, so that equal positions of equal pictures have equal numbers."""

    def __init__(self, image_token_id: int) -> None:
        self._token = image_token_id
        self._starts: dict[Hashable, int] = {}
        self._features: list[torch.Tensor] = []
        self._count = 0

    def numbers_of(self, prompt: Prompt) -> np.ndarray:
        """The ids (S,), with -1 - k in place of a picture's token, k the number of its features among those of all pictures."""
        places = []
        for key, features in prompt.pictures:
            count = features.shape[0] * features.shape[1]
            if key not in self._starts:
                self._starts[key] = self._count
                self._features.append(features.flatten(0, 1))
                self._count += count
            places.append(-1 - self._starts[key] - np.arange(count))
        numbers_S = prompt.ids_S.astype(np.int64)
        pictured = numbers_S == self._token
        have = sum(map(len, places))
        assert pictured.sum() == have, f"{pictured.sum()} picture tokens but {have} features"
        if places:
            numbers_S[pictured] = np.concatenate(places)
        return numbers_S

    def embedded_as(self, numbers: np.ndarray) -> tuple[np.ndarray, torch.Tensor | None]:
        """(ids, features (1, count, width) in the order of their places or None) of numbers of any shape."""
        pictured = numbers < 0
        if not pictured.any():
            return numbers, None
        features = torch.cat(self._features)
        wanted = torch.from_numpy(-1 - numbers[pictured]).to(features.device)
        return np.where(pictured, self._token, numbers), features[wanted][None]


def common_length(all_numbers: Sequence[np.ndarray]) -> int:
    """How many positions all of these have in common from the start."""
    first = all_numbers[0]
    length = min(map(len, all_numbers))
    for other in all_numbers[1:]:
        differ = np.flatnonzero(first[:length] != other[:length])
        length = int(differ[0]) if len(differ) else length
    return length


class Tree:
    """What follows a trunk of `trunk` tokens. Node 0 is the trunk's last token; every other node is a token that stands once."""

    def __init__(self, trunk: int) -> None:
        self.trunk = trunk
        self.numbers, self.parents, self.depths = [0], [0], [0]
        self._known: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def grow(self, at: int, numbers: Sequence[int]) -> list[int]:
        """The nodes of `numbers` one after another behind node `at`; those that are not there yet grow."""
        path = []
        for number in numbers:
            found = self._known.get((at, number))
            if found is None:
                found = self._known[at, number] = len(self.numbers)
                self.numbers.append(number)
                self.parents.append(at)
                self.depths.append(self.depths[at] + 1)
            path.append(found)
            at = found
        return path

    def seen(self) -> np.ndarray:
        """Which nodes (columns, without node 0) each node (rows, with node 0) may see: those on its way from the trunk, and itself."""
        seen = np.zeros((len(self), len(self)), bool)
        for node in range(1, len(self)):
            seen[node] = seen[self.parents[node]]
            seen[node, node] = True
        return seen[:, 1:]
