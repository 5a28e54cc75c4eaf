"""FoodieQA's published results as counts with intervals, and whether a score of ours may stand beside them. No torch here.

Promises: the numbers are the paper's, as data with their attribution (assets/foodieqa_published.json); every way in which our score
was obtained otherwise is told, and none of theirs is re-scored. Cost: reading one small file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervale.core.embedded import ASSETS
from intervale.core.errors import UserError
from intervale.core.files import read_json, read_object
from intervale.evaluate.statistics import wilson

_CARD, _HOME = "dataset.json", "lyan62/FoodieQA"
_SHOWS_OPTIONS = ("mcq", "foodieqa")


def published() -> dict[str, Any]:
    """The file itself: benchmark, paper, source, protocol, items a task, columns ("sivqa zh"), human, models."""
    return read_object(ASSETS / "foodieqa_published.json", "columns", "models", "items")


def column(name: str) -> list[dict[str, Any]]:
    """The rows of one column ("sivqa zh"), best first: {who, percent, n, correct, interval}; the last two None for the annotators' mean.

    `correct` is the count nearest to the published percentage.
    """
    told = published()
    at, n = told["columns"].index(name), told["items"][name.split()[0]]
    rows = []
    for entry in [*told["models"], told["human"]]:
        percent = entry["percent"][at]
        if percent is None:
            continue
        correct = None if entry is told["human"] else round(percent * n / 100)
        interval = None if correct is None else list(wilson(correct, n))
        rows.append({"who": entry["who"], "percent": percent, "n": n, "correct": correct, "interval": interval})
    return sorted(rows, key=lambda row: -row["percent"])


def _task(summary: dict[str, Any]) -> str | None:
    """The FoodieQA task a summary's data is of, by the card beside the data; None for any other data."""
    protocol = summary["protocol"]
    if protocol.get("suite") == "foodieqa":
        return str(protocol["task"])
    file = (summary.get("data") or {}).get("file")
    if not file:
        return None
    try:
        card = read_json(Path(file).parent / _CARD)
    except UserError:
        return None
    if not isinstance(card, dict) or not isinstance(card.get("licence"), dict):
        return None
    own = _HOME in str(card["licence"].get("url")) and card.get("task") in published()["items"]
    return str(card["task"]) if own else None


def _language(lines: Sequence[dict[str, Any]]) -> str:
    found = Counter("zh" if any("\u3400" <= char <= "\u9fff" for char in line["question"]) else "en" for line in lines)
    return found.most_common(1)[0][0] if len(found) == 1 else "both"


def beside(summary: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """{column, rows, differs} to show beside a score, or None when the data is not FoodieQA's.

    `differs` names by code how our score was obtained otherwise; empty when it is comparable: all of the task's items in one language,
    options shown, answered (not by likelihood), not trained on. The prompts' wording always differs a little and is said anyway.
    """
    task = _task(summary)
    if task is None:
        return None
    language = summary["protocol"].get("language") or _language(lines)
    name = f"{task} {'zh' if language == 'both' else language}"
    if name not in published()["columns"]:
        return None
    protocol, n = summary["protocol"], published()["items"][task]
    differs = [
        ("languages", language == "both"),
        ("items", len(lines) != n),
        ("options", protocol["prompt"] not in _SHOWS_OPTIONS),
        ("view", protocol.get("view", "picture") != "picture"),
        ("likelihood", protocol["mode"] == "likelihood"),
        ("trained", summary.get("scored_on_training_items") is True),
        ("unknown", summary.get("scored_on_training_items") is None),
    ]
    told = published()
    about = {key: told[key] for key in ("paper", "source", "protocol")}
    return {"column": name, "items": n, "rows": column(name), "differs": [code for code, true in differs if true], **about}
