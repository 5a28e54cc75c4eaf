"""The protocol's prompts are the protocol's, word for word, and ask what they say they ask."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from foodie_fixture import write_foodieqa
from intervale.core.embedded import ASSETS
from intervale.core.errors import UserError
from intervale.core.records import IMAGE
from intervale.evaluate.foodieqa import (
    LANGUAGES,
    Asking,
    ask_item,
    languages_of,
    prompt_text,
    prompts_of,
    steps_of,
    turned,
)
from intervale.evaluate.suite import Settings, askings_of
from intervale.evaluate.suite_data import NO_ENGLISH, read_suite
from intervale.evaluate.suite_score import read_official, read_strict


@pytest.fixture(scope="module")
def foodie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foodie") / "src"
    write_foodieqa(folder, traps=False)
    return folder


def asked(folder: Path, task: str, language: str, prompt: str, number: int = 0, view: str = "picture", turn: str = "as-is") -> Asking:
    part = next(part for part in read_suite(folder, (task,), (language,)).parts)
    item, plain = part.items[number]
    return ask_item(item, plain, task, language, view, prompt, turn)


def test_the_protocol_has_its_prompts() -> None:
    counts = {(task, language): len(prompts_of(task, language)) for task in ("sivqa", "mivqa", "textqa") for language in languages_of(task)}
    assert counts == {("sivqa", "zh"): 5, ("sivqa", "en"): 4, ("mivqa", "zh"): 4, ("mivqa", "en"): 4, ("textqa", "zh"): 4}
    with pytest.raises(UserError, match="no prompt '7'"):
        prompt_text("sivqa", "zh", "7")


def test_a_single_picture_is_asked_as_the_authors_ask(foodie: Path) -> None:
    choices = "（A) 川菜（四川，重庆）\n（B) 黔菜 (贵州）\n（C) 上海本帮菜\n（D) 徽菜 （安徽）\n"
    question = "图片中的食物通常属于哪个菜系?"
    first = asked(foodie, "sivqa", "zh", "0").record
    assert [message.role for message in first.messages] == ["user"]
    said = f"{IMAGE}\n{question} 选项有: {choices}, 请根据上图从所提供的选项中选择一个正确答案，为（"
    assert first.messages[0].content == said
    third = asked(foodie, "sivqa", "zh", "3").record
    assert third.messages[0].content == f"{IMAGE}\n{question} 这是选项: {choices} 请根据上图从所提供的选项中选择一个正确答案。"
    assert (third.messages[1].role, third.reference()) == ("assistant", "我选择（")
    english = asked(foodie, "sivqa", "en", "2").record
    assert english.reference() == "If had to select one of the options, my answer would be ("
    assert "Here are the options: （A) cuisine_type 0\n" in english.messages[0].content


def test_four_pictures_are_named_where_the_prompt_names_them(foodie: Path) -> None:
    zero = asked(foodie, "mivqa", "zh", "0")
    assert zero.record.messages[0].content.startswith(f"{IMAGE}\n" * 4 + "根据以上四张图回答问题，他们分别为图A, 图B, 图C, 图D, ")
    assert zero.record.messages[0].content.endswith("问题：以上哪道菜是红色的？, 答案为：图")  # 以下 becomes 以上
    one = asked(foodie, "mivqa", "zh", "1").record.messages[0].content
    assert one.startswith(f"{IMAGE}\n图A\n{IMAGE}\n图B\n{IMAGE}\n图C\n{IMAGE}\n图D\n根据以上四张图")
    three = asked(foodie, "mivqa", "en", "3").record
    assert three.messages[0].content.startswith(
        "QuestionWhich of the following is red? The options are: \nOption (A)\n<image>\nOption (B)\n"
    )
    assert three.reference().endswith("the answer is：Option (")
    assert asked(foodie, "mivqa", "en", "2").record.choices == ("Option A", "Option B", "Option C", "Option D")
    own = asked(foodie, "mivqa", "zh", "2", number=1).record  # an item whose `choices` hold texts: the pictures are still the options
    assert own.choices == ("图A", "图B", "图C", "图D")


def test_text_questions_may_move_the_assistants_role_into_the_system_turn(foodie: Path) -> None:
    plain, moved = (asked(foodie, "textqa", "zh", name).record for name in ("1", "1s"))
    assert moved.messages[0].role == "system"
    assert moved.messages[1].content == plain.messages[0].content.replace("你是一个智能助手，", "")
    assert plain.images == ()


def test_turned_options_are_the_same_options_and_the_order_says_which(foodie: Path) -> None:
    plain = asked(foodie, "sivqa", "zh", "0").record
    for steps in range(4):
        turn = asked(foodie, "sivqa", "zh", "0", turn=f"turn{steps}" if steps else "as-is")
        assert [plain.choices[own] for own in turn.order] == list(turn.record.choices)
        assert turn.record.answer is not None
        assert turn.order[turn.record.answer] == plain.answer
    pictures = asked(foodie, "mivqa", "zh", "0", turn="turn1")
    assert pictures.record.images == (*pictures.plain.images[1:], pictures.plain.images[0])
    assert pictures.record.answer == 3
    assert turned(3, 4) == (1, 2, 0)
    drawn = Counter(steps_of("seeded", 1, f"vqa-{number}", 4) for number in range(4000))
    assert all(900 < count < 1100 for count in drawn.values())
    assert steps_of("seeded", 1, "a", 4) == steps_of("seeded", 1, "a", 4)


def test_a_question_with_braces_stays_what_it_is(foodie: Path) -> None:
    from dataclasses import replace

    item, plain = read_suite(foodie, ("textqa",), ("zh",)).parts[0].items[0]
    item = replace(item, question="{choices}{question}{letter}?")
    record = ask_item(item, plain, "textqa", "zh", "picture", "0", "as-is").record
    assert record.messages[0].content.startswith("{choices}{question}{letter}? 选项有: （A) ")


@pytest.mark.parametrize(
    ("raw", "strict", "official"),
    [
        ("B", 1, 1),
        ("B) 黔菜", 1, 1),
        ("B 因为", 1, 1),
        ("Answer: B", 1, 0),
        ("b", 1, None),
        ("Based on the image, the answer is (C)", 2, 1),
        ("A Sichuan dish, so B", None, 0),
        ("B or C", None, 1),
        ("不知道", None, None),
        ("", None, None),
        ("徽菜 （安徽）", 3, None),
        ("D", 3, 3),
    ],
)
def test_an_answer_is_read_strictly_and_by_the_first_letter(foodie: Path, raw: str, strict: int | None, official: int | None) -> None:
    assert read_strict(raw, asked(foodie, "sivqa", "zh", "0").record.choices) == strict
    assert read_official(raw, "key", "wrong", 0) == (official, official is None)


def test_every_prompt_ends_where_the_letter_belongs(foodie: Path) -> None:
    for asking in askings_of(read_suite(foodie), Settings()):
        words = asking.record.reference() or asking.record.question()
        assert words.endswith(("（", "(", "：图", "Option (")), asking.key


def test_the_official_fallback_is_explicit_seeded_and_uniform() -> None:
    assert read_official("?", "k", "a", 0) == (0, True)
    drawn = Counter(read_official("?", f"sivqa/{number}", "random", 3)[0] for number in range(4000))
    assert set(drawn) == {0, 1, 2, 3}
    assert all(900 < count < 1100 for count in drawn.values())
    assert read_official("?", "k", "random", 3) == read_official("?", "k", "random", 3)


def test_every_trap_is_handled_and_the_counts_add_up(tmp_path: Path) -> None:
    write_foodieqa(tmp_path / "src", traps=True)
    with pytest.raises(UserError) as caught:
        read_suite(tmp_path / "src")
    told = caught.value.what
    assert told.startswith("3 faulty items; nothing was asked")
    for part in ("not_there.jpg: no such picture", "the id 'vqa-8' stands already", "'answer' is '4', but there are 4 choices"):
        assert told.count(part) == 1
    data = read_suite(tmp_path / "src", skip_bad=True)
    left = {(part.task, part.language): Counter(fault.kind for fault in part.left_out) for part in data.parts}
    assert left["sivqa", "zh"] == {"item": 2, "picture": 1}
    assert left["sivqa", "en"] == {"item": 2, "picture": 1, NO_ENGLISH: 1}
    assert left["mivqa", "en"] == {NO_ENGLISH: 1}
    assert left["mivqa", "zh"] == left["textqa", "zh"] == {}
    for part in data.parts:
        assert len(part.items) + len(part.left_out) + part.not_chosen == part.in_file
    assert {part.in_file for part in data.parts} == {24, 12}
    first = {part.task: part for part in data.parts if part.language == "zh"}
    ids = [item.id for item, _ in first["sivqa"].items]
    assert "vqa-7" in ids  # its key was `qid`
    by_id = {item.id: item for item, _ in first["sivqa"].items}
    assert len(by_id["vqa-4"].choices) == 3
    assert by_id["vqa-20"].choices[0] == by_id["vqa-20"].choices[0].strip()  # trailing blanks go
    assert by_id["vqa-1"].choices[1] == "黔菜 (贵州）"  # mixed brackets stay in the text ...
    assert by_id["vqa-1"].tags["cuisine"] == "黔菜（贵州）"  # ... and are one in the tag
    assert by_id["vqa-5"].names == ("images/dish_5.png",)  # web_file is there once, and not used
    turned_upright = next(size for path, size in data.sizes.items() if path.name == "turned.jpg")
    assert turned_upright == (96, 64)


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("mivqa", {"images": ["images/mi_0_0.png"] * 3}, "speak of four"),
        ("textqa", {"choices": ["a", "b", "c", "d", "e"]}, "A to D"),
        ("textqa", {"question": "<image>?"}, "<image> in a question"),
        ("textqa", {"question": ""}, "'question' is empty"),
        ("mivqa", {"images": ["images/mi_0_0.png"] * 3 + ["../secret.png"]}, "a path out of"),
    ],
)
def test_what_the_protocol_cannot_ask_is_told_before_anything_is_asked(
    tmp_path: Path, task: str, change: dict[str, Any], told: str
) -> None:
    import json

    write_foodieqa(tmp_path / "src", traps=False)
    file = tmp_path / "src" / f"{task}_tidy.json"
    items = json.loads(file.read_text())
    items[0] |= change
    file.write_text(json.dumps(items))
    with pytest.raises(UserError, match="1 faulty items") as caught:
        read_suite(tmp_path / "src", (task,), LANGUAGES)
    assert told in caught.value.what


def test_only_chosen_items_are_asked_and_the_others_counted(foodie: Path, tmp_path: Path) -> None:
    from intervale.core.records import to_json
    from intervale.data.foodieqa import read_foodieqa

    held = [sample.record for sample in read_foodieqa(foodie).samples][5:8]
    (tmp_path / "eval.jsonl").write_text("\n".join(to_json(record) for record in held), encoding="utf-8")
    part = read_suite(foodie, ("sivqa",), ("zh",), only=tmp_path / "eval.jsonl").parts[0]
    assert [item.id for item, _ in part.items] == [record.id for record in held]
    assert (part.not_chosen, part.in_file) == (21, 24)
    with pytest.raises(UserError, match="no item is left"):
        read_suite(foodie, ("textqa",), ("zh",), only=tmp_path / "eval.jsonl")
    with pytest.raises(UserError, match="textqa is asked in zh only"):
        read_suite(foodie, ("textqa",), ("en",))


def test_the_notice_names_where_the_prompts_come_from() -> None:
    notice = (ASSETS / "foodieqa" / "NOTICE").read_text(encoding="utf-8")
    for word in ("2024.emnlp-main.1063", "states no licence", "CC BY-NC-ND 4.0"):
        assert word in notice
