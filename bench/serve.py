"""How fast do servers answer many clients at once, and what does our gateway in front of one cost? Any OpenAI-compatible servers, the same load.

python bench/serve.py --url NAME=http://HOST:PORT/v1 [--url ...] --model NAME [--clients 32] [--requests 128] [--size 448x448] [--new 128]
python bench/serve.py --stand-in [--against SRC] ...    # a stand-in engine (no model) alone and behind `intervale serve --engine remote`

Each client sends its next request when the last answer ended; every picture is another one. The servers take turns, round by round. The last
line is one line of JSON. A server's key is taken from BENCH_KEY. `cpu_us_request`: microseconds that a process of
the stand-in computes for a request (Linux). `--against`: the gateway of another checkout (its src folder) beside this one's.
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


def gateway_of(inner: str, source: Path | None = None) -> tuple[subprocess.Popen, str]:
    """Our gateway (or that of another source folder) in front of a server, and its address."""
    words = ["serve", "stand-in", "--engine", "remote", "--base-url", inner, "--port", "0", "--no-page"]
    environment = os.environ | ({"PYTHONPATH": f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"} if source else {})
    command = [sys.executable, "-m", "intervale", *words]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert gateway.stdout is not None
    found = re.search(r"http://[\d.:]+", gateway.stdout.readline())
    assert found
    return gateway, f"{found[0]}/v1"


def stand_in(port: int, against: Path | None) -> tuple[dict[str, subprocess.Popen], dict[str, str]]:
    """A stand-in engine with 4 ms a token, and our gateway in front of it; the processes and the addresses."""
    processes = {"alone": subprocess.Popen([sys.executable, "-c", STAND_IN, str(port)])}
    addresses = {"alone": f"http://127.0.0.1:{port}/v1"}
    for name, source in (("gateway", None), ("against", against)):
        if name == "gateway" or source is not None:
            processes[name], addresses[name] = gateway_of(addresses["alone"], source)
    time.sleep(2)
    return processes, addresses


def computed(pid: int) -> float:
    """Seconds that the threads of a process have computed."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def compare(
    servers: dict[str, Server], contents: list[list[dict]], clients: int, new: int, rounds: int, pids: dict[str, int] | None = None
) -> dict[str, dict[str, float]]:
    """The same load on each server in turn, `rounds` times after a shorter one that warms up: medians of the rounds, and each one's requests/s.

    `pids`: processes whose time is counted.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name, server in servers.items():
            requests = [server.request(content, new) for content in (contents if number else contents[:clients])]
            pid = (pids or {}).get(name)
            before = computed(pid) if pid else 0.0
            got = asyncio.run(load(server, requests, clients))
            if pid:
                got["cpu_us_request"] = round(1e6 * (computed(pid) - before) / len(requests))
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
    parser.add_argument("--against", type=Path, metavar="SRC")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--size", default="448x448", help="of the pictures; 0x0: text only")
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs to cut the pictures from (default: smooth noise)")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    processes, addresses = stand_in(18761, asked.against) if asked.stand_in else ({}, dict(entry.split("=", 1) for entry in asked.url))
    servers = {name: Server(url, asked.model, os.environ.get("BENCH_KEY", "none")) for name, url in addresses.items()}
    width, height = map(int, asked.size.split("x"))
    urls = [data_url(picture) for picture in pictures(min(asked.requests, 64), (width, height), asked.photos)] if width else []
    contents = [parts(f"{number}. {WORDS}", *([urls[number % len(urls)]] if urls else [])) for number in range(asked.requests)]
    try:
        counted = Path("/proc/self/schedstat").exists()
        pids = {name: process.pid for name, process in processes.items() if counted}
        table = compare(servers, contents, asked.clients, asked.new, asked.rounds, pids)
    finally:
        for process in processes.values():
            process.terminate()
    for name, row in table.items():
        print(f"{name:>12}: " + "  ".join(f"{key} {value}" for key, value in row.items()))
    about = {"clients": asked.clients, "requests": asked.requests, "size": asked.size, "new": asked.new, "rounds": asked.rounds}
    about["letters_a_picture"] = round(statistics.mean(map(len, urls))) if urls else 0
    print(json.dumps({"bench": "serve", "machine": f"{platform.machine()}, {os.cpu_count()} cores", **about, "servers": table}))


if __name__ == "__main__":
    main()
