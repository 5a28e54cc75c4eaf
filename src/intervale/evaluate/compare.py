"""Two evaluations of the same items, paired: what was fixed, what broke, and whether chance explains it. No torch here.

Promises: items are joined by id and must be the same in question, choices and answer; the protocols must be the same; anything
else is refused with a list of what differs. Cost: reading two folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import write_atomic, write_json
from intervale.core.runlog import differences
from intervale.evaluate.folder import read_evaluation
from intervale.evaluate.report import report_html
from intervale.evaluate.statistics import Pairs, mcnemar, paired_difference

REPORT_HTML, REPORT_JSON = "report.html", "report.json"
_SHOWN = 5
_SAME = ("question", "choices", "answer")
Line = dict[str, Any]


def _refuse_different(before: Path, after: Path, protocols: tuple[Any, Any], lines: tuple[Sequence[Line], Sequence[Line]]) -> None:
    faults = [f"protocol.{told}" for told in differences(*protocols)]
    olds, news = ({line["id"]: line for line in side} for side in lines)
    for folder, own, other in ((before, olds, news), (after, news, olds)):
        if alone := [name for name in own if name not in other]:
            more = ", ..." if len(alone) > _SHOWN else ""
            faults.append(f"{len(alone)} items are only in {folder}: {', '.join(map(repr, alone[:_SHOWN]))}{more}")
    changed = [
        (name, told) for name in olds if name in news for key in _SAME for told in differences(olds[name][key], news[name][key], key)
    ]
    faults += [f"item {name!r}: {told}" for name, told in changed[:_SHOWN]]
    if len(changed) > _SHOWN:
        faults.append(f"... and {len(changed) - _SHOWN} more differences between items")
    if faults:
        raise UserError(
            f"{before} and {after} cannot be compared; what differs:\n       " + "\n       ".join(faults),
            "evaluate both models on the same data with the same --prompt, --mode, --max-new-tokens and --max-tiles",
        )


def pair(old: Sequence[Line], new: Sequence[Line]) -> tuple[Pairs, list[tuple[Line, Line]], list[tuple[Line, Line]]]:
    """(counts, fixed items, broken items) of predictions with the same ids, in the order of the first."""
    by_id = {line["id"]: line for line in new}
    both = [(line, by_id[line["id"]]) for line in old]
    fixed = [(a, b) for a, b in both if not a["correct"] and b["correct"]]
    broken = [(a, b) for a, b in both if a["correct"] and not b["correct"]]
    right = sum(a["correct"] and b["correct"] for a, b in both)
    return Pairs(right, len(fixed), len(broken), len(both) - right - len(fixed) - len(broken)), fixed, broken


def said(line: Line) -> str:
    """What the model answered, as a person would read it: its words, or the choice it found most likely."""
    if line["mode"] != "likelihood":
        return str(line["raw"])
    return "" if line["parsed"] is None else str(line["choices"][line["parsed"]])


def _item(old: Line, new: Line) -> dict[str, Any]:
    return {
        "id": old["id"],
        "question": old["question"],
        "choices": old["choices"],
        "right": old["choices"][old["answer"]],
        "before": said(old),
        "after": said(new),
        "tags": old["tags"],
    }


def _side(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    keys = ("n", "correct", "accuracy", "interval", "unparsed", "ties", "tags", "model", "data", "versions")
    seen = {key: summary[key] for key in ("scored_on_training_items", "scored_on_training_items_reason")}
    return {"folder": str(folder.resolve()), **{key: summary[key] for key in keys if key in summary}, **seen}


def _tags(old: dict[str, Any], new: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # Tags are labels, not part of an item's identity: a value that only one side has is left to summary.json.
    return {
        tag: {value: {"before": score, "after": new[tag][value]} for value, score in values.items() if value in new[tag]}
        for tag, values in old.items()
        if tag in new
    }


def compare(before: Path, after: Path) -> dict[str, Any]:
    """The comparison as plain values, the content of report.json.

    Raises: UserError when one is no finished evaluation, or they are not of the same items under the same protocol.
    """
    (old, old_lines), (new, new_lines) = read_evaluation(before), read_evaluation(after)
    _refuse_different(before, after, (old["protocol"], new["protocol"]), (old_lines, new_lines))
    pairs, fixed, broken = pair(old_lines, new_lines)
    difference, low, high = paired_difference(pairs)
    sides = {"before": _side(before, old), "after": _side(after, new)}
    flags = [side["scored_on_training_items"] for side in sides.values()]
    return {
        "kind": "intervale comparison",
        "n": pairs.n,
        "pairs": {"both_right": pairs.both_right, "fixed": pairs.fixed, "broken": pairs.broken, "both_wrong": pairs.both_wrong},
        "difference": {"value": difference, "interval": [low, high], "method": "Newcombe 1998, paired, method 10; 95%"},
        "mcnemar": {"p": mcnemar(pairs.fixed, pairs.broken), "method": "exact binomial, two-sided"},
        "scored_on_training_items": True if True in flags else None if None in flags else False,
        "protocol": old["protocol"],
        "chance": old["chance"],
        **sides,
        "tags": _tags(old["tags"], new["tags"]),
        "fixed": [_item(*both) for both in fixed],
        "broken": [_item(*both) for both in broken],
    }


def write_report(found: dict[str, Any], out: Path) -> None:
    """DIR/report.json and DIR/report.html, each complete or absent; an earlier report is replaced.

    Raises: UserError when `out` is a file or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "give --out a folder")
    write_json(out / REPORT_JSON, found)
    write_atomic(out / REPORT_HTML, report_html(found))
