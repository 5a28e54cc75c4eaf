"""A client of OpenAI-compatible servers that costs next to nothing: plain asyncio, one kept connection a visitor, parsed after the clock stops.

What it measures of a streamed answer: seconds to the first piece of text, seconds in all, tokens (by the server's own usage), the text.
"""

import asyncio
import base64
import io
import json
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps

_SAID = re.compile(rb'"content":\s*"[^"]')


@dataclass
class Server:
    """Where a server is, the model's name there, and its key."""

    url: str
    model: str
    key: str = "none"
    connections: list[Any] = field(default_factory=list)

    def request(self, content: list[dict[str, Any]], new: int, **more: Any) -> bytes:
        """The bytes of one streamed, greedy request."""
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": new,
            "temperature": 0,
            "stream": True,
        }
        body = json.dumps(asked | {"stream_options": {"include_usage": True}} | more).encode()
        address = urlsplit(self.url)
        head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {self.key}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Answer:
    """`first` and `whole` in seconds; `events`: the stream's JSON objects."""

    first: float
    whole: float
    events: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """What was said."""
        return "".join(choice["delta"].get("content") or "" for event in self.events for choice in event.get("choices") or [])

    @property
    def usage(self) -> dict[str, Any]:
        """The server's counts."""
        return next((event["usage"] for event in reversed(self.events) if event.get("usage")), {})


async def ask(server: Server, request: bytes) -> Answer:
    """One answer. Raises: RuntimeError with what the server said when that is no stream."""
    reader, writer = server.connections.pop() if server.connections else await _connect(server)
    began = time.perf_counter()
    writer.write(request)
    raw, first = b"", 0.0
    while b"data: [DONE]" not in raw[-200:]:
        part = await reader.read(1 << 16)
        now = time.perf_counter()
        raw += part
        if not first and _SAID.search(raw):
            first = now - began
        if not part or (not raw.startswith(b"HTTP/1.1 200") and len(raw) > 20 and b"\r\n\r\n" in raw):
            writer.close()
            raise RuntimeError(f"{server.url} answered {raw[:600]!r}")
    whole = time.perf_counter() - began
    while not raw.endswith(b"0\r\n\r\n"):
        raw += await reader.read(1 << 16)
    server.connections.append((reader, writer))
    return Answer(first or whole, whole, _parsed(raw))


async def _connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(server.url)
    assert address.hostname is not None
    return await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)


def _parsed(raw: bytes) -> list[dict[str, Any]]:
    _, _, rest = raw.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    lines = (line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:"))
    return [json.loads(line) for line in lines if line != b"[DONE]"]


async def load(server: Server, requests: list[bytes], clients: int) -> dict[str, float]:
    """`clients` visitors at once, each of whom asks again as soon as its last answer ended."""
    left, done = iter(requests), []

    async def visitor() -> None:
        for request in left:
            done.append(await ask(server, request))

    began = time.perf_counter()
    await asyncio.gather(*(visitor() for _ in range(clients)))
    seconds = time.perf_counter() - began
    for _, writer in server.connections:
        writer.close()
    server.connections.clear()
    firsts = sorted(answer.first for answer in done)
    wholes = sorted(answer.whole for answer in done)
    return {
        "requests_s": round(len(done) / seconds, 3),
        "tokens_s": round(sum(answer.usage.get("completion_tokens", 0) for answer in done) / seconds, 1),
        "prompt_tokens": statistics.median(answer.usage.get("prompt_tokens", 0) for answer in done),
        "ttft_p50_ms": round(1000 * statistics.median(firsts), 2),
        "ttft_p95_ms": round(1000 * firsts[int(0.95 * (len(firsts) - 1))], 2),
        "whole_p50_ms": round(1000 * statistics.median(wholes), 1),
    }


def pictures(count: int, size: tuple[int, int], photos: Path | None = None) -> list[Image.Image]:
    """`count` different pictures of a size: crops of the photographs in a folder, or else smooth noise."""
    files = sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")) if photos else []
    opened = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in files]
    made = []
    for number in range(count):
        if opened:
            fitted = ImageOps.fit(opened[number % len(opened)], size, Image.Resampling.BICUBIC, bleed=0.02 * (number // len(opened)))
        else:
            low = np.random.default_rng(number).integers(0, 255, (24, 32, 3), np.uint8)
            fitted = Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)
        made.append(fitted)
    return made


def data_url(picture: Image.Image, kind: str = "jpeg") -> str:
    """The picture as a data URL."""
    out = io.BytesIO()
    picture.save(out, kind.upper(), **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def parts(words: str, *urls: str) -> list[dict[str, Any]]:
    """A question's content: its pictures, then its words."""
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": words}]
