"""The LMDeploy behind our gateway: where it is, and what its log (TM_LOG_LEVEL=INFO) tells of a load: how often tiles were encoded."""

import asyncio
import re
import time
from pathlib import Path

from stream_client import Server, load, parts

_PASS = re.compile(r"InternViT setup: .*?patches=(\d+)")


def tiles_encoded(
    log: Path, server: Server, urls: list[str], new: int, tiles: int = 13, count: int = 64, clients: int = 32
) -> dict[str, float | int]:
    """Ask `count` questions about pictures of `tiles` tiles, `new` tokens each; the tiles that the vision tower was given meanwhile, by the engine's log.

    TurboMind encodes a picture that is split between two passes in both. No lines of the tower's (another engine, another level) are told as 0 passes.
    """
    asked = [server.request(parts(f"tiles {number}. What is it?", urls[number % len(urls)]), new) for number in range(count)]
    before = log.stat().st_size
    asyncio.run(load(server, asked, clients))
    time.sleep(1)  # the log is written by a thread of its own
    with log.open("rb") as file:
        file.seek(before)
        passes = [int(found) for found in _PASS.findall(file.read().decode("utf-8", "replace"))]
    return {"tiles_sent": tiles * count, "passes": len(passes), "tiles_encoded_per_tile_sent": round(sum(passes) / (tiles * count), 3)}


def engine_of(gateway: int) -> tuple[int, str]:
    """Port and key of the LMDeploy that this gateway started: the bench looks at its own processes."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int(re.search(r"PPid:\s*(\d+)", (entry / "status").read_text())[1])  # type: ignore[index]
            if parent == gateway and any(word.endswith(b"lmdeploy_launcher.py") for word in words):
                environment = dict(pair.split(b"=", 1) for pair in (entry / "environ").read_bytes().split(b"\0") if b"=" in pair)
                return int(words[words.index(b"--server-port") + 1]), environment[b"INTERVALE_ENGINE_KEY"].decode()
        except (OSError, ValueError, TypeError):
            continue
    raise RuntimeError("the gateway's engine was not found")
