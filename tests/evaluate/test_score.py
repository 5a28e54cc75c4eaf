"""Answers are read strictly: what is ambiguous, hedged or unreadable is nobody's answer."""

from __future__ import annotations

import time

import pytest

from intervale.evaluate.score import match_choice, most_likely, normalise, parse_letter, parse_official

CHOICES = ["川菜", "苏菜", "粤菜", "浙菜"]


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("酸辣", ["酸", "辣", "酸辣", "甜"], 2),  # 酸 and 辣 lie inside 酸辣
        ("辣，图中的菜是酸辣粉", ["酸", "辣", "酸辣", "甜"], 1),  # the dish is not the answer
        ("辣, 图中的菜是酸辣粉", ["酸", "辣", "酸辣", "甜"], 1),
        ("酸辣，也有点酸", ["酸", "辣", "酸辣", "甜"], None),  # 酸 stands alone too
        ("酸和辣", ["酸", "辣", "甜"], None),
        ("这道菜是川菜。", CHOICES, 0),
        ("川菜或苏菜", CHOICES, None),
        ("湘菜", CHOICES, None),
        ("", CHOICES, None),
        ("，图中的菜是川菜", CHOICES, None),  # a tail without an answer
        ("黔菜(贵州)", ["黔菜 (贵州）", "苏菜（江苏）"], 0),  # mixed brackets and blanks
        ("ＳＰＩＣＹ!", ["Spicy", "Sweet"], 0),
        ("It is spicy.", ["Spicy", "Sweet"], 0),
        ("Fried noodles", ["red", "noodle"], 1),  # no word begins inside another
        ("unsweetened", ["sweet", "sour"], None),
        ("25 g", ["5", "25"], 1),
        ("about 25", ["5", "7"], None),  # 25 is not 5
        ("15", ["1.5", "2"], None),
        ("1.5 kg", ["1.5", "15"], 0),
        ("川菜", ["川菜", "川菜。", "苏菜"], None),  # two choices that read the same
        ("anything", ["…", "。"], None),  # a choice of punctuation alone is never named
    ],
)
def test_an_open_answer_counts_for_the_one_choice_it_names(answer: str, choices: list[str], expected: int | None) -> None:
    assert match_choice(answer, choices) == expected


def test_normal_form_has_no_width_case_space_or_punctuation() -> None:
    assert normalise("　Ｈｅ said：“川 菜（四川）”！\u200b") == "hesaid川菜四川"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("（Ｂ）", "B"), ("【B】。", "B"), ("B.", "B"), ("**B**", "B"), ("B\n因为颜色", "B"),
        ("B. 苏菜", "B"), ("B 苏菜", "B"), ("B、苏菜", "B"), ("B: because it is sweet", "B"), ("苏菜", "B"), ("苏菜。", "B"),
        ("苏菜，图中的菜是狮子头", "B"),
        ("Answer: B", "B"), ("The answer is (C)", "C"), ("Based on the image, the answer is (C)", "C"), ("答案是B", "B"), ("正确答案为：（C）", "C"),
        ("我选择（B）", "B"), ("应该选D", "D"), ("Option D", "D"), ("I think the correct answer is option D.", "D"), ("The answer is A because x", "A"),
        ("A. 川菜\nB. 苏菜\n答案：B", "B"), ("不选A，选B", "B"),
    ],
)  # fmt: skip
def test_a_letter_or_the_exact_choice_is_an_answer(answer: str, letter: str) -> None:
    assert parse_letter(answer, CHOICES) == "ABCD".index(letter)


@pytest.mark.parametrize(
    "answer",
    ["", "E", "(E)", "Based on the image", "A Sichuan dish, so B", "A Sichuan dish", "Answer: A Sichuan dish", "Apple", "bad", "不选A", "答案不是A",
     "The answer is not A", "A or B", "A、B", "A, B", "A和B", "答案是A或B", "The answer is B. No, the answer is C.", "A. 川菜\nB. 苏菜", "川菜和苏菜"],
)  # fmt: skip
def test_anything_else_is_no_answer(answer: str) -> None:
    assert parse_letter(answer, CHOICES) is None


@pytest.mark.parametrize("fill", [" ", "\n", "\u3000", ")", "("])
def test_an_answer_of_blanks_or_brackets_is_read_in_proportion_to_its_length(fill: str) -> None:
    began = time.process_time()
    for answer in ("B" + fill * 40_000 + "x", fill * 40_000 + "x"):
        parse_letter(answer, CHOICES)
        match_choice(answer, CHOICES)
    assert time.process_time() - began < 2  # in proportion to its square it was half a minute


def test_only_letters_that_stand_for_a_choice_are_read() -> None:
    assert parse_letter("C", ["x", "y"]) is None
    assert parse_letter("F", list("uvwxyz")) == 5


def test_official_takes_the_first_letter_wherever_it_stands() -> None:
    assert parse_official("Answer: B", CHOICES) == 0  # the rule's well-known fault, kept
    assert parse_official("the answer is b", CHOICES) is None
    assert parse_official("So, D then B", CHOICES) == 3
    assert parse_official("E", list("vwxyz")) == 4


def test_a_tie_for_the_most_likely_choice_is_nobodys() -> None:
    assert most_likely([-2.0, -1.0, -3.0]) == 1
    assert most_likely([-1.0, -3.0, -1.0]) is None
