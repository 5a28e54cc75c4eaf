"""What is asked together is a function of the data, in bounds, and loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from intervale.core.records import Message, Record
from intervale.evaluate import batches as batching
from intervale.evaluate.batches import ROWS, TOKENS, Question, batches_of, rows_of, tower_schedule, work_of


def question(name: str, tokens: int, new: int = 10, pictures: tuple[str, ...] = (), picture_tokens: int = 0) -> Question:
    record = Record(name, (Message("user", "<image>" * len(pictures) + "?"),), pictures, root=Path("/data"), where="data.jsonl:1")
    return Question(record, tokens, picture_tokens, new)


def names(batches: list[list[Question]]) -> list[list[str]]:
    return [[asked.record.id for asked in batch] for batch in batches]


def test_every_question_is_in_one_batch_and_no_batch_is_over_the_limits() -> None:
    asked = [question(str(n), 1 + (n * 7919) % 3000, new=n % 60) for n in range(1500)]
    batches = batches_of(asked)
    assert sorted(name for batch in names(batches) for name in batch) == sorted(str(n) for n in range(1500))
    for batch in batches:
        assert len(batch) <= ROWS
        assert len(batch) * max(own.tokens + own.new for own in batch) <= TOKENS
    assert len(batches_of([question(str(n), 100) for n in range(200)])[0]) == ROWS


def test_a_question_over_the_budget_is_asked_alone() -> None:
    assert names(batches_of([question("a", 5), question("b", TOKENS), question("c", 5)])) == [["b"], ["a", "c"]]


def test_long_before_short_and_a_pictures_questions_stay_neighbours() -> None:
    asked = [question(f"{n}{m}", 300 + 7 * m, pictures=(f"{n}.png",), picture_tokens=256 * (1 + n % 2)) for n in range(4) for m in range(2)]
    assert names(batches_of(asked)) == [["10", "11", "30", "31", "00", "01", "20", "21"]]


def test_windows_bound_how_far_the_order_is_from_the_datas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WINDOW", 3)
    assert names(batches_of([question(str(n), n + 1) for n in range(5)])) == [["2", "1", "0"], ["4", "3"]]


def test_a_picture_is_computed_with_the_first_batch_that_needs_it_until_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "KEPT_PICTURES", 2)
    needs = [("a", "b", "c"), ("c", "b"), ("d",), ("b", "c")]
    schedule = tower_schedule([[question("q", 9, pictures=tuple(pictures))] for pictures in needs])
    assert schedule == [
        {"/data/a": 0, "/data/b": 0, "/data/c": 0},
        {"/data/c": 0, "/data/b": 0},
        {"/data/d": 2},
        {"/data/b": 0, "/data/c": 3},  # b and d were the last two
    ]


def about(name: str, *parts: int | str, new: int = 10, turn: int | None = None, tiles: int = 100) -> Question:
    """A question of these ids and pictures (files), in this order, each picture of `tiles` tokens."""
    pictures = tuple(part for part in parts if isinstance(part, str))
    record = Record(name, (Message("user", "<image>" * len(pictures) + "?"),), pictures, root=Path("/data"), where="data.jsonl:1")
    outline = tuple(-1 if isinstance(part, str) else part for part in parts)
    counts = (tiles,) * len(pictures)
    tokens = len(outline) - len(pictures) + sum(counts)
    return Question(record, tokens, sum(counts), new, outline=outline, counts=counts, turn=turn)


def rows(batches: list[list[Question]]) -> list[list[list[str]]]:
    return [names(rows_of(batch)) for batch in batches]


def test_items_share_a_row_by_what_their_prompts_begin_with_wherever_they_stand_in_the_data() -> None:
    asked = [
        about("a1", 1, 2, "a.png", 3), about("b1", 1, 2, "b.png", 3), about("a2", 1, 2, "a.png", 4, 5), about("text", 1, 2, 3),
        about("before", 1, 2, 9, "a.png"), about("b2", 1, 2, "b.png", 3), about("a3", 1, 2, "a.png"),
    ]  # fmt: skip
    assert rows(batches_of(asked)) == [[["a1", "a2", "a3"], ["b1", "b2"], ["before"], ["text"]]]


def test_a_second_picture_that_differs_is_shared_up_to_it_and_texts_share_too() -> None:
    two = [about("x", 1, "a.png", "b.png", 2), about("y", 1, "a.png", "c.png", 2), about("z", 1, "b.png", "a.png", 2)]
    assert rows(batches_of(two)) == [[["x"], ["y"], ["z"]]]  # more than twice what is shared is behind it
    some = [about("x", 1, "a.png", 7, *range(70)), about("y", 1, "a.png", 8, *range(90)), about("z", 1, "a.png", 9, *range(120))]
    assert rows(batches_of(some)) == [[["x", "y"], ["z"]]]  # 101 are half of 172 and 192, not of 222
    long_ = [about("x", 1, "a.png", "b.png", *range(300)), about("y", 1, "a.png", "b.png", *range(290))]
    assert rows(batches_of(long_)) == [[["x", "y"]]]
    texts = [about("s", *range(40), 7), about("t", *range(40), 8, 9), about("u", 5, *range(40))]
    assert rows(batches_of(texts)) == [[["s", "t"], ["u"]]]


def test_a_row_is_split_where_it_would_be_over_the_limits() -> None:
    many = batches_of([about(f"{n}", 1, "a.png", n + 2, tiles=800) for n in range(ROWS + 6)])
    assert [[len(row) for row in batch] for batch in rows(many)] == [[ROWS], [6]]
    short = batches_of([about(f"{n}", 1, "a.png", n + 2, tiles=100) for n in range(40)])
    assert [[len(row) for row in batch] for batch in rows(short)] == [[18, 18, 4]]  # 18 x 11 positions behind 101, 19 would be 209
    wide = batches_of([about(f"{n}", 1, "a.png", n + 2, new=1000, tiles=3000) for n in range(7)])
    assert [[len(row) for row in batch] for batch in rows(wide)] == [[5], [2]]
    for batch in [*many, *wide]:
        for row in rows_of(batch):
            shared = row[0].tokens - 1
            assert shared + sum(own.tokens - shared + own.new for own in row) <= TOKENS


def test_every_question_is_asked_once_however_it_is_shared() -> None:
    asked = [about(f"{n}", 1, f"{n % 7}.png", *range(2, 2 + n % 5), tiles=64 * (1 + n % 7), new=n % 50 + 1) for n in range(1200)]
    batches = batches_of(asked)
    assert sorted(name for batch in names(batches) for name in batch) == sorted(str(n) for n in range(1200))
    assert all(len(batch) <= ROWS for batch in batches)
    assert sum(work_of(batch) for batch in batches) < 0.2 * sum(own.tokens + own.new for own in asked)
    assert batches_of(asked) == batches


def test_where_the_rotary_embedding_turns_nothing_of_two_sides_is_computed_together() -> None:
    """Short ones share with short ones, long ones if what they share is long already; one that crosses is alone in its batch."""
    turn = 150
    short = [about("s1", 1, "a.png", 2, turn=turn), about("s2", 1, "a.png", 3, turn=turn)]
    crossing = [about(f"c{n}", 1, "a.png", *range(40 + n), turn=turn) for n in range(2)]
    early = [about(f"e{n}", 1, "a.png", n, *range(60), turn=turn) for n in range(2)]  # 101 in common
    late = [about(f"l{n}", 1, "a.png", "b.png", n, turn=turn) for n in range(2)]
    found = rows(batches_of([*short, *crossing, *early, *late]))
    assert found == [[["l0", "l1"]], [["s1", "s2"]], [["c0"]], [["c1"]], [["e0"], ["e1"]]]
    plain = [replace(asked, turn=None) for asked in [*short, *crossing, *early, *late]]
    assert len(batches_of(plain)) == 1


def test_pictures_whose_features_are_given_need_no_tower() -> None:
    batches = [[question("q", 9, pictures=("a", "b"))], [question("r", 9, pictures=("b", "c"))]]
    assert tower_schedule(batches, {"/data/b"}) == [{"/data/a": 0}, {"/data/c": 1}]
