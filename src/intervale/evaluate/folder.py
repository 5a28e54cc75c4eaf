"""An evaluation's folder: protocol.json first, predictions.jsonl as it goes, summary.json last. No torch here.

Promises: what is written stays, a line at a time; a folder without summary.json can be continued by exactly the run that began
it; a summary is a function of the lines alone. Cost: one small append an item, and one write of all when they are complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import disk_errors, parse_json, read_json, read_object, read_text, set_aside, write_atomic, write_json
from intervale.core.lang import say
from intervale.core.runlog import differences

PROTOCOL, PREDICTIONS, SUMMARY = "protocol.json", "predictions.jsonl", "summary.json"


def open_folder(out: Path, identity: dict[str, Any], fresh: bool, tell: Callable[[str], None]) -> str:
    """'new', 'resume' or 'done'; nothing is written yet (`begin` does), so that a model that cannot be loaded leaves no folder.

    Raises: UserError when `out` holds something else, or an evaluation of another protocol, model or data (listing what differs).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / PROTOCOL).is_file():
            raise UserError(f"{out} exists and is not an evaluation", "choose another --out, or remove it")
        if not fresh:
            told = differences(read_json(out / PROTOCOL), identity)
            if told:
                raise UserError(
                    f"{out} holds another evaluation; what differs:\n       " + "\n       ".join(told),
                    "choose another --out, or --fresh to start over (the old folder is kept beside)",
                )
            return "done" if (out / SUMMARY).is_file() else "resume"
        aside = set_aside(out)
        tell(say(f"the earlier evaluation is kept as {aside}", f"先前的评测保留在 {aside}"))
    return "new"


def begin(out: Path, identity: dict[str, Any]) -> None:
    """Write protocol.json, after which predictions may follow."""
    write_json(out / PROTOCOL, identity)


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of predictions.jsonl. A half line at its end (a crash) is cut off the file.

    Raises: UserError for a damaged line elsewhere, or an id that stands twice.
    """
    return read_lines(folder / PREDICTIONS, "id", "prediction")


def read_lines(path: Path, key: str, what: str) -> list[dict[str, Any]]:
    """The complete lines of a JSONL that a run adds to, each an object with a text of its own under `key`; a half line at its end (a
    crash) is cut off the file. Raises: UserError for a damaged line elsewhere, or a `key` that stands twice."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    if len(complete) != len(raw):
        with disk_errors(path), open(path, "rb+") as file:
            file.truncate(len(complete))
    lines = [parse_json(line, f"{path}:{n}") for n, line in enumerate(read_text(path).split("\n"), 1) if line]
    odd = next((n for n, line in enumerate(lines, 1) if not isinstance(line, dict) or not isinstance(line.get(key), str)), None)
    if odd is not None:
        raise UserError(f"{path}: damaged: line {odd} is no {what}", "start over with --fresh")
    twice = [name for name, count in Counter(line[key] for line in lines).items() if count > 1]
    if twice:
        raise UserError(f"{path}: the {key} {twice[0]!r} stands twice", "two runs wrote into this folder; start over with --fresh")
    return lines


def append_prediction(folder: Path, line: dict[str, Any]) -> None:
    """Add one line and hand it to the operating system. Raises: UserError on a full disk."""
    append_line(folder / PREDICTIONS, line)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one line to a JSONL and hand it to the operating system. Raises: UserError on a full disk."""
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(_as_text(line))


def in_order(folder: Path, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The predictions of exactly these ids in this order, which the file has from now on (items are asked in another).

    Raises: UserError when a line is of no item, or an item has no line: somebody else wrote into the file.
    """
    lines = read_predictions(folder)
    by_id = {line["id"]: line for line in lines}
    if odd := sorted(set(by_id) ^ set(ids)):
        raise UserError(f"{folder / PREDICTIONS}: damaged: {odd[0]!r} is not in both the file and the data", "evaluate again with --fresh")
    ordered = [by_id[name] for name in ids]
    if ordered != lines:
        write_atomic(folder / PREDICTIONS, "".join(map(_as_text, ordered)))
    return ordered


def _as_text(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def read_evaluation(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, predictions) of a finished evaluation. Raises: UserError when it is none, or not finished."""
    if not (folder / PROTOCOL).is_file():
        raise UserError(f"{folder}: not an evaluation (no {PROTOCOL} in it)", "name a folder that `intervale evaluate --out` wrote")
    if "suite" in read_object(folder / PROTOCOL):
        first = next((path.parent.relative_to(folder) for path in sorted(folder.rglob(SUMMARY))), None)
        fix = (
            f"name one of its combinations, such as {folder / first}"
            if first
            else "run the same command again; it goes on where it stopped"
        )
        raise UserError(f"{folder}: a whole suite, not one evaluation", fix)
    if not (folder / SUMMARY).is_file():
        raise UserError(
            f"{folder}: this evaluation is not finished", "run the same `intervale evaluate` again; it continues where it stopped"
        )
    summary, predictions = read_object(folder / SUMMARY, "n", "accuracy", "protocol", "tags"), read_predictions(folder)
    if len(predictions) != summary["n"]:
        raise UserError(f"{folder}: {len(predictions)} predictions, but the summary is of {summary['n']}", "evaluate again with --fresh")
    return summary, predictions


def positions(indices: Sequence[int | None], most: int) -> dict[str, int]:
    """How often each place among the choices was chosen: {'A': 3, ..., 'none': 1}. `most` is the longest list of choices."""
    names = [chr(ord("A") + n) if n < 26 else str(n + 1) for n in range(most)]
    return {name: sum(index == n for index in indices) for n, name in enumerate(names)} | {"none": sum(index is None for index in indices)}


def telling_tags(tags: dict[str, dict[str, Any]], n: int, most: int = 24) -> list[str]:
    """The tags worth a table: at most `most` values, and six items a value on average: five can show no difference (p is 0.06 at best)."""
    return [tag for tag, values in tags.items() if len(values) <= most and n >= 6 * len(values)]


def sees_choices(protocol: dict[str, Any]) -> bool:
    """Is the answer one of the choices by the way of asking? Only then is guessing right one time in so many."""
    return protocol["prompt"] != "open" or protocol["mode"] == "likelihood"
