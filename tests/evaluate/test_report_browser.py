"""The report in a real Chromium: on a desktop, on a phone and on paper it fits, asks nothing of anyone and says its warning."""

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from evaluation_fixture import folder, line
from intervale.core.files import write_json
from intervale.core.lang import set_language
from intervale.evaluate.compare import compare, write_report
from intervale.evaluate.published import published

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("INTERVALE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]
SCREENS = {"desktop": {"width": 1280, "height": 900}, "tablet": {"width": 768, "height": 1024}, "phone": {"width": 360, "height": 740}}
# Elements that stick out of the page, or text that is wider than its box.
_STICKS_OUT = """() => [...document.querySelectorAll('main *')].filter(e => e.closest('svg') === null && e.tagName !== 'OPTION').filter(e => {
  const box = e.getBoundingClientRect(); return box.width > 0 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(e => e.tagName + '.' + e.className).slice(0, 5)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def _side(home: Path, name: str, marks: str, mode: str, sure: float) -> Path:
    """FoodieQA's 256 items, scored on training items, with pictures and long words without blanks."""
    protocol = {"prompt": "mcq", "mode": mode, "max_new_tokens": 64, "max_tiles": 6, "headline": "sum" if mode == "likelihood" else None}
    data = {"file": str(home / "eval.jsonl"), "items": 256, "digest": "d", "pictures": "p"}
    seen = {
        "verdict": True,
        "code": "items",
        "files": [{"file": "/data/train.jsonl", "exact": 3, "near": 2, "picture": 4, "compared": True}],
    }
    scores = [{"sum": math.log(sure)}, {"sum": math.log(1 - sure)}]
    kinds = [kind for kind, count in published()["types"]["sivqa"].items() for _ in range(count)]
    items = [
        line(
            f"vqa-{n}", marks[n % len(marks)] == "1", mode=mode, prompt="mcq", scores=scores, images=["a b.png"] * (1 + 3 * (n % 7 == 0)),
            question="图中的菜" + "Donaudampfschifffahrt" * (4 if n % 5 == 0 else 0), tags={"question_type": kinds[n], "dish": f"{n % 20:02}"}, pictures=[f"p{n // 2}"],
        )
        for n in range(256)
    ]  # fmt: skip
    return folder(home / name, items, protocol=protocol, data=data, scored_on_training_items=True, seen=seen)


@pytest.fixture(scope="module", params=["en", "zh"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    home = tmp_path_factory.mktemp("report")
    write_json(home / "dataset.json", {"task": "sivqa", "licence": {"url": "https://huggingface.co/datasets/lyan62/FoodieQA"}})
    picture = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(picture).ellipse([60, 30, 240, 170], fill="orange")
    picture.save(home / "a b.png")
    set_language(request.param)
    others = [_side(home, "e", "1010101", "strict", 0.5), _side(home, "f", "0001000", "strict", 0.5)]
    strict = compare(_side(home, "a", "0110100", "strict", 0.5), _side(home, "b", "1110110", "strict", 0.5), others)
    likely = compare(_side(home, "c", "0110100", "likelihood", 0.95), _side(home, "d", "1110110", "likelihood", 0.7))
    write_report(strict, home / "out", likely)
    yield request.param, home / "out" / "report.html"
    set_language(None)


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_the_screen_and_asks_nothing_of_anyone(browser: Any, report: tuple[str, Path], screen: str) -> None:
    context = browser.new_context(viewport=SCREENS[screen], is_mobile=screen == "phone")
    page, odd = context.new_page(), []
    page.on("request", lambda sent: odd.append(sent.url) if not sent.url.startswith(("file:", "data:")) else None)
    page.on("console", lambda said: odd.append(said.text))
    page.on("pageerror", lambda error: odd.append(str(error)))
    page.goto(report[1].as_uri())
    for folded in page.query_selector_all("details"):
        folded.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(_STICKS_OUT) == []
    assert page.locator("main > .banner").is_visible()
    red, green, _ = map(int, re.findall(r"\d+", page.locator("main > .banner").evaluate("e => getComputedStyle(e).color"))[:3])
    assert red > 3 * green
    assert page.locator("figure svg").count() == 2
    assert page.locator("img").first.evaluate("picture => picture.naturalWidth") > 0
    context.close()
    assert odd == []


def test_on_paper_it_has_pages_and_its_warning_stands_first(browser: Any, report: tuple[str, Path], tmp_path: Path) -> None:
    page = browser.new_page()
    page.goto(report[1].as_uri())
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    page.close()
    raw = (tmp_path / "report.pdf").read_bytes()
    assert raw.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", raw)) <= 30
    if shutil.which("pdftotext"):
        import subprocess

        text = subprocess.run(["pdftotext", "-l", "1", tmp_path / "report.pdf", "-"], capture_output=True, text=True, check=True).stdout
        assert {"en": "Scored on training items.", "zh": "在训练数据上评分"}[report[0]] in text


def test_a_long_list_of_groups_goes_over_a_pages_edge_instead_of_leaving_a_page_empty(browser: Any, report: tuple[str, Path]) -> None:
    page = browser.new_page()
    page.goto(report[1].as_uri())
    page.emulate_media(media="print")
    kept = page.evaluate("""() => [...document.querySelectorAll('div:has(> h3)')].filter(box => box.querySelector('.row'))
        .map(box => [box.querySelectorAll('.row').length, getComputedStyle(box).breakInside])""")
    page.close()
    assert sorted(kept) == [[6, "avoid"], [20, "auto"]]
