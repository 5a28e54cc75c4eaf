"""What an answer leaves behind for the next one: features of pictures, keys and values of conversations.

Promises: a picture is the same only if its bytes and its tiles are; a kept prefix is used only by the same visitor and model,
only as far as tokens and pictures agree, and never by two answers at once. Both stores are bounded in bytes; what was used
longest ago goes first. Cost: a lookup compares the prompt with each kept conversation of that visitor (microseconds each).
Legend: S positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache


class Features:
    """Pictures' features by what they are of."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The features kept under `key`, or None."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, value: torch.Tensor) -> None:
        """Keep features, unless they alone are more than the limit."""
        if key in self._kept or value.nbytes > self.most_bytes:
            return
        self._kept[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.most_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.bytes = 0


@dataclass(frozen=True)
class Span:
    """A picture in a prompt: its first position, its number of positions, and what it is."""

    start: int
    length: int
    key: Hashable


def shared_length(ids_S: np.ndarray, spans: tuple[Span, ...], other_S: np.ndarray, others: tuple[Span, ...]) -> int:
    """How many positions two prompts have in common from the start, pictures included."""
    short = min(len(ids_S), len(other_S))
    differ = np.flatnonzero(ids_S[:short] != other_S[:short])
    shared = int(differ[0]) if len(differ) else short
    for own, other in zip(spans, others, strict=False):
        if own.start >= shared:
            break
        if own != other:
            return min(own.start, other.start, shared)
    return shared


@dataclass(frozen=True)
class Kept:
    """A conversation in the network: its ids (prompt, then what was answered), its pictures, and how long the prompt was."""

    owner: Hashable
    ids_S: np.ndarray
    spans: tuple[Span, ...]
    prompt: int
    cache: DynamicCache

    @property
    def bytes(self) -> int:
        """Memory of the keys and values, whole even where a view shows less."""
        return sum(t.untyped_storage().nbytes() for layer in self.cache.layers if layer.is_initialized for t in (layer.keys, layer.values))


class Conversations:
    """Keys and values of conversations that may go on."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: list[Kept] = []  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, owner: Hashable, ids_S: np.ndarray, spans: tuple[Span, ...]) -> DynamicCache:
        """A cache that holds the longest known start of the prompt, always short of its last position; empty when none is known.

        A conversation that goes on is handed over; where only its start is shared (another conversation), that start is copied.
        """
        best, longest = None, 0
        for kept in self._kept:
            if kept.owner == owner:
                shared = min(shared_length(ids_S, spans, kept.ids_S, kept.spans), len(ids_S) - 1)
                if shared > longest:
                    best, longest = kept, shared
        if best is None:
            return DynamicCache()
        if longest >= best.prompt - 1:
            self._remove(best)
            best.cache.crop(longest - best.cache.get_seq_length())
            return best.cache
        self._kept.sort(key=lambda kept: kept is best)  # stable: only the used one moves to the end
        return _start_of(best.cache, longest)

    def put(self, kept: Kept) -> None:
        """Keep a conversation. Positions beyond those of `ids_S` must not be in its cache."""
        size = kept.bytes
        if size == 0 or size > self.most_bytes:
            return
        self._kept.append(kept)
        self.bytes += size
        while self.bytes > self.most_bytes:
            self._remove(self._kept[0])

    def _remove(self, kept: Kept) -> None:
        self._kept = [other for other in self._kept if other is not kept]
        self.bytes -= kept.bytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept, self.bytes = [], 0


@torch.inference_mode()
def _start_of(cache: DynamicCache, length: int) -> DynamicCache:
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys[..., :length, :].clone(), layer.values[..., :length, :].clone(), number)
    return copy
