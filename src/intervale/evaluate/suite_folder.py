"""A suite's folder: protocol.json and answers.jsonl as it goes; at the end a folder a combination, and suite.json last.

    OUT/protocol.json   what was asked of which model
    OUT/answers.jsonl   a line an asking: key, what was said, the letters' scores
    OUT/sivqa-zh/0-strict/{protocol.json,predictions.jsonl,summary.json}   a finished evaluation, as `compare` reads it
    OUT/suite.json      every combination's numbers, the tables, what was left out, what it cost

Promises: everything but the answers is made from the answers alone, so it is the same whenever they were given. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intervale.core.errors import UserError
from intervale.core.files import read_json, read_object, set_aside, write_atomic, write_json
from intervale.core.lang import say
from intervale.core.records import data_digest
from intervale.core.runlog import differences, versions
from intervale.evaluate.folder import PREDICTIONS, PROTOCOL, SUMMARY, append_line, read_lines
from intervale.evaluate.foodieqa import Asking
from intervale.evaluate.identity import pictures_digest
from intervale.evaluate.kept_features import begun_with
from intervale.evaluate.provenance import about
from intervale.evaluate.run import summarise
from intervale.evaluate.suite_score import COUNTS, circular, mode_counts, read_answer, shown_positions, tables

if TYPE_CHECKING:
    from intervale.evaluate.suite import Asker, Settings
    from intervale.evaluate.suite_data import Part, SuiteData

Tell = Callable[[str], None]
ANSWERS, SUITE = "answers.jsonl", "suite.json"


def open_suite(out: Path, identity: dict[str, Any], fresh: bool, tell: Callable[[str], None]) -> tuple[str, dict[str, Any] | None]:
    """('new' or 'resume', None), or ('done', suite.json). Raises: UserError when `out` holds something else, or another suite."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / PROTOCOL).is_file() or "suite" not in read_object(out / PROTOCOL):
            raise UserError(f"{out} exists and is not a suite", "choose another --out, or remove it")
        if not fresh:
            told = differences(read_json(out / PROTOCOL), identity)
            if told:
                raise UserError(
                    f"{out} holds another suite; what differs:\n       " + "\n       ".join(told),
                    "choose another --out, or --fresh to start over (the old folder is kept beside)",
                )
            if (out / SUITE).is_file():
                tell(say(f"{out}: already evaluated; --fresh would start over", f"{out}：已评测过；--fresh 可重新开始"))
                return "done", read_suite_json(out)
            return "resume", None
        aside = set_aside(out)
        tell(say(f"the earlier suite is kept as {aside}", f"先前的评测保留在 {aside}"))
    return "new", None


def begin_suite(out: Path, identity: dict[str, Any]) -> None:
    """Write protocol.json, after which answers may follow."""
    write_json(out / PROTOCOL, identity)


def read_suite_json(folder: Path) -> dict[str, Any]:
    """suite.json of a finished suite. Raises: UserError when there is none."""
    if not (folder / SUITE).is_file():
        raise UserError(f"{folder}: no finished suite (no {SUITE} in it)", "name a folder that `intervale evaluate --suite` finished")
    return read_object(folder / SUITE, "combinations", "tables")


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of answers.jsonl; a half line at its end (a crash) is cut off the file. Raises: UserError for damage elsewhere."""
    return read_lines(folder / ANSWERS, "key", "answer")


def append_answer(folder: Path, answer: dict[str, Any]) -> None:
    """Add one line and hand it to the operating system. Raises: UserError on a full disk."""
    append_line(folder / ANSWERS, answer)


def combination_folder(combination: Sequence[str], mode: str) -> str:
    """Where a combination lies below the suite's folder: sivqa-zh/0-strict, or sivqa-zh/0-strict-blind-turn2."""
    task, language, view, prompt, turn = combination
    return f"{task}-{language}/" + "-".join([prompt, mode, *([view] if view != "picture" else []), *([turn] if turn != "as-is" else [])])


