"""How long the items of a run are: all measured where they are few, a sample where they are indexed and many.

Promises: whatever is measured and cannot be trained on is told before the run starts, all at once; of a large data set the longest
texts and the items with most pictures are among the measured. The rest is checked when it is loaded, and refused by name, never cut.
Cost: a tokenisation and the picture headers of each measured item (about 0.2 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from intervale.core.errors import UserError
from intervale.core.records import Record
from intervale.core.spread import spread
from intervale.data.corpus import Corpus
from intervale.data.dataset import Size, measure
from intervale.data.images import PictureError
from intervale.data.stored import ARCHIVES
from intervale.model.load import TextSide

_SAMPLE, _EXTREME = 512, 64  # items: evenly spread, and of each kind of longest


def measure_all(records: Sequence[Record], side: TextSide, max_length: int, skip: bool) -> list[Size]:
    """Every item's size; all faults at once. With `skip` an unreadable picture is left for the loading to list."""

    def one(record: Record) -> Size | UserError:
        try:
            return measure(record, side.tokenizer, side.template, side.tiling, max_length)
        except UserError as error:
            return Size(0, 0, 0) if skip and isinstance(error, PictureError) else error

    found = spread(one, records)
    sizes = [size for size in found if isinstance(size, Size)]
    faults = [error for error in found if isinstance(error, UserError)]
    if faults:
        told = list(dict.fromkeys(fault.what for fault in faults))  # of a large data set the longest items may be in the sample too
        if len(told) == 1:
            raise faults[0]
        shown = "\n  ".join(told[:10])
        archived = any(Path(record.where.rpartition(":")[0]).suffix in ARCHIVES for record in records)  # `check` reads lines of text
        listed = "" if archived else "; `intervale check` lists them all"
        raise UserError(f"{len(told)} items cannot be trained on:\n  {shown}", f"{faults[0].fix}{listed}")
    return sizes


@dataclass(frozen=True)
class Measured:
    """The items' sizes: `sizes` of all when `exact`, else of `even` items spread over the data and, behind them, of the largest."""

    corpus: Corpus
    sizes: list[Size]
    exact: bool
    even: int
    tokens_a_tile: int

    @property
    def longest(self) -> int:
        """Tokens of the longest item that was measured."""
        return max(size.tokens for size in self.sizes)

    @property
    def most_tiles(self) -> int:
        """Most tiles of an item that was measured."""
        return max(size.tiles for size in self.sizes)

    def an_epoch(self) -> tuple[int, int]:
        """(tokens, target tokens) of an epoch, a mix as its weights say; an estimate unless `exact`."""
        counts = np.array([(size.tokens, size.targets) for size in self.sizes[: self.even]], float)
        shown = self.corpus.shown(_spaced(len(self.corpus), self.even))
        tokens, targets = shown @ counts * (len(self.corpus) / len(counts))
        return round(tokens), round(targets)

    @cached_property
    def _rates(self) -> tuple[float, float]:
        """(text tokens a byte, tokens a picture) of the sample."""
        numbers = _spaced(len(self.corpus), self.even)
        text, images = (self.corpus.weights_of(numbers, *rates).sum() for rates in ((1.0, 0.0), (0.0, 1.0)))
        some = self.sizes[: self.even]
        pictures = sum(size.tiles for size in some) * self.tokens_a_tile
        return (sum(size.tokens for size in some) - pictures) / max(1.0, text), pictures / max(1.0, images)

    def costs(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of these items, for dealing them out evenly: measured, or told from the index."""
        if self.exact:
            return np.array([self.sizes[number].tokens for number in numbers], float)
        return self.corpus.weights_of(numbers, *self._rates)


def _spaced(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def measure_corpus(corpus: Corpus, side: TextSide, max_length: int, skip: bool) -> Measured:
    """Measure all items, or of an indexed corpus a sample. Raises: UserError listing what cannot be trained on."""
    per_tile = side.tiling.tokens_per_tile
    if not corpus.indexed:
        sizes = measure_all(corpus, side, max_length, skip)
        return Measured(corpus, sizes, True, len(sizes), per_tile)
    even = _spaced(len(corpus), _SAMPLE)
    chosen = np.concatenate([even, *corpus.largest(_EXTREME)])
    sizes = measure_all([corpus[int(number)] for number in chosen], side, max_length, skip)
    return Measured(corpus, sizes, False, len(even), per_tile)
