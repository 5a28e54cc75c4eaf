"""Open answers are measured as published, and never better than their words are."""

from __future__ import annotations

import pytest

from intervale.core.errors import UserError
from intervale.core.records import Message, Record
from intervale.evaluate.free import character_f1, rouge_l, score_free, without_choices, words


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004, section 3.1: S1, S2
        ("police killed the gunman", "the gunman kill police", 0.5),  # S3
        ("police killed the gunman", "the gunman police killed", 0.5),  # S4
    ],
)
def test_rouge_l_gives_lins_worked_example(reference: str, answer: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected)


def test_rouge_l_of_texts_of_unequal_length_is_the_f_measure_of_their_common_subsequence() -> None:
    # lcs("麻婆豆腐", "这是麻婆豆腐") = 4, recall 4/4, precision 4/6
    assert rouge_l("这是麻婆豆腐。", "麻婆豆腐") == pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6))
    assert rouge_l("", "麻婆豆腐") == rouge_l("，", "麻婆豆腐") == 0.0


def test_a_chinese_character_is_a_word_and_a_number_is_one() -> None:
    assert words("我吃 Mapo-tofu, 1.5 碗") == ["我", "吃", "mapo", "tofu", "1.5", "碗"]


def test_character_f1_counts_shared_characters_with_their_number() -> None:
    assert character_f1("abcd", "abef") == pytest.approx(0.5)
    assert character_f1("aaaa", "a") == pytest.approx(2 * 1 / 5)
    assert character_f1("", "a") == character_f1("b", "a") == 0.0


@pytest.mark.parametrize(
    ("raw", "reference", "exact", "contained"),
    [
        ("Mapo Tofu.", "mapo tofu", True, True),
        ("This is mapo tofu, a spicy dish.", "mapo tofu", False, True),
        ("potato soup", "pot", False, False),  # not inside a word
        ("a big pot", "pot", False, True),
        ("25 g", "5 g", False, False),
        ("图中的菜是麻婆豆腐。", "麻婆豆腐", False, True),
        ("川菜，图中的菜是麻婆豆腐", "川菜，图中的菜是酸菜鱼", True, True),  # the dish was not asked for
        ("苏菜，图中的菜是川菜", "川菜", False, False),
        ("", "川菜", False, False),
    ],
)
def test_exact_and_contained(raw: str, reference: str, exact: bool, contained: bool) -> None:
    found = score_free(raw, reference)
    assert (found["exact"], found["contained"]) == (exact, contained)
    assert (found["f1"] == 1.0) >= exact


def free(name: str, answer: str | None = "x", choices: tuple[str, ...] = ()) -> Record:
    turns = (Message("user", "q"), *([Message("assistant", answer)] if answer is not None else []))
    return Record(name, turns, choices=choices, answer=0 if choices else None, where=f"d.jsonl:{name}")


def test_open_data_is_known_by_its_items_and_a_mixture_is_refused() -> None:
    assert without_choices([free("1"), free("2")], "d.jsonl", "open", "strict")
    assert not without_choices([free("1", choices=("a", "b"))], "d.jsonl", "mcq", "likelihood")
    with pytest.raises(UserError, match=r"1 \(line 2\) of 2 items have no 'choices'"):
        without_choices([free("1", choices=("a", "b")), free("2")], "d.jsonl", "open", "strict")
    with pytest.raises(UserError, match="nothing for --prompt open --mode likelihood"):
        without_choices([free("1")], "d.jsonl", "open", "likelihood")
    with pytest.raises(UserError, match=r"2 \(lines 2, 3\) of 3 items have neither"):
        without_choices([free("1"), free("2", None), free("3", " 。")], "d.jsonl", "open", "strict")
