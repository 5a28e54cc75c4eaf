"""What a report says beyond its headline is computed, bounded and in one language."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evaluation_fixture import folder, line, outcomes
from intervale.cli.evaluate import shown
from intervale.core.errors import UserError
from intervale.core.files import write_json
from intervale.core.lang import in_language, set_language
from intervale.evaluate.compare import compare
from intervale.evaluate.free import free_numbers, score_free
from intervale.evaluate.published import column, published
from intervale.evaluate.report import in_words, report_html
from intervale.evaluate.seen import in_words as seen_words
from intervale.evaluate.statistics import holm, mcnemar

MCQ = {"prompt": "mcq", "mode": "strict", "max_new_tokens": 64, "max_tiles": 6, "headline": None}
LIKELY = {"prompt": "mcq", "mode": "likelihood", "max_new_tokens": None, "max_tiles": 6, "headline": "sum"}


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    set_language("en")
    yield
    set_language(None)


class _Text(HTMLParser):
    """The words of a page, without its style sheet; and those of attributes that are read out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        self.words += [value or "" for name, value in attrs if name in ("aria-label", "alt", "data-side", "title")]

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)


def text_of(found: dict[str, Any], extra: dict[str, Any] | None = None) -> str:
    return " ".join(_Text(report_html(found, extra)).words).replace("\u00a0", " ")


def grouped(pattern: dict[str, str], tag: str = "question_type", **changes: Any) -> list[dict[str, Any]]:
    return [
        line(f"{value}{n}", mark == "1", tags={tag: value}, **changes) for value, marks in pattern.items() for n, mark in enumerate(marks)
    ]


def test_groups_are_tested_pair_by_pair_and_read_together(tmp_path: Path) -> None:
    before = folder(tmp_path / "a", grouped({"taste": "0" * 9 + "1", "region": "0" * 6 + "1" * 4, "color": "01" * 5}))
    after = folder(tmp_path / "b", grouped({"taste": "1" * 9 + "0", "region": "1" * 6 + "1" * 4, "color": "01" * 5}))
    found = compare(before, after)
    groups = found["tags"]["question_type"]
    assert {value: (group["fixed"], group["broken"]) for value, group in groups.items()} == {
        "taste": (9, 1),
        "region": (6, 0),
        "color": (0, 0),
    }
    plain = [mcnemar(9, 1), mcnemar(6, 0), 1.0]
    assert [group["p"] for group in groups.values()] == plain
    assert [group["p_holm"] for group in groups.values()] == holm(plain)
    assert found["holm"] == {"family": 3, "tags": ["question_type"], "found": 0}  # 0.02 and 0.03 alone, 0.06 each among three
    assert "No group changed by more than chance explains" in text_of(found)
    assert "Holm's correction for looking at 3 groups" in text_of(found)
    assert "way" not in groups


def test_a_group_that_stands_is_marked(tmp_path: Path) -> None:
    before = folder(tmp_path / "a", grouped({"taste": "0" * 30, "region": "01" * 15}))
    after = folder(tmp_path / "b", grouped({"taste": "1" * 30, "region": "01" * 15}))
    found = compare(before, after)
    assert found["holm"]["found"] == 1
    assert "1 of 2 groups changed" in text_of(found)
    assert text_of(found).count("+100.0 *") == 1


def test_the_bootstrap_draws_the_pictures_that_questions_share(tmp_path: Path) -> None:
    def lines(marks: str) -> list[dict[str, Any]]:
        return [line(f"q{n}", mark == "1", pictures=[f"p{n // 4}"]) for n, mark in enumerate(marks)]

    found = compare(folder(tmp_path / "a", lines("0" * 80)), folder(tmp_path / "b", lines(("1" * 4 + "0" * 4) * 10)))
    drawn = found["difference"]["bootstrap"]
    assert (drawn["groups"], drawn["seed"]) == (20, 0)
    low, high = found["difference"]["interval"]
    assert drawn["interval"][1] - drawn["interval"][0] > 1.5 * (high - low)
    assert "The 80 items stand on 20 pictures" in text_of(found)
    alone = compare(folder(tmp_path / "c", outcomes("01" * 10)), folder(tmp_path / "d", outcomes("11" * 10)))
    assert alone["difference"]["bootstrap"]["groups"] == 20
    assert "items stand on" not in text_of(alone)


