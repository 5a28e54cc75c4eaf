"""Hosts, keys, origins: who may come in, and that nothing of it depends on what a header claims about the path."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_fixture import asking, live, raw_http
from speaking import Speaker

from intervale.core.errors import UserError
from intervale.engine.scheduler import Scheduler
from intervale.serve.app import Serving, door_rules
from intervale.serve.door import DoorRules, Keys, read_keys
from intervale.serve.limits import Limits

KEY, OTHER = "first-key-0123456789", "second-key-0123456789"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(Scheduler(Speaker(), ("echo",)), Serving(DoorRules(read_keys(None, f"{KEY},{OTHER}")))) as url:
        yield url


@pytest.fixture(scope="module")
def open_url() -> Iterator[str]:
    with live(Scheduler(Speaker(), ("echo",))) as url:
        yield url


def ask(url: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "echo", "messages": asking("hi")}, headers=headers, timeout=30)


def test_every_key_opens_and_nothing_else_does(url: str) -> None:
    for key in (KEY, OTHER):
        assert ask(url, authorization=f"Bearer {key}").status_code == 200
    for wrong in (
        "",
        "Bearer",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
        "Bearer " + "k" * 30_000,
        f"Bearer {KEY},{OTHER}",
    ):
        got = ask(url, authorization=wrong)
        assert got.status_code == 401, wrong
        assert got.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/", "/v1/chat/completions", "/anything"):
        assert httpx.get(url + path).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_key_is_asked_for_before_the_body_is_read(url: str) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url[7:]}\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    assert b" 401 " in raw_http(url, head.encode())


def test_a_huge_or_strange_key_is_a_4xx(url: str) -> None:
    for value in (b"Bearer " + b"k" * 1_000_000, b"Bearer \xc3\xa4\xff\xfe"):
        answer = raw_http(url, b"GET /v1/models HTTP/1.1\r\nHost: " + url[7:].encode() + b"\r\nAuthorization: " + value + b"\r\n\r\n")
        assert answer == b"" or answer.split(b" ")[1] in (b"400", b"401", b"431")
    assert ask(url, authorization=f"Bearer {KEY}").status_code == 200


@pytest.mark.parametrize(
    "host", ["x/health?", "evil.example", "127.0.0.1@evil", "", "a b", "127.0.0.1:99999999", "localhost#/health", "[::1", "x" * 300]
)
def test_a_foreign_or_malformed_host_gets_nowhere(open_url: str, host: str) -> None:
    for path in ("/v1/models", "/health"):
        answer = raw_http(open_url, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.split(b" ")[1] in (b"400", b"421"), answer
    doubled = f"GET /v1/models HTTP/1.1\r\nHost: {open_url[7:]}\r\nHost: evil.example\r\n\r\n"
    assert raw_http(open_url, doubled.encode()).split(b" ")[1] == b"400"


def test_a_badhost_does_not_open_what_needs_a_key(url: str) -> None:
    for host in ("x/health?", "x/login?", "127.0.0.1/health"):
        assert b" 200 " not in raw_http(url, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).split(b"\r\n")[0]
    for path in ("/health/../v1/models", "//health", "/v1/models?/health", "/health;/v1/models", "/login/../metrics"):
        assert httpx.get(url + path).status_code in (401, 404)


def test_a_page_of_another_site_is_refused(open_url: str) -> None:
    assert ask(open_url, origin="https://evil.example").json()["error"]["code"] == "foreign_origin"
    assert ask(open_url, origin=open_url).status_code == 200
    assert "access-control-allow-origin" not in ask(open_url).headers


def test_a_browser_signs_in_with_the_key_and_keeps_a_session(url: str) -> None:
    with httpx.Client(base_url=url) as browser:
        asked = browser.get("/", headers={"accept": "text/html"})
        assert (asked.status_code, asked.headers["location"]) == (303, "/login")
        assert "password" in browser.get("/login").text
        assert browser.post("/login", data={"key": "wrong-key-0123456"}).status_code == 401
        signed = browser.post("/login", data={"key": OTHER})
        assert signed.status_code == 303
        assert "HttpOnly" in signed.headers["set-cookie"]
        assert "SameSite=strict" in signed.headers["set-cookie"]
        assert OTHER not in signed.headers["set-cookie"]
        assert browser.get("/v1/models").status_code == 200
    for cookie in ("intervale_session=x", "intervale_session=" + "0" * 64, "intervale_session=\u00e4".encode().decode("latin-1"), ";;;="):
        assert httpx.get(f"{url}/v1/models", headers={"cookie": cookie.encode("latin-1")}).status_code == 401


def test_keys_come_from_a_file_or_a_list_and_short_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}\n\n{OTHER}\n")
    keys = read_keys(file, KEY)
    assert (len(keys.digests), keys.number(OTHER.encode())) == (2, 1)
    assert KEY not in repr(keys)
    for bad in ("short", "with space in it", "ünicode-ünicode"):
        with pytest.raises(UserError, match="API key 1"):
            read_keys(None, bad)
    file.write_text("# none\n")
    with pytest.raises(UserError, match="no key"):
        read_keys(file, "")
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "missing", "")


def test_a_public_address_without_a_key_is_refused() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="no API key"):
            door_rules(host, Keys(), ())
        assert door_rules(host, read_keys(None, KEY), ()).hosts is None
        assert door_rules(host, Keys(), (), insecure=True).hosts is None
    assert "chat.local" in (door_rules("127.0.0.1", Keys(), ("Chat.Local",)).hosts or ())


def test_keys_are_compared_in_constant_time() -> None:
    import inspect

    from intervale.serve import door

    assert "compare_digest" in inspect.getsource(door.Keys)
    assert "break" not in inspect.getsource(door.Keys)


def test_bodies_together_have_a_limit_and_give_it_back() -> None:
    rules = DoorRules(limits=Limits(held_bytes=1000))
    with live(Scheduler(Speaker(), ("echo",)), Serving(rules)) as url:
        for _ in range(5):
            assert ask(url).status_code == 200  # 100 bytes each, given back each time
        got = httpx.post(f"{url}/v1/chat/completions", content=b"x" * 2000, headers={"content-type": "application/json"})
        assert (got.status_code, got.json()["error"]["code"], got.headers["retry-after"]) == (429, "busy", "2")
        assert ask(url).status_code == 200


def test_a_slow_body_is_given_up() -> None:
    with live(Scheduler(Speaker(), ("echo",)), Serving(DoorRules(limits=Limits(body_seconds=0.2)))) as url:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url[7:]}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        assert b" 408 " in raw_http(url, head.encode())
        assert ask(url).status_code == 200


def test_a_full_queue_is_429_with_retry_after() -> None:
    speaker = Speaker(slow=True)
    desk = Scheduler(speaker, ("echo",), active=1, waiting=1)
    with live(desk) as url:
        import concurrent.futures

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [done.result() for done in [pool.submit(ask, url) for _ in range(8)]]
        full = [one for one in answers if one.status_code == 429]
        assert full
        assert full[0].headers["retry-after"] == "2"
        assert full[0].json()["error"]["code"] == "busy"
        assert sum(one.status_code == 200 for one in answers) == 8 - len(full)


def test_a_fault_of_the_engine_is_a_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    with live(Scheduler(Speaker(fault="secret /home/x 0xdeadbeef"), ("echo",))) as url:
        got = ask(url)
        assert (got.status_code, got.json()["error"]["code"]) == (500, "engine_failed")
        assert "secret" not in got.text
        assert len(got.headers["x-request-id"]) == 32


def test_a_fault_in_the_middle_of_a_stream_is_an_event_and_the_end() -> None:
    with live(Scheduler(Speaker(fault="secret", after=2), ("echo",))) as url:
        body = {"model": "echo", "messages": asking("hello"), "stream": True}
        lines = [line for line in httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).text.split("\n\n") if line]
        assert '"engine_failed"' in lines[-1]
        assert "secret" not in "".join(lines)
        assert "[DONE]" not in lines[-1]
        assert ask(url).status_code in (200, 500)


def test_nothing_of_a_prompt_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="intervale")
    with live(Scheduler(Speaker(), ("echo",))) as url:
        ask(url, authorization="Bearer my-secret-key-123")
        httpx.post(f"{url}/v1/chat/completions", json={"model": "echo", "messages": asking("CANARY")}, timeout=30)
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("intervale"))
    assert "echo done" in ours
    assert "CANARY" not in ours
    assert "my-secret" not in ours


def test_a_page_is_mounted_behind_the_door_and_streams_in_this_process() -> None:
    from contextlib import aclosing

    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    from intervale.engine.api import ChatTurn, Request

    def page(app: FastAPI) -> FastAPI:
        @app.get("/")
        async def home() -> PlainTextResponse:
            request = Request((ChatTurn("user", ("hello",)),), visitor="page:1")
            async with aclosing(app.state.desk.answer(request)) as pieces:
                return PlainTextResponse("".join([piece.text async for piece in pieces]))

        return app

    with live(Scheduler(Speaker(), ("echo",)), page=page) as url:
        assert httpx.get(url).text == "hello"
        assert raw_http(url, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n").split(b" ")[1] == b"421"


def test_many_streams_at_once_say_the_same_in_fewer_events(monkeypatch: pytest.MonkeyPatch) -> None:
    import concurrent.futures
    import json

    from intervale.serve import api

    monkeypatch.setattr(api, "_CROWD", 0)

    def text(url: str, words: str) -> tuple[str, str]:
        body = {"model": "echo", "messages": asking(words), "stream": True}
        lines = [line[6:] for line in httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).text.split("\n\n") if line]
        chunks = [json.loads(line) for line in lines if line != "[DONE]"]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if "choices" in chunk), lines[-1]

    with live(Scheduler(Speaker(), ("echo",))) as url, concurrent.futures.ThreadPoolExecutor(16) as pool:
        said = list(pool.map(lambda number: text(url, f"{number} " * 50), range(16)))
    assert said == [(f"{number} " * 50, "[DONE]") for number in range(16)]
    with live(Scheduler(Speaker(fault="x", after=5), ("echo",))) as url:
        said_before, last = text(url, "hello there")
        assert said_before == "hello"
        assert "engine_failed" in last
