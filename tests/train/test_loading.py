"""Steps made ahead are the steps made when asked, by threads and by processes, faults included."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from intervale.core.records import Record, read_records
from intervale.data.dataset import Item, ItemPicture, TileCache, load_item
from intervale.data.images import PictureError
from intervale.model.load import text_side
from intervale.train.batches import Loaded, Packing, load_ahead, load_step

BAD = 3


@pytest.fixture(scope="module")
def step(tiny: Path, plates: Path) -> Callable[[int], Loaded]:
    """Step n: items 2n and 2n + 1, in micro-batches of one; item 3 cannot be read."""
    side, cache = text_side(tiny), TileCache()
    records = read_records(plates / "train.jsonl")
    token = side.tokenizer.control("<IMG_CONTEXT>")

    def load(record: Record) -> Item:
        if record is records[BAD]:
            raise PictureError("item 3: damaged", "replace it")
        return load_item(record, side.tokenizer, side.template, side.tiling, cache)

    return lambda number: load_step(records, load, [2 * number, 2 * number + 1], Packing(1, share=True), token)


@pytest.mark.parametrize(("workers", "processes"), [(1, False), (3, False), (1, True), (2, True)])
def test_steps_made_ahead_are_those_made_when_asked(step: Callable[[int], Loaded], workers: int, processes: bool) -> None:
    asked = list(load_ahead(step, 1, 4, 0, False))
    ahead = list(load_ahead(step, 1, 4, workers, processes))
    assert len(ahead) == len(asked) == 3
    for one, other in zip(asked, ahead, strict=True):
        assert [batch.ids for batch in one.batches] == [batch.ids for batch in other.batches]
        for left, right in zip(one.batches, other.batches, strict=True):
            for name in ("ids_1T", "positions_1T", "labelled_N", "targets_N", "tiles_PHWC"):
                assert torch.equal(getattr(left, name), getattr(right, name)), name
            assert left.layout.groups == right.layout.groups
            assert torch.equal(left.layout.begins_R, right.layout.begins_R)


@pytest.mark.parametrize("processes", [False, True])
def test_an_unreadable_picture_is_told_at_its_step_with_its_fix(step: Callable[[int], Loaded], processes: bool) -> None:
    first, second = load_ahead(step, 0, 2, 1, processes)
    assert not first.bad
    ((name, error),) = second.bad
    assert isinstance(error, PictureError)
    assert (error.what, error.fix) == ("item 3: damaged", "replace it")
    assert name not in [own for batch in second.batches for own in batch.ids]
    assert len(second.batches) == 1


def test_questions_on_one_picture_fit_into_packs_too() -> None:
    """64 of them, 76 tokens each: a pack of 200 holds the 40 that they share and 36 of each of four; one of a token is one item."""
    picture = (ItemPicture("p", 1, None),)
    begin = np.concatenate([np.ones(1, np.int64), np.full(16, 9), np.full(23, 7)])
    items = [Item(str(n), np.concatenate([begin, np.full(36, 100 + n)]), np.arange(76) >= 70, picture) for n in range(64)]
    records = [Record(item.id, (), ()) for item in items]
    for tokens, most in ((200, 4), (1, 1)):
        loaded = load_step(records, lambda record: items[int(record.id)], range(64), Packing(4, tokens, share=True), 9)
        assert {len(batch.ids) for batch in loaded.batches} == {most}
        assert max(batch.tokens for batch in loaded.batches) <= max(tokens, 76)
        assert sorted(int(name) for batch in loaded.batches for name in batch.ids) == list(range(64))