def test_an_undecided_comparison_says_what_it_could_have_shown(tmp_path: Path) -> None:
    found = compare(folder(tmp_path / "a", outcomes("01" * 20)), folder(tmp_path / "b", outcomes("0111" * 10)))
    assert 0.15 < found["power"]["detectable"] < 0.35
    assert "40 items of which 25.0% changed show a difference of" in in_words(found) or found["mcnemar"]["p"] < 0.05
    few = compare(folder(tmp_path / "c", outcomes("010")), folder(tmp_path / "d", outcomes("001")))
    assert few["power"]["detectable"] is None
    assert "3 items are too few to show any difference" in in_words(few)


def test_other_pictures_are_refused_with_the_items_they_belong_to(tmp_path: Path) -> None:
    def lines(picture: str) -> list[dict[str, Any]]:
        return [line(f"q{n}", True, pictures=["same" if n else picture]) for n in range(3)]

    with pytest.raises(UserError, match="the pictures of 1 items are not the same: 'q0'"):
        compare(folder(tmp_path / "a", lines("old")), folder(tmp_path / "b", lines("new")))
    with pytest.raises(UserError, match="the pictures of 3 items"):  # an older evaluation did not note them: nobody knows
        compare(folder(tmp_path / "c", outcomes("111")), folder(tmp_path / "d", lines("new")))
    assert compare(tmp_path / "a", tmp_path / "a")["pictures_compared"] is True


def likely(sure: float, marks: str) -> list[dict[str, Any]]:
    scores = [{"sum": math.log(sure), "mean": 0.0, "tokens": 1}, {"sum": math.log(1 - sure), "mean": 0.0, "tokens": 1}]
    return [line(f"q{n}", mark == "1", mode="likelihood", prompt="mcq", scores=scores) for n, mark in enumerate(marks)]


def test_calibration_stands_where_likelihoods_were_asked_for(tmp_path: Path) -> None:
    strict = compare(folder(tmp_path / "a", outcomes("0101")), folder(tmp_path / "b", outcomes("1101")))
    extra = compare(
        folder(tmp_path / "c", likely(0.95, "0101"), protocol=LIKELY), folder(tmp_path / "d", likely(0.75, "1101"), protocol=LIKELY)
    )
    assert strict["calibration"] is None
    assert extra["calibration"]["before"]["ece"] == pytest.approx(0.45)
    assert extra["calibration"]["after"]["ece"] == pytest.approx(0.0)
    assert "How sure the models are" not in text_of(strict)
    told = text_of(strict, extra)
    assert "ECE 45.0%" in told
    assert "it promises more than it keeps" in told
    assert "about as sure as it may be" in told


def test_every_published_percentage_is_a_count_of_its_items_but_for_one_misprint() -> None:
    off = []
    for name in published()["columns"]:
        for row in column(name):
            if row["correct"] is None:
                continue
            exact = 100 * row["correct"] / row["n"]
            if f"{exact:.2f}" != f"{row['percent']:.2f}":
                off.append((name, row["who"], row["percent"], row["correct"]))
    # 325/403 is 80.645 (cut, not rounded), 120/256 is 46.875; 318/403 is 78.908.
    assert off == [("mivqa zh", "GPT-4V", 78.92, 318), ("mivqa en", "GPT-4o", 80.64, 325), ("sivqa zh", "Idefics2-8B", 46.87, 120)]
    assert next(row for row in column("sivqa zh") if row["who"] == "GPT-4o")["correct"] == 186
    assert next(row for row in column("textqa zh") if row["who"] == "Qwen2-7B-Instruct")["correct"] == 481


def foodie(
    tmp_path: Path,
    n: int,
    card: dict[str, Any] | None = None,
    question: str = "这道菜是什么口味？",
    ids: str = "vqa-{}",
    kind: str = "",
    **changes: Any,
) -> dict[str, Any]:
    home = tmp_path / "data"
    home.mkdir(exist_ok=True)
    write_json(home / "dataset.json", card or {"task": "sivqa", "licence": {"url": "https://huggingface.co/datasets/lyan62/FoodieQA"}})
    own = {
        "data": {"file": str(home / "eval.jsonl"), "items": n, "digest": "d"},
        "protocol": MCQ,
        "scored_on_training_items": False,
    } | changes
    kinds = [kind for kind, count in published()["types"]["sivqa"].items() for _ in range(count)]
    items = [
        line(ids.format(at), at % 3 > 0, question=question, prompt="mcq", tags={"question_type": kind or kinds[at]}) for at in range(n)
    ]
    return compare(folder(tmp_path / "a", items, **own), folder(tmp_path / "b", items, **own))


