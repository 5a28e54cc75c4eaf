"""A live server on a loopback port for the tests, in a thread of its own."""

import base64
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from intervale.engine.api import Desk
from intervale.serve.app import Serving, create_app, open_port


@contextmanager
def live(desk: Desk, serving: Serving | None = None, page: Any = None) -> Iterator[str]:
    """The base URL of a server that answers from `desk`; the desk is closed at the end."""
    app = create_app(desk, serving or Serving(), page)
    with running(app) as url:
        yield url
    desk.close()


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Any ASGI app on a free port."""
    sock = open_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="error", access_log=False, timeout_graceful_shutdown=1))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    sock.close()


def picture(seed: int = 0, size: tuple[int, int] = (64, 80)) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def data_url(data: bytes, media: str = "image/png") -> str:
    """Bytes as a data URL."""
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def asking(text: str, *urls: str) -> list[dict[str, Any]]:
    """One user message with pictures first."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def raw_http(url: str, request: bytes, wait: float = 10.0) -> bytes:
    """What the server answers to these bytes on a fresh connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=wait) as sock:
        answer = b""
        with suppress(ConnectionError):  # it may answer and hang up before it has read everything
            sock.sendall(request)
        while part := _some(sock):
            answer += part
            if b"\r\n\r\n" in answer and b"content-length" in answer.lower():
                head, _, body = answer.partition(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                if len(body) >= length:
                    break
        return answer


def _some(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionError:
        return b""
