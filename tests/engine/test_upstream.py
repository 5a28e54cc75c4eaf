"""The way to another server, on real sockets: connections are kept, left and lost as promised, and faults are httpx's."""

import asyncio
import gc
import gzip
import itertools
import shutil
import socket
import ssl
import subprocess
import warnings
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from intervale.engine.api import ChatTurn, EngineError, Request, Sampling
from intervale.engine.remote import RemoteEngine
from intervale.engine.upstream import Upstream

ASK = Request((ChatTurn("user", ("hi",)),), Sampling(max_new_tokens=9))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
WORD = b'data: {"choices": [{"delta": {"content": "he"}, "finish_reason": null}]}\n\n'
END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
LAST = b"0\r\n\r\n"

Answer = Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Other:
    """A server on a port of its own; `answer` writes what it likes. Counts connections, and those that the other side has closed."""

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.answer, self.opened, self.closed, self.heads, self.bodies = answer, 0, 0, list[bytes](), list[bytes]()

    async def __aenter__(self) -> "Other":
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.heads.append(head)
                self.bodies.append(await reader.readexactly(length))
                answering = asyncio.ensure_future(self.answer(writer, self.bodies[-1]))
                gone = asyncio.ensure_future(reader.read(1)) if self.answer is endless else None
                await asyncio.wait([one for one in (answering, gone) if one], return_when=asyncio.FIRST_COMPLETED)
                if gone is not None:
                    answering.cancel()
                    raise ConnectionError
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed += 1
        finally:
            writer.close()


