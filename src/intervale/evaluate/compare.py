"""Two evaluations of the same items, paired: what was fixed, what broke, and whether chance explains it. No torch here.

Promises: items are joined by id and must be the same in question, choices and answer; the protocols must be the same; anything
else is refused with a list of what differs. Cost: reading two folders; for the page, decoding the pictures it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import write_atomic, write_json
from intervale.core.lang import in_language, language
from intervale.core.runlog import differences
from intervale.evaluate.folder import read_evaluation
from intervale.evaluate.report import report_html
from intervale.evaluate.statistics import Pairs, mcnemar, paired_difference
from intervale.evaluate.training_card import training_card

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


@dataclass(frozen=True)
class Paired:
    """(before, after) predictions of the same items by how the two models did, each list in the order of the first evaluation."""

    both_right: list[tuple[Line, Line]]
    fixed: list[tuple[Line, Line]]
    broken: list[tuple[Line, Line]]
    both_wrong: list[tuple[Line, Line]]

    def counts(self) -> Pairs:
        """How many there are of each."""
        return Pairs(len(self.both_right), len(self.fixed), len(self.broken), len(self.both_wrong))


def pair(old: Sequence[Line], new: Sequence[Line]) -> Paired:
    """Predictions with the same ids, side by side."""
    by_id = {line["id"]: line for line in new}
    found = Paired([], [], [], [])
    lists = {(True, True): found.both_right, (False, True): found.fixed, (True, False): found.broken, (False, False): found.both_wrong}
    for line in old:
        other = by_id[line["id"]]
        lists[bool(line["correct"]), bool(other["correct"])].append((line, other))
    return found


def said(line: Line) -> str:
    """What the model answered, as a person would read it: its words, or the choice it found most likely."""
    if line["mode"] != "likelihood":
        return str(line["raw"])
    return _choice(line) or ""


def _choice(line: Line) -> str | None:
    return None if line["parsed"] is None else str(line["choices"][line["parsed"]])


def _images(*lines: Line) -> list[str]:
    """The item's pictures, by their paths from the data's folder; none where the evaluation did not note them."""
    return next(([str(name) for name in line["images"]] for line in lines if isinstance(line.get("images"), list)), [])


def _item(old: Line, new: Line) -> dict[str, Any]:
    return {
        "id": old["id"],
        "question": old["question"],
        "images": _images(new, old),
        "choices": old["choices"],
        "right": old["choices"][old["answer"]],
        "before": said(old),
        "after": said(new),
        "before_choice": _choice(old),
        "after_choice": _choice(new),
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
    paired = pair(old_lines, new_lines)
    pairs = paired.counts()
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
        "training": training_card(new.get("model") or {}),
        **{name: [_item(*both) for both in getattr(paired, name)] for name in ("fixed", "broken", "both_wrong", "both_right")},
    }


def write_report(found: dict[str, Any], out: Path, extra: dict[str, Any] | None = None) -> None:
    """DIR/report.json and DIR/report.html, each complete or absent; an earlier report is replaced. The page is also there in the other
    language (`report.zh.html` or `report.en.html`): a server's page shows its visitors theirs.

    `extra` is another comparison of the same two models (say, by likelihood): a row under the headline, "also" in report.json.
    Raises: UserError when `out` is a file or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "give --out a folder")
    for side in ("before", "after") if extra else ():
        one, other = (_weights(told[side]["model"]) for told in (found, extra or {}))
        assert one == other, f"`extra` compares other models ({side}: {other}, not {one})"
    write_json(out / REPORT_JSON, found if extra is None else found | {"also": extra})
    write_atomic(out / REPORT_HTML, report_html(found, extra))
    second = "en" if language() == "zh" else "zh"
    with in_language(second):
        write_atomic(out / f"report.{second}.html", report_html(found, extra))


def _weights(model: dict[str, Any]) -> tuple[Any, Any]:
    return model.get("fingerprint"), model.get("checkpoint_fingerprint")
