"""Two evaluations group by group: each value of a tag with its pairs, its own test, and how that reads among so many.

Promises: every group that is shown is in the family that Holm's correction counts, whatever its result, so that looking at many groups
finds no more by chance than looking at one. Cost: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intervale.evaluate.folder import telling_tags
from intervale.evaluate.statistics import Pairs, detectable, holm, mcnemar, paired_difference, wilson

Line = dict[str, Any]


def _score(lines: Sequence[Line]) -> dict[str, Any]:
    right = sum(bool(line["correct"]) for line in lines)
    return {"n": len(lines), "correct": right, "accuracy": right / len(lines), "interval": list(wilson(right, len(lines)))}


def _group(both: Sequence[tuple[Line, Line]]) -> dict[str, Any]:
    outcomes = [(bool(old["correct"]), bool(new["correct"])) for old, new in both]
    counts = (outcomes.count(kind) for kind in ((True, True), (False, True), (True, False), (False, False)))
    pairs = Pairs(*counts)
    value, low, high = paired_difference(pairs)
    return {
        "before": _score([old for old, _ in both]),
        "after": _score([new for _, new in both]),
        "fixed": pairs.fixed,
        "broken": pairs.broken,
        "difference": {"value": value, "interval": [low, high]},
        "p": mcnemar(pairs.fixed, pairs.broken),
        "detectable": detectable(pairs.n, (pairs.fixed + pairs.broken) / pairs.n),
    }


def by_tag(old: Sequence[Line], new: Sequence[Line]) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, Any]]:
    """({tag: {value: group}}, {"family": how many groups were tested, "tags": which, "found": how many stand after Holm}).

    An item belongs to a group when both evaluations say so: tags are labels, not a part of its identity. Groups of tags with too many
    values to tell anything (`telling_tags`) have no `p_holm` and are no part of the family.
    """
    others = {line["id"]: line for line in new}
    groups: dict[str, dict[str, list[tuple[Line, Line]]]] = {}
    for line in old:
        other = others[line["id"]]
        for tag, value in line["tags"].items():
            if other["tags"].get(tag) == value:
                groups.setdefault(tag, {}).setdefault(value, []).append((line, other))
    found = {tag: {value: _group(both) for value, both in values.items()} for tag, values in groups.items()}
    tags = telling_tags(found, len(old))
    family = [group for tag in tags for group in found[tag].values()]
    for group, adjusted in zip(family, holm([group["p"] for group in family]), strict=True):
        group["p_holm"] = adjusted
    return found, {"family": len(family), "tags": tags, "found": sum(group["p_holm"] < 0.05 for group in family)}
