"""The way to another server: aiohttp's connections and parser behind httpx's transport, so that errors and answers are httpx's everywhere.

httpcore, httpx's own, parses in Python and looks at every open connection a few times a request: with 32 answers at once more than half of
what a gateway spends on a token. Promises: a connection is kept for the next request when its answer was read to the end, and
closed at once when an answer is left; what is open is closed on the event loop that it belongs to, also when that one just ends.
A request is sent again, once, only where a kept connection was closed before anything of an answer came.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import aiohttp
import httpx

from intervale.core.errors import UserError

_keepers: set[asyncio.Task[None]] = set()  # a loop holds its tasks weakly: one that is only waiting may be collected
_heard: WeakSet[asyncio.Future[None]] = WeakSet()  # ends of connections whose faults are not told by the loop's log
_SWALLOWED = 1 << 16  # bytes of a request that a connection takes without anybody reading
_KEPT = 4.0  # seconds an idle connection is kept: uvicorn, which serves most such engines, closes it after five


def web_address(base_url: str) -> str:
    """The address of a server, without a slash at its end. Raises: UserError when it is none, or has more than a path."""
    try:
        url = httpx.URL(base_url)
        url.host.encode("idna")  # as the look-up of the name does; no part of one is empty or longer than 63
    except Exception:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65535:
        raise UserError(f"--base-url {base_url!r} is not a web address", "give it like http://127.0.0.1:23333/v1")
    if "?" in str(url) or "#" in str(url):  # what is asked for is written behind it
        plain = url.copy_with(query=None, fragment=None, username="", password="")  # a key may stand in what is not to be there
        raise UserError(f"--base-url {str(plain)!r} has a part after its path", "leave out what begins with ? or #")
    return str(url).rstrip("/")


@contextlib.contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
        raise httpx.ReadError(str(error), request=request) from error


def _hear(lost: asyncio.Future[None]) -> None:
    if not lost.cancelled():
        lost.exception()


async def _taken(body: bytes, late: asyncio.Timeout, seconds: float | None) -> AsyncIterator[bytes]:
    """A request's body; `late` comes when the other side does not take it within `seconds`, for which aiohttp has no limit."""
    with contextlib.suppress(RuntimeError):  # it was answered already
        late.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)
    yield body  # at once: of a body in parts, a server that answers before it has read it makes a connection that broke
    with contextlib.suppress(RuntimeError):
        late.reschedule(None)


async def _reused(session: aiohttp.ClientSession, context: SimpleNamespace, told: Any) -> None:
    context.trace_request_ctx.add("reused")


class _Parts(httpx.AsyncByteStream):
    """What has come of an answer since the last look, in one piece."""

    def __init__(self, got: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._got, self._request = got, request
        protocol = got.connection.protocol if got.connection is not None else None
        self._lost = protocol.closed if protocol is not None else None
        if self._lost is not None:
            self._lost.add_done_callback(self._end)
            if self._lost not in _heard:
                _heard.add(self._lost)
                self._lost.add_done_callback(_hear)

    def _end(self, lost: asyncio.Future[None]) -> None:
        """The connection is gone. After bytes that are no HTTP, aiohttp (3.14) tells nobody and stops its clock: reading would never end."""
        if not self._got.content.is_eof() and self._got.content.exception() is None:
            self._got.content.set_exception(aiohttp.ClientPayloadError("the answer breaks off"))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._request):
            async for part in self._got.content.iter_any():
                yield part

    async def aclose(self) -> None:
        if self._lost is not None:
            self._lost.remove_done_callback(self._end)
        self._got.close()  # after its end the connection is not its own any more


class Upstream(httpx.AsyncBaseTransport):
    """Connections of one event loop, which must be running when it is made. `extensions['timeout']` of a request is honoured as by httpx.

    `secure`: some go to https; reading the certificates that are trusted takes 20 ms.
    """

    def __init__(self, secure: bool) -> None:
        trusted = httpx.create_ssl_context(trust_env=False) if secure else True
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT, ssl=trusted)
        watch = aiohttp.TraceConfig()
        watch.on_connection_reuseconn.append(_reused)
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trace_configs=[watch]
        )
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        _keepers.add(self._keeper)
        self._keeper.add_done_callback(_keepers.discard)

    async def _keep(self) -> None:
        """Close what is open when this task is cancelled, as all are when a loop's run ends."""
        try:
            await asyncio.Event().wait()
        finally:
            await self._session.close()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Ask, and give back the answer with its head read. Raises: httpx.ConnectError, httpx.ReadError."""
        with _as_httpx(request):
            kept = set[str]()
            try:
                got = await self._ask(request, kept)
            except aiohttp.ClientConnectionError as error:
                begun = not isinstance(getattr(error, "message", ""), str)  # the head of an answer, as far as it came
                if not kept or begun or isinstance(error, TimeoutError):
                    raise
                got = await self._ask(request, kept)
        return httpx.Response(got.status, headers=got.raw_headers, stream=_Parts(got, request), request=request)

    async def _ask(self, request: httpx.Request, kept: set[str]) -> aiohttp.ClientResponse:
        """Ask once. `kept` gets a word when the connection has served before."""
        given, body = request.extensions.get("timeout", {}), request.content
        timeout = aiohttp.ClientTimeout(sock_connect=given.get("connect"), sock_read=given.get("read"))
        async with asyncio.timeout(None) as late:
            return await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                data=body if len(body) <= _SWALLOWED else _taken(body, late, given.get("write")),
                timeout=timeout,
                allow_redirects=False,
                trace_request_ctx=kept,
            )

    async def aclose(self) -> None:
        """Close all of it; called on its own event loop."""
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        await self._session.close()  # a task that is cancelled before it began has closed nothing
