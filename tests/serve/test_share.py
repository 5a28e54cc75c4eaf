"""A public link: never without a password, and its visitors pass the same door. The relay is a stand-in: nothing here reaches the network."""

from collections.abc import Iterator

import httpx
import pytest
from gradio import networking
from serve_fixture import asking, live
from speaking import Speaker
from typer.testing import CliRunner

from intervale.cli.main import app
from intervale.core.errors import OutsideError, UserError
from intervale.engine.scheduler import Scheduler
from intervale.serve.app import Serving, door_rules
from intervale.serve.door import Keys, read_keys
from intervale.serve.share import share, share_link

KEY = "first-key-0123456789"
LINK = "1a2b3c4d.gradio.live"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(Scheduler(Speaker(), ("echo",)), Serving(door_rules("127.0.0.1", read_keys(None, KEY), (), shared=True))) as url:
        yield url


@pytest.mark.parametrize("more", [[], ["--insecure"]])
def test_without_a_password_there_is_no_link(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERVALE_API_KEYS", raising=False)
    monkeypatch.setattr(networking, "setup_tunnel", lambda *words: pytest.fail("a tunnel was asked for"))
    got = CliRunner().invoke(app, ["serve", "nano", "--share", *more])
    assert got.exit_code != 0
    assert isinstance(got.exception, UserError)
    assert "no password" in got.exception.what
    with pytest.raises(UserError, match="no password"):
        door_rules("127.0.0.1", Keys(), (), shared=True)


def test_visitors_of_the_link_need_the_key_whatever_they_call_the_server(url: str) -> None:
    body = {"model": "echo", "messages": asking("hi")}

    def ask(**headers: str) -> int:
        return httpx.post(f"{url}/v1/chat/completions", json=body, headers={"host": LINK, **headers}, timeout=30).status_code

    assert ask() == 401
    assert ask(authorization="Bearer wrong-key-0123456789") == 401
    assert ask(authorization=f"Bearer {KEY}") == 200
    with httpx.Client(base_url=url, headers={"host": LINK, "accept": "text/html"}) as browser:
        assert browser.get("/").headers["location"] == "/login"
        browser.post("/login", data={"key": KEY}, headers={"origin": f"https://{LINK}"})
        assert browser.get("/").status_code == 200


def test_the_link_leads_to_this_port_and_is_https(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tunnel(host: str, port: int, token: str, *more: object) -> str:
        asked.append((host, port, len(token) > 30, *more))
        return f"http://{LINK}"

    monkeypatch.setattr(networking, "setup_tunnel", tunnel)
    assert share_link(4321) == f"https://{LINK}"
    assert asked == [("127.0.0.1", 4321, True, None, None)]


def test_without_a_network_the_server_goes_on_and_says_why_there_is_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*words: object) -> str:
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr(networking, "setup_tunnel", away)
    told: list[OutsideError] = []
    share(1, lambda link: pytest.fail("no link"), told.append).join(10)
    assert "could not be made" in told[0].what
