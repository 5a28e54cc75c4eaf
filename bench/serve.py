"""How fast do servers answer many clients at once, and what does our gateway in front of one cost? Any OpenAI-compatible servers, the same load.

python bench/serve.py --url NAME=http://HOST:PORT/v1 [--url ...] --model NAME [--clients 32] [--requests 128] [--size 448x448] [--new 128]
python bench/serve.py --stand-in [--clients 32] ...     # a stand-in engine (no model) alone and behind `intervale serve --engine remote`

Each client sends its next request when the last answer ended; every picture is another one. The last line is one line of JSON. A server's key
is taken from BENCH_KEY.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time

import httpx
import numpy as np
from PIL import Image


def pictures(count: int, size: tuple[int, int]) -> list[str]:
    """Data URLs of `count` JPEGs of smooth noise."""
    urls = []
    for number in range(count):
        low = np.random.default_rng(number).integers(0, 255, (24, 32, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}")
    return urls


async def one(client: httpx.AsyncClient, url: str, body: dict) -> tuple[float, float, int]:
    """(seconds to the first token, seconds in all, pieces) of one answer."""
    began, first, pieces = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{url}/chat/completions", json=body) as got:
        if got.status_code != 200:
            raise RuntimeError(f"{url} answered {got.status_code}: {(await got.aread())[:300]!r}")
        async for line in got.aiter_lines():
            if line.startswith("data: {") and (choices := json.loads(line[6:]).get("choices")) and choices[0]["delta"].get("content"):
                pieces += 1
                first = first or time.perf_counter() - began
    return first, time.perf_counter() - began, pieces


async def measure(url: str, bodies: list[dict], clients: int) -> dict[str, float]:
    """The load on one server."""
    left, done = iter(bodies), []
    headers = {"Authorization": f"Bearer {os.environ.get('BENCH_KEY', 'none')}"}
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None), headers=headers, trust_env=False) as client:

        async def visitor() -> None:
            for body in left:
                done.append(await one(client, url, body))

        began = time.perf_counter()
        await asyncio.gather(*(visitor() for _ in range(clients)))
        seconds = time.perf_counter() - began
    firsts = sorted(first for first, _, _ in done)
    return {
        "requests_s": round(len(done) / seconds, 2),
        "pieces_s": round(sum(pieces for _, _, pieces in done) / seconds),
        "ttft_p50_ms": round(1000 * statistics.median(firsts), 1),
        "ttft_p95_ms": round(1000 * firsts[int(0.95 * (len(firsts) - 1))], 1),
        "whole_p50_ms": round(1000 * statistics.median(whole for _, whole, _ in done), 1),
    }


STAND_IN = """
import asyncio, json, sys, uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
app = FastAPI()
@app.post("/v1/chat/completions")
async def chat(http: Request):
    count = (await http.json())["max_tokens"]
    async def events():
        await asyncio.sleep(0.05)
        for number in range(count):
            await asyncio.sleep(0.004)
            yield "data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "x "}, "finish_reason": "length" if number == count - 1 else None}]}) + "\\n\\n"
        yield "data: [DONE]\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""


def stand_in(port: int) -> tuple[list[subprocess.Popen], dict[str, str]]:
    """A stand-in engine with 4 ms a token, and our gateway in front of it."""
    engine = subprocess.Popen([sys.executable, "-c", STAND_IN, str(port)])
    inner = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-m", "intervale", "serve", "stand-in", "--engine", "remote", "--base-url", inner, "--port", "0"]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert gateway.stdout is not None
    found = re.search(r"http://[\d.:]+", gateway.stdout.readline())
    assert found
    time.sleep(2)
    return [engine, gateway], {"alone": inner, "gateway": f"{found[0]}/v1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--model", default="stand-in")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--size", default="448x448", help="of the pictures; 0x0: text only")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    processes, servers = stand_in(18761) if asked.stand_in else ([], dict(entry.split("=", 1) for entry in asked.url))
    width, height = map(int, asked.size.split("x"))
    urls = pictures(min(asked.requests, 64), (width, height)) if width else []
    words = "What is on the plate, and where is it from? " * 6
    bodies = []
    for number in range(asked.requests):
        parts: list[dict] = [{"type": "image_url", "image_url": {"url": urls[number % len(urls)]}}] if urls else []
        content = [*parts, {"type": "text", "text": f"{number}. {words}"}]
        bodies.append(
            {
                "model": asked.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": asked.new,
                "temperature": 0,
                "stream": True,
            }
        )
    try:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for number in range(asked.rounds + 1):
            for name, url in servers.items():
                got = asyncio.run(measure(url, bodies if number else bodies[: asked.clients], asked.clients))
                if number:  # the first, shorter one warms up
                    rounds[name].append(got)
    finally:
        for process in processes:
            process.terminate()
    table = {name: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for name, all_ in rounds.items()}
    for name, row in table.items():
        print(f"{name:>12}: " + "  ".join(f"{key} {value:g}" for key, value in row.items()))
    about = {"clients": asked.clients, "requests": asked.requests, "size": asked.size, "new": asked.new, "rounds": asked.rounds}
    print(json.dumps({"bench": "serve", "machine": f"{platform.machine()}, {os.cpu_count()} cores", **about, "servers": table}))


if __name__ == "__main__":
    main()
