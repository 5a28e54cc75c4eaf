"""Rows and groups hold every item's own tokens, and fill in little."""

import numpy as np
import pytest

from intervale.data.dataset import Item, ItemPicture
from intervale.data.packing import pack, row_tokens

IMAGE = 9


def item(number: int, length: int, picture: str | None = None, answer: int = 3) -> Item:
    """`length` tokens, the last `answer` of them trained; with a picture the first four are it."""
    draw = np.random.default_rng(number)
    ids = draw.integers(10, 100, length)
    if picture:
        ids[:4] = IMAGE
    trained = np.arange(length) >= length - answer
    pictures = (ItemPicture(picture, 1, np.zeros((1, 2, 2, 3), np.uint8)),) if picture else ()
    return Item(f"i{number}", ids, trained, pictures)


def labels(ids: np.ndarray, targets: np.ndarray) -> list[tuple[int, int]]:
    return sorted((int(a), int(b)) for a, b in zip(ids, targets, strict=True) if b >= 0)


@pytest.mark.parametrize("shapes", [0, 4, 16])
@pytest.mark.parametrize("share", [False, True])
def test_every_target_follows_its_own_token_once(share: bool, shapes: int) -> None:
    items = [item(n, 20 + 7 * n) for n in range(9)] + [item(20 + n, 30, f"p{n // 3}") for n in range(6)]
    rows = pack(items, share, IMAGE, shapes)
    wanted = [pair for one in items for pair in labels(one.ids_S[:-1], np.where(one.trained_S[1:], one.ids_S[1:], -1))]
    assert labels(rows.ids_T, rows.targets_T) == sorted(wanted)
    assert len(rows.ids_T) == sum(group.rows * group.length for group in rows.groups)
    assert len(rows.begins) == sum(group.rows for group in rows.groups)


def test_rows_of_about_one_length_are_filled_up_by_three_percent_at_most() -> None:
    rows = pack([item(n, length) for n, length in enumerate((3400, 3396, 3390, 330, 336, 328))], False, IMAGE)
    assert [(group.rows, group.length) for group in rows.groups] == [(3, 3400), (3, 336)]
    assert rows.tokens == 3400 + 3396 + 3390 + 330 + 336 + 328
    assert len(rows.ids_T) <= 1.03 * rows.tokens


def test_many_lengths_become_few_groups() -> None:
    rows = pack([item(n, 10 + 3 * n) for n in range(60)], False, IMAGE)
    assert len(rows.groups) <= 8
    assert len(rows.ids_T) <= 1.3 * rows.tokens


def test_lengths_beside_a_gpu_are_few() -> None:
    lengths = {pack([item(n, length)], False, IMAGE, 16).groups[0].length for n, length in enumerate(range(1024, 2048))}
    assert len(lengths) <= 17
    assert pack([item(0, 3390)], False, IMAGE, 64).groups[0].length == 3392
    assert all(pack([item(n, length)], False, IMAGE, 64).groups[0].length % 16 == 0 for n, length in enumerate((7, 100, 333, 3391)))


def asked(number: int, rest: int, answer: int = 3, begin: int = 0) -> Item:
    """A question about one picture: 40 tokens that all share (`begin` names other ones), then `rest` of its own."""
    own = np.random.default_rng(100 + number).integers(10, 100, rest)
    ids = np.concatenate([[begin + 1], np.full(16, IMAGE), np.full(23, 7), own])
    trained = np.arange(len(ids)) >= len(ids) - answer
    return Item(f"q{number}", ids, trained, (ItemPicture("p", 1, None),))


def test_one_long_answer_among_short_ones_fills_up_none_of_them() -> None:
    items = [asked(0, 4000, 3990), *(asked(number, 12) for number in range(1, 8))]
    rows = pack(items, True, IMAGE)
    assert len(rows.ids_T) <= 4040 + 40 + 7 * 16  # the long one alone, the others as branches of one row
    assert sorted(group.branches for group in rows.groups) == [0, 7]
    wanted = [pair for one in items for pair in labels(one.ids_S[:-1], np.where(one.trained_S[1:], one.ids_S[1:], -1))]
    assert labels(rows.ids_T, rows.targets_T) == sorted(wanted)


def test_sharing_never_computes_more_than_separate_rows() -> None:
    draw = np.random.default_rng(3)
    for _ in range(30):
        items = [asked(number, int(rest), 3) for number, rest in enumerate(draw.integers(6, 3 + 10 ** draw.integers(1, 5), 8))]
        alone = sum(len(item.ids_S) for item in items)
        assert row_tokens(items, True, IMAGE) <= alone
        assert len(pack(items, True, IMAGE).ids_T) <= 1.03 * alone


def test_an_item_that_begins_otherwise_leaves_the_others_their_row() -> None:
    early = asked(5, 12)
    trained = early.trained_S.copy()
    trained[3] = True  # before its picture ends
    items = [asked(1, 12), asked(2, 12), asked(3, 12, begin=1), Item("early", early.ids_S, trained, early.pictures), asked(4, 12)]
    assert sorted((group.rows, group.branches) for group in pack(items, True, IMAGE).groups) == [(1, 3), (2, 0)]
