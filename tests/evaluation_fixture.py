"""Finished evaluations as `evaluate` leaves them, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intervale.core.files import write_json


def line(name: str, correct: bool, **changes: Any) -> dict[str, Any]:
    """A prediction."""
    parsed = 0 if correct else 1
    item = {"id": name, "question": f"Q {name}", "choices": ["hot", "sour"], "answer": 0, "prompt": "open", "mode": "strict"}
    told = {"raw": item["choices"][parsed], "finish": "stop", "parsed": parsed, "correct": correct, "tokens": 3, "seconds": 0.1}  # type: ignore[index]
    return {**item, **told, "tags": {"type": "taste"}, **changes}


def folder(path: Path, lines: list[dict[str, Any]], **changes: Any) -> Path:
    """An evaluation of `lines`, with the summary `evaluate` writes (but for numbers that no report uses)."""
    right = sum(entry["correct"] for entry in lines)
    score = {"n": len(lines), "correct": right, "accuracy": right / len(lines), "interval": [0.1, 0.9]}
    protocol = {"prompt": "open", "mode": "strict", "max_new_tokens": 64, "max_tiles": 6, "headline": None}
    model = {"name": "m", "fingerprint": "f", "checkpoint": None, "checkpoint_fingerprint": None, "precision": "float32", "device": "cpu"}
    summary = {
        **score, "unparsed": 0, "cut_off": 0, "chance": 0.5, "tags": {"type": {"taste": score}}, "protocol": protocol, "model": model,
        "data": {"file": "d.jsonl", "items": len(lines), "digest": "d"}, "scored_on_training_items": None, "scored_on_training_items_reason": "unknown",
        "versions": {"intervale": "0", "torch": "2", "transformers": "5"},
    }  # fmt: skip
    path.mkdir()
    write_json(path / "protocol.json", {"protocol": protocol})
    (path / "predictions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    write_json(path / "summary.json", summary | changes)
    return path


def outcomes(pattern: str) -> list[dict[str, Any]]:
    """Items q0, q1, ... of which those marked 1 were answered right."""
    return [line(f"q{n}", mark == "1") for n, mark in enumerate(pattern)]


def after(count: int) -> Callable[[], None]:
    """A hook that kills the run at its `count`th answer."""
    left = [count]

    def hook() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return hook


def timeless(value: Any) -> Any:
    """Without the times, which are all that may differ between two runs."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key != "seconds"}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, Any]:
    """Everything that is made from the answers."""
    summaries = {str(path.relative_to(out)): json.loads(path.read_text()) for path in sorted(out.rglob("*.json"))}
    lines = {
        str(path.relative_to(out)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.rglob("predictions.jsonl"))
    }
    return timeless(summaries | lines)