async def good(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(HEAD + b"\r\n" + chunk(WORD) + chunk(END) + LAST)


async def endless(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(HEAD + b"\r\n")
    while True:
        writer.write(chunk(WORD))
        await asyncio.sleep(0.005)


async def breaks(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(HEAD + b"\r\n" + chunk(WORD))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()


async def hangs_up(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.close()


async def said(remote: RemoteEngine) -> str:
    async with aclosing(remote.answer(ASK)) as pieces:
        return "".join([piece.text async for piece in pieces])


async def until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError


def test_a_connection_is_kept_when_its_answer_was_read_to_the_end() -> None:
    async def run() -> None:
        async with Other(good) as other:
            remote = RemoteEngine(f"{other.url}/v1", ("m",), "sesame")
            assert [await said(remote) for _ in range(5)] == ["he"] * 5
            assert other.opened == 1
            assert await asyncio.gather(*(said(remote) for _ in range(40))) == ["he"] * 40
            assert other.opened <= 40
            head = other.heads[-1].lower()
            assert head.startswith(b"post /v1/chat/completions http/1.1")
            for line in (b"authorization: bearer sesame", b"content-type: application/json", b"accept-encoding: identity"):
                assert line in head

    asyncio.run(run())


def test_a_large_request_arrives_whole() -> None:
    async def run() -> None:
        async with Other(good) as other:
            remote = RemoteEngine(f"{other.url}/v1", ("m",))
            text = "菜" * 700_000
            async for _ in remote.answer(Request((ChatTurn("user", (text,)),))):
                pass
            assert text.encode() in other.bodies[0]

    asyncio.run(run())


def test_leaving_an_answer_closes_its_connection_at_once() -> None:
    async def run() -> None:
        async with Other(endless) as other:
            remote = RemoteEngine(f"{other.url}/v1", ("m",))
            async with aclosing(remote.answer(ASK)) as pieces:
                await anext(pieces)
            await until(lambda: other.closed == 1)
            waiting = asyncio.create_task(said(remote))  # a task that is cancelled leaves as well
            await until(lambda: other.opened == 2)
            await asyncio.sleep(0.02)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            await until(lambda: other.closed == 2)

    asyncio.run(run())


@pytest.mark.parametrize(("answer", "code", "asked"), [(breaks, "engine_interrupted", 1), (hangs_up, "engine_unavailable", 2)])
def test_what_breaks_off_is_told_or_asked_again(answer: Answer, code: str, asked: int) -> None:
    async def run() -> None:
        async with Other(answer) as other:
            remote = RemoteEngine(f"{other.url}/v1", ("m",), retries=1, pause=0.001)
            with pytest.raises(EngineError) as error:
                await said(remote)
            assert (error.value.code, len(other.heads)) == (code, asked)

    asyncio.run(run())


def test_nobody_there_and_silence_are_told_apart() -> None:
    async def silent(writer: asyncio.StreamWriter, body: bytes) -> None:
        await asyncio.sleep(1)

    async def run() -> None:
        async with Other(silent) as other:
            with pytest.raises(EngineError, match="does not answer"):
                await said(RemoteEngine(f"{other.url}/v1", ("m",), retries=0, seconds=0.1))
            url = other.url
        with pytest.raises(EngineError, match="cannot be reached"):
            await said(RemoteEngine(f"{url}/v1", ("m",), retries=0))

    asyncio.run(run())


def test_a_packed_answer_is_unpacked_once_and_a_redirect_is_not_followed() -> None:
    async def packed(writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(HEAD + b"Content-Encoding: gzip\r\n\r\n" + chunk(gzip.compress(WORD + END)) + LAST)

    async def elsewhere(writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(b"HTTP/1.1 307 x\r\nLocation: /elsewhere\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")

    async def run() -> None:
        async with Other(packed) as other:
            assert await said(RemoteEngine(f"{other.url}/v1", ("m",))) == "he"
        async with Other(elsewhere) as other:
            remote = RemoteEngine(f"{other.url}/v1", ("m",))
            for _ in range(2):
                with pytest.raises(EngineError, match="answered 307"):
                    await said(remote)
            assert len(other.heads) == 2
            assert not any(b"cookie" in head.lower() for head in other.heads)

    asyncio.run(run())


def test_what_is_open_is_closed_with_its_event_loop() -> None:
    async def run(remote: RemoteEngine) -> None:
        async with Other(good) as other:
            remote._asking = httpx.URL(f"{other.url}/v1/chat/completions")
            assert await said(remote) == "he"

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        remote = RemoteEngine("http://127.0.0.1:9/v1", ("m",), retries=0)
        for _ in range(3):  # each loop has connections of its own
            asyncio.run(run(remote))
        assert len(remote._ways) == 1  # those of loops that are over are forgotten
        remote = None  # type: ignore[assignment]
        gc.collect()
    assert not [one.message for one in told]


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, own = tmp_path / "key.pem", tmp_path / "own.pem"
    words = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run(["openssl", *words, "-keyout", str(key), "-out", str(own)], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(own, key)

    async def run() -> str:
        async with Other(good, context) as other:
            remote = RemoteEngine(f"{other.url.replace('http', 'https').replace('127.0.0.1', 'localhost')}/v1", ("m",), retries=0)
            return await said(remote)

    with pytest.raises(EngineError, match="cannot be reached"):
        asyncio.run(run())
    vouched = ssl.create_default_context(cafile=str(own))
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: vouched)
    assert asyncio.run(run()) == "he"


def test_a_transport_that_is_closed_asks_no_more() -> None:
    async def run() -> None:
        async with Other(good) as other:
            way = Upstream(secure=False)
            got = await way.handle_async_request(httpx.Request("POST", other.url, content=b"x"))
            assert got.status_code == 200
            await got.aclose()
            await way.aclose()
            await until(lambda: other.closed == 1)
            with pytest.raises(RuntimeError):
                await way.handle_async_request(httpx.Request("POST", other.url, content=b"x"))

    asyncio.run(run())


def test_bytes_that_are_no_http_end_the_answer() -> None:
    async def strange(writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(HEAD + b"\r\n" + chunk(WORD))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"zz\r\nno size\r\n")

    async def run() -> None:
        async with Other(strange) as other:
            with pytest.raises(EngineError) as error:
                await asyncio.wait_for(said(RemoteEngine(f"{other.url}/v1", ("m",))), 10)
            assert error.value.code == "engine_interrupted"

    asyncio.run(run())


def test_after_its_last_event_an_answer_is_whole_however_the_connection_ends() -> None:
    async def cut(writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(HEAD + b"\r\n" + chunk(WORD) + chunk(END))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    async def run() -> None:
        async with Other(cut) as other:
            assert await said(RemoteEngine(f"{other.url}/v1", ("m",), retries=0)) == "he"

    asyncio.run(run())


def test_a_server_that_takes_no_request_is_left_in_time() -> None:
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()

        async def run() -> None:
            remote = RemoteEngine(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", ("m",), retries=0, seconds=0.3)
            with pytest.raises(EngineError, match="does not answer"):
                async for _ in remote.answer(Request((ChatTurn("user", ("x" * 30_000_000,)),))):
                    pass

        asyncio.run(asyncio.wait_for(run(), 20))


def then(second: bytes) -> Answer:
    """Answers well, then to the next request with `second`, after which it hangs up; and so on."""
    turns = itertools.cycle([False, True])

    async def answer(writer: asyncio.StreamWriter, body: bytes) -> None:
        if next(turns):
            writer.write(second)
            await writer.drain()
            writer.close()
        else:
            await good(writer, body)

    return answer


def test_a_kept_connection_that_is_closed_costs_no_answer() -> None:
    async def run() -> None:
        async with Other(then(b"")) as other:
            remote = RemoteEngine(f"{other.url}/v1", ("m",), retries=0)
            assert [await said(remote) for _ in range(4)] == ["he"] * 4
            assert len(other.heads) == 7  # the second of each connection, but not the last's

    asyncio.run(run())


def test_what_was_begun_to_be_answered_or_came_on_a_new_connection_is_not_sent_again() -> None:
    async def run() -> None:
        async with Other(then(b"HTTP/1.1 200 OK\r\nContent-")) as other:
            remote = RemoteEngine(f"{other.url}/v1", ("m",), retries=0)
            assert await said(remote) == "he"
            with pytest.raises(EngineError):
                await said(remote)
            assert len(other.heads) == 2
        async with Other(hangs_up) as other:
            with pytest.raises(EngineError):
                await said(RemoteEngine(f"{other.url}/v1", ("m",), retries=0))
            assert len(other.heads) == 1

    asyncio.run(run())


def test_an_engine_that_is_forgotten_on_a_running_loop_leaves_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    faults = list[str]()

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: faults.append(told["message"]))
        async with Other(good) as other:
            assert await said(RemoteEngine(f"{other.url}/v1", ("m",))) == "he"
            gc.collect()
            await asyncio.sleep(0)

    asyncio.run(run())
    gc.collect()
    assert not [fault for fault in faults if "Task" in fault and "destroyed" in fault]
    assert not [
        one.message for one in recwarn if "nclosed c" in str(one.message)
    ]  # aiohttp's sessions and connections; not a stranger's socket
