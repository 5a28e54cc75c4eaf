"""Pictures from web addresses, where they are switched on: no way to anything that is not public."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from intervale.serve.errors import ApiError
from intervale.serve.media import MediaLimits, fetch_picture, is_public

PUBLIC = "93.184.216.34"
LIMITS = MediaLimits(remote=True, picture_bytes=1000, remote_seconds=0.5)


class Web(httpx.AsyncBaseTransport):
    """Answers by path, and notes where each connection went."""

    def __init__(self, pages: dict[str, Any]) -> None:
        self.pages, self.went = pages, []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.went.append((request.url.host, request.headers["host"], request.extensions.get("sni_hostname")))
        page = self.pages[request.url.path]
        if isinstance(page, bytes):
            return httpx.Response(200, stream=Once(page))
        return page() if callable(page) else page


class Once(httpx.AsyncByteStream):
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data


def fetch(url: str, pages: dict[str, Any] | None = None, names: dict[str, Any] | None = None) -> tuple[bytes, Web]:
    web = Web(pages or {"/a.png": b"picture"})

    async def find(host: str, port: int) -> list[str]:
        found = (names or {}).get(host, [PUBLIC])
        return found() if isinstance(found, Callable) else found  # type: ignore[arg-type]

    return asyncio.run(fetch_picture(url, LIMITS, find, web)), web


def refused(url: str, **more: Any) -> str:
    with pytest.raises(ApiError) as error:
        fetch(url, **more)
    assert error.value.status == 400
    return error.value.code


def test_a_public_picture_comes_from_the_address_that_was_checked() -> None:
    data, web = fetch("https://pictures.example/a.png")
    assert data == b"picture"
    assert web.went == [(PUBLIC, "pictures.example", "pictures.example")]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "::1", "::", "fc00::1", "fe80::1%eth0",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1", "ff02::1", "255.255.255.255", "x",
    ],
)  # fmt: skip
def test_no_private_address_is_reached_however_it_is_written(address: str) -> None:
    assert not is_public(address)
    assert refused("http://inner.example/a.png", names={"inner.example": [PUBLIC, address]}) == "image_fetch_refused"


def test_public_addresses_are_known_as_such() -> None:
    assert all(is_public(address) for address in (PUBLIC, "2606:4700::1111", "64:ff9b::5db8:d822", "::ffff:8.8.8.8"))


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "localhost.", "[::1]", "[::ffff:7f00:1]"])
def test_odd_spellings_of_this_machine_are_refused_by_the_real_resolver(host: str) -> None:
    with pytest.raises(ApiError) as error:
        asyncio.run(fetch_picture(f"http://{host}/a.png", LIMITS, transport=Web({})))
    assert error.value.code in ("image_fetch_refused", "invalid_image_url", "image_fetch_failed")


@pytest.mark.parametrize(
    "url",
    [
        "https://good.example\\@evil.example/a.png", "http://user:pass@x.example/a.png", "http://x.example:22/a.png", "https://x.example:80/a.png", "http:///a.png",
        "http://x .example/a.png", "http://x.example/\r\nHost: y", "http://exämple.org/a.png", "http://" + "a" * 3000, "http://[bad/a.png",
    ],
)  # fmt: skip
def test_addresses_that_two_readers_may_read_differently_are_refused(url: str) -> None:
    assert refused(url) == "invalid_image_url"


def test_a_name_that_changes_its_address_is_looked_up_once() -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    data, web = fetch("http://rebind.example/a.png", names={"rebind.example": lambda: next(answers)})
    assert data == b"picture"
    assert [place[0] for place in web.went] == [PUBLIC]


def to(place: str, status: int = 302) -> httpx.Response:
    return httpx.Response(status, headers={"location": place})


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("http://127.0.0.1/x", "image_fetch_refused"), ("http://inner.example/x", "image_fetch_refused"), ("file:///etc/passwd", "invalid_image_url"),
        ("//127.0.0.1/x", "image_fetch_refused"), ("http://a:b@x.example/", "invalid_image_url"), ("/again", "image_fetch_failed"), ("gopher://x/", "invalid_image_url"),
    ],
)  # fmt: skip
def test_each_redirect_is_checked_anew(place: str, code: str) -> None:
    names = {"inner.example": ["10.0.0.5"], "127.0.0.1": ["127.0.0.1"]}
    assert refused("http://x.example/go", pages={"/go": lambda: to(place), "/again": lambda: to("/again")}, names=names) == code


def test_a_redirect_to_a_public_picture_is_followed_and_one_without_a_place_is_not() -> None:
    data, web = fetch("http://x.example/go", {"/go": to("https://y.example/a.png", 307), "/a.png": b"p"})
    assert (data, len(web.went)) == (b"p", 2)
    assert refused("http://x.example/go", pages={"/go": httpx.Response(302)}) == "image_fetch_failed"
    assert refused("http://x.example/go", pages={"/go": httpx.Response(404)}) == "image_fetch_failed"


def test_size_and_time_are_bounded() -> None:
    class Slow(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for _ in range(100):
                await asyncio.sleep(0.05)
                yield b"x"

    assert refused("http://x.example/a", pages={"/a": b"x" * 2000}) == "image_too_large"
    assert refused("http://x.example/a", pages={"/a": httpx.Response(200, stream=Slow())}) == "image_fetch_failed"
