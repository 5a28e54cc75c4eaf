"""How do several GPUs, or a 4-bit base, compare with one process on the same recipe? Samples a second, memory, losses.

    python bench/train_parallel.py --processes 2 --ways single ddp zero2 --work /tmp/b --out parallel.json
    python bench/train_parallel.py --ways single nf4 --work /tmp/b --out nf4.json        # QLoRA beside bf16, one GPU
    python bench/train_parallel.py --preset tiny --device cpu --steps 3 --tiles 1        # smoke test

`intervale train` as a user runs it, a way after the other, each in processes of its own; InternVL2-2B shapes with random weights, LoRA
128/256, projector learns, batch 4 x accumulation 2 in every process (so a step of n processes holds n times the items). The last line
is JSON; `ratio` is samples a second over the first `single`. A step's seconds are those between two lines of the run's metrics.jsonl, as
seen from outside (looked at every 2 ms), so with all that lies between two steps; `inside_s` is what the step itself says. Both are
medians, `step_s_most` the longest.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml
from train_data import MOST_TILES, base_model, side_of, write_items
from train_sides import environment_of, watch

from intervale.core.runlog import versions

_SHOWN = 60  # lines of a way that failed: two processes' stacks
WAYS: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {"parallel": {"strategy": "ddp"}},
    "fsdp": {"parallel": {"strategy": "fsdp"}},
    "zero1": {"parallel": {"strategy": "deepspeed", "zero_stage": 1}},
    "zero2": {"parallel": {"strategy": "deepspeed", "zero_stage": 2}},
    "zero3": {"parallel": {"strategy": "deepspeed", "zero_stage": 3}},
    "nf4": {"lora": {"quantize": "nf4"}},
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["single", "ddp", "fsdp"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--preset", default="internvl2-2b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiles", type=int, choices=(1, 5, 13), default=13)
    parser.add_argument("--items", type=int, default=64, help="for each process; an epoch")
    parser.add_argument("--steps", type=int, default=24, help="timed steps")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them: at least an epoch, so that features are kept")
    parser.add_argument("--rounds", type=int, default=1, help="how often all ways are run")
    parser.add_argument("--compile", choices=("on", "off", "auto"), default="auto", help="train.compile of all ways")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--limit", type=float, default=280, help="seconds a way may take")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one); the base model stays there")
    parser.add_argument("--out", type=Path, help="also write the JSON here, after every way")
    given = parser.parse_args()
    if given.warmup < 1 or given.steps < 1:
        parser.error("--warmup and --steps are 1 at least: a step's seconds begin with the line of the step before")
    return given


def say_where(child: subprocess.Popen[bytes]) -> None:
    """The processes of a way that takes too long show every thread's stack and end; the launcher shows what they said last."""
    for process in psutil.Process(child.pid).children() or [psutil.Process(child.pid)]:
        process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(40)


def between(times: list[float], warmup: int) -> list[float]:
    """Seconds of every step behind the first `warmup`, from when the metrics' lines appeared: one needs the line of the step before."""
    return [after - before for before, after in itertools.pairwise(times[warmup - 1 :])]


def run_way(name: str, given: argparse.Namespace, work: Path, base: Path, data: Path) -> dict[str, Any]:
    """One way's row."""
    way = WAYS[name]
    processes = given.processes if "parallel" in way else 1
    folder = work / f"run-{name}-{time.time_ns()}"
    total = given.warmup + given.steps
    recipe = {
        "model": str(base),
        "out": str(folder),
        "data": {"train": str(data), "max_tiles": MOST_TILES, "min_tiles": 1, "workers": 8 if given.device == "cuda" else 0}
        | {"features_dir": str(folder.with_suffix(".features"))},  # several processes share it; --work in memory spares a slow disk
        "lora": {"rank": 128, "alpha": 256.0, "dropout": given.dropout} | way.get("lora", {}),
        "train": {
            "epochs": total,
            "max_steps": total,
            "batch_size": 4,
            "accumulation": 2,
            "precision": "bf16" if given.device == "cuda" else "fp32",
            "compile": given.compile,
            "save_steps": total,
        },
        "parallel": way.get("parallel", {}) | ({"processes": processes} if processes > 1 else {}),
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    metrics, log = folder / "metrics.jsonl", work / f"{name}.log"
    environment = environment_of(given.device) | {"PYTHONFAULTHANDLER": "1"}  # at a SIGABRT every thread's stack
    seen = watch([sys.executable, "-m", "intervale", "train", str(path)], environment, log, [metrics], given.limit, say_where)
    if seen.late or seen.code:
        error = f"not done after {given.limit:g} s" if seen.late else f"exit code {seen.code}"
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"way": name, "processes": processes, "error": error, "log": said[-_SHOWN:]}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(lines) == len(seen.times[metrics]) == total, "a line a step, none of them an evaluation"
    timed, steps = lines[given.warmup :], between(seen.times[metrics], given.warmup)
    each = statistics.median(steps)
    samples = statistics.mean(line["samples"] for line in timed)
    for place in (folder, folder.with_suffix(".features")):
        shutil.rmtree(place)
    return {
        "way": name,
        "processes": processes,
        "samples_s": round(samples / each, 3),
        "step_s": round(each, 4),
        "step_s_most": round(max(steps), 4),
        "inside_s": round(statistics.median(line["seconds"] for line in timed), 4),
        "samples_a_step": samples,
        "memory_gib": max(line["memory_gib"] for line in lines),
        "process_s": round(seen.seconds, 1),
        "losses": [line["loss"] for line in lines],
    }


def told(given: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything as one JSON object."""
    import torch

    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    case = {key: getattr(given, key) for key in ("preset", "tiles", "items", "steps", "warmup", "compile", "dropout", "processes")}
    rates: dict[str, list[float]] = {}
    for row in rows:
        if "samples_s" in row:
            rates.setdefault(row["way"], []).append(row["samples_s"])
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ratios = {name: round(rate / medians["single"], 3) for name, rate in medians.items()} if "single" in medians else {}
    software = versions() | {"cuda": torch.version.cuda}
    for name in ("deepspeed", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            software[name] = metadata.version(name)
    head = {"bench": "train_parallel", "date": datetime.date.today().isoformat(), "device": device, "versions": software}
    return head | {"case": case, "rows": rows, "ratio": ratios}


def main() -> None:
    """Run the ways in turns; the last line printed is JSON."""
    given = options()
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).resolve()
        base = base_model(work, given.preset)
        data = write_items(work / f"parallel-{time.time_ns()}", side_of(base).tiling, given.tiles, 1, given.items * given.processes)
        rows: list[dict[str, Any]] = []
        print(f"{'way':8} {'processes':>9} {'samples/s':>9} {'step s':>8} {'most':>8} {'GiB':>6} {'loss':>14}")
        for _ in range(given.rounds):
            for name in given.ways:
                row = run_way(name, given, work, base, data)
                rows.append(row)
                if "error" in row:
                    print(f"{name:8} {row['error']}\n    " + "\n    ".join(row["log"]), flush=True)
                else:
                    print(
                        f"{name:8} {row['processes']:>9} {row['samples_s']:>9.2f} {row['step_s']:>8.3f} {row['step_s_most']:>8.3f} "
                        f"{row['memory_gib']:>6.1f} {row['losses'][0]:.4f} {row['losses'][-1]:.4f}",
                        flush=True,
                    )
                if given.out:
                    given.out.parent.mkdir(parents=True, exist_ok=True)
                    given.out.write_text(json.dumps(told(given, rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(data.parent)
        print(json.dumps(told(given, rows), ensure_ascii=False))


if __name__ == "__main__":
    main()
