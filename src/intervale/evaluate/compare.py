"""Two evaluations of the same items, paired: what was fixed, what broke, and whether chance explains it. No torch here.

Promises: items are joined by id and must be the same in question, choices, answer and the content of their pictures; the protocols must
be the same; anything else is refused with a list of what differs. Cost: reading two folders, two bootstraps; for the page, decoding the pictures it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import write_atomic, write_json
from intervale.core.lang import in_language, language
from intervale.evaluate.calibration import calibration
from intervale.evaluate.folder import read_evaluation
from intervale.evaluate.free import GRADED
from intervale.evaluate.groups import by_tag
from intervale.evaluate.model_card import note_report
from intervale.evaluate.others import refuse_different, standings
from intervale.evaluate.published import beside
from intervale.evaluate.report import report_html
from intervale.evaluate.statistics import (
    BOOTSTRAP_SEED,
    RESAMPLES,
    Pairs,
    bootstrap_difference,
    detectable,
    mcnemar,
    paired_difference,
)
from intervale.evaluate.training_card import training_card

REPORT_HTML, REPORT_JSON = "report.html", "report.json"
KIND = "intervale comparison"
Line = dict[str, Any]


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
        "right": old["choices"][old["answer"]] if old["choices"] else old["reference"],
        "before": said(old),
        "after": said(new),
        "before_choice": _choice(old),
        "after_choice": _choice(new),
        "tags": old["tags"],
    } | ({"f1": [old["f1"], new["f1"]]} if not old["choices"] else {})


def _side(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    keys = ("n", "correct", "accuracy", "interval", "unparsed", "ties", "unseen", "refused", "empty", "cut_off", "accuracies", "means", "tags", "model", "data",
            "hashes", "seeds", "seen", "versions")  # fmt: skip
    seen = {key: summary[key] for key in ("scored_on_training_items", "scored_on_training_items_reason")}
    return {"folder": str(folder.resolve()), **{key: summary[key] for key in keys if key in summary}, **seen}


def _groups(old: Sequence[Line]) -> list[str]:
    """What each item shares its chance with: its pictures, by content where that is on file; without pictures, nothing."""
    return [" ".join(line.get("pictures") or _images(line)) or f"alone {line['id']}" for line in old]


def _difference(pairs: Pairs, old: Sequence[Line], new: Sequence[Line]) -> dict[str, Any]:
    value, low, high = paired_difference(pairs)
    groups = _groups(old)
    ends = bootstrap_difference([bool(line["correct"]) for line in old], [bool(line["correct"]) for line in new], groups)
    drawn = {"interval": list(ends) if ends else None, "groups": len(set(groups)), "seed": BOOTSTRAP_SEED, "resamples": RESAMPLES}
    return {
        "value": value,
        "interval": [low, high],
        "method": "Newcombe 1998, paired, method 10; 95%",
        "bootstrap": {**drawn, "method": "paired, whole pictures drawn, percentile; 95%"},
    }


def _graded(old: Sequence[Line], new: Sequence[Line]) -> dict[str, Any] | None:
    """The mean of each graded measure of open answers, before and after; None for questions with choices."""
    if not old or old[0]["choices"]:
        return None
    found = {}
    for name in GRADED:
        one, two = [line[name] for line in old], [line[name] for line in new]
        ends = bootstrap_difference(one, two, _groups(old))
        means = sum(one) / len(one), sum(two) / len(two)
        found[name] = {"before": means[0], "after": means[1], "difference": means[1] - means[0], "interval": list(ends) if ends else None}
    return found


def _calibrations(old: Sequence[Line], new: Sequence[Line]) -> dict[str, Any] | None:
    before, after = calibration(old), calibration(new)
    return {"before": before, "after": after} if before and after else None


def compare(before: Path, after: Path, others: Sequence[Path] = ()) -> dict[str, Any]:
    """The comparison as plain values, the content of report.json; `others` are more evaluations of the same items, to stand beside.

    Raises: UserError when one is no finished evaluation, or they are not of the same items under the same protocol.
    """
    (old, old_lines), (new, new_lines) = read_evaluation(before), read_evaluation(after)
    refuse_different(before, after, (old["protocol"], new["protocol"]), (old_lines, new_lines))
    paired = pair(old_lines, new_lines)
    by_id = {line["id"]: line for line in new_lines}
    new_lines = [by_id[line["id"]] for line in old_lines]
    pairs = paired.counts()
    sides = {"before": _side(before, old), "after": _side(after, new)}
    flags = [side["scored_on_training_items"] for side in sides.values()]
    tags, family = by_tag(old_lines, new_lines)
    changed = (pairs.fixed + pairs.broken) / pairs.n
    return {
        "kind": KIND,
        "n": pairs.n,
        "pairs": {"both_right": pairs.both_right, "fixed": pairs.fixed, "broken": pairs.broken, "both_wrong": pairs.both_wrong},
        "difference": _difference(pairs, old_lines, new_lines),
        "mcnemar": {"p": mcnemar(pairs.fixed, pairs.broken), "method": "exact binomial, two-sided"},
        "power": {"changed": changed, "detectable": detectable(pairs.n, changed), "power": 0.8, "alpha": 0.05},
        "scored_on_training_items": True if True in flags else None if None in flags else False,
        "pictures_compared": all("pictures" in line for line in old_lines),
        "protocol": old["protocol"],
        "chance": old["chance"],
        **sides,
        "tags": tags,
        "holm": family,
        "graded": _graded(old_lines, new_lines),
        "calibration": _calibrations(old_lines, new_lines),
        "others": standings(others, (after, new, new_lines)),
        "published": beside(new, new_lines),
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
    note_report(found, out / REPORT_JSON)
    write_atomic(out / REPORT_HTML, report_html(found, extra))
    second = "en" if language() == "zh" else "zh"
    with in_language(second):
        write_atomic(out / f"report.{second}.html", report_html(found, extra))


def _weights(model: dict[str, Any]) -> tuple[Any, Any]:
    return model.get("fingerprint"), model.get("checkpoint_fingerprint")
