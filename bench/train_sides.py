"""The two sides of the training benchmarks, each in a process of its own: `stock` (transformers + PEFT) and `ours` (intervale).

python bench/train_sides.py SPEC.json   is such a process; `run_child` starts one and reads what it leaves; `watch` runs any command
and notes when its lines appear.

`stock` is the loop a user of transformers and PEFT writes, with what HF's Trainer does for bf16=True: bfloat16 weights under autocast,
what learns in float32, the loss divided by the target tokens of the whole step, gradient clipping, fused AdamW. It is favoured where
the two cannot be equal: its pictures are decoded and tiled in memory before the clock starts, and are normalised on the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import intervale

HERE = Path(__file__).parent
SRC = Path(intervale.__file__).parents[1]  # the children import the package that the parent does
_POLL = 0.002  # seconds; the resolution of the times taken from outside
_GIB = 1 << 30


# ---- the parent's part: no torch here, so that the parent holds no part of the GPU


@dataclass(frozen=True)
class Watched:
    """A process and what was seen of it; times are seconds of the epoch."""

    code: int
    late: bool  # was it ended for taking too long?
    started: float
    seconds: float
    times: dict[Path, list[float]]  # of each file that was asked for: when each of its lines appeared


def environment_of(device: str, *folders: Path) -> dict[str, str]:
    """A child's environment: our package and `folders` to import from, the device to use, each line written when it is said."""
    paths = [*map(str, (SRC, *folders)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "INTERVALE_DEVICE": device}


def watch(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    files: list[Path],
    limit: float,
    last: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Watched:
    """Run a command, what it says going to `log`, and note when the lines of `files` appear (`log` may be one of them). Its process
    group ends with it, at the latest after `limit` seconds; `last` is done with one that took longer before it is ended."""
    times: dict[Path, list[float]] = {path: [] for path in files}
    sizes = dict.fromkeys(files, 0)
    with open(log, "w", encoding="utf-8") as said:
        started, until = time.time(), time.monotonic() + limit
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            while True:
                ended = child.poll() is not None
                seconds = time.time() - started
                for path in files:
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_size > sizes[path]:
                            text = path.read_bytes()
                            sizes[path] = len(text)
                            times[path] += [time.time()] * (text.count(b"\n") - len(times[path]))
                if ended or time.monotonic() > until:
                    break
                time.sleep(_POLL)
            if last is not None and not ended:
                last(child)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the loader's processes are in its group
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return Watched(child.returncode, not ended, started, seconds, times)


def run_child(spec: dict[str, Any], work: Path, limit: float) -> dict[str, Any]:
    """Run a side; its result, with `error` when it failed. For `ours`: `line_times`, when each line of metrics.jsonl appeared."""
    name = spec["name"]
    spec = spec | {"result": str(work / f"{name}.result.json")}
    Path(spec["result"]).unlink(missing_ok=True)
    (work / f"{name}.spec.json").write_text(json.dumps(spec), encoding="utf-8")
    metrics = [Path(spec["recipe"]["out"]) / "metrics.jsonl"] if spec["side"] == "ours" else []
    log = work / f"{name}.log"
    command = [sys.executable, str(HERE / "train_sides.py"), str(work / f"{name}.spec.json")]
    seen = watch(command, environment_of(spec["device"], HERE), log, metrics, limit)
    result = _result_of(Path(spec["result"]), seen.late, limit, log)
    times = seen.times[metrics[0]] if metrics else []
    return result | {"started": seen.started, "line_times": times, "process_s": seen.seconds}


def last_lines(log: Path) -> list[str]:
    """The end of what a process said."""
    return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]


def _result_of(path: Path, late: bool, limit: float, log: Path) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"error": f"not done after {limit:.0f} s" if late else "the process died", "log": last_lines(log)}


# ---- the children's part


def machine(device: str) -> dict[str, Any]:
    """The GPU's name and CUDA's version, or how many threads the CPU's work takes. Touches the GPU: for a child only."""
    import torch

    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def _memory(device: str) -> dict[str, float]:
    import torch

    if device == "cuda":
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gib": round(peak / _GIB, 3), "reserved_gib": round(held / _GIB, 3)}
    return {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB, 3)}


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """`intervale train` on the spec's recipe, in this process."""
    from intervale.core.runlog import read_metrics, versions
    from intervale.train.loop import train
    from intervale.train.recipe import TrainRecipe

    told: list[tuple[float, str]] = []

    def tell(text: str) -> None:
        told.append((time.time(), text))
        print(text, flush=True)

    recipe = TrainRecipe.model_validate(spec["recipe"], strict=True)
    begun = time.time()
    outcome = train(recipe, spec["name"], resume=False, fresh=False, dry_run=False, tell=tell)
    ended = time.time()
    lines = read_metrics(Path(spec["recipe"]["out"]))
    found = {"begun": begun, "ended": ended, "told": told, "lines": lines, "status": outcome.status, "versions": versions()}
    return found | _memory(spec["device"]) | machine(spec["device"])


