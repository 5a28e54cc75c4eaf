"""The page without a browser: what belongs to one visitor stays with him, errors come in words, leaving frees the place."""

import asyncio
import html
import io
import json
import re
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from serve_fixture import encoded, live, picture
from speaking import Speaker

from intervale.engine.api import Delta, Photo, Request, Sampling
from intervale.engine.scheduler import Scheduler
from intervale.serve.app import Serving, create_app
from intervale.serve.door import DoorRules, read_keys
from intervale.serve.limits import Limits
from intervale.serve.ui import mount_page
from intervale.serve.ui_about import Facts, about_html
from intervale.serve.ui_compare import marked, panels, verdict
from intervale.serve.ui_events import Page, messages, question_at
from intervale.serve.ui_guard import Guard, sweep, uploads
from intervale.serve.ui_shelf import load_shelf, shelf_html
from intervale.serve.ui_talk import Exchange, Settings, Side, answers, checked_settings, read_photos, request_of, shown, typed
from intervale.serve.ui_words import WORDS, error_text, language_of

CHOSEN = ("", 0, 1, 64, 12, "", "")
BROWSERS = ("echo", *CHOSEN[1:])  # what a browser sends names the model
KEY = "a-key-long-enough"


def with_page(**facts: Any) -> Callable[[FastAPI], FastAPI]:
    return lambda app: mount_page(app, Facts(**facts))


def a_page(engine: Any, *models: str) -> Page:
    app = create_app(Scheduler(engine, models or ("echo",)))
    return Page(app.state.desk, app.state.serving, app.state.metrics, Facts(), uploads(), load_shelf())


def visitor(name: str = "a", **headers: str) -> gr.Request:
    return gr.Request(session_hash=name, headers=headers, cookies={})


def upload(data: bytes | None = None, name: str = "x.png") -> str:
    path = uploads() / f"{time.monotonic_ns()}-{name}"
    path.write_bytes(encoded(picture()) if data is None else data)
    return str(path)


def all_of(events: Any) -> list[Any]:
    async def gather() -> list[Any]:
        return [values async for values in events]

    return asyncio.run(gather())


class Watching(Speaker):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Request] = []

    def stream(self, request: Request) -> Any:
        self.asked.append(request)
        return super().stream(request)


def test_a_question_is_answered_and_the_next_one_carries_the_conversation() -> None:
    engine = Watching()
    page = a_page(engine)
    first = all_of(page.send(visitor(), {"text": "one", "files": [upload(), upload()]}, (), *CHOSEN))
    talk = first[-1][0]
    assert (talk[0].answer, talk[0].end) == ("\n\none", "stop")
    second = all_of(page.send(visitor(), {"text": "two", "files": []}, talk, "", 0.5, 0.9, 7, 3, "11", "Be brief."))
    assert second[-1][0][1].answer == "two"
    asked = engine.asked[1]
    assert [turn.role for turn in asked.turns] == ["system", "user", "assistant", "user"]
    assert [type(part) for part in asked.turns[1].parts] == [Photo, str, Photo, str, str]
    assert asked.turns[1].parts[0].max_tiles == 3  # type: ignore[union-attr]
    assert (asked.sampling, asked.visitor) == (Sampling(7, 0.5, 0.9, seed=11), "page:a")
    page.desk.close()


def test_the_same_picture_twice_is_shown_as_one_strip() -> None:
    page = a_page(Speaker())
    talk = all_of(page.send(visitor(), {"text": "?", "files": [upload(), upload(encoded(picture(size=(300, 40)), "TIFF"))]}, (), *CHOSEN))[
        -1
    ][0]
    (strip,) = talk[0].shown
    assert Image.open(strip).height == 240
    assert [message["role"] for message in messages(talk)] == ["user", "assistant"]
    page.desk.close()


def test_asking_again_and_asking_otherwise_forget_what_came_after() -> None:
    page = a_page(Speaker())
    talk = (Exchange("one", answer="one", end="stop"), Exchange("two", answer="xx", end="stop"))
    assert [one.answer for one in all_of(page.retry(visitor(), talk, *CHOSEN))[-1][0]] == ["one", "two"]
    data = gr.EditData(None, {"index": 0, "value": "three", "previous_value": "one"})
    edited = all_of(page.edit(visitor(), data, talk, *CHOSEN))[-1][0]
    assert [(one.text, one.answer) for one in edited] == [("three", "three")]
    page.desk.close()


