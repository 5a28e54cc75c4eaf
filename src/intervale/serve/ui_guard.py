"""What of Gradio's server is open: the page, its event queue, and the uploads. Everything else is not there.

Promises: the routes a page does not need (its API's description, direct calls, proxies, recordings, monitoring ...) answer 404; files are
given out of the page's own folder only; a browser is told to load nothing from elsewhere; uploads are deleted after a while and bounded
together. Cost: a look at the folder for each upload.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from intervale.serve.errors import ApiError
from intervale.serve.limits import Message, Receive

Send = Callable[[Message], Awaitable[None]]

UPLOADS_SECONDS = 2 * 3600  # a picture nobody asked about for so long is deleted
UPLOADS_BYTES = 2 << 30
_GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static|svelte)/[^?]*"
    r"|/gradio_api/(queue/data|upload_progress|startup-events|app_id|theme\.css|heartbeat/[A-Za-z0-9]+)/?"
)
_POST = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)/?")
_LASTING = ("/gradio_api/heartbeat/", "/gradio_api/queue/data")
_FILE = "/gradio_api/file="
# The page's own scripts are inline and compiled as they run; nothing comes from, or goes to, another host.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob: data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"


@functools.cache
def uploads() -> Path:
    """This process's folder for uploads: nobody else's, and gone when the process ends. Gradio is told of it: call this before it is imported."""
    folder = Path(tempfile.mkdtemp(prefix="intervale-page-")).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def sweep(folder: Path, seconds: float = UPLOADS_SECONDS) -> int:
    """Delete files that are older; how many bytes are left."""
    left, now = 0, time.time()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                facts = path.stat()
                if now - facts.st_mtime > seconds:
                    path.unlink()
                else:
                    left += facts.st_size
            elif not any(path.iterdir()) and now - path.stat().st_mtime > seconds:
                path.rmdir()
    return left


class Guard:
    """In front of Gradio's app (plain ASGI)."""

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path, head: str = "") -> None:
        self.app, self.folder, self.head = app, folder, head.encode()
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Let go of the browsers: a tab holds a connection for as long as it is open."""
        self._closing.set()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], scope["path"])
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return

        extra = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        if scope["path"] == "/" and scope["method"] == "GET":
            await self._home(scope, receive, guarded)
        elif scope["path"].startswith(_LASTING):
            await self.app(scope, self._until_closed(receive), guarded)
        else:
            await self.app(scope, receive, guarded)

    def _until_closed(self, receive: Receive) -> Receive:
        """To the app, a server that ends looks like a browser that leaves: its answers stop in order."""

        async def receiving() -> Message:
            news, end = asyncio.ensure_future(receive()), asyncio.ensure_future(self._closing.wait())
            try:
                await asyncio.wait({news, end}, return_when=asyncio.FIRST_COMPLETED)
                return news.result() if news.done() else {"type": "http.disconnect"}
            finally:
                for task in (news, end):
                    task.cancel()

        return receiving

    async def _home(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The page itself, with our head first in it: Gradio's own `head` comes after its scripts have looked at the browser's language."""
        plain = scope | {"headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
        starts: list[Message] = []
        body: list[bytes] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                starts.append(message)
                return
            body.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            whole = b"".join(body).replace(b"<head>", b"<head>" + self.head, 1)
            headers = [pair for pair in starts[0].get("headers", []) if pair[0].lower() != b"content-length"]
            headers += [(b"content-length", str(len(whole)).encode()), (b"cache-control", b"no-store")]
            await send({**starts[0], "headers": headers})
            await send({"type": "http.response.body", "body": whole})

        await self.app(plain, receive, keep)

    def _refusal(self, method: str, path: str) -> ApiError | None:
        missing = ApiError(404, "not_found", "there is nothing at this address")
        if method in ("GET", "HEAD"):
            if path.startswith(_FILE):
                return None if self._is_ours(path.removeprefix(_FILE)) else missing
            return None if _GET.fullmatch(path) else missing
        if method != "POST" or not _POST.fullmatch(path):
            return missing
        if path.startswith("/gradio_api/upload") and sweep(self.folder) > UPLOADS_BYTES:
            return ApiError(429, "busy", "the server holds too many uploads; try again later", None, 600)
        return None

    def _is_ours(self, name: str) -> bool:
        try:
            path = Path(unquote(name))
            return path.is_absolute() and path.resolve().is_relative_to(self.folder)
        except (OSError, ValueError):
            return False