def write_suite(
    out: Path, data: SuiteData, settings: Settings, asker: Asker, identity: dict[str, Any], askings: Sequence[Asking], tell: Tell
) -> dict[str, Any]:
    """Make everything from the answers on file: the combinations' folders, then suite.json, which is returned."""
    answers = {answer["key"]: answer for answer in read_answers(out)}
    groups: dict[tuple[str, str, str, str, str], list[Asking]] = {}
    for asking in askings:
        groups.setdefault(asking.combination, []).append(asking)
    parts = {(part.task, part.language): part for part in data.parts}
    model = asker.about()
    facts = {key: identity["data"]["-".join(key)] for key in parts}
    abouts = {key: {"model": model, **about(asker.folder, part.source, part.as_trained(), facts[key], tell)} for key, part in parts.items()}
    rows: list[dict[str, Any]] = []
    turns: dict[tuple[str, str, str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for combination, own in groups.items():
        task, language, view, prompt, turn = combination
        for mode in settings.modes:
            read = [
                read_answer(asking, answers[asking.key], mode, settings.fallback, settings.seed)
                | {"pictures": data.keys[asking.plain.images]}
                for asking in own
            ]
            protocol = _protocol(combination, mode, settings, asker.protocol())
            where = out / combination_folder(combination, mode)
            summary = _write_combination(where, read, protocol, parts[task, language], abouts[task, language], identity["model"])
            rows.append(_row(combination, mode, combination_folder(combination, mode), summary))
            turns.setdefault((task, language, view, prompt, mode), {})[turn] = read
    found = {
        "kind": "intervale suite", **identity, "model": model, "versions": versions(),
        "combinations": rows, "tables": tables(rows), "rotations": _rotations(turns, settings),
        "left_out": [_left_out(part) for part in data.parts], "features_read": len(begun_with(out, len(answers)) or ()),
        "used": used([answers[asking.key] for asking in askings], asker.price),
    }  # fmt: skip
    write_json(out / SUITE, found)
    return found


def _protocol(combination: Sequence[str], mode: str, settings: Settings, limits: dict[str, Any]) -> dict[str, Any]:
    """How all items of a combination were asked and scored: two of them compare only if this is the same."""
    task, language, view, prompt, turn = combination
    new = None if mode == "likelihood" else limits.get("max_new_tokens")
    found: dict[str, Any] = {"prompt": "foodieqa", "mode": mode, **limits, "max_new_tokens": new}
    found |= {"headline": "sum" if mode == "likelihood" else None, "suite": "foodieqa", "task": task, "language": language}
    found |= {"view": view, "wording": prompt, "turn": turn, "prefix_as": settings.prefix_as}
    if mode == "official":
        found["fallback"] = settings.fallback
    if turn == "seeded" or (mode == "official" and settings.fallback == "random"):
        found["seed"] = settings.seed
    return found


def _write_combination(
    folder: Path, lines: list[dict[str, Any]], protocol: dict[str, Any], part: Part, told: dict[str, Any], identity: dict[str, Any]
) -> dict[str, Any]:
    """A combination's folder as a finished evaluation; its summary."""
    asked = {line["id"] for line in lines}
    facts: dict[str, Any] = {"items": len(lines), "digest": data_digest([plain for plain in part.plains if plain.id in asked])}
    facts["pictures"] = pictures_digest([line["pictures"] for line in lines])
    told = told | {"hashes": told["hashes"] | {"data": facts["digest"], "pictures": facts["pictures"]}}
    told["seeds"] = told["seeds"] | {"evaluation": protocol.get("seed")}
    counts = mode_counts(lines, protocol["mode"], protocol.get("fallback", ""))
    summary = {
        **summarise([line | {"tokens": line["tokens"] or 0} for line in lines]), **counts, **shown_positions(lines),
        "protocol": protocol, "data": {"file": str(part.source.resolve()), "in_file": part.in_file, **facts}, **told, "versions": versions(),
    }  # fmt: skip
    write_json(folder / PROTOCOL, {"protocol": protocol, "model": identity, "data": facts})
    write_atomic(folder / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
    write_json(folder / SUMMARY, summary)
    return summary


def _row(combination: Sequence[str], mode: str, name: str, summary: dict[str, Any]) -> dict[str, Any]:
    """A combination's row of suite.json."""
    place = dict(zip(("task", "language", "view", "prompt", "turn"), combination, strict=True))
    keys = ("n", "correct", "accuracy", "interval", "chance", *COUNTS, "fallback", "scored_on_training_items")
    return {**place, "mode": mode, "folder": name, **{key: summary[key] for key in keys if key in summary}}


def _rotations(turns: dict[tuple[str, str, str, str, str], dict[str, list[dict[str, Any]]]], settings: Settings) -> list[dict[str, Any]]:
    """With every rotation asked, what each prompt's turns say together."""
    if settings.rotate != "all":
        return []
    names = ("task", "language", "view", "prompt", "mode")
    return [dict(zip(names, place, strict=True)) | circular(own) for place, own in turns.items()]


def _left_out(part: Part) -> dict[str, Any]:
    """What was not asked of a part's file: the numbers add up to it."""
    return {
        "task": part.task, "language": part.language, "file": str(part.source), "in_file": part.in_file, "asked": len(part.items),
        "not_chosen": part.not_chosen, "left_out": [{"where": fault.where, "kind": fault.kind, "what": fault.what} for fault in part.left_out],
    }  # fmt: skip


def used(answers: Sequence[dict[str, Any]], price: Callable[[int, int], float | None]) -> dict[str, Any]:
    """What the answers took: tokens (of `untold` answers nobody told them), seconds added up, price where it is known."""
    prompt, new = (sum(answer[name] or 0 for answer in answers) for name in ("prompt_tokens", "tokens"))
    untold = sum(answer["prompt_tokens"] is None or answer["tokens"] is None for answer in answers)
    seconds = round(sum(answer["seconds"] for answer in answers), 2)
    return {
        "askings": len(answers),
        "prompt_tokens": prompt,
        "tokens": new,
        "untold": untold,
        "seconds": seconds,
        "price": price(prompt, new),
    }
