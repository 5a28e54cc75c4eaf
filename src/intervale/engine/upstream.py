"""The way to another server: aiohttp's connections and parser behind httpx's transport, so that errors and answers are httpx's everywhere.

httpcore, httpx's own, parses in Python and looks at every open connection a few times a request: with 32 answers at once more than half of
what a gateway spends on a token. Promises: a connection is kept for the next request when its answer was read to the end, and
closed at once when an answer is left; what is open is closed on the event loop that it belongs to, also when that one just ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import aiohttp
import httpx

_KEPT = 4.0  # seconds an idle connection is kept: uvicorn, which serves most such engines, closes it after five


@contextlib.contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
        raise httpx.ReadError(str(error), request=request) from error


class _Parts(httpx.AsyncByteStream):
    """What has come of an answer since the last look, in one piece."""

    def __init__(self, got: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._got, self._request = got, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._request):
            async for part in self._got.content.iter_any():
                yield part

    async def aclose(self) -> None:
        self._got.close()  # after its end the connection is not its own any more


class Upstream(httpx.AsyncBaseTransport):
    """Connections of one event loop, which must be running when it is made. `extensions['timeout']` of a request is honoured as by httpx.

    `secure`: some go to https; reading the certificates that are trusted takes 20 ms.
    """

    def __init__(self, secure: bool) -> None:
        trusted = httpx.create_ssl_context(trust_env=False) if secure else True
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT, ssl=trusted)
        self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        """Close what is open when this task is cancelled, as all are when a loop's run ends."""
        try:
            await asyncio.Event().wait()
        finally:
            await self._session.close()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Ask, and give back the answer with its head read. Raises: httpx.ConnectError, httpx.ReadError."""
        given = request.extensions.get("timeout", {})
        timeout = aiohttp.ClientTimeout(sock_connect=given.get("connect"), sock_read=given.get("read"))
        with _as_httpx(request):
            got = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                data=request.content,
                timeout=timeout,
                allow_redirects=False,
            )
        return httpx.Response(got.status, headers=got.raw_headers, stream=_Parts(got, request), request=request)

    async def aclose(self) -> None:
        """Close all of it; called on its own event loop."""
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
