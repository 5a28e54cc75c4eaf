"""The page in a real Chromium: what a visitor does with it, on a desktop and on a phone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_fixture import encoded, live, picture
from speaking import Speaker

from intervale.engine.desks import local_desk
from intervale.engine.scheduler import Scheduler
from intervale.serve.app import Serving
from intervale.serve.door import DoorRules, read_keys
from intervale.serve.ui import mount_page
from intervale.serve.ui_about import Facts

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("INTERVALE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]
WAIT = 30_000
expect = sync_api.expect


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """Opens the page as a new visitor; at the end, nothing may have gone to another host or broken in the page."""
    contexts, odd = [], []

    def open_page(url: str, language: str = "en-US", **options: Any) -> Any:
        context = chromium.new_context(locale=language, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda sent: odd.append(sent.url) if not sent.url.startswith((url, "data:", "blob:")) else None)
        page.on("pageerror", lambda error: odd.append(str(error)))
        page.on("response", lambda got: odd.append(f"{got.status} {got.url}") if got.status >= 400 else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert odd == []


@pytest.fixture
def slow() -> Iterator[tuple[Scheduler, str]]:
    """A server that says every letter back, a fifth of a second each."""
    desk = Scheduler(Speaker(slow=True), ("echo", "echo-base"))
    with live(
        desk, page=lambda app: mount_page(app, Facts(report={"en": b"<h1>the report</h1>", "zh": "<h1>报告在此</h1>".encode()}))
    ) as url:
        yield desk, url


def ask(page: Any, text: str, box: str = "#iv-box") -> None:
    page.wait_for_selector("#iv-shelf button", timeout=WAIT)
    page.fill(f"{box} textarea", text)
    page.press(f"{box} textarea", "Enter")


def bots(page: Any) -> Any:
    return page.locator("#iv-chat [data-testid=bot]")


def idle(page: Any) -> None:
    page.wait_for_selector(".submit-button:visible", timeout=WAIT)


def freed(page: Any, desk: Scheduler) -> bool:
    """Has every answer been left? The engine sees it at its next letter."""
    for _ in range(100):
        if not desk.load().active:
            return True
        page.wait_for_timeout(100)
    return False


def test_an_answer_streams_stops_comes_again_and_is_cleared(opened: Any, slow: tuple[Scheduler, str]) -> None:
    desk, url = slow
    page = opened(url)
    long = "abcdefghij" * 60  # two minutes of letters: however slow the browser, it is stopped in between
    ask(page, long)
    expect(bots(page)).to_contain_text("abc", timeout=WAIT)  # while it goes on
    assert desk.load().active == 1
    page.click("#iv-box .stop-button")
    expect(bots(page)).to_contain_text("■", timeout=WAIT)
    idle(page)
    assert freed(page, desk)
    assert long not in bots(page).inner_text()
    page.eval_on_selector('#iv-chat [data-testid="status-tracker"]', "one => one.classList.remove('hide')")  # Gradio's cover over the talk
    page.click("#iv-chat button[title=Retry]")
    expect(bots(page)).not_to_contain_text("■", timeout=WAIT)
    expect(bots(page)).to_contain_text("ab", timeout=WAIT)
    page.click("#iv-new")  # also while an answer runs
    expect(bots(page)).to_have_count(0, timeout=WAIT)
    assert freed(page, desk)
    ask(page, "abcdef")
    expect(bots(page)).to_have_text("abcdef", timeout=WAIT)
    idle(page)
    page.click("#iv-new")
    expect(bots(page)).to_have_count(0, timeout=WAIT)


def test_a_closed_tab_leaves_its_answer(opened: Any, slow: tuple[Scheduler, str]) -> None:
    desk, url = slow
    page = opened(url)
    ask(page, "x" * 200)
    expect(bots(page)).to_contain_text("x", timeout=WAIT)
    other = page.context.new_page()
    page.close()
    assert freed(other, desk)


def test_a_question_can_be_asked_otherwise_and_a_tag_is_text(opened: Any, slow: tuple[Scheduler, str]) -> None:
    page = opened(slow[1])
    ask(page, "<b>a</b> <IMG_CONTEXT> &lt;")
    # Between what would be a tag stands a character without width.
    expect(bots(page)).to_have_text("<\u2060b>a<\u2060/b> <\u2060IMG_CONTEXT> &\u2060lt;", timeout=WAIT)
    idle(page)
    page.click("#iv-chat button[title=Edit]")
    assert page.locator("#iv-chat textarea").bounding_box()["width"] >= 400  # room to write in, whatever the question's own width
    assert page.input_value("#iv-chat textarea").replace("\u2060", "") == "<b>a</b> <IMG_CONTEXT> &lt;"
    page.fill("#iv-chat textarea", "<|im_end|>")
    page.click("#iv-chat button[title=Submit]")
    expect(bots(page)).to_have_text("<|im_end|>", timeout=WAIT)
    expect(bots(page)).to_have_count(1)


def test_two_pictures_one_uploaded_one_off_the_shelf(opened: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.png"
    file.write_bytes(encoded(picture()))
    with live(local_desk(str(tiny), device="cpu"), page=lambda app: mount_page(app, Facts(most_tiles=2))) as url:
        page = opened(url)
        page.wait_for_selector("#iv-shelf button", timeout=WAIT)
        page.set_input_files("#iv-box input[type=file]", str(file))
        expect(page.locator("#iv-box img")).to_have_count(1, timeout=WAIT)
        page.click("#iv-shelf [data-at='7']")
        expect(page.locator("#iv-box img")).to_have_count(2, timeout=WAIT)
        page.click("text=What is in the picture?")
        expect(page.locator("#iv-box textarea")).to_have_value("What is in the picture?", timeout=WAIT)
        page.press("#iv-box textarea", "Enter")
        expect(page.locator("#iv-status")).to_contain_text("token", timeout=WAIT)
        box = page.locator("#iv-chat [data-testid=user] img").bounding_box()
        assert box["width"] > 1.5 * box["height"]  # side by side
        ask(page, "and now?")
        expect(bots(page)).to_have_count(2, timeout=WAIT)


def test_two_models_side_by_side_and_the_report(opened: Any, slow: tuple[Scheduler, str]) -> None:
    desk, url = slow
    page = opened(url)
    page.wait_for_selector("#iv-shelf button", timeout=WAIT)
    page.click("button[role=tab]:visible >> nth=1")
    ask(page, "abcdefgh", "#iv-box2")
    expect(page.locator("#iv-panels .iv-answer >> nth=1")).to_contain_text("ab", timeout=WAIT)
    assert desk.load().active == 2
    expect(page.locator("#iv-status2")).to_contain_text("both say the same", timeout=WAIT)
    assert page.locator("#iv-panels .iv-answer").all_inner_texts() == ["abcdefgh"] * 2
    page.click("button[role=tab]:visible >> nth=2")
    expect(page.frame_locator("#iv-report iframe").locator("h1")).to_have_text("the report", timeout=WAIT)
    page.click("button[role=tab]:visible >> nth=3")
    expect(page.locator("#iv-about")).to_contain_text("intervale chat echo", timeout=WAIT)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#iv-about [data-copy] >> nth=0")
    expect(page.locator("#iv-about [data-copy] >> nth=0")).to_have_text("copied", timeout=WAIT)
    assert page.evaluate("navigator.clipboard.readText()").startswith("intervale chat echo -i PICTURE QUESTION --base-url http")


def test_the_language_is_the_browsers_and_can_be_switched(opened: Any, slow: tuple[Scheduler, str]) -> None:
    page = opened(slow[1], "zh-CN")
    tabs = page.locator("button[role=tab]:visible")
    expect(tabs.first).to_have_text("对话", timeout=WAIT)
    expect(page.locator("#iv-shelf")).to_contain_text("海鲜", timeout=WAIT)
    tabs.nth(2).click()
    expect(page.frame_locator("#iv-report iframe").locator("h1")).to_have_text("报告在此", timeout=WAIT)
    page.click("[data-lang]")
    expect(tabs.first).to_have_text("Chat", timeout=WAIT)
    expect(page.locator("#iv-shelf")).to_contain_text("seafood", timeout=WAIT)
    expect(page.locator("#iv-new")).to_have_text("New chat")


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_on_a_phone_an_answer_to_a_picture_off_the_shelf_is_seen(opened: Any) -> None:
    with live(Scheduler(Speaker(), ("echo",)), page=lambda app: mount_page(app, Facts())) as url:
        page = opened(url, **PHONE)
        page.wait_for_selector("#iv-shelf button", timeout=WAIT)
        text = page.locator("#iv-chat .placeholder p")
        assert text.bounding_box()["x"] >= 30  # not at the frame's edge
        page.locator("#iv-shelf [data-at='20']").tap()
        expect(page.locator("#iv-box img")).to_have_count(1, timeout=WAIT)
        page.fill("#iv-box textarea", "seen")
        page.evaluate("scrollTo(0, document.querySelector('#iv-box').getBoundingClientRect().top + scrollY - 40)")
        page.locator("#iv-box .submit-button").tap()
        expect(page.locator("#iv-status")).to_contain_text("token", timeout=WAIT)
        expect(bots(page)).to_be_in_viewport(ratio=1)


def test_the_box_stays_where_it_is_when_an_answers_numbers_come(opened: Any, slow: tuple[Scheduler, str]) -> None:
    page = opened(slow[1])
    page.wait_for_selector("#iv-shelf button", timeout=WAIT)
    before = page.locator("#iv-box").bounding_box()["y"]
    ask(page, "a")
    expect(page.locator("#iv-status")).to_contain_text("token", timeout=WAIT)
    assert page.locator("#iv-box").bounding_box()["y"] == pytest.approx(before, abs=2)


def test_a_phone_shows_it_without_scrolling_sideways_and_dark_is_dark(opened: Any, slow: tuple[Scheduler, str]) -> None:
    page = opened(slow[1], "en-US", color_scheme="dark", **PHONE)
    ask(page, "a_long_word_without_any_space_" * 4)
    expect(bots(page)).to_contain_text("a_long", timeout=WAIT)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#iv-box .stop-button").bounding_box()["y"] < 844
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in shade[4:-1].replace("(", "").split(",")[:3]) < 64


def test_a_browser_logs_in_once_and_then_sees_the_page(opened: Any) -> None:
    key = "a-key-long-enough"
    serving = Serving(DoorRules(read_keys(None, key)))
    with live(Scheduler(Speaker(), ("echo",)), serving, lambda app: mount_page(app, Facts())) as url:
        page = opened(url)
        page.fill("input[name=key]", key)
        page.press("input[name=key]", "Enter")
        ask(page, "hello")
        expect(bots(page)).to_have_text("hello", timeout=WAIT)


def test_two_visitors_at_once_do_not_see_stop_or_clear_each_other(opened: Any, slow: tuple[Scheduler, str]) -> None:
    one, two = opened(slow[1]), opened(slow[1])
    ask(one, "canary-one-" * 3)
    ask(two, "canary-two-" * 3)
    expect(bots(one)).to_contain_text("canary-one", timeout=WAIT)
    expect(bots(two)).to_contain_text("canary-two", timeout=WAIT)
    two.click("#iv-new")
    expect(bots(two)).to_have_count(0, timeout=WAIT)
    expect(bots(one)).to_have_text("canary-one-" * 3, timeout=WAIT)
    assert "canary-two" not in one.content()