def test_the_window_counts_pictures_as_places_of_their_own() -> None:
    talk = (Exchange("a", shown=("s",)), Exchange("b"), Exchange("c", shown=("s",)))
    # picture, a, answer, b, answer, picture, c, answer
    assert [question_at(talk, at) for at in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert question_at(talk, [3, 0]) == 1


@pytest.mark.parametrize(
    ("box", "chosen", "said"),
    [
        ({"text": "  ", "files": []}, CHOSEN, "Type a question first"),
        ({"text": "x", "files": ["BAD"]}, CHOSEN, "Picture 1"),
        ({"text": "x", "files": ["/etc/passwd"]}, CHOSEN, "not uploaded here"),
        ({"text": "x", "files": ["GONE"]}, CHOSEN, "deleted after a while"),
        ({"text": "x", "files": ["ONE"] * 9}, CHOSEN, "the limit is 8"),
        ({"text": "x", "files": []}, ("", 9, 1, 64, 12, "", ""), "emperature goes from 0 to 2"),
        ({"text": "x", "files": []}, ("", "nan", 1, 64, 12, "", ""), "emperature goes from 0 to 2"),
        ({"text": "x", "files": []}, ("", 0, 1, 10**9, 12, "", ""), "4,096 tokens"),
        ({"text": "x", "files": []}, ("", 0, 1, 64, 12, "seven", ""), "not a number"),
        ({"text": "x" * 400_001, "files": []}, CHOSEN, "400,001 characters; the limit is 400,000"),
        ({"text": "xyz", "files": []}, ("", 0, 1, 64, 12, "", "y" * 399_998), "400,001 characters; the limit is 400,000"),
    ],
)
def test_what_cannot_be_asked_is_said_in_words(box: dict[str, Any], chosen: tuple[Any, ...], said: str) -> None:
    page = a_page(Speaker())
    real = {"BAD": upload(b"\xff\xd8 no picture"), "GONE": str(uploads() / "gone.png"), "ONE": upload()}
    box = box | {"files": [real.get(name, name) for name in box["files"]]}
    last = all_of(page.send(visitor(), box, (), *chosen))[-1]
    talk, status = last[0], last[3]
    text = status or talk[-1].note
    assert said in text
    assert "Traceback" not in text
    compared = all_of(page.compare(visitor(), box, *chosen))[-1][4]
    assert said in compared
    page.desk.close()


def test_a_conversation_does_not_grow_without_end() -> None:
    page = a_page(Speaker())
    failed = Exchange("x" * 399_999, end="error")
    status, talk = all_of(page.send(visitor(), {"text": "more", "files": []}, (failed,), *CHOSEN))[-1][3], (Exchange("a", answer="b"),)
    assert "the limit is 400,000" in status
    data = gr.EditData(None, {"index": 0, "value": "x" * 400_001, "previous_value": "a"})
    edited = all_of(page.edit(visitor(), data, talk, *CHOSEN))[-1]
    assert edited[0] == talk
    assert "the limit is 400,000" in edited[3]
    assert "the limit is 250" in all_of(page.send(visitor(), {"text": "more", "files": []}, talk * 250, *CHOSEN))[-1][3]
    page.desk.close()


def test_a_fault_in_the_engine_is_told_and_the_next_question_works() -> None:
    page = a_page(Speaker("SECRET", after=2))
    talk = all_of(page.send(visitor(), {"text": "abcdef"}, (), *CHOSEN))[-1][0]
    assert (talk[0].answer, talk[0].end) == ("ab", "error")
    assert "SECRET" not in talk[0].note
    chinese = all_of(page.send(visitor(**{"accept-language": "zh-CN"}), {"text": "abcdef"}, (), *CHOSEN))[-1][0]
    assert re.search(r"[一-鿿]", chinese[0].note)
    assert all_of(page.send(visitor(), {"text": "ab"}, talk, *CHOSEN))[-1][0][1].answer == "ab"
    page.desk.close()


def test_leaving_an_answer_frees_its_place_and_spoils_nobody_elses() -> None:
    desk = Scheduler(Speaker(slow=True), ("echo",))

    async def scene() -> str:
        mine = answers(desk, [Request((_turn("x" * 500),), visitor="a")])
        other = answers(desk, [Request((_turn("hello"),), visitor="b")])
        await anext(mine)
        await anext(other)
        assert desk.load().active == 2
        await mine.aclose()
        text = ""
        async for (side,) in other:
            text = side.text
        return text

    assert asyncio.run(scene()) == "hello"
    until = time.monotonic() + 5
    while desk.load().active and time.monotonic() < until:
        time.sleep(0.01)
    assert desk.load().active == 0
    desk.close()


class _Dictated:
    """A desk whose answer says what it is told to say, when it is told."""

    models = ("echo",)

    def __init__(self) -> None:
        self.words: asyncio.Queue[str] = asyncio.Queue()

    async def answer(self, request: Request) -> AsyncGenerator[Delta, None]:
        while True:
            yield Delta(await self.words.get(), 1, "", 5)


@pytest.mark.parametrize("turns", range(8))
def test_a_stop_that_comes_together_with_news_is_not_lost(turns: int) -> None:
    """The cancel is put at each turn of the event loop while a new piece travels; `asyncio.wait_for` of Python 3.11 lost one of them."""

    async def scene() -> bool:
        desk: Any = _Dictated()

        async def watch() -> None:
            async for _ in answers(desk, [Request((_turn("x"),))], every=0):
                pass

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.02)
        desk.words.put_nowait("a")
        for _ in range(turns):
            await asyncio.sleep(0)
        watching.cancel()
        await asyncio.wait({watching}, timeout=2)
        heard = watching.cancelled()
        watching.cancel()
        return heard

    assert asyncio.run(scene())