def test_published_results_stand_beside_a_comparable_score(tmp_path: Path) -> None:
    found = foodie(tmp_path, 256)
    assert (found["published"]["column"], found["published"]["differs"]) == ("sivqa zh", [])
    told = text_of(found)
    assert "GPT-4o" in told
    assert "ours is asked in other words" in told
    assert "72.7%" in told
    assert "2024.emnlp-main.1063" in told
    assert "Not comparable" not in told


def test_a_score_obtained_otherwise_says_how(tmp_path: Path) -> None:
    open_prompt = {"prompt": "open", "mode": "likelihood", "max_new_tokens": None, "max_tiles": 6, "headline": "sum"}
    found = foodie(tmp_path, 40, question="What flavour?", protocol=open_prompt, scored_on_training_items=True)
    assert found["published"]["column"] == "sivqa en"
    assert found["published"]["differs"] == ["items", "options", "likelihood", "trained"]
    told = text_of(found)
    for part in (
        "Not comparable with ours",
        "we scored 40 items, they 256",
        "did not see the options",
        "ours is a score on training items",
    ):
        assert part in told


def test_the_suites_own_protocol_is_known_by_its_settings(tmp_path: Path) -> None:
    suite = MCQ | {
        "prompt": "foodieqa",
        "suite": "foodieqa",
        "task": "sivqa",
        "language": "en",
        "view": "picture",
        "wording": "2",
        "turn": "as-is",
        "prefix_as": "assistant",
    }
    found = foodie(tmp_path, 256, card={"made_by": "hand"}, protocol=suite)
    assert (found["published"]["column"], found["published"]["differs"]) == ("sivqa en", [])
    told = text_of(found)
    assert "FoodieQA's prompts; strict answers; at most 64 new tokens; at most 6 tiles a picture; task sivqa; in English; wording 2" in told
    assert "ours is asked with one of these prompts" in told
    assert "the forced beginning opens the answer" in told
    blind = tmp_path / "blind"
    blind.mkdir()
    assert foodie(blind, 256, protocol=suite | {"view": "blind"})["published"]["differs"] == ["view"]


def test_other_data_has_no_published_results(tmp_path: Path) -> None:
    assert foodie(tmp_path, 4, card={"task": "sivqa", "licence": {"url": "see NOTICE"}})["published"] is None


def test_the_benchmarks_question_types_add_up_to_its_items() -> None:
    told = published()
    assert {task: sum(types.values()) for task, types in told["types"].items()} == {
        task: told["items"][task] for task in ("sivqa", "mivqa")
    }


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ids": "{}"}, ["ids"]),
        ({"kind": "food_name"}, ["types"]),
        ({"kind": "present"}, ["types"]),  # 40 of it, and the benchmark has 14
        ({"card": {"files": {"eval.jsonl": {"items": 40}}, "skipped": 2}}, ["number"]),
        ({"card": {"files": {"train.jsonl": {"items": 213}, "eval.jsonl": {"items": 40}}, "skipped": 3}}, []),
        ({"card": {"files": {"eval.jsonl": {"items": 40}}, "question_language": "both"}}, []),  # not known
        ({"card": {"files": {"eval.jsonl": []}}}, []),
    ],
)
def test_published_results_stand_beside_the_benchmarks_own_items_alone(tmp_path: Path, changes: dict[str, Any], why: list[str]) -> None:
    home = {"task": "sivqa", "licence": {"url": "https://huggingface.co/datasets/lyan62/FoodieQA"}}
    found = foodie(tmp_path, 40, **changes | {"card": home | changes.get("card", {})})
    assert found["published"]["foreign"] == why
    assert bool(found["published"]["rows"]) == (not why)
    told = text_of(found)
    assert ("GPT-4o" in told) == (not why)
    assert ("these are other items" in told) == bool(why)


def test_a_suite_on_other_data_of_that_form_has_no_published_results(tmp_path: Path) -> None:
    suite = MCQ | {"prompt": "foodieqa", "suite": "foodieqa", "task": "sivqa", "language": "zh", "view": "picture"}
    data = {"file": str(tmp_path / "data" / "sivqa_tidy.json"), "items": 40, "digest": "d"}
    assert foodie(tmp_path, 40, card={}, protocol=suite, data=data | {"in_file": 42})["published"]["foreign"] == ["number"]
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    assert foodie(tmp_path, 40, card={}, protocol=suite, data=data | {"in_file": 256})["published"]["foreign"] == []


