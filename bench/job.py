"""How long does the tutorial's whole job take, from photographs to an exported model, and in how much memory?

python bench/job.py [--photos DIR] [--items 256] [--epochs 10] [--lean] [--preset internvl2-2b] [--device cuda] [--set KEY=VALUE ...]
                    [--work DIR] [--out FILE]

256 questions on 12-megapixel photographs (13 tiles each) in the tutorial's LLaVA file -> `intervale prepare llava` -> `intervale train --export`,
LoRA 128 on the language model and its output layer, batch 4 x accumulation 2, and the merged model in hf's format. The weights are random.
`--lean` trains in as little memory as the recipe allows: one item a pack, activations recomputed.
"""

import argparse
import datetime
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import train_sides
import yaml
from PIL import Image
from train_data import MOST_TILES, base_model, draw_picture, on_all_cores, question_and_answer, set_keys

from intervale.core.runlog import METRICS, read_metrics

LEAN = {"pack_tokens": 1, "checkpointing": "on"}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs, enlarged to --size (default: drawn pictures)")
    parser.add_argument("--size", default="4000x3000", help="pixels of a photograph")
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--k", type=int, default=1, help="questions a photograph")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lean", action="store_true", help="as little memory as possible")
    parser.add_argument("--preset", default="internvl2-2b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="data.workers")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key")
    parser.add_argument("--budget", type=float, default=570, help="seconds after which the training is ended, counted from the start")
    parser.add_argument("--no-export", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder to work in and to keep the base model in (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="where the JSON goes too")
    return parser.parse_args()


def _enlarge(source: Path, target: Path, size: tuple[int, int], shift: int) -> None:
    """The photograph's middle in the shape of `size`, enlarged; `shift` pixels cut off make a copy another picture."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    wide = min(picture.width, picture.height * size[0] / size[1]) - shift
    high = wide * size[1] / size[0]
    left, top = (picture.width - wide) / 2, (picture.height - high) / 2
    picture.resize(size, Image.Resampling.BICUBIC, (left, top, left + wide, top + high)).save(target, quality=90)


def write_source(folder: Path, given: argparse.Namespace) -> Path:
    """The photographs and the tutorial's LLaVA file of questions on them."""
    size = tuple(map(int, given.size.split("x")))
    (folder / "images").mkdir(parents=True)
    pictures = [folder / "images" / f"photo-{number:03d}.jpg" for number in range(-(-given.items // given.k))]
    if given.photos:
        photos = sorted(p for p in given.photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
        if not photos:
            raise SystemExit(f"{given.photos}: no JPEG in it")
        plan = [(photos[n % len(photos)], path, size, n // len(photos)) for n, path in enumerate(pictures)]
        on_all_cores(_enlarge, plan)
    else:
        on_all_cores(draw_picture, [(path, *size, number) for number, path in enumerate(pictures)])
    draw, items = random.Random(0), []
    for number in range(given.items):
        question, answer = question_and_answer(number, draw)
        talk = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}]
        items.append({"id": f"vqa-{number}", "image": f"images/{pictures[number // given.k].name}", "conversations": talk})
    (folder / "sivqa_llava.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return folder / "sivqa_llava.json"


def command(stage: str, seconds: dict[str, float], device: str, *words: object) -> None:
    """Run an `intervale` command as a user would, and note its seconds. Its failure ends the benchmark."""
    environment = train_sides.environment_of(device)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "intervale", *map(str, words)], env=environment, check=False)
    seconds[stage] = round(time.monotonic() - begun, 2)
    print(f"[{stage}: {seconds[stage]} s]", flush=True)
    if done.returncode:
        raise SystemExit(f"{stage} failed with code {done.returncode}")


def recipe_of(given: argparse.Namespace, base: Path, data: Path, out: Path) -> dict[str, Any]:
    """The tutorial's recipe as plain values."""
    train = {"epochs": given.epochs, "batch_size": 4, "accumulation": 2, "learning_rate": 3e-5, "save_steps": 64}
    recipe: dict[str, Any] = {
        "model": str(base),
        "out": str(out),
        "data": {"train": str(data / "train.jsonl"), "max_tiles": MOST_TILES, "min_tiles": 1, "workers": given.workers},
        "lora": {"rank": 128, "alpha": 256.0, "dropout": 0.05, "targets": "llm+head"},
        "train": train | (LEAN if given.lean else {}),
    }
    recipe, notes = set_keys(recipe, given.set)
    for text in notes:
        print(f"note: {text}", flush=True)
    return recipe


def train(recipe: dict[str, Any], case: Path, device: str, limit: float, *more: str) -> dict[str, Any]:
    """`intervale train` as a user runs it; when its log and metrics lines appeared. Its failure ends the benchmark, and so does `limit`."""
    path, log, out = case / "job.yaml", case / "train.log", Path(recipe["out"])
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    words = [sys.executable, "-m", "intervale", "train", str(path), *more]
    environment = train_sides.environment_of(device) | {"INTERVALE_LANG": "en"}  # the stages are known by its lines
    seen = train_sides.watch(words, environment, log, [log, out / METRICS], limit)
    if seen.late or seen.code:
        why = f"not done after {limit:.1f} s" if seen.late else f"exit code {seen.code}"
        raise SystemExit(f"training failed: {why}\n" + "\n".join(train_sides.last_lines(log)))
    texts = log.read_text(encoding="utf-8", errors="replace").split("\n")  # not at \r: a progress bar is one line
    told = list(zip(seen.times[log], texts, strict=False))  # the end of a text is no line
    for at, text in told:
        print(f"{at - seen.started:7.1f} s  {text}")
    lines = list(zip(seen.times[out / METRICS], read_metrics(out), strict=True))
    return {"started": seen.started, "process_s": seen.seconds, "told": told, "lines": lines}


def told_at(told: list[tuple[float, str]], beginning: str) -> float:
    """When the line came that begins so (a regular expression). Other lines may stand between: libraries warn on the same stream."""
    for at, text in told:
        if re.match(beginning, text):
            return at
    raise SystemExit(f"no line of the training begins with {beginning!r}: its stages cannot be told apart")


def machine(device: str) -> dict[str, Any]:
    """The device, asked in a process of its own: this one holds no part of the GPU."""
    code = f"import json, train_sides; print(json.dumps(train_sides.machine({device!r})))"
    environment = train_sides.environment_of(device, train_sides.HERE)
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def training_stages(found: dict[str, Any]) -> dict[str, float]:
    """Seconds of the training's process by stage, from when its log lines and its metrics appeared.

    start: the process's start, imports and the measuring of the data; load: the network; ready to step 1: whatever happens before the
    first step that is not the step (loading ahead, encoding pictures); steps: all optimizer steps, as they tell their own seconds;
    between: waiting for data, checkpoints on the way and plots; save: from the last step to "done"; after: the export, if there is one,
    and the process's own end.
    """
    lines, told, started = [(at, line) for at, line in found["lines"] if "loss" in line], found["told"], found["started"]
    loading, loaded, done = (told_at(told, beginning) for beginning in ("loading ", r"[\d,]+ items", "done: "))
    first, last = lines[0], lines[-1]
    steps = sum(line["seconds"] for _, line in lines)
    return {
        "start": loading - started,
        "load": loaded - loading,
        "ready to step 1": first[0] - loaded - first[1]["seconds"],
        "steps": steps,
        "between": last[0] - first[0] - (steps - first[1]["seconds"]),
        "save": done - last[0],
        "after": started + found["process_s"] - done,
    }


def training_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Rates, memory and losses of the training; seconds of the first and of the last epoch (the first encodes the pictures).

    The peak is what torch allocated (CPU: the resident set) as the metrics tell it: to the end of the last step, without the last save.
    """
    lines = [line for _, line in found["lines"] if "loss" in line]
    epochs = max(1, round(lines[-1]["epoch"]))
    each = len(lines) // epochs
    known = {key: value for _, line in found["lines"] for key, value in line.items() if "encode" in key or "feature" in key}
    seconds = [line["seconds"] for line in lines]
    return {
        "steps": len(lines),
        "samples": sum(line["samples"] for line in lines),
        "first_step_s": seconds[0],
        "step_s": round(statistics.median(seconds), 4),
        "first_epoch_s": round(sum(seconds[:each]), 2),
        "last_epoch_s": round(sum(seconds[-each:]), 2),
        "samples_s_steady": round(lines[-1]["samples"] / statistics.median(seconds[-each:]), 3) if epochs > 1 else None,
        "peak_gib": max(line["memory_gib"] for line in lines),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
    } | known


def run(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The job; returns what it measured."""
    seconds: dict[str, float] = {}
    begun = time.monotonic()
    case = work / f"job-{time.time_ns()}"
    recipe = recipe_of(given, work / f"base-{given.preset}", case / "data", case / "run")
    with ThreadPoolExecutor(2) as pool:
        described, written = pool.submit(machine, given.device), pool.submit(write_source, case / "source", given)
        base_model(work, given.preset)
        device, source = described.result(), written.result()  # here: a fault of theirs must not come after the job
    weight = sum(path.stat().st_size for path in (case / "source" / "images").iterdir()) / 2**20
    print(f"[random base and {weight:.0f} MiB of photographs: {time.monotonic() - begun:.0f} s, no part of the job]", flush=True)
    command("prepare", seconds, given.device, "prepare", "llava", source, case / "data", "--image-root", case / "source")
    left = max(0.0, given.budget - (time.monotonic() - begun))
    export = [] if given.no_export else ["--export", str(case / "tuned"), "--format", "hf"]
    found = train(recipe, case, given.device, left, *export)
    stages = {name: round(value, 2) for name, value in training_stages(found).items()}
    after = stages.pop("after") if export else 0.0
    seconds["train"] = round(found["process_s"] - after, 2)
    if export:
        seconds["export"] = after
    versions = json.loads((case / "run" / "run.json").read_text(encoding="utf-8"))["versions"]
    shutil.rmtree(case)
    settings = {key: getattr(given, key) for key in ("preset", "items", "k", "size", "epochs", "lean", "workers", "set")}
    settings["photos"] = bool(given.photos)
    head = {"bench": "job", "date": datetime.date.today().isoformat(), **device, "versions": versions, "case": settings}
    return head | {"seconds": seconds, "training_seconds": stages, "training": training_numbers(found)}


def main() -> None:
    """Run the job; the last line printed is its JSON."""
    given = options()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that a child is ended too
    with tempfile.TemporaryDirectory() as temporary:
        result = run(given, (given.work or Path(temporary)).resolve())
    print("\nstage                 seconds")
    for stage, value in result["seconds"].items():
        print(f"{stage:20} {value:8.1f}")
        for name, part in result["training_seconds"].items() if stage == "train" else ():
            print(f"  {name:18} {part:8.1f}")
    whole = sum(result["seconds"].values())
    print(f"{'in all':20} {whole:8.1f}\n{'without prepare':20} {whole - result['seconds']['prepare']:8.1f}")
    numbers = result["training"]
    print(
        f"{numbers['steps']} steps, {numbers['samples']} samples; first epoch {numbers['first_epoch_s']} s, last {numbers['last_epoch_s']} s; ",
        end="",
    )
    print(f"peak {numbers['peak_gib']} GiB; loss {numbers['first_loss']:.3f} -> {numbers['last_loss']:.3f}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
