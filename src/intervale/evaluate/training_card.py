"""How a scored model was trained, as plain values: its run's numbers and a loss curve small enough for a report. No torch here.

Promises: only a run that is this model's own is told of (the fingerprint of its base fits; for an export, the recipe and the data
too); a run that is gone, damaged or another's is None, never an error. Cost: reading run.json and metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from intervale.core.errors import UserError
from intervale.core.files import read_object
from intervale.core.runlog import read_metrics

MOST_POINTS = 200
SMOOTHING = 0.9  # as in the run's own loss.png
_KIND = "intervale training run"
T = TypeVar("T")


def _run(folder: Path) -> dict[str, Any] | None:
    """run.json of `folder`; None when there is none that can be read."""
    try:
        run = read_object(folder / "run.json", "kind", "base", "recipe", "data")
    except UserError:
        return None
    parts = (run["base"], run["recipe"], run["recipe"].get("train") if isinstance(run["recipe"], dict) else None)
    return run if run["kind"] == _KIND and all(isinstance(part, dict) for part in parts) else None


def _home(folder: Path) -> Path | None:
    """The run that `folder` is or is a checkpoint of."""
    if (folder / "run.json").is_file():
        return folder
    return folder.parent.parent if folder.parent.name == "checkpoints" else None


def _exports(folder: Path) -> Iterator[dict[str, Any]]:
    """What an exported folder says about itself, then what it was exported from, if that was an export too."""
    try:
        card: Any = read_object(folder / "intervale.json")
    except UserError:
        return
    while isinstance(card, dict):
        yield card
        card = card.get("before")


def _places(told: str, folder: Path) -> list[Path]:
    # `from` is the path as it was typed, and from where is not on file: relative ones are looked for from here and around the export.
    return [Path(told)] if Path(told).is_absolute() else [Path.cwd() / told, *(parent / told for parent in folder.parents)]


def find_run(model: dict[str, Any]) -> tuple[Path, dict[str, Any], int | None] | None:
    """(folder, run.json, step of the scored weights or None) of the run that made `model`, a summary's "model".

    A run, a checkpoint inside one, or an export whose run is still there.
    """
    if not model.get("folder"):
        return None
    folder = Path(model["folder"])
    home = _home(folder)
    if home is not None:
        run = _run(home)
        if run is None or run["base"].get("fingerprint") != model.get("fingerprint"):
            return None
        number = str(model.get("checkpoint") or "").removeprefix("step-")
        return home, run, int(number) if number.isdecimal() else None
    for card in _exports(folder):
        if not isinstance(card.get("from"), str) or "recipe" not in card:
            continue
        for place in _places(card["from"], folder):
            home = _home(place)
            run = _run(home) if home is not None else None
            if home is not None and run is not None and all(run[key] == card.get(key) for key in ("recipe", "data")):
                return home.resolve(), run, card.get("step")
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _only_number(value: Any) -> Any:
    return value if _number(value) else None


def thin(points: Sequence[T], most: int = MOST_POINTS) -> list[T]:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def curve_of(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """{loss: [[step, loss, smoothed]], held_out: [[step, loss]], smoothing} of the lines of metrics.jsonl; None without a loss.

    Smoothed over all steps first, thinned to `MOST_POINTS` afterwards.
    """
    told = [entry for entry in entries if isinstance(entry, dict) and _number(entry.get("step"))]
    steps, value = [], 0.0
    for number, entry in enumerate((entry for entry in told if _number(entry.get("loss"))), 1):
        value = SMOOTHING * value + (1 - SMOOTHING) * entry["loss"]
        # Without the start's weight, as Adam corrects its averages.
        steps.append([entry["step"], _short(entry["loss"]), _short(value / (1 - SMOOTHING**number))])
    held = [[entry["step"], _short(entry["eval_loss"])] for entry in told if _number(entry.get("eval_loss"))]
    if not steps:
        return None
    return {"loss": thin(steps), "held_out": thin(held), "smoothing": SMOOTHING}


def _entries(run: Path) -> list[dict[str, Any]]:
    try:
        return [entry for entry in read_metrics(run) if isinstance(entry, dict)]
    except (OSError, ValueError):
        return []


def training_card(model: dict[str, Any]) -> dict[str, Any] | None:
    """The run behind a summary's "model", its key numbers and its curve; None when intervale did not train it or the run is gone."""
    found = find_run(model)
    if found is None:
        return None
    folder, run, step = found
    recipe, entries = run["recipe"], _entries(folder)
    train, lora = recipe["train"], recipe.get("lora")
    steps = [entry for entry in entries if _number(entry.get("loss"))]
    last: dict[str, Any] = steps[-1] if steps else {}
    # What a step really held, all processes together; the recipe's numbers are those of one process.
    batch = max((entry["samples"] for entry in steps if _number(entry.get("samples"))), default=None)
    items = {name: run[name] if isinstance(run.get(name), dict) else {} for name in ("train", "eval")}
    return {
        "run": str(folder),
        "status": run.get("status"),
        "base": run["base"].get("name"),
        "learns": {part: train.get(part) for part in ("vision", "projector", "llm")},
        "lora": lora if "lora" in (train.get("llm"), train.get("vision")) and isinstance(lora, dict) else None,
        "epochs": _only_number(last.get("epoch", train.get("epochs"))),
        "steps": _only_number(last.get("step", run.get("step"))),
        "step_scored": _only_number(step),
        "batch": batch,
        "learning_rate": _only_number(train.get("learning_rate")),
        "schedule": train.get("schedule"),
        "seed": train.get("seed"),
        "seconds": _only_number(run.get("seconds")),
        "items": _only_number(items["train"].get("items")),
        "held_out_items": _only_number(items["eval"].get("items")),
        "curve": curve_of(entries),
    }
