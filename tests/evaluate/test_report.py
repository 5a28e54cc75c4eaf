"""A report is one file that shows what it speaks of: pictures, the curve, a second score; bounded, and the same each time."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation_fixture import folder, line, outcomes
from intervale.core.files import write_json
from intervale.core.lang import set_language
from intervale.evaluate.compare import compare, write_report
from intervale.evaluate.report import in_words, p_value, report_html
from intervale.evaluate.report_gallery import MOST_CARDS, shares
from intervale.evaluate.training_card import MOST_POINTS, training_card

RECIPE = {
    "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": "llm"},
    "train": {"vision": "frozen", "projector": "full", "llm": "lora", "epochs": 3, "batch_size": 4, "accumulation": 2,
              "learning_rate": 3e-5, "schedule": "cosine", "seed": 42},
}  # fmt: skip
BASE_MODEL = {"checkpoint": None, "checkpoint_fingerprint": None, "precision": "float32", "device": "cpu"}


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    set_language("en")
    yield
    set_language(None)


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, style: str = "") -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag and style in [*attrs.get("class", "").split(), ""]]


def noise(path: Path, size: tuple[int, int] = (320, 240)) -> Path:
    """What compresses worst."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, os.urandom(3 * size[0] * size[1])).save(path)
    return path


