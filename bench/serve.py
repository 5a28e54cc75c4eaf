"""How fast do servers answer many clients at once, and what does our gateway in front of one cost? Any OpenAI-compatible servers, the same load.

python bench/serve.py --url NAME=http://HOST:PORT/v1 [--url ...] --model NAME [--clients 32] [--requests 128] [--size 448x448] [--new 128]
python bench/serve.py --stand-in [--clients 32] ...     # a stand-in engine (no model) alone and behind `intervale serve --engine remote`

Each client sends its next request when the last answer ended; every picture is another one. The servers take turns, round by round. The last
line is one line of JSON. A server's key is taken from BENCH_KEY.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from stream_client import Server, data_url, load, parts, pictures

WORDS = "What is on the plate, and where is it from? " * 6
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
        yield "data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}}) + "\\n\\n"
        yield "data: [DONE]\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""


def stand_in(port: int) -> tuple[list[subprocess.Popen], dict[str, str]]:
    """A stand-in engine with 4 ms a token, and our gateway in front of it."""
    engine = subprocess.Popen([sys.executable, "-c", STAND_IN, str(port)])
    inner = f"http://127.0.0.1:{port}/v1"
    command = [
        sys.executable,
        "-m",
        "intervale",
        "serve",
        "stand-in",
        "--engine",
        "remote",
        "--base-url",
        inner,
        "--port",
        "0",
        "--no-page",
    ]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert gateway.stdout is not None
    found = re.search(r"http://[\d.:]+", gateway.stdout.readline())
    assert found
    time.sleep(2)
    return [engine, gateway], {"alone": inner, "gateway": f"{found[0]}/v1"}


def compare(servers: dict[str, Server], contents: list[list[dict]], clients: int, new: int, rounds: int) -> dict[str, dict[str, float]]:
    """The same load on each server in turn, `rounds` times after a shorter one that warms up: medians of the rounds, and each one's requests/s."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name, server in servers.items():
            requests = [server.request(content, new) for content in (contents if number else contents[:clients])]
            got = asyncio.run(load(server, requests, clients))
            if number:
                found[name].append(got)
    table = {}
    for name, each in found.items():
        table[name] = {key: statistics.median(one[key] for one in each) for key in each[0]}
        table[name]["each_requests_s"] = [one["requests_s"] for one in each]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--model", default="stand-in")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--size", default="448x448", help="of the pictures; 0x0: text only")
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs to cut the pictures from (default: smooth noise)")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    processes, addresses = stand_in(18761) if asked.stand_in else ([], dict(entry.split("=", 1) for entry in asked.url))
    servers = {name: Server(url, asked.model, os.environ.get("BENCH_KEY", "none")) for name, url in addresses.items()}
    width, height = map(int, asked.size.split("x"))
    urls = [data_url(picture) for picture in pictures(min(asked.requests, 64), (width, height), asked.photos)] if width else []
    contents = [parts(f"{number}. {WORDS}", *([urls[number % len(urls)]] if urls else [])) for number in range(asked.requests)]
    try:
        table = compare(servers, contents, asked.clients, asked.new, asked.rounds)
    finally:
        for process in processes:
            process.terminate()
    for name, row in table.items():
        print(f"{name:>12}: " + "  ".join(f"{key} {value}" for key, value in row.items()))
    about = {"clients": asked.clients, "requests": asked.requests, "size": asked.size, "new": asked.new, "rounds": asked.rounds}
    about["letters_a_picture"] = round(statistics.mean(map(len, urls))) if urls else 0
    print(json.dumps({"bench": "serve", "machine": f"{platform.machine()}, {os.cpu_count()} cores", **about, "servers": table}))


if __name__ == "__main__":
    main()
