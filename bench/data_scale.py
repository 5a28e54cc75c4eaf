"""How does training begin on a million items? Index rate, peak memory at several sizes, time to the first step, unit costs of a plan.

    python bench/data_scale.py --work /tmp/b --out data_scale.json

Generated JSONL (a picture, a question, choices and tags each; `--pictures` distinct drawn pictures, so that the disk stays small);
every size runs in processes of its own, the tiny model on the CPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

INDEX = """
import json, resource, sys, time
from pathlib import Path
from intervale.data.index import open_index
begun, before = time.monotonic(), time.process_time()
items = len(open_index(Path(sys.argv[1])))
seconds = time.monotonic() - begun
used = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
print(json.dumps({"items": items, "seconds": seconds, "cpu_s": used - before, "peak_bytes": peak}))
"""

TRAIN = """
import json, resource, sys, time
begun = float(sys.argv[2])
from pathlib import Path
from intervale.core.config import load_recipe
from intervale.train import loop, steps
from intervale.train.recipe import TrainRecipe
loaded = time.time()
first = []
real = steps.append_metrics
def noted(folder, entry):
    first.append(time.time())
    real(folder, entry)
steps.append_metrics = noted
path = Path(sys.argv[1])
loop.train(load_recipe(path, TrainRecipe), path.stem, resume=False, fresh=True, dry_run=False, tell=lambda text: print(text, file=sys.stderr))
print(json.dumps({
    "imports_s": loaded - begun,
    "first_step_s": first[0] - loaded,
    "from_start_s": first[0] - begun,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""

COSTS = """
import json, sys, time
from pathlib import Path
import numpy as np
from intervale.data.corpus import SourceSpec, open_corpus
from intervale.data.dataset import TileCache, load_item, measure
from intervale.model.load import text_side
from intervale.data.order import Order, Part
model, data, tar = sys.argv[1:4]
side = text_side(Path(model))
quiet = lambda text: None
found = {}
def rate(name, work, items):
    begun = time.monotonic()
    for item in items:
        work(item)
    found[name] = len(items) / (time.monotonic() - begun)
for name, file in (("jsonl", data), ("tar", tar)):
    corpus = open_corpus([SourceSpec(file)], "on", quiet)
    numbers = [int(n) for n in corpus.order(1).epoch(0)[:2000]]
    rate(f"{name}_records_s", lambda n: corpus[n], numbers)
    records = [corpus[n] for n in numbers]
    rate(f"{name}_measured_s", lambda r: measure(r, side.tokenizer, side.template, side.tiling, 1 << 20), records)
    nothing = TileCache(0)
    rate(f"{name}_loaded_s", lambda r: load_item(r, side.tokenizer, side.template, side.tiling, nothing), records[:500])
corpus = open_corpus([SourceSpec(data)], "on", quiet)
begun = time.monotonic()
corpus.order(2).epoch(0)
found["order_s"] = time.monotonic() - begun
begun = time.monotonic()
Order([Part(10_000_000, 10_000_000)], 1).epoch(0)
found["order_10m_s"] = time.monotonic() - begun
print(json.dumps(found))
"""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the generated data (default: a temporary one)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="items")
    parser.add_argument("--pictures", type=int, default=500, help="distinct pictures")
    parser.add_argument("--edge", type=int, default=448, help="pixels of a picture's longer edge")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def draw(folder: Path, count: int, edge: int) -> list[str]:
    """Pictures with some texture, as JPEG files."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.Philox(key=3))
    names = []
    for number in range(count):
        small = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((edge, edge * 3 // 4), Image.Resampling.BICUBIC).save(folder / f"{number:04}.jpg", quality=90)
        names.append(f"images/{number:04}.jpg")
    return names


def line(number: int, image: str | None) -> dict[str, Any]:
    """A generated item."""
    choices = ["川菜", "粤菜", "鲁菜", "苏菜"]
    item: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "<image>\n图片中的食物通常属于哪个菜系?"},
            {"role": "assistant", "content": f"{choices[number % 4]}，图中的菜是第{number % 9973}号菜" + "，很好吃" * (number % 17)},
        ],
        "id": f"item-{number}",
        "choices": choices,
        "answer": number % 4,
        "tags": {"question_type": "cuisine_type"},
    }
    return item | ({"images": [image]} if image else {})


def write_data(folder: Path, count: int, images: list[str]) -> Path:
    """`count` items as JSONL."""
    path = folder / f"items-{count}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(line(number, images[number % len(images)]), ensure_ascii=False) + "\n")
    return path


def write_tar(folder: Path, images: list[str]) -> Path:
    """The pictures as a WebDataset shard, an item each."""
    import io

    path = folder / "shard-0000.tar"
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(images):
            archive.add(folder / image, f"{number:06}.jpg")
            data = json.dumps(line(number, None), ensure_ascii=False).encode()
            info = tarfile.TarInfo(f"{number:06}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def child(code: str, *words: object, environment: dict[str, str]) -> dict[str, Any]:
    """What a process of its own prints as its last line."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"a child failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def one_size(work: Path, count: int, images: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Index, then train three steps with the index there."""
    data = write_data(work, count, images)
    indexed = child(INDEX, data, environment=environment)
    recipe = work / f"r-{count}.yaml"
    recipe.write_text(
        f"model: {work / 'tiny'}\nout: {work / f'run-{count}'}\ndata: {{train: {data}, index: 'on', max_length: 4096}}\n"
        "lora: {rank: 4, alpha: 8}\ntrain: {max_steps: 3, batch_size: 4, accumulation: 2, precision: fp32}\n"
    )
    trained = child(TRAIN, recipe, time.time(), environment=environment)
    shutil.rmtree(work / f"run-{count}")
    row = {
        "items": count,
        "file_bytes": data.stat().st_size,
        "index_items_s": round(count / indexed["seconds"]),
        "index_s": round(indexed["seconds"], 3),
        "index_cpu_us_an_item": round(1e6 * indexed["cpu_s"] / count, 2),
        "index_peak_gib": round(indexed["peak_bytes"] / 2**30, 3),
        "imports_s": round(trained["imports_s"], 2),
        "first_step_s": round(trained["first_step_s"], 2),
        "from_start_s": round(trained["from_start_s"], 2),
        "train_peak_gib": round(trained["peak_bytes"] / 2**30, 3),
    }
    print(
        f"{count:>10,} {row['index_items_s']:>9,} {row['index_s']:>8} {row['index_cpu_us_an_item']:>7} {row['index_peak_gib']:>10} {row['first_step_s']:>12} "
        f"{row['from_start_s']:>12} {row['train_peak_gib']:>10}",
        flush=True,
    )
    return row


def main() -> None:
    """Run every size; the last line printed is JSON."""
    given = options()
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).resolve() / "data_scale"
        shutil.rmtree(work, ignore_errors=True)
        images = draw(work / "images", given.pictures, given.edge)
        environment = os.environ | {"INTERVALE_CACHE": str(work / "cache"), "INTERVALE_DEVICE": "cpu"}
        subprocess.run(
            [sys.executable, "-m", "intervale", "init", str(work / "tiny"), "--preset", "tiny"],
            check=True,
            env=environment,
            capture_output=True,
        )
        print(
            f"{'items':>10} {'items/s':>9} {'index s':>8} {'us CPU':>7} {'index GiB':>10} {'first step s':>12} {'from start s':>12} {'train GiB':>10}"
        )
        rows = [one_size(work, count, images, environment) for count in given.sizes]
        costs = child(COSTS, work / "tiny", work / f"items-{given.sizes[-1]}.jsonl", write_tar(work, images), environment=environment)
        costs = {name: round(value, 3) for name, value in costs.items()}
        for name, value in costs.items():
            print(f"{name:>20} {value:>12,}" + (" an s and process" if not name.startswith("order") else ""))
        shutil.rmtree(work)
        told = {
            "bench": "data_scale",
            "date": datetime.date.today().isoformat(),
            "cores": len(os.sched_getaffinity(0)),
            "cpu": platform.processor() or platform.machine(),
            "edge": given.edge,
            "sizes": rows,
            "costs": costs,
        }
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(told, indent=1) + "\n")
        print(json.dumps(told))


if __name__ == "__main__":
    main()
