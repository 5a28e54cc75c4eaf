"""Should kept features lie in page-locked memory? What locking costs, and what it saves on the way to the GPU, beside a busy GPU.

    python bench/host_copies.py --out host_copies.json

For a picture of 13 tiles (26 MiB in bfloat16): `plain_ms` and `locked_ms`, a fresh piece of memory of either kind, written once;
`up_plain_ms` and `up_locked_ms`, to the GPU; `staged_ms`, through `train.moving.Staging`. `..._held_up_ms`: the longest that a call of
CUDA by another thread took meanwhile, as the thread that trains makes them. Medians of `--rounds`; the last line is JSON.
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

from intervale.train.moving import Staging

NUMBERS = 13 * 256 * 4096  # tiles, tokens a tile, width before the projector


def milliseconds(act: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    act()
    return (time.perf_counter() - begun) * 1e3


def fresh(locked: bool) -> torch.Tensor:
    """Memory nobody had before."""
    return torch.empty(NUMBERS, dtype=torch.bfloat16, pin_memory=locked).fill_(1)


def held_up(act: Callable[[], object]) -> float:
    """The longest that another thread's call of CUDA takes, in milliseconds, while something is done."""
    longest, over = [0.0], threading.Event()

    def call() -> None:
        idle = torch.cuda.Stream()  # where nothing is waited for but the driver
        torch.cuda.Event().record(idle)
        while not over.is_set():
            longest[0] = max(longest[0], milliseconds(lambda: torch.cuda.Event().record(idle)))

    calling = threading.Thread(target=call)
    calling.start()
    try:
        act()
    finally:
        over.set()
        calling.join()
    return longest[0]


def up(features: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """To the GPU, beside what it computes."""
    with torch.cuda.stream(stream):
        features.to("cuda", non_blocking=True)
        stream.synchronize()


def through(features: torch.Tensor, staging: Staging, stream: torch.cuda.Stream) -> None:
    """To the GPU as a run sends it."""
    with torch.cuda.stream(stream):
        staging.up(features)
        stream.synchronize()


def main() -> None:
    """Measure; the last line printed is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and nothing to copy to")
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    stream, kept = torch.cuda.Stream(), list[torch.Tensor]()
    plain, locked, staging = fresh(False), fresh(True), Staging(torch.device("cuda"), stream)
    for _ in range(2):  # its two pieces of memory
        through(plain, staging, stream)
    found: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for _ in range(200):  # 0.3 s of work for the GPU
            matrix @ matrix
        acts: dict[str, Callable[[], object]] = {
            "plain": lambda: kept.append(fresh(False)),
            "locked": lambda: kept.append(fresh(True)),
            "up_plain": lambda: up(plain, stream),
            "up_locked": lambda: up(locked, stream),
            "staged": lambda: through(plain, staging, stream),
        }
        for name, act in acts.items():
            found.setdefault(f"{name}_ms", []).append(milliseconds(act))
            found.setdefault(f"{name}_held_up_ms", []).append(held_up(act))
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