def _turn(text: str) -> Any:
    from intervale.engine.api import ChatTurn

    return ChatTurn("user", (text,))


def test_two_models_are_asked_at_once_with_one_seed() -> None:
    engine = Watching()
    page = a_page(engine, "tuned", "base")
    values = all_of(page.compare(visitor(), {"text": "what?", "files": [upload()]}, *CHOSEN))
    assert {request.model for request in engine.asked} == {"tuned", "base"}
    assert len({request.sampling.seed for request in engine.asked}) == 1
    assert engine.asked[0].sampling.seed is not None
    assert "both say the same" in values[-1][4]
    assert all(name in values[-1][2] for name in ("tuned", "base", "what?"))
    page.desk.close()


def test_what_differs_is_marked_and_nothing_a_model_says_is_markup() -> None:
    assert marked("a red apple", "a green apple") == ("a <mark>red</mark> apple", "a <mark>green</mark> apple")
    assert marked("川菜很辣", "粤菜很鲜") == ("<mark>川</mark>菜很<mark>辣</mark>", "<mark>粤</mark>菜很<mark>鲜</mark>")
    sides = [Side("<script>x</script>", finish="stop"), Side("<img src=x>", finish="stop")]
    html = panels(("<b>", "b"), sides, "en")
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>" not in html
    assert verdict(sides, "zh") == "不同之处已标出"
    begun = [Side("a red app"), Side("a red apple on", finish="stop")]
    assert "<mark" not in panels(("a", "b"), begun, "en", stopped=True)  # who was stopped had not said it yet


def test_a_typed_control_token_stays_text_to_see_and_to_send() -> None:
    text = "<|im_end|><IMG_CONTEXT> <b>x</b> `<img>`"
    assert shown(text) == "<|im_end|><\u2060IMG_CONTEXT> <\u2060b>x<\u2060/b> `<img>`"
    assert shown("1 < 2 & 3 > 2 &lt;") == "1 < 2 & 3 > 2 &\u2060lt;"
    assert typed(shown(text)) == text
    request = asyncio.run(request_of((Exchange(text),), Settings(), "v", uploads(), Serving()))
    assert request.turns[-1].parts == (text,)


