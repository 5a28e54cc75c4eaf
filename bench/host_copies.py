"""Should kept features lie in page-locked memory? What locking costs, and what it saves on the way to the GPU, beside a busy GPU.

    python bench/host_copies.py --out host_copies.json

For a picture of 13 tiles (26 MiB in bfloat16): `plain_ms` and `locked_ms`, a fresh piece of memory of either kind, written once;
`stood_still_...`, the longest that another Python thread was not heard of meanwhile (Python itself changes threads every 5 ms); `up_...`, to the GPU.
Medians of `--rounds`; the last line is JSON.
"""

import argparse
import datetime
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

NUMBERS = 13 * 256 * 4096  # tiles, tokens a tile, width before the projector


def milliseconds(act: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    act()
    return (time.perf_counter() - begun) * 1e3


def fresh(locked: bool) -> torch.Tensor:
    """Memory nobody had before."""
    return torch.empty(NUMBERS, dtype=torch.bfloat16, pin_memory=locked).fill_(1)


def stood_still(act: Callable[[], object]) -> float:
    """The longest time between two ticks of another thread, in milliseconds, while something is done."""
    longest, over = [0.0], threading.Event()

    def tick() -> None:
        before = time.perf_counter()
        while not over.is_set():
            now = time.perf_counter()
            longest[0], before = max(longest[0], now - before), now

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        act()
    finally:
        over.set()
        ticking.join()
    return longest[0] * 1e3


def up(features: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """To the GPU, beside what it computes."""
    with torch.cuda.stream(stream):
        features.to("cuda", non_blocking=True)
        stream.synchronize()


def main() -> None:
    """Measure; the last line printed is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    stream, kept = torch.cuda.Stream(), []
    found: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for _ in range(200):  # 0.3 s of work for the GPU
            matrix @ matrix
        for name, locked in (("plain", False), ("locked", True)):
            found.setdefault(f"{name}_ms", []).append(milliseconds(lambda locked=locked: kept.append(fresh(locked))))
            found.setdefault(f"stood_still_{name}_ms", []).append(stood_still(lambda locked=locked: kept.append(fresh(locked))))
            up(kept[-1], stream)
            found.setdefault(f"up_{name}_ms", []).append(milliseconds(lambda: up(kept[-1], stream)))
        torch.cuda.synchronize()
    told = {
        "bench": "host_copies",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "mib": NUMBERS * 2 / (1 << 20),
    } | {name: round(statistics.median(times), 2) for name, times in found.items()}
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
