"""Two evaluations are paired item by item or not at all, and the report is text, whatever the data holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evaluation_fixture import folder, line, outcomes
from intervale.core.errors import UserError
from intervale.core.lang import set_language
from intervale.evaluate.compare import compare, write_report
from intervale.evaluate.folder import in_order
from intervale.evaluate.report import in_words, report_html

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&</style>'


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    set_language("en")
    yield
    set_language(None)


def test_items_are_paired_by_id_whatever_their_order(tmp_path: Path) -> None:
    before = folder(tmp_path / "a", outcomes("1100011"))
    after = folder(tmp_path / "b", outcomes("1011101")[::-1])
    found = compare(before, after)
    assert found["pairs"] == {"both_right": 2, "fixed": 3, "broken": 2, "both_wrong": 0}
    assert [item["id"] for item in found["fixed"]] == ["q2", "q3", "q4"]
    assert [item["id"] for item in found["broken"]] == ["q1", "q5"]
    assert [item["id"] for item in found["both_right"]] == ["q0", "q6"]
    assert found["both_wrong"] == []
    assert found["fixed"][0] | {"tags": {}} == {
        "id": "q2",
        "question": "Q q2",
        "choices": ["hot", "sour"],
        "images": [],
        "right": "hot",
        "before": "sour",
        "after": "hot",
        "before_choice": "sour",
        "after_choice": "hot",
        "tags": {},
    }
    assert found["difference"]["value"] == pytest.approx(1 / 7)
    assert found["difference"]["interval"][0] < 1 / 7 < found["difference"]["interval"][1]
    assert found["mcnemar"]["p"] == 1.0


def test_what_cannot_be_paired_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    before = folder(tmp_path / "a", outcomes("1100"))
    other = [line("q0", True, question="another"), line("q1", True, answer=1), line("q2", False), line("new", False)]
    protocol = {"prompt": "mcq", "mode": "strict", "max_new_tokens": 64, "max_tiles": 6, "headline": None}
    after = folder(tmp_path / "b", other, protocol=protocol)
    with pytest.raises(UserError) as caught:
        compare(before, after)
    for told in (
        'protocol.prompt: "open" -> "mcq"',
        f"1 items are only in {before}: 'q3'",
        f"only in {after}: 'new'",
        "item 'q0': question",
        "item 'q1': answer: 0 -> 1",
    ):
        assert told in caught.value.what


@pytest.mark.parametrize("damage", ["[]", "3", '{"x": 1}', '{"id": [1]}'])
def test_a_line_that_is_no_prediction_is_told_with_its_number(tmp_path: Path, damage: str) -> None:
    one, other = folder(tmp_path / "a", outcomes("01")), folder(tmp_path / "b", outcomes("01"))
    lines = (other / "predictions.jsonl").read_text().splitlines()
    (other / "predictions.jsonl").write_text(f"{lines[0]}\n{damage}\n")
    with pytest.raises(UserError, match="line 2 is no prediction"):
        compare(one, other)


def test_predictions_of_other_items_are_no_evaluation_of_these(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", outcomes("01"))
    for ids in (["q0"], ["q0", "q1", "q2"]):
        with pytest.raises(UserError, match="not in both"):
            in_order(one, ids)


def test_an_unfinished_evaluation_is_not_compared(tmp_path: Path) -> None:
    before, after = folder(tmp_path / "a", outcomes("10")), folder(tmp_path / "b", outcomes("11"))
    (after / "summary.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        compare(before, after)
    with pytest.raises(UserError, match="not an evaluation"):
        compare(before, tmp_path)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_hostile_text_stays_text_and_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    def hostile(correct: bool) -> list[dict[str, Any]]:
        texts = {"question": HOSTILE, "choices": [HOSTILE + "a", HOSTILE + "b"], "raw": HOSTILE, "tags": {HOSTILE: HOSTILE}}
        return [line(HOSTILE + str(n), correct, **texts) for n in range(3)]

    score = {"n": 3, "correct": 0, "accuracy": 0.0, "interval": [0.0, 0.6]}
    model = {
        "name": HOSTILE,
        "fingerprint": "f",
        "checkpoint": HOSTILE,
        "checkpoint_fingerprint": "c",
        "precision": "float32",
        "device": "cpu",
    }
    own = {
        "tags": {HOSTILE: {HOSTILE: score}},
        "model": model,
        "scored_on_training_items": True,
        "scored_on_training_items_reason": HOSTILE,
    }
    found = compare(folder(tmp_path / "a", hostile(False), **own), folder(tmp_path / "b", hostile(True), **own))
    page = _Tags()
    page.feed(report_html(found))
    assert not {tag for tag, _ in page.seen} & {"script", "img", "link", "iframe", "a", "object", "use"}
    names = {name for _, attrs in page.seen for name in attrs}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "style")}
    assert sum(HOSTILE in text for text in page.text) >= 3 * 4 + 3  # lists, tag table, facts, banner
    assert not re.search(r"https?://|url\(|@import", report_html(found))


def test_the_report_warns_when_either_side_was_scored_on_training_items(tmp_path: Path) -> None:
    before = folder(tmp_path / "a", outcomes("10"), scored_on_training_items=False)
    for name, flag, expected in (("b", True, True), ("c", None, None), ("d", False, False)):
        found = compare(before, folder(tmp_path / name, outcomes("11"), scored_on_training_items=flag))
        assert found["scored_on_training_items"] is expected
        assert ('class="banner"' in report_html(found)) == (expected is True)


def test_the_words_claim_no_more_than_the_test(tmp_path: Path) -> None:
    many = compare(folder(tmp_path / "a", outcomes("0" * 10 + "1")), folder(tmp_path / "b", outcomes("1" * 10 + "0")))
    assert many["mcnemar"]["p"] == pytest.approx(0.0117, abs=5e-5)
    assert "p = 0.012" in in_words(many)
    assert "better" in in_words(many)
    few = compare(folder(tmp_path / "c", outcomes("001")), folder(tmp_path / "d", outcomes("110")))
    assert "does not show which model is better" in in_words(few)
    none = compare(folder(tmp_path / "e", outcomes("01")), folder(tmp_path / "f", outcomes("01")))
    assert "No item changed" in in_words(none)


def test_the_report_speaks_chinese_and_is_written_whole(tmp_path: Path) -> None:
    set_language("zh")
    found = compare(folder(tmp_path / "a", outcomes("001")), folder(tmp_path / "b", outcomes("111")))
    write_report(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    page = (tmp_path / "out" / "report.html").read_text()
    assert "改对的题目 (2)" in page
    assert 'lang="zh-CN"' in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.en.html", "report.html", "report.json"]
    assert 'lang="en"' in (tmp_path / "out" / "report.en.html").read_text()
