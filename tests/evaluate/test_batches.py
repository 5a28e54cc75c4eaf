"""What is asked together is a function of the data, in bounds, and loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from intervale.core.records import Message, Record
from intervale.evaluate import batches as batching
from intervale.evaluate.batches import ROWS, TOKENS, Question, batches_of, tower_schedule


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