def open_lines(answers: list[tuple[str, str]]) -> list[dict[str, Any]]:
    found = []
    for n, (reference, raw) in enumerate(answers):
        measures = score_free(raw, reference)
        own = {"choices": [], "answer": None, "parsed": None, "raw": raw, "reference": reference, **measures}
        found.append(line(f"f{n}", measures["contained"], **own) | {"correct": measures["contained"]})
    return found


def free_comparison(tmp_path: Path) -> dict[str, Any]:
    protocol = {"prompt": "open", "mode": "strict", "max_new_tokens": 64, "max_tiles": 6, "headline": "contained"}
    before = open_lines([("麻婆豆腐", "一盘菜"), ("酸菜鱼", "酸菜鱼"), ("rice", "a bowl")])
    after = open_lines([("麻婆豆腐", "这是麻婆豆腐"), ("酸菜鱼", "酸菜鱼"), ("rice", "fried rice")])
    sides = [
        folder(tmp_path / name, lines, protocol=protocol, chance=None, **free_numbers(lines))
        for name, lines in (("a", before), ("b", after))
    ]
    return compare(*sides)


def test_open_answers_are_compared_by_every_measure_and_listed_for_reading(tmp_path: Path) -> None:
    found = free_comparison(tmp_path)
    assert found["pairs"] == {"both_right": 1, "fixed": 2, "broken": 0, "both_wrong": 0}
    assert found["graded"]["rouge_l"]["after"] == pytest.approx((8 / 10 + 1 + 2 / 3) / 3)
    assert found["fixed"][0]["f1"] == [0.0, pytest.approx(0.8)]
    told = text_of(found)
    for part in ("Open answers", "word for word", "right answer contained", "这是麻婆豆腐", "fried rice", "F1 0.00 → 0.80"):
        assert part in told


def test_reasons_follow_the_readers_language_not_the_evaluations(tmp_path: Path) -> None:
    seen = {"verdict": True, "code": "items", "files": [{"file": "t.jsonl", "exact": 1, "near": 2, "picture": 0, "compared": True}]}
    told = {"scored_on_training_items": True, "scored_on_training_items_reason": "english", "seen": seen}
    found = compare(folder(tmp_path / "a", outcomes("01"), **told), folder(tmp_path / "b", outcomes("11"), **told))
    assert "3 of 2 items are training items (1 with the very same pictures and 2 with pictures that look the same; t.jsonl)" in text_of(
        found
    )
    set_language("zh")
    assert "2 条中有 3 条是训练数据（1 条图片完全相同，2 条图片看起来相同；t.jsonl）" in text_of(found)
    assert "english" not in text_of(found)


def test_a_picture_that_was_in_training_with_another_question_is_a_note_not_an_alarm(tmp_path: Path) -> None:
    seen = {
        "verdict": False,
        "code": "none",
        "files": [{"exact": 0, "near": 0, "picture": 2, "looks": True, "unreadable": 1, "compared": True}],
    }
    own = {"scored_on_training_items": False, "seen": seen}
    page = report_html(compare(folder(tmp_path / "a", outcomes("01"), **own), folder(tmp_path / "b", outcomes("11"), **own)))
    assert 'class="note"' in page
    assert 'class="banner"' not in page
    assert "2 of 2 ask something else about a picture it was trained on; 1 pictures could not be read" in page
    assert seen_words({"code": "none", "files": [{"looks": False}]}, 5).endswith("too many pictures to compare their look)")


# What is the same in every language: names of methods, units of the field, software, file names.
_NAMES = r"McNemar|Holm|Wilson|Newcombe|ECE|F1|ROUGE-L|LoRA|alpha|token|intervale|torch|transformers|report\.json|float32|cpu|InternVL\S*|GPT-\S+|Yi-VL-\S+|Idefics\S+"
_NAMES += r"|Mantis-\S+|Qwen-VL-\S+|Phi-\S+ 4.2B|FoodieQA|README|github\.com/\S+|Li et al\., FoodieQA: A Multimodal[^)]*\)|EMNLP|sivqa zh|step-\d+|p [=<]|n="


