"""FoodieQA's published results as counts with intervals, and whether a score of ours may stand beside them. No torch here.

Promises: the numbers are the paper's, as data with their attribution (assets/foodieqa_published.json); they stand beside a score on the
benchmark's own items alone, never beside other data of its form; every way in which our score was obtained otherwise is told, and none
of theirs is re-scored. Cost: reading two small files.
"""

from __future__ import annotations

import re
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


def _card(summary: dict[str, Any]) -> dict[str, Any]:
    """dataset.json beside a summary's data; {} where there is none."""
    file = (summary.get("data") or {}).get("file")
    try:
        card = read_json(Path(file).parent / _CARD) if file else None
    except UserError:
        return {}
    return card if isinstance(card, dict) else {}


def _task(summary: dict[str, Any], card: dict[str, Any]) -> str | None:
    """The FoodieQA task whose form a summary's data has, by the protocol or the card beside the data; None for any other data."""
    protocol = summary["protocol"]
    if protocol.get("suite") == "foodieqa":
        return str(protocol["task"])
    licence = card.get("licence")
    own = isinstance(licence, dict) and _HOME in str(licence.get("url")) and card.get("task") in published()["items"]
    return str(card["task"]) if own else None


def _items_there(summary: dict[str, Any], card: dict[str, Any]) -> int | None:
    """How many items the file had that the data came from; None where that is not on file or a language was added to another."""
    if summary["protocol"].get("suite") == "foodieqa":
        return (summary.get("data") or {}).get("in_file")
    files = card.get("files")
    if not isinstance(files, dict) or card.get("question_language") == "both":
        return None
    counts = [part.get("items") if isinstance(part, dict) else None for part in files.values()] + [card.get("skipped", 0)]
    return sum(count for count in counts if count) if all(isinstance(count, int) for count in counts) else None


def foreign(task: str, lines: Sequence[dict[str, Any]], there: int | None) -> list[str]:
    """What tells that these are not the benchmark's own items, by code: `ids`, `types`, `number`; empty when nothing does.

    Known of the benchmark without having it are the form of its ids, how many questions of each type it holds, and how many in all.
    `there`: the items of the file that `lines` were taken from, if known. An item in English may have the id's suffix of `prepare`.
    """
    told = published()
    kinds = {line["id"].removesuffix("-en"): (line.get("tags") or {}).get("question_type") for line in lines}
    most = told["types"].get(task)
    checks = {
        "ids": all(re.fullmatch(told["ids"][task], name) for name in kinds),
        "types": most is None or all(count <= most.get(kind, 0) for kind, count in Counter(kinds.values()).items()),
        "number": len(kinds) <= told["items"][task] and there in (None, told["items"][task]),
    }
    return [code for code, fits in checks.items() if not fits]


def _language(lines: Sequence[dict[str, Any]]) -> str:
    found = Counter("zh" if any("\u3400" <= char <= "\u9fff" for char in line["question"]) else "en" for line in lines)
    return found.most_common(1)[0][0] if len(found) == 1 else "both"


def beside(summary: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """{column, rows, differs, foreign} to show beside a score, or None when the data has not even FoodieQA's form.

    `foreign` tells by code why these are not FoodieQA's own items; then `rows` is empty, because nothing published is about them.
    `differs` names by code how our score was obtained otherwise; empty when it is comparable: all of the task's items in one language,
    options shown, answered (not by likelihood), not trained on. The prompts' wording always differs a little and is said anyway.
    """
    card = _card(summary)
    task = _task(summary, card)
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
    others = foreign(task, lines, _items_there(summary, card))
    rows = [] if others else column(name)
    return {"column": name, "items": n, "rows": rows, "differs": [code for code, true in differs if true], "foreign": others, **about}
