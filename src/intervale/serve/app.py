"""The server put together: one app on one port, the API and, where one is given, a page at `/`.

The seam for a page: `create_app(desk, ..., page=mount)` calls `mount(app)` last and serves what it returns; `app.state.desk` is the Desk,
so a page streams answers in this process with `async for delta in app.state.desk.answer(Request(..., visitor=...))`. The door
(hosts, keys, sizes) stands in front of the page as well.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from intervale.core.errors import OutsideError, UserError
from intervale.engine.api import Desk
from intervale.serve.api import add_api, log
from intervale.serve.door import LOOPBACK, Door, DoorRules, Keys
from intervale.serve.errors import ApiError
from intervale.serve.limits import Limits
from intervale.serve.media import MediaLimits
from intervale.serve.metrics import Metrics
from intervale.serve.share import refuse_open

Page = Callable[[FastAPI], FastAPI]
_MOST_CONNECTIONS = 800  # below the usual limit of 1024 open files


@dataclass(frozen=True)
class Serving:
    """How to serve: the door's rules, and the limits of pictures."""

    door: DoorRules = field(default_factory=DoorRules)
    media: MediaLimits = field(default_factory=MediaLimits)

    @property
    def limits(self) -> Limits:
        """The limits of a request."""
        return self.door.limits


def create_app(desk: Desk, serving: Serving = Serving(), page: Page | None = None) -> FastAPI:
    """The app. `app.state.desk`, `app.state.serving` and `app.state.metrics` are what a page needs; closing the desk is the caller's."""
    app = FastAPI(title="intervale", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(desk)
    app.state.desk, app.state.serving, app.state.metrics = desk, serving, metrics
    app.state.at_end = list[
        Callable[[], None]
    ]()  # called when the server is told to stop: what lasts for as long as a tab is open ends here
    add_api(app, desk, serving.limits, serving.media, metrics)
    _add_errors(app, metrics)
    app.add_middleware(Door, rules=serving.door, refused=lambda code: metrics.refused.labels(code).inc())
    if page is not None:
        return page(app)

    @app.get("/")
    async def home() -> HTMLResponse:
        return HTMLResponse(_HOME.format(models=escape(", ".join(desk.models))))

    return app


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def told(http: HttpRequest, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def missing(http: HttpRequest, error: HTTPException) -> JSONResponse:
        known = {
            404: ("not_found", "there is nothing at this address"),
            405: ("method_not_allowed", "this address does not take that method"),
        }
        code, message = known.get(error.status_code, ("invalid_request", "this request cannot be answered"))
        metrics.refused.labels(code).inc()
        return ApiError(error.status_code, code, message).response()

    @app.exception_handler(Exception)
    async def broken(http: HttpRequest, error: Exception) -> JSONResponse:
        return ApiError(500, "internal_error", "the server failed on this request; its log has the reason").response()


def door_rules(
    host: str, keys: Keys, allowed: tuple[str, ...], limits: Limits = Limits(), *, insecure: bool = False, shared: bool = False
) -> DoorRules:
    """Who may come in when the server listens on `host`, or is `shared` under a name that is not known yet.

    Raises: UserError for a public address without a key.
    """
    if shared:
        refuse_open(keys)
        return DoorRules(keys, None, limits)
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    if not loopback and not keys.digests and not insecure:
        raise UserError(
            f"--host {host} opens the server to the network, and there is no API key",
            "give --api-key-file FILE (one key a line) or INTERVALE_API_KEYS, or listen on 127.0.0.1",
        )
    names = frozenset(name.lower() for name in allowed)
    if loopback:
        return DoorRules(keys, LOOPBACK | names | {host.lower()}, limits)
    return DoorRules(keys, names | LOOPBACK if names else None, limits)


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: UserError for an address that cannot be had; done before the model is loaded, so that it fails early."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio sends small packets at once only where it knows that; else a stream's first event waits 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(
            f"port {port} on {host} cannot be had: it is in use, or not ours", "choose another with --port (0: any free one)"
        ) from error
    return sock


def run(app: FastAPI, sock: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until Ctrl-C or SIGTERM; running answers get three seconds. Raises: OutsideError when the server does not start."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    # h11 bounds a request's head (64 KiB) whatever else is installed; the server's own log would show paths, ours shows counts.
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=3,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        proxy_headers=False,
    )
    server = _Server(config, ready, app.state.at_end)
    with contextlib.closing(sock):
        server.run(sockets=[sock])
    if not server.started:
        raise OutsideError("the server did not start", "see the messages above")


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], at_end: list[Callable[[], None]]) -> None:
        super().__init__(config)
        self._ready, self._at_end = ready, at_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for end in self._at_end:
            end()
        await super().shutdown(sockets)


_HOME = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>intervale</title>
<style>body{{font:16px system-ui;max-width:40em;margin:4em auto;padding:0 1em}}code{{background:#8882;padding:.1em .3em}}</style>
<h1>intervale</h1><p>OpenAI API: <code>/v1/chat/completions</code>, <code>/v1/models</code>. Models: <code>{models}</code>.</p>
"""
