"""From what a model answered in the suite to lines, summaries and tables. Pure functions on text and numbers.

Promises: one answer is read in every mode that was asked for, so `strict` and `official` differ in the reading alone; what is not
recognised is counted, and what `official` falls back on is said and counted too; a maximum never stands without its mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from intervale.evaluate.folder import positions
from intervale.evaluate.foodieqa import Asking, prompts_of
from intervale.evaluate.score import most_likely, parse_letter
from intervale.evaluate.statistics import wilson

FALLBACKS = ("wrong", "a", "random")
MODES = ("strict", "official", "likelihood")
COUNTS = ("unparsed", "cut_off", "ties", "refused", "unseen")  # what a score hides
_LETTERS = "ABCD"
_TEXT, _KEPT = ("raw", "finish"), ("tokens", "prompt_tokens", "seconds", "refused")


def needs_text(modes: Sequence[str]) -> bool:
    """Do these modes read a generated answer?"""
    return bool({"strict", "official"} & set(modes))


def read_strict(raw: str, shown: Sequence[str]) -> int | None:
    """The place of the option that an answer names, by `parse_letter`: of the answer alone, else of one that follows "the answer is (".

    "B because" is no letter by itself, but after 正确答案，为（ it is: the protocol's prompts all end where the letter belongs.
    """
    found = parse_letter(raw, shown)
    return parse_letter(f"答案: ({raw.lstrip()}", shown) if found is None and raw.strip() else found


def read_official(raw: str, key: str, fallback: str, seed: int) -> tuple[int | None, bool]:
    """(place, did it fall back?): the first of A to D anywhere in the answer, however many options there are.

    Without one: `wrong` gives None, `a` the first option, `random` one of four drawn from seed and key alone. Source: foodieqa.md B6.
    """
    found = next((_LETTERS.index(char) for char in raw if char in _LETTERS), None)
    if found is not None:
        return found, False
    if fallback == "a":
        return 0, True
    if fallback == "random":
        return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") % 4, True
    return None, True


def read_answer(asking: Asking, answer: dict[str, Any], mode: str, fallback: str, seed: int) -> dict[str, Any]:
    """The line of predictions.jsonl: `shown` is the place that was named, `parsed` the item's own index of what stood there."""
    told: dict[str, Any] = {}
    if mode == "likelihood":
        scores = answer["scores"]
        shown = None if scores is None else most_likely(scores)
        told["scores"] = None if scores is None else [{"sum": value, "mean": value, "tokens": 1} for value in _as_own(scores, asking.order)]
    elif mode == "official":
        shown, fell = read_official(answer["raw"], asking.key, fallback, seed)
        told["fell_back"] = fell
    else:
        shown = read_strict(answer["raw"], asking.record.choices)
    parsed = asking.order[shown] if shown is not None and shown < len(asking.order) else None
    plain = asking.plain
    line = {
        "id": plain.id,
        "question": plain.question(),
        "images": list(plain.images),
        "choices": list(plain.choices),
        "answer": plain.answer,
        "prompt": "foodieqa",
        "mode": mode,
        **({} if mode == "likelihood" else {key: answer[key] for key in _TEXT}),
        **told,
        **{key: answer[key] for key in _KEPT if key in answer},
        "shown": shown,
        "right_shown": asking.record.answer,
        "parsed": parsed,
        "correct": parsed == plain.answer,
        "tags": plain.tags,
    }
    return line | ({"parsed_mean": parsed} if mode == "likelihood" else {})


def _as_own(scores: Sequence[float], order: Sequence[int]) -> list[float]:
    """The scores of the places as those of the item's own options."""
    return [scores[order.index(own)] for own in range(len(order))]


def shown_positions(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How often each letter was chosen and was right, as the options were shown: a model that always says A shows here."""
    return {
        "predicted_positions": positions([line["shown"] for line in lines], 4),
        "right_positions": positions([line["right_shown"] for line in lines], 4),
    }


def mode_counts(lines: Sequence[dict[str, Any]], mode: str, fallback: str) -> dict[str, Any]:
    """What a mode has to say about answers that it could not read."""
    found: dict[str, Any] = {"refused": sum("refused" in line for line in lines)}
    if mode == "official":
        fell = [line for line in lines if line["fell_back"]]
        right = sum(line["correct"] for line in fell)
        found |= {"fallback": {"policy": fallback, "used": len(fell), "right": right}, "unparsed": len(fell)}
    if mode == "likelihood":
        unseen = [line for line in lines if line["scores"] is None]
        found |= {"unseen": len(unseen), "ties": sum(line["parsed"] is None for line in lines) - len(unseen)}
    return found


def _spread(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most accuracy of a task's prompts, and which prompt gave the most."""
    best = max(rows, key=lambda row: row["accuracy"])
    shares = [row["accuracy"] for row in rows]
    return {"mean": sum(shares) / len(shares), "min": min(shares), "max": best["accuracy"], "max_prompt": best["prompt"]}


def tables(combinations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task, language, view, mode and turn: every prompt's accuracy, their mean and their maximum.

    `complete` says whether all prompts of the protocol were asked: published numbers are the maximum over all of them. What a score
    hides (COUNTS) is summed over the prompts.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in combinations:
        groups.setdefault(tuple(row[key] for key in ("task", "language", "view", "turn", "mode")), []).append(row)
    found = []
    for (task, language, view, turn, mode), rows in groups.items():
        own = prompts_of(task, language)
        prompts = {row["prompt"]: {key: row[key] for key in ("n", "correct", "accuracy", "interval")} for row in rows}
        whole: dict[str, Any] = {"task": task, "language": language, "view": view, "turn": turn, "mode": mode}
        whole |= {"n": rows[0]["n"], "chance": rows[0]["chance"], "prompts": prompts, **_spread(rows)}
        counts: dict[str, Any] = {key: sum(one[key] for one in rows) for key in COUNTS if key in rows[0]}
        if mode == "official":
            falls = [one["fallback"] for one in rows]
            counts["fallback"] = falls[0] | {key: sum(fall[key] for fall in falls) for key in ("used", "right")}
        found.append(whole | {"complete": set(own) <= set(prompts), "protocol_prompts": len(own), **counts})
    return found


def circular(lines: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Of one prompt's lines by turn: the accuracy of each turn, their mean, and how many items were right in every turn they have."""
    rights: dict[str, list[bool]] = {}
    for own in lines.values():
        for line in own:
            rights.setdefault(line["id"], []).append(line["correct"])
    shares = {turn: sum(line["correct"] for line in own) / len(own) for turn, own in lines.items()}
    all_right = sum(all(own) for own in rights.values())
    places = positions([line["shown"] for own in lines.values() for line in own], 4)
    return {
        "turns": shares, "mean": sum(shares.values()) / len(shares), "min": min(shares.values()), "max": max(shares.values()),
        "n": len(rights), "all_right": all_right, "all_right_share": all_right / len(rights), "interval": list(wilson(all_right, len(rights))),
        "predicted_positions": places,
    }  # fmt: skip