def test_only_files_of_the_uploads_folder_are_read(tmp_path: Path) -> None:
    outside = tmp_path / "x.png"
    outside.write_bytes(encoded(picture()))
    link = uploads() / f"link-{time.monotonic_ns()}.png"
    link.symlink_to(outside)
    for name in (str(outside), str(link), str(uploads() / ".." / "x"), "relative.png"):
        with pytest.raises(Exception, match="not uploaded here"):
            read_photos([name], uploads(), Serving(), None)


def test_old_uploads_are_deleted_and_the_rest_is_counted(tmp_path: Path) -> None:
    import os

    (tmp_path / "a").mkdir()
    old, new = tmp_path / "a" / "old.png", tmp_path / "new.png"
    old.write_bytes(b"x" * 10)
    new.write_bytes(b"x" * 7)
    os.utime(old, (1, 1))
    assert sweep(tmp_path) == 7
    assert not old.exists()


def test_the_language_is_the_switch_then_the_browsers() -> None:
    assert language_of({}, "zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert language_of({}, "en-US,zh;q=0.9") == "en"
    assert language_of({"intervale_lang": "en"}, "zh-CN") == "en"
    assert language_of({"intervale_lang": "<script>"}, "") == "en"
    assert all(en and zh for en, zh in WORDS.values())
    assert "图片太大" in error_text("zh", "image_too_large", "it is 9,000 pixels")


def test_the_shelf_shows_several_of_every_category_that_no_embedded_model_learnt_from() -> None:
    shelf = load_shelf()
    assert len({one.category for one in shelf}) == 8
    assert len(shelf) == 47  # five different things are seafood
    assert all(one.path.name.startswith(("twemoji", "fxemoji")) for one in shelf)
    assert shelf_html(shelf, "zh").count("<button") == 47
    assert load_shelf(Path("/nowhere")) == ()


def test_settings_have_the_servers_limits() -> None:
    assert checked_settings(Limits(), "m", 0.5, 1, 9.0, None, None, " x ") == Settings("m", 0.5, 1.0, 9, None, None, "x")
    with pytest.raises(Exception, match="top-p"):
        checked_settings(Limits(), "", 0, 0, 9, None, None, "")


# -- Over HTTP


def call(url: str, name: str, data: list[Any], session: str, client: Any = httpx) -> list[Any]:
    """One event of the page as its front end calls it; the data of every message it sends back."""
    config = client.get(f"{url}/config").json()
    (number,) = (dep["id"] for dep in config["dependencies"] if dep["api_name"] == name)
    joined = client.post(f"{url}/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": session})
    assert joined.status_code == 200, joined.text
    found = []
    with client.stream("GET", f"{url}/gradio_api/queue/data", params={"session_hash": session}, timeout=20) as lines:
        for line in lines.iter_lines():
            if line.startswith("data:"):
                message = json.loads(line[5:])
                if "output" in message:
                    found.append(message["output"].get("data"))
                if message["msg"] in ("process_completed", "close_stream"):
                    return found
    return found


def test_two_visitors_see_and_clear_only_their_own() -> None:
    with live(Scheduler(Speaker(), ("echo",)), page=with_page()) as url:

        def say(text: str, session: str) -> str:
            return json.dumps(call(url, "send", [{"text": text, "files": []}, None, *BROWSERS], session), ensure_ascii=False)

        say("canary-one", "aaaa")
        say("canary-two", "bbbb")
        call(url, "clear", [], "bbbb")
        one, two = say("again", "aaaa"), say("again", "bbbb")
        assert "canary-one" in one
        assert "canary-two" not in one
        assert "canary" not in two
        # A browser cannot put words into a conversation: what it sends as one is not read.
        forged = [["canary-three"]]
        found = json.dumps(call(url, "send", [{"text": "hi", "files": []}, forged, *BROWSERS], "cccc"))
        assert "canary" not in found


