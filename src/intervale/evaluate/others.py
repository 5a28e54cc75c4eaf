"""More than two models on the same items: what may stand in one table, and how each of the others compares with the one in question.

Promises: items and pictures must be the same and asked alike; only what a server decides for itself (how it cuts pictures) may differ, and
is told. Every other model's test is in one family under Holm's correction. Cost: reading the folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.runlog import differences
from intervale.evaluate.folder import read_evaluation
from intervale.evaluate.statistics import Pairs, holm, mcnemar, paired_difference

_SHOWN = 5
_SAME = ("question", "choices", "answer", "reference")
_SERVERS_OWN = ("max_tiles", "prefix_as", "extra")  # a server cuts pictures its own way
Line = dict[str, Any]


def refuse_different(
    before: Path, after: Path, protocols: tuple[Any, Any], lines: tuple[Sequence[Line], Sequence[Line]], free: Sequence[str] = ()
) -> None:
    """Raise a UserError that lists every way in which two evaluations are not of the same items asked alike; settings in `free` may differ."""
    protocols = tuple({key: value for key, value in own.items() if key not in free} for own in protocols)  # type: ignore[assignment]
    faults = [f"protocol.{told}" for told in differences(*protocols)]
    olds, news = ({line["id"]: line for line in side} for side in lines)
    for folder, own, other in ((before, olds, news), (after, news, olds)):
        if alone := [name for name in own if name not in other]:
            faults.append(f"{len(alone)} items are only in {folder}: {_named(alone)}")
    both = [(name, olds[name], news[name]) for name in olds if name in news]
    changed = [(name, told) for name, old, new in both for key in _SAME for told in differences(old.get(key), new.get(key), key)]
    faults += [f"item {name!r}: {told}" for name, told in changed[:_SHOWN]]
    if len(changed) > _SHOWN:
        faults.append(f"... and {len(changed) - _SHOWN} more differences between items")
    if repainted := [name for name, old, new in both if old.get("pictures") != new.get("pictures")]:
        faults.append(f"the pictures of {len(repainted)} items are not the same: {_named(repainted)}")
    if faults:
        raise UserError(
            f"{before} and {after} cannot be compared; what differs:\n       " + "\n       ".join(faults),
            "evaluate both models on the same data and pictures with the same --prompt, --mode, --max-new-tokens and --max-tiles",
        )


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def _standing(folder: Path, after: tuple[Path, dict[str, Any], Sequence[Line]]) -> dict[str, Any]:
    own, lines = read_evaluation(folder)
    place, summary, theirs = after
    refuse_different(folder, place, (own["protocol"], summary["protocol"]), (lines, theirs), _SERVERS_OWN)
    right = {line["id"]: bool(line["correct"]) for line in lines}
    outcomes = [(right[line["id"]], bool(line["correct"])) for line in theirs]
    pairs = Pairs(*(outcomes.count(kind) for kind in ((True, True), (False, True), (True, False), (False, False))))
    value, low, high = paired_difference(pairs)
    keys = (
        "n",
        "correct",
        "accuracy",
        "interval",
        "model",
        "hashes",
        "seen",
        "scored_on_training_items",
        "scored_on_training_items_reason",
        "used",
        "unseen",
        "refused",
    )
    return {
        "folder": str(folder.resolve()),
        **{key: own[key] for key in keys if key in own},
        "differs": {key: own["protocol"].get(key) for key in _SERVERS_OWN if own["protocol"].get(key) != summary["protocol"].get(key)},
        "against": {
            "only_after": pairs.fixed,
            "only_other": pairs.broken,
            "difference": value,
            "interval": [low, high],
            "p": mcnemar(pairs.fixed, pairs.broken),
        },
    }


def standings(folders: Sequence[Path], after: tuple[Path, dict[str, Any], Sequence[Line]]) -> list[dict[str, Any]]:
    """Each folder's evaluation against AFTER (its folder, summary and lines): numbers, `against` (AFTER minus the other, p, p_holm), `differs`.

    Raises: UserError for one of other items or pictures, or asked otherwise.
    """
    found = [_standing(folder, after) for folder in folders]
    for row, adjusted in zip(found, holm([row["against"]["p"] for row in found]), strict=True):
        row["against"]["p_holm"] = adjusted
    return found
