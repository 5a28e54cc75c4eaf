"""Write and read speed of the feature store: `python bench/features.py [FOLDER]`. Entries of 13 tiles of InternVL2-2B (26 MiB, bfloat16).

Both sides in one process: the store (first read: with checksum; again: without) and safetensors files of the same tensors, unchecked.
The pages are in the system's cache: what is measured is copying and checking, not the disk.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from intervale.data.tiling import Tiling
from intervale.model.features import FeatureStore, picture_key

COUNT, TILES, TOKENS, WIDTH, ROUNDS = 32, 13, 256, 4096, 3


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    tensors = [torch.randn(TILES, TOKENS, WIDTH).to(torch.bfloat16) for _ in range(4)]
    keys = [picture_key(str(number), Tiling(), "bench", "tower", torch.bfloat16) for number in range(COUNT)]
    mib = COUNT * tensors[0].nbytes / 2**20
    best: dict[str, float] = {}

    def timed(name: str, work: Callable[[int], object], threads: int = 0) -> None:
        begun = time.perf_counter()
        if threads:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda number: work(number) is not None, range(COUNT)))
        else:
            for number in range(COUNT):
                work(number)
        best[name] = max(best.get(name, 0.0), mib / (time.perf_counter() - begun))

    def one_round(place: Path) -> None:
        store, opened = FeatureStore(place, disk_budget=1 << 40), FeatureStore(place)
        timed("store: write", lambda n: store.put(keys[n], tensors[n % 4]))
        timed("store: first read", lambda n: opened.get(keys[n]))
        timed("store: read again", lambda n: opened.get(keys[n]))
        timed("store: read again, 1 thread beside", lambda n: opened.get(keys[n]), 1)
        timed("store: read again, 2 threads beside", lambda n: opened.get(keys[n]), 2)
        timed("safetensors: write", lambda n: save_file({"t": tensors[n % 4]}, folder / f"{n}.safetensors"))
        timed("safetensors: read (copied)", lambda n: load_file(folder / f"{n}.safetensors")["t"].clone())
        shutil.rmtree(place)

    try:
        for number in range(ROUNDS):
            one_round(folder / f"store-{number}")
    finally:
        shutil.rmtree(folder)
    print("| what | MiB/s (best of 3) |\n|---|---|")
    for name, rate in best.items():
        print(f"| {name} | {rate:,.0f} |")
    print(json.dumps({name: round(rate) for name, rate in best.items()}))


if __name__ == "__main__":
    main()
