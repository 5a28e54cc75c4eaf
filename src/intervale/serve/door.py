"""Who may come in: the Host a request names, where a browser sent it from, and its key. One check in front of every route, the page's too.

Promises: keys are compared in constant time, all of them, before a byte of the body is read; only `/health` (and the form that
asks a browser for its key) is open; a name that is not ours is refused, so that no web site reaches a server on this machine under a
name of its own; what is decided here looks at the path that is served, never at a URL built from headers.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

from starlette.responses import HTMLResponse, RedirectResponse, Response

from intervale.core.errors import UserError
from intervale.serve.errors import ApiError
from intervale.serve.limits import Counter, Limits, Message, Receive, read_body, too_large

Send = Callable[[Message], Awaitable[None]]
Scope = dict[str, Any]

SHORTEST_KEY = 12
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_OPEN = ("/health", "/login")
_COOKIE = "intervale_session"
_HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9.\-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(?::(\d{1,5}))?")


@dataclass(frozen=True)
class Keys:
    """The server's keys, as digests; none: everybody who reaches the port may ask."""

    digests: tuple[bytes, ...] = ()
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def number(self, given: bytes) -> int | None:
        """Which key it is, or None. The time taken does not depend on the answer."""
        return self._match(hashlib.sha256(given).digest(), self.digests)

    def session(self, number: int) -> str:
        """What a browser keeps in place of the key; void when the server restarts."""
        return hmac.new(self.secret, self.digests[number], "sha256").hexdigest()

    def session_number(self, given: str) -> int | None:
        """Which key a browser's session stands for, or None."""
        known = tuple(self.session(number).encode() for number in range(len(self.digests)))
        return self._match(given.encode("utf-8", "replace"), known)

    @staticmethod
    def _match(given: bytes, known: tuple[bytes, ...]) -> int | None:
        found = None
        for number, digest in enumerate(known):
            if hmac.compare_digest(given, digest):
                found = number
        return found


def read_keys(file: Path | None, listed: str) -> Keys:
    """Keys of a file (one a line, # comments) and of a text with commas (the environment's INTERVALE_API_KEYS).

    Raises: UserError for a file that cannot be read, or a key that is short or has odd characters.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: the key file cannot be read", "give a text file with one key a line") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    keys += [key.strip() for key in listed.split(",") if key.strip()]
    if file is not None and not keys:
        raise UserError(f"{file}: no key in it", "write one key a line, for example from `openssl rand -hex 24`")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"API key {number} is shorter than {SHORTEST_KEY} characters, or has others than printable ASCII",
                "use a random one, for example from `openssl rand -hex 24`",
            )
    return Keys(tuple(hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)))


@dataclass(frozen=True)
class DoorRules:
    """`hosts`: the names this server answers to; None: any (only with keys)."""

    keys: Keys = Keys()
    hosts: frozenset[str] | None = LOOPBACK
    limits: Limits = field(default_factory=Limits)


class Door:
    """The outermost layer of the app (plain ASGI)."""

    def __init__(self, app: Callable[..., Awaitable[None]], rules: DoorRules, refused: Callable[[str], None] = lambda code: None) -> None:
        self.app, self.rules, self.refused = app, rules, refused
        self.counter = Counter(rules.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _headers(scope)
        number = uuid4().hex
        scope.setdefault("state", {})["request_id"] = number

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", number.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        counting, give_back = self.counter.counted(receive)
        try:
            answer = await self._checked(scope, headers, counting)
            if answer is None:
                await self.app(scope, counting, named)
                return
        except ApiError as error:
            self.refused(error.code)
            answer = error.response()
        except ConnectionError:
            return
        finally:
            give_back()
        await answer(scope, receive, named)

    async def _checked(self, scope: Scope, headers: dict[str, list[str]], receive: Receive) -> Response | None:
        """None to let the request in, or what to answer instead. Raises: ApiError."""
        host = self._host(headers)
        path = scope["path"]
        origin = headers.get("origin", [""])[0]
        if origin and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc.lower() != host:
            raise ApiError(403, "foreign_origin", "this request comes from a page of another site")
        length = headers.get("content-length", ["0"])[0]
        if length.isdigit() and int(length[:20]) > self.rules.limits.body_bytes:
            raise too_large(self.rules.limits.body_bytes)
        if not self.rules.keys.digests:
            client = scope.get("client") or ("", 0)
            scope["state"]["visitor"] = f"ip:{client[0]}"
            return None
        if path == "/login":
            return await self._login(scope, receive)
        known = self._key(headers)
        if known is not None:
            scope["state"]["visitor"] = f"key:{known}"
            return None
        if path in _OPEN:
            return None
        if scope["method"] == "GET" and "text/html" in headers.get("accept", [""])[0]:
            return RedirectResponse("/login", 303)
        raise ApiError(401, "invalid_api_key", "no valid API key: send 'Authorization: Bearer KEY'")

    def _host(self, headers: dict[str, list[str]]) -> str:
        given = headers.get("host", [])
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            raise ApiError(400, "invalid_host", "the Host header is missing, doubled or malformed")
        name = match[1].lower().rstrip(".")
        if self.rules.hosts is not None and name not in self.rules.hosts:
            raise ApiError(421, "unknown_host", "this server does not answer to that name; its owner can add it with --allow-host")
        return given[0].lower()

    def _key(self, headers: dict[str, list[str]]) -> int | None:
        """Which key a request carries, as a bearer or as a browser's session."""
        keys = self.rules.keys
        bearer = headers.get("authorization", [])
        if len(bearer) == 1:
            scheme, _, token = bearer[0].partition(" ")
            if scheme.lower() == "bearer":
                return keys.number(token.strip().encode("latin-1", "replace"))
        try:
            cookie = SimpleCookie(headers.get("cookie", [""])[0]).get(_COOKIE)
        except CookieError:
            return None
        return keys.session_number(cookie.value) if cookie else None

    async def _login(self, scope: Scope, receive: Receive) -> Response:
        if scope["method"] != "POST":
            return HTMLResponse(_FORM.replace("NOTE", ""))
        form = parse_qs((await read_body(receive)).decode("latin-1"), max_num_fields=4)
        number = self.rules.keys.number(form.get("key", [""])[0].strip().encode("latin-1", "replace"))
        if number is None:
            self.refused("invalid_api_key")
            await asyncio.sleep(0.5)
            return HTMLResponse(_FORM.replace("NOTE", "<p>That key is not valid. 密钥无效。</p>"), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(_COOKIE, self.rules.keys.session(number), httponly=True, samesite="strict", secure=scope["scheme"] == "https")
        return answer


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


_FORM = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>intervale</title>
<style>body{font:16px system-ui;display:grid;place-items:center;min-height:90vh}input,button{font:inherit;padding:.5em}</style>
<form method="post" action="/login">NOTE<label>API key / 密钥 <input name="key" type="password" autofocus autocomplete="current-password"></label>
<button>OK</button></form>
"""
