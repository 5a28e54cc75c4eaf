"""Does a server's memory stay where it is under minutes of mixed load? python bench/soak.py [--minutes 10] [--cache-mib 64] [--model nano]

Six clients: pictures never seen before (two in three questions), streamed and whole answers, one in five clients leaves after three events, one
request in seven is refused. Resident memory is read every fifteen seconds; the first two minutes, in which caches fill, are not judged. The last
line is one line of JSON: the mean of the next two minutes and of the last two, in MiB, and what is left in the server's counters.
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from stream_client import data_url

_QUIET = 120.0  # seconds for the caches to fill


def status_of(process: int, name: str) -> int:
    """A number of /proc/PID/status."""
    found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found, name
    return int(found[1])


def client(url: str, model: str, number: int, end: float, counts: dict[str, int]) -> None:
    """One visitor, until the end."""
    chosen = random.Random(number)
    asked = 1_000_000 * number
    with httpx.Client(timeout=120, trust_env=False) as http:
        while time.monotonic() < end:
            asked += 1
            noise = np.random.default_rng(asked).integers(0, 255, (chosen.choice([60, 200, 400]), 300, 3), np.uint8)
            words: Any = "just text " * 20
            if asked % 3:
                words = [
                    {"type": "image_url", "image_url": {"url": data_url(Image.fromarray(noise))}},
                    {"type": "text", "text": f"q{asked}"},
                ]
            body = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": chosen.choice([4, 40])}
            if asked % 5 == 0:
                with http.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True, "max_tokens": 500}) as got:
                    for _ in zip(range(3), got.iter_lines(), strict=False):
                        pass
                counts["left"] += 1
                continue
            bad = {"temperature": -1} if asked % 7 == 0 else {}
            got = http.post(f"{url}/v1/chat/completions", json=body | {"stream": asked % 2 == 0} | bad)
            counts["answered" if got.status_code == 200 else "refused"] += 1
            assert got.status_code == (400 if bad else 200), got.text[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cache-mib", type=int, default=64)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, default=6)
    asked = parser.parse_args()
    command = [sys.executable, "-m", "intervale", "serve", asked.model, "--port", "0", "--cache-mib", str(asked.cache_mib)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    found = re.search(r"http://[\d.:]+", server.stdout.readline())
    assert found
    url, began = found[0], time.monotonic()
    end, counts = began + 60 * asked.minutes, {"answered": 0, "left": 0, "refused": 0}
    name = Path(asked.model).name
    threads = [threading.Thread(target=client, args=(url, name, number, end, counts)) for number in range(asked.clients)]
    for thread in threads:
        thread.start()
    seen: list[tuple[float, float]] = []
    while time.monotonic() < end:
        time.sleep(15)
        seen.append((time.monotonic() - began, status_of(server.pid, "VmRSS") / 1024))
        print(f"{seen[-1][0]:5.0f} s  {seen[-1][1]:6.0f} MiB  {status_of(server.pid, 'Threads')} threads  {counts}", flush=True)
    for thread in threads:
        thread.join()
    time.sleep(2)
    numbers = dict(re.findall(r"^(intervale_(?:active|queue|cancelled_total)) (\S+)", httpx.get(f"{url}/metrics").text, re.M))
    judged = [(at, rss) for at, rss in seen if at > min(_QUIET, 30 * asked.minutes)]
    first = [rss for at, rss in judged if at <= judged[0][0] + 120]
    last = [rss for at, rss in judged if at >= judged[-1][0] - 120]
    about = {"minutes": asked.minutes, "cache_mib": asked.cache_mib, "clients": asked.clients, **counts, **numbers}
    told = {
        "first_mib": round(sum(first) / len(first)),
        "last_mib": round(sum(last) / len(last)),
        "most_mib": round(max(rss for _, rss in judged)),
    }
    server.send_signal(signal.SIGINT)
    server.wait(30)
    print(json.dumps({"bench": "soak", "machine": f"{platform.machine()}, {os.cpu_count()} cores", **about, **told}))


if __name__ == "__main__":
    main()