def pictured(tmp_path: Path, before: list[dict[str, Any]], after: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A comparison of items whose pictures lie below `tmp_path`/data."""
    (tmp_path / "data").mkdir(exist_ok=True)
    data = {"file": str(tmp_path / "data" / "eval.jsonl"), "items": len(before), "digest": "d"}
    return compare(folder(tmp_path / "a", before, data=data), folder(tmp_path / "b", after, data=data, **changes))


def test_an_items_pictures_are_embedded_small_and_their_names_escaped(tmp_path: Path) -> None:
    name = 'images/a"><script>x&.png'
    noise(tmp_path / "data" / name)
    for n in range(5):
        noise(tmp_path / "data" / f"{n}.png")
    one, five = [name], [f"{n}.png" for n in range(5)]
    found = pictured(
        tmp_path,
        [line("q0", False, images=one), line("q1", True, images=five), line("q2", True, images=[])],
        [line("q0", True, images=one), line("q1", False, images=five), line("q2", True, images=[])],
    )
    assert [found[kind][0]["images"] for kind in ("fixed", "broken", "both_right")] == [one, five, []]
    page = _Page(report_html(found))
    pictures = page.all("img")
    assert [picture["alt"] for picture in pictures] == [name, *five[:4]]
    assert "and 1 more pictures" in page.text
    for picture in pictures:
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/webp;base64"
        raw = base64.b64decode(data)
        assert len(raw) <= 6 * 1024
        assert max(Image.open(io.BytesIO(raw)).size) <= 160
    assert not page.all("script")


def test_a_picture_that_cannot_be_shown_says_why_in_its_place(tmp_path: Path) -> None:
    whole = noise(tmp_path / "data" / "whole.png")
    noise(tmp_path / "secret.png")
    (tmp_path / "data" / "cut.png").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "data" / "empty.png").write_bytes(b"")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    names = [
        "missing.png",
        "cut.png",
        "empty.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "a\0b",
        "x" * 300,
        ".",
    ]
    found = pictured(tmp_path, *([line(f"q{n}", right, images=[name]) for n, name in enumerate(names)] for right in (False, True)))
    page = _Page(report_html(found))
    assert not page.all("img")
    assert len(page.all("div", "gone")) == len(names)
    assert page.text.count("not a path below the data's folder") == 5
    for told in ("no such file", "damaged or cut short", "the file is empty"):
        assert told in page.text


def test_without_noted_pictures_or_without_the_data_the_report_is_text(tmp_path: Path) -> None:
    old = compare(folder(tmp_path / "c", outcomes("01")), folder(tmp_path / "d", outcomes("11")))
    assert not _Page(report_html(old)).all("div", "shots")
    images = {"images": ["a.png"]}
    gone = pictured(tmp_path, [line("q", False, **images)], [line("q", True, **images)])
    (tmp_path / "data").rmdir()
    page = _Page(report_html(gone))
    assert not page.all("div", "gone")
    assert "The pictures are not shown" in page.text


def test_the_page_may_ask_nothing_of_the_network_and_run_nothing(tmp_path: Path) -> None:
    noise(tmp_path / "data" / "a.png")
    run = make_run(tmp_path / "run")
    images = {"images": ["a.png"]}
    found = pictured(tmp_path, [line("q", False, **images)], [line("q", True, **images)], model=model_of(run))
    for lang in ("en", "zh"):
        set_language(lang)
        text = report_html(found, found)
        page = _Page(text)
        assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "use", "a", "base", "form"}
        assert all(
            value.startswith("data:image/") for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")
        )
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
        assert not re.search(r"https?://|url\(|@import", text)
        assert page.all("meta")[1]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_size_is_bounded_however_many_items_pictures_and_words(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(4)]
    for name in names:
        noise(tmp_path / "data" / name)
    long = {"images": names, "question": "问<" * 2000}
    before = [line(f"q{n}", n % 3 == 0, raw="<前>" * 500, **long) for n in range(3000)]
    after = [line(f"q{n}", n % 3 != 0, raw="<后>" * 500, **long) for n in range(3000)]
    found = pictured(tmp_path, before, after)
    text = report_html(found)
    page = _Page(text)
    assert len(page.all("li", "card")) <= MOST_CARDS
    assert len(text.encode()) < 3_000_000
    assert "more in report.json" in page.text
    listed = len(re.findall(r'<td data-side="before" class=', text))
    told = sum(int(count.replace(",", "")) for count in re.findall(r">([\d,]+) more in report.json", text))
    assert len(page.all("li", "card")) + listed + told == 3000


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (5, 1), (1, 500), (500, 1), (500, 500), (90, 30)])
def test_cards_go_to_what_broke_as_well_as_to_what_was_fixed(fixed: int, broken: int) -> None:
    counts = shares({"fixed": [{}] * fixed, "broken": [{}] * broken, "both_wrong": [{}] * 50, "both_right": [{}] * 50})
    assert sum(counts.values()) <= MOST_CARDS
    assert counts["broken"] >= min(broken, 40)
    assert counts["fixed"] >= min(fixed, 60)
    if fixed + broken <= 100:
        assert (counts["fixed"], counts["broken"]) == (fixed, broken)


def test_a_letter_is_told_with_the_choice_it_was_read_as(tmp_path: Path) -> None:
    found = pictured(tmp_path, [line("q", False, raw="B")], [line("q", True, raw="hot, of course")])
    text = report_html(found)
    assert ">B (sour)<" in text
    assert ">hot, of course<" in text


def make_run(path: Path, steps: int = 1000, fingerprint: str = "base", **changes: Any) -> Path:
    """A finished training run, without weights."""
    (path / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    run = {
        "kind": "intervale training run", "status": "done", "base": {"name": "models/InternVL2-2B", "folder": "/gone", "fingerprint": fingerprint},
        "recipe": RECIPE, "data": "digest", "train": {"file": "t", "items": 1420, "digest": "digest"}, "eval": None, "seconds": 754.2,
    }  # fmt: skip
    write_json(path / "run.json", run | changes)
    entries: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        entries.append({"step": step, "epoch": step * 8 / 1420, "loss": 0.4 + math.exp(-step / 100), "samples": 8})
        if step % 100 == 0:
            entries.append({"step": step, "eval_loss": 0.5, "eval_items": 10})
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 10')
    return path


def model_of(place: Path, fingerprint: str = "base", checkpoint: str | None = "step-00001000") -> dict[str, Any]:
    return BASE_MODEL | {"name": "m", "folder": str(place), "fingerprint": fingerprint, "checkpoint": checkpoint}


def export_of(path: Path, told: str, **changes: Any) -> Path:
    path.mkdir(parents=True)
    card = {"made_by": "intervale export", "from": told, "step": 1000, "recipe": RECIPE, "data": "digest"}
    write_json(path / "intervale.json", card | changes)
    return path


def test_the_curve_appears_for_a_run_a_checkpoint_and_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs" / "r")
    monkeypatch.chdir(tmp_path / "runs")
    again = export_of(tmp_path / "again", "/gone", recipe=None)
    write_json(
        again / "intervale.json", {"from": "x", "before": json.loads((export_of(tmp_path / "e0", str(run)) / "intervale.json").read_text())}
    )
    places = {
        "run": model_of(run),
        "checkpoint": model_of(run / "checkpoints" / "step-00001000"),
        "export": model_of(export_of(tmp_path / "e1", str(run)), "own", None),
        "export, path as typed elsewhere": model_of(export_of(tmp_path / "e2", "runs/r"), "own", None),
        "export of an export": model_of(again, "own", None),
    }
    for name, model in places.items():
        card = training_card(model)
        assert card is not None, name
        assert (card["base"], card["items"], card["batch"], card["steps"], card["step_scored"]) == (
            "models/InternVL2-2B",
            1420,
            8,
            1000,
            1000,
        )
    found = compare(folder(tmp_path / "a", outcomes("01")), folder(tmp_path / "b", outcomes("11"), model=places["run"]))
    page = _Page(report_html(found))
    assert len(page.all("div", "curve")) == 1
    assert len(page.all("circle")) == 10
    for told in (
        "rank 16, alpha 32",
        "1,420",
        "1,000 (5.63 epochs)",
        "8 items a step",
        "3e-5",
        "42",
        "12 min 34 s",
        "vision tower: frozen",
    ):
        assert told in page.text
    assert "the scored weights" not in page.text


def test_no_curve_of_another_run_or_of_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    damaged = make_run(tmp_path / "damaged")
    (damaged / "run.json").write_text('{"kind": ')
    (tmp_path / "plain").mkdir()
    for model in (
        model_of(tmp_path / "plain", checkpoint=None),
        model_of(tmp_path / "gone"),
        model_of(damaged),
        model_of(run, "another base"),
        model_of(export_of(tmp_path / "e1", str(tmp_path / "removed")), "own", None),
        model_of(export_of(tmp_path / "e2", str(run), data="other data"), "own", None),
        model_of(export_of(tmp_path / "e3", str(run), recipe=RECIPE | {"lora": {}}), "own", None),
        {"name": "m"},
    ):
        assert training_card(model) is None, model
    found = compare(folder(tmp_path / "a", outcomes("01")), folder(tmp_path / "b", outcomes("11")))
    assert found["training"] is None
    assert not _Page(report_html(found)).all("div", "curve")


def test_a_run_without_readable_metrics_still_has_its_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", recipe={"train": {}}, train=None, seconds="long")
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    found = compare(folder(tmp_path / "a", outcomes("01")), folder(tmp_path / "b", outcomes("11"), model=model_of(run)))
    page = _Page(report_html(found))
    assert "How it was trained" in page.text
    assert not page.all("div", "curve")
    (run / "metrics.jsonl").write_text('[1]\n{"step": 1, "loss": NaN}\n{"step": 1, "loss": 0}\n')
    card = training_card(model_of(run))
    assert card is not None
    assert card["curve"] == {"loss": [[1, 0, 0]], "held_out": [], "smoothing": 0.9}
    assert "curve" in report_html(found | {"training": card})


def test_the_curve_on_file_is_small_and_keeps_both_ends(tmp_path: Path) -> None:
    card = training_card(model_of(make_run(tmp_path / "r", steps=5000)))
    assert card is not None
    losses = card["curve"]["loss"]
    assert len(losses) == MOST_POINTS
    assert (losses[0][0], losses[-1][0]) == (1, 5000)
    assert losses[-1][2] == pytest.approx(0.4, abs=1e-3)
    assert len(json.dumps(card)) < 12_000


def test_a_checkpoint_before_the_runs_end_is_marked_on_the_curve(tmp_path: Path) -> None:
    model = model_of(make_run(tmp_path / "r"), checkpoint="step-00000512")
    found = compare(folder(tmp_path / "a", outcomes("01")), folder(tmp_path / "b", outcomes("11"), model=model))
    assert "the scored weights: step 512" in report_html(found)


def test_a_second_comparison_is_a_row_and_stands_in_the_json(tmp_path: Path) -> None:
    protocol = {"prompt": "mcq", "mode": "likelihood", "max_new_tokens": None, "max_tiles": 6, "headline": "sum"}
    found = compare(folder(tmp_path / "a", outcomes("0" * 9 + "1")), folder(tmp_path / "b", outcomes("1" * 10)))
    other = [line(f"q{n}", right, mode="likelihood", prompt="mcq") for n, right in enumerate([False] * 8 + [True] * 2)]
    better = [line(f"q{n}", True, mode="likelihood", prompt="mcq") for n in range(10)]
    extra = compare(folder(tmp_path / "c", other, protocol=protocol), folder(tmp_path / "d", better, protocol=protocol))
    write_report(found, tmp_path / "out", extra)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found | {"also": extra}
    text = _Page((tmp_path / "out" / "report.html").read_text()).text.replace("\u00a0", " ")
    assert "By likelihood (options shown): 20.0% → 100.0%, +80.0 points [" in text
    assert "], McNemar p = 0.0078" in text
    write_report(found, tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "report.json").read_text()) == found
    assert "By likelihood" not in (tmp_path / "alone" / "report.html").read_text()
    strangers = compare(folder(tmp_path / "e", outcomes("0")), folder(tmp_path / "f", outcomes("1"), model=model_of(tmp_path, "another")))
    with pytest.raises(AssertionError, match="other models"):
        write_report(found, tmp_path / "out", strangers)


def test_the_same_comparison_gives_the_same_bytes(tmp_path: Path) -> None:
    noise(tmp_path / "data" / "a.png")
    images = {"images": ["a.png"]}
    model = model_of(make_run(tmp_path / "run"))
    found = pictured(tmp_path, [line("q", False, **images)], [line("q", True, **images)], model=model)
    for out in ("one", "two"):
        write_report(found, tmp_path / out, found | {"before": found["before"]})
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()
    assert report_html(found) == report_html(json.loads(json.dumps(found)))


@pytest.mark.parametrize(
    ("p", "told"),
    [(1.0, "p = 1.00"), (0.234, "p = 0.23"), (0.0117, "p = 0.012"), (0.00012, "p = 0.00012"), (0.0000312, "p = 3·10⁻⁵"), (2.6e-26, "p = 3·10⁻²⁶"),
     (9.7e-8, "p = 10⁻⁷"), (0.0, "p < 10⁻³⁰⁰")],
)  # fmt: skip
def test_a_p_value_shows_its_magnitude(p: float, told: str) -> None:
    assert p_value(p) == told


def test_the_words_tell_a_small_p_to_a_layman(tmp_path: Path) -> None:
    few = compare(folder(tmp_path / "a", outcomes("0" * 10 + "1")), folder(tmp_path / "b", outcomes("1" * 10 + "0")))
    many = compare(folder(tmp_path / "c", outcomes("0" * 90)), folder(tmp_path / "d", outcomes("1" * 90)))
    assert "about once in 85 tries" in in_words(few)
    assert "less than once in a million tries" in in_words(many)
    set_language("zh")
    assert "机会约为 85 分之一" in in_words(few)
    assert "不到百万分之一" in in_words(many)