def test_a_chinese_report_has_no_english_and_an_english_one_no_chinese(tmp_path: Path) -> None:
    from test_report import make_run, model_of

    run = make_run(tmp_path / "run")
    seen = {"verdict": None, "code": "gone", "files": []}
    asked = {"zh": "这道菜是什么口味？", "en": "Which taste?"}
    for lang, other in (("zh", r"[A-Za-z]{2,}"), ("en", r"[\u3400-\u9fff]+")):
        home = tmp_path / lang
        home.mkdir()
        choices = ["辣", "酸"] if lang == "zh" else ["hot", "sour"]
        raw = {"choices": choices, "raw": choices[0], "question": asked[lang], "prompt": "mcq"}
        tags = {"question_type": "cooking-skills", "cuisine": "川菜"}
        marks = "01" * 20
        items = [[line(f"{n}", mark == "1", tags=tags, **raw) for n, mark in enumerate(side)] for side in (marks, "1" + marks[1:])]
        write_json(home / "dataset.json", {"task": "sivqa", "licence": {"url": "lyan62/FoodieQA"}})
        data = {"file": str(home / "1.jsonl"), "items": 40, "digest": "1"}
        own = {"protocol": MCQ, "data": data, "model": model_of(run), "seen": seen}
        strict = compare(folder(home / "a", items[0], **own), folder(home / "b", items[1], **own))
        sure = [
            [entry | likely(0.9, "1")[0] | {"id": entry["id"], "question": asked[lang], "choices": choices, "tags": {}} for entry in side]
            for side in items
        ]
        extra = compare(
            folder(home / "c", sure[0], **(own | {"protocol": LIKELY})), folder(home / "d", sure[1], **(own | {"protocol": LIKELY}))
        )
        set_language(lang)
        told = text_of(strict, extra).replace(str(tmp_path), "")
        for data_word in (*choices, asked[lang], f"/{lang}/1.jsonl", "models/", " base "):
            told = told.replace(data_word, "")
        left = re.sub(_NAMES, "", told)
        assert [left[max(0, hit.start() - 30) : hit.end() + 30] for hit in re.finditer(other, left)] == []
        assert json.dumps(strict)  # plain values


def test_more_models_stand_beside_each_tested_against_the_tuned_one(tmp_path: Path) -> None:
    before, after = folder(tmp_path / "a", outcomes("0" * 40)), folder(tmp_path / "b", outcomes("1" * 30 + "0" * 10))
    model = {"name": "gpt-x", "folder": None, "precision": None, "device": "endpoint"}
    server = {"prompt": "open", "mode": "strict", "max_new_tokens": 64, "max_tiles": None, "headline": None}
    other = folder(tmp_path / "c", outcomes("1" * 10 + "0" * 30), model=model, protocol=server)
    near = folder(tmp_path / "d", outcomes("1" * 29 + "0" * 11), scored_on_training_items=True)
    found = compare(before, after, [other, near])
    first, second = found["others"]
    assert (first["against"]["only_after"], first["against"]["only_other"]) == (20, 0)
    assert first["against"]["p"] == mcnemar(20, 0)
    assert [first["against"]["p_holm"], second["against"]["p_holm"]] == holm([mcnemar(20, 0), mcnemar(1, 0)])
    assert first["differs"] == {"max_tiles": None}
    told = text_of(found)
    assert "Beside other models" in told
    assert "gpt-x 25.0% +50.0 [" in re.sub(r"\s+", " ", told)
    assert "Scored on training items: m" in told
    assert "Beside other models" not in text_of(compare(before, after))


def test_what_a_server_kept_back_is_told_wherever_its_score_stands(tmp_path: Path) -> None:
    pair = folder(tmp_path / "a", outcomes("0" * 40)), folder(tmp_path / "b", outcomes("1" * 40))
    kept = folder(tmp_path / "c", outcomes("1" * 10 + "0" * 30), unseen=12, refused=3)
    told = text_of(compare(*pair, [kept]))
    assert "Counted as wrong: m: 12 without a letter among the server's likeliest tokens, 3 refused by the server" in told
    assert "12 without a letter" in text_of(compare(pair[0], kept))
    assert "Counted as wrong" not in text_of(compare(*pair, [pair[0]]))
    with in_language("zh"):
        shown_lines = "\n".join(shown(json.loads((kept / "summary.json").read_text()), coloured=False))
    assert "计为错误：12 条在服务器给出的最可能 token 中没有选项字母; 3 条被服务器拒绝" in shown_lines


def test_a_model_asked_otherwise_or_other_items_does_not_stand_beside(tmp_path: Path) -> None:
    before, after = folder(tmp_path / "a", outcomes("00")), folder(tmp_path / "b", outcomes("11"))
    with pytest.raises(UserError, match=r"protocol\.prompt"):
        compare(before, after, [folder(tmp_path / "c", outcomes("01"), protocol=MCQ)])
    with pytest.raises(UserError, match="only in"):
        compare(before, after, [folder(tmp_path / "d", outcomes("011"))])