def _stock_network(spec: dict[str, Any], image_token: int) -> Any:
    """transformers' InternVL with PEFT's LoRA on the text model's linears and a projector that learns."""
    import torch

    from intervale.model.adapt import attach_lora
    from intervale.model.load import load_network

    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    network = load_network(spec["base"], dtype=dtype, device=spec["device"], image_token_id=image_token)
    network.requires_grad_(False)
    torch.manual_seed(spec["seed"])  # PEFT draws on the CPU: the same matrices as the trainer's
    attach_lora(network, spec["rank"], spec["alpha"], spec["dropout"], spec["targets"])
    for parameter in network.model.multi_modal_projector.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if spec["checkpointing"]:
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    network.config.use_cache = False
    return network.train()


def _stock_items(spec: dict[str, Any], side: Any) -> dict[int, tuple[Any, Any, Any]]:
    """(ids, labels, uint8 tiles) of every item the order names, in memory."""
    import numpy as np
    import torch

    from intervale.core.records import read_records
    from intervale.data.images import load_picture
    from intervale.data.prompt import encode_turns, turns_of
    from intervale.data.tiling import cut_tiles

    records = read_records(Path(spec["data"]))
    tiles: dict[str, torch.Tensor] = {}
    items = {}
    for number in sorted({item for step in spec["order"] for item in step}):
        record = records[number]
        image = record.images[0]
        if image not in tiles:
            tiles[image] = torch.from_numpy(cut_tiles(load_picture(record.root / image), side.tiling))
        counts = [len(tiles[image]) * side.tiling.tokens_per_tile]
        prompt = encode_turns(turns_of(record.messages, counts), side.template, side.tokenizer)
        ids = torch.from_numpy(np.asarray(prompt.ids_S, np.int64))
        items[number] = (ids, torch.where(torch.from_numpy(np.asarray(prompt.trained_S)), ids, -100), tiles[image])
    return items


def _padded(rows: list[tuple[Any, Any, Any]], device: str) -> dict[str, Any]:
    """A batch as transformers' collators pad it: to its longest item, on the right. The tiles are still uint8."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels, tiles = zip(*rows, strict=True)
    batch = {
        "input_ids": pad_sequence(list(ids), batch_first=True, padding_value=0),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
        "tiles_PHWC": torch.cat(tiles),
    }
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def stock(spec: dict[str, Any]) -> dict[str, Any]:
    """The stock loop over the spec's order, or as much of it as `seconds` allow; a line of metrics for each step, as the trainer writes it."""
    import torch
    from train_data import side_of

    from intervale.core.runlog import versions
    from intervale.train.schedule import learning_rate

    begun = time.time()
    side = side_of(Path(spec["base"]))
    network = _stock_network(spec, side.tokenizer.control("<IMG_CONTEXT>"))
    items = _stock_items(spec, side)
    learning = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": spec["weight_decay"]},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    ready, lines, times = time.time(), [], []
    for number, chosen in enumerate(spec["order"]):
        if lines and time.time() - begun + lines[-1]["seconds"] > spec.get("seconds", math.inf):
            break
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, len(spec["order"]), spec["learning_rate"], spec["warmup_ratio"], "cosine")
        torch.manual_seed(spec["seed"] * 1_000_003 + number)
        line = _stock_step(network, optimizer, learning, [items[item] for item in chosen], spec)
        if spec["device"] == "cuda":
            torch.cuda.synchronize()
        times.append(time.time())
        lines.append({"step": number + 1, **line, "samples": len(chosen), "seconds": time.monotonic() - start})
    attention = getattr(network.config.text_config, "_attn_implementation", None)
    found = {"begun": begun, "ready": ready, "ended": time.time(), "lines": lines, "own_times": times, "versions": versions()}
    return found | {"attention": attention, "status": "done"} | _memory(spec["device"]) | machine(spec["device"])


def _stock_step(network: Any, optimizer: Any, learning: list[Any], rows: list[Any], spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from intervale.model.forward import normalise

    dtype = next(network.model.vision_tower.parameters()).dtype
    autocast = torch.autocast(spec["device"], dtype) if dtype != torch.float32 else contextlib.nullcontext()
    optimizer.zero_grad(set_to_none=True)
    targets = sum(int((labels != -100).sum()) for _, labels, _ in rows)
    total = torch.zeros((), device=spec["device"])
    for at in range(0, len(rows), spec["batch_size"]):
        batch = _padded(rows[at : at + spec["batch_size"]], spec["device"])
        pixels = normalise(batch.pop("tiles_PHWC"), dtype)
        with autocast:
            loss = network(pixel_values=pixels, use_cache=False, num_items_in_batch=targets, **batch).loss
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(learning, spec["max_norm"])
    optimizer.step()
    assert math.isfinite(float(total)), f"the loss is {float(total)}"
    return {"loss": float(total), "gradient_norm": float(norm), "targets": targets}


def main(path: Path) -> None:
    """Run the spec at `path` and write its result file, in any case."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    try:
        result = {"ours": ours, "stock": stock}[spec["side"]](spec)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[0][:300]}", "log": traceback.format_exc().splitlines()[-12:]}
    aside = Path(spec["result"] + ".part")
    aside.write_text(json.dumps(result), encoding="utf-8")
    aside.rename(spec["result"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