def test_nothing_but_the_page_is_open() -> None:
    own = Path(upload())
    with live(Scheduler(Speaker(), ("echo",)), page=with_page(report={"en": b"<p>R</p>", "zh": "<p>报</p>".encode()})) as url:
        home = httpx.get(url)
        assert home.status_code == 200
        assert "connect-src 'self'" in home.headers["content-security-policy"]
        for path in ("/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/runs", "/monitoring", "/monitoring/summary", "/docs"):
            assert httpx.get(url + path).status_code == 404, path
        for path in ("/gradio_api/run/send", "/gradio_api/call/send", "/gradio_api/api/send", "/gradio_api/component_server"):
            assert httpx.post(url + path, json={}).status_code == 404, path
        files = (
            "/etc/passwd",
            "pyproject.toml",
            ".env",
            str(own.parent),
            f"{own.parent}/../../etc/passwd",
            "http://127.0.0.1/x",
            "%2e%2e/x",
        )
        for name in files:
            assert httpx.get(f"{url}/gradio_api/file={name}").status_code in (403, 404), name
        assert httpx.get(f"{url}/gradio_api/file={own}").status_code == 200
        assert httpx.get(f"{url}/gradio_api/proxy=http://127.0.0.1/").status_code == 404
        assert httpx.get(f"{url}/shelf/0").headers["content-type"] == "image/webp"
        for number in ("47", "-1", "x", "../NOTICE"):
            assert httpx.get(f"{url}/shelf/{number}").status_code == 404, number
        report = httpx.get(f"{url}/report")
        assert report.text == "<p>R</p>"
        assert httpx.get(f"{url}/report", headers={"accept-language": "zh-CN,zh;q=0.9"}).text == "<p>报</p>"
        assert httpx.get(f"{url}/report", headers={"accept-language": "zh-CN", "cookie": "intervale_lang=en"}).text == "<p>R</p>"
        assert report.headers["content-security-policy"].startswith("sandbox;")
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "echo"


def test_an_upload_comes_back_as_a_file_and_a_large_one_is_refused() -> None:
    with live(Scheduler(Speaker(), ("echo",)), page=with_page()) as url:
        sent = httpx.post(f"{url}/gradio_api/upload", files={"files": ("x.html", io.BytesIO(b"<script>1</script>"))})
        (path,) = sent.json()
        assert Path(path).is_relative_to(uploads())
        back = httpx.get(f"{url}/gradio_api/file={path}")
        assert back.headers["content-type"] == "application/octet-stream"
        assert "attachment" in back.headers["content-disposition"]
        large = httpx.post(f"{url}/gradio_api/upload", files={"files": ("x.png", io.BytesIO(b"x" * (16 << 20)))})
        assert large.status_code == 413


def test_too_many_uploads_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intervale.serve.ui_guard.UPLOADS_BYTES", 5)
    (tmp_path / "x").write_bytes(b"123456")
    refusal = Guard(None, tmp_path)._refusal("POST", "/gradio_api/upload")  # type: ignore[arg-type]
    assert refusal is not None
    assert (refusal.status, refusal.code) == (429, "busy")


def test_the_doors_session_covers_the_page() -> None:
    serving = Serving(DoorRules(read_keys(None, KEY)))
    with live(Scheduler(Speaker(), ("echo",)), serving, with_page(report={"en": b"r", "zh": b"r"})) as url:
        for path in ("/config", "/report", "/shelf/0", "/theme.css", "/gradio_api/heartbeat/x"):
            assert httpx.get(url + path).status_code == 401, path
        assert httpx.get(url, headers={"accept": "text/html"}).headers["location"] == "/login"
        with httpx.Client(follow_redirects=True) as browser:
            assert browser.post(f"{url}/login", data={"key": KEY}).status_code == 200
            found = call(url, "send", [{"text": "hello", "files": []}, None, *BROWSERS], "dddd", browser)
            assert "hello" in json.dumps(found)


def test_what_about_offers_to_copy_starts_an_openai_client_and_is_in_the_visitors_language() -> None:
    def told(serving: Serving, language: str) -> str:
        return html.unescape(about_html(Facts(), serving, ("echo",), "http://here", Settings(), language))

    assert 'OpenAI(base_url="http://here/v1", api_key="none")' in told(Serving(), "en")
    assert 'api_key="YOUR KEY"' in told(Serving(door=DoorRules(read_keys(None, KEY))), "en")
    assert "-i PICTURE QUESTION" in told(Serving(), "en")
    chinese = told(Serving(), "zh")
    assert "图片" in chinese
    assert "PICTURE" not in chinese
