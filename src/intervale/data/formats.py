"""Other tools' data files as records: LLaVA conversations, ms-swift messages, OpenAI parts.

Promises: every item of the file is either a Sample or a Fault with its place in the file; pictures stand first in their turn
unless the text around them refers to them; a key that is not understood is counted, never dropped in silence. No picture is
opened here. A key `split` of an item is the side its source puts it on. Cost: the whole file in memory, one JSON parse.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError, nearest
from intervale.core.files import inside, parse_json, read_text
from intervale.core.records import IMAGE, Record, parse_record, read_lines

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "developer": "system"}
_PASSED_ON = ("id", "choices", "answer", "tags")
SIDES = {"train": "train", **dict.fromkeys(("test", "eval", "validation", "val", "dev"), "eval")}  # what a source may call a side
_OTHER_MEDIA = ("video", "videos", "audio", "audios", "tools")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: `where` (file:line, or file and item), a short `kind`, what it is, and what to do."""

    where: str
    kind: str
    what: str
    fix: str


@dataclass(frozen=True)
class Sample:
    """A record whose `images` are the names under the output folder, and the source file of each of them.

    `side` is where the source's own split puts it: train, eval, or None when it does not say.
    """

    record: Record
    files: tuple[Path, ...]
    side: str | None = None


@dataclass(frozen=True)
class Reading:
    """What a data file held: samples and faults in the order of the file, and counts worth telling (name -> number)."""

    source: Path
    samples: tuple[Sample, ...]
    faults: tuple[Fault, ...]
    counts: dict[str, int]


def fault_of(error: UserError, where: str, kind: str) -> Fault:
    """A UserError as a Fault; its text loses the place it starts with."""
    return Fault(where, kind, error.what.removeprefix(f"{where}: "), error.fix)


def entries(path: Path) -> tuple[list[tuple[str, Any]], list[Fault]]:
    """(place, JSON value) of every item of a JSON list or a JSON-lines file, and the lines that are not JSON.

    Raises: UserError when the file cannot be read, is no valid JSON list, or holds nothing.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder", "name the data file in it")
    text = read_text(path)
    found: list[tuple[str, Any]] = []
    faults: list[Fault] = []
    if text.lstrip().startswith("["):
        for number, item in enumerate(parse_json(text, str(path)), 1):
            name = (
                next((item[key] for key in ("id", "question_id", "qid") if item.get(key) is not None), None)
                if isinstance(item, dict)
                else None
            )
            found.append((f"{path}: item {number}" + (f" (id {str(name)[:80]})" if name is not None else ""), item))
    elif path.suffix.lower() == ".json":
        value = parse_json(text, str(path))
        raise UserError(
            f"{path}: the file holds {type(value).__name__}, not a list of items", "name a JSON list, or a .jsonl file with one item a line"
        )
    else:
        for where, line in read_lines(path):
            try:
                found.append((where, parse_json(line, where)))
            except UserError as error:
                faults.append(fault_of(error, where, "json"))
    if not found and not faults:
        raise UserError(f"{path}: no items", "a data set needs at least one item")
    return found, faults


def collect(path: Path, adapt: Callable[[dict[str, Any], str, int], list[Sample]], counts: Counter[str]) -> Reading:
    """Run `adapt(item, where, number)` over a file; what it refuses, and what has the id of an earlier item, is a fault."""
    found, faults = entries(path)
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    for number, (where, item) in enumerate(found, 1):
        try:
            if not isinstance(item, dict):
                raise UserError(f"{where}: an item must be a JSON object", "correct the item, or remove it")
            new = adapt(item, where, number)
            for sample in new:
                if sample.record.id in seen:
                    raise UserError(
                        f"{where}: the id {sample.record.id!r} stands already at {seen[sample.record.id]}",
                        "give every item an id of its own (where ids are optional, remove them all)",
                    )
        except UserError as error:
            faults.append(fault_of(error, where, "item"))
            continue
        seen.update({sample.record.id: where for sample in new})
        samples += new
    return Reading(path, tuple(samples), tuple(faults), dict(counts))


def locate(name: Any, root: Path, where: str) -> tuple[str, Path]:
    """A picture's path in a data file as (its name under the output folder, the file): below `root` or refused.

    The name keeps the path below `root`; `images/` is put before it unless it starts so. Raises: UserError.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: a picture must be a path, not {str(name)[:80]!r}", 'write "images/a.jpg"')
    if name.startswith(("http://", "https://", "data:")):
        raise UserError(
            f"{where}: {name[:80]!r} is not a file", "save the picture below the image folder and name it by its path from there"
        )
    name = name.removeprefix("file://")
    if Path(name).is_absolute():
        try:
            name = str(Path(name).resolve().relative_to(root.resolve()))
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(
                f"{where}: {name[:200]!r} is not below {root}", f"put the picture below {root}, or name another image folder"
            ) from error
    file = inside(root, name, where)
    tidy = posixpath.normpath(name)
    if tidy.startswith(".."):
        tidy = file.relative_to(root.resolve()).as_posix()
    return (tidy if tidy.startswith("images/") else f"images/{tidy}"), file


def pictures_first(text: str) -> str:
    """`question\\n<image>` as `<image>\\nquestion`; marks with text on both sides of one of them stay where they are."""
    parts = text.split(IMAGE)
    words = [part.strip() for part in parts if part.strip()]
    if len(parts) == 1 or len(words) > 1:
        return text
    return "\n".join([IMAGE] * (len(parts) - 1) + words)


def _side(item: dict[str, Any], where: str) -> str | None:
    """The side an item's `split` names. Raises: UserError for a word that names none."""
    value = item.get("split")
    if value is None:
        return None
    side = SIDES.get(value.strip().casefold()) if isinstance(value, str) else None
    if side is None:
        raise UserError(f"{where}: 'split' is {str(value)[:80]!r}", f"use one of {', '.join(SIDES)}, or remove the key from every item")
    return side


def build(turns: list[tuple[str, str]], names: list[Any], item: dict[str, Any], where: str, number: int, root: Path) -> Sample:
    """A Sample from (role, text) turns and picture paths. Raises: UserError for anything a record does not allow.

    Without any mark the pictures go to the front of the first user turn (the official rule); otherwise marks and pictures
    must be as many. Every answer must have text, and there must be one.
    """
    if names and not any(IMAGE in text for _, text in turns):
        first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if first is not None:
            turns[first] = ("user", f"{IMAGE}\n" * len(names) + turns[first][1])
    messages = [{"role": role, "content": pictures_first(text) if role == "user" else text} for role, text in turns]
    located = [locate(name, root, where) for name in names]
    fields = {key: item[key] for key in _PASSED_ON if item.get(key) is not None}
    record = parse_record({"messages": messages, "images": [name for name, _ in located], **fields}, where, Path(), number)
    answers = [message.content for message in record.messages if message.role == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise UserError(f"{where}: {'an answer is empty' if answers else 'there is no answer'}", "write the answer, or remove the item")
    return Sample(record, tuple(file for _, file in located), _side(item, where))


def _count_ignored(item: dict[str, Any], known: Iterable[str], where: str, counts: Counter[str]) -> None:
    for key, value in item.items():
        if key in _OTHER_MEDIA and value:
            raise UserError(f"{where}: {key!r} is not supported", "only text and pictures are; remove the item")
        if key not in known:
            counts[f"ignored key {key!r}"] += 1


def _speaker(turn: Any, keys: tuple[str, ...], where: str, number: int) -> str:
    said = next((turn[key] for key in keys if key in turn), None) if isinstance(turn, dict) else None
    if said not in _SPEAKERS:
        raise UserError(
            f"{where}: turn {number} is from {said!r}{nearest(str(said), _SPEAKERS)}",
            f"use one of {', '.join(_SPEAKERS)}",
        )
    return _SPEAKERS[said]


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _llava_turns(raw: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: 'conversations' must be a non-empty list", 'write [{"from": "human", "value": "..."}, ...]')
    turns = []
    for number, turn in enumerate(raw, 1):
        role = _speaker(turn, ("from", "role"), where, number)
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise UserError(f"{where}: turn {number} has no text", 'write {"from": "human", "value": "..."}')
        turns.append((role, text))
    return turns


def read_llava(path: Path, image_root: Path) -> Reading:
    """LLaVA's format, JSON list or JSON lines: {"image": str | list | null, "conversations": [{"from", "value"}]}.

    Pictures are looked for below `image_root`. Raises: UserError when the file as a whole cannot be read.
    """
    counts: Counter[str] = Counter()

    def adapt(item: dict[str, Any], where: str, number: int) -> list[Sample]:
        _count_ignored(item, ("image", "images", "conversations", "split", *_PASSED_ON), where, counts)
        names = _as_list(item.get("image")) + _as_list(item.get("images"))
        return [build(_llava_turns(item.get("conversations"), where), names, item, where, number, image_root)]

    return collect(path, adapt, counts)


def _part(part: Any, listed: list[Any], where: str) -> tuple[str, Any | None]:
    """One OpenAI content part as (text, picture path or None); a bare {"type": "image"} takes the next of `listed`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], None
    if kind in ("image", "image_url"):
        value = next((part[key] for key in ("image_url", "image", "path", "url") if key in part), None)
        if isinstance(value, dict):
            value = next((value[key] for key in ("url", "path") if key in value), None)
        if value is None and listed:
            value = listed.pop(0)
        return IMAGE, value if value is not None else ""
    raise UserError(f"{where}: a content part of type {kind!r} is not supported", "use parts of type text, image or image_url")


def _messages_turns(raw: Any, listed: list[Any], where: str) -> tuple[list[tuple[str, str]], list[Any]]:
    """(role, text) turns and the pictures in the order of their marks."""
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: 'messages' must be a non-empty list", 'write [{"role": "user", "content": "..."}, ...]')
    turns: list[tuple[str, str]] = []
    names: list[Any] = []
    for number, message in enumerate(raw, 1):
        role = _speaker(message, ("role",), where, number)
        content = message.get("content")
        if isinstance(content, str):
            names += [listed.pop(0) for _ in range(min(content.count(IMAGE), len(listed)))]
            turns.append((role, content))
        elif isinstance(content, list):
            parts = [_part(part, listed, where) for part in content]
            names += [name for _, name in parts if name is not None]
            turns.append((role, "".join(text for text, _ in parts)))
        else:
            raise UserError(f"{where}: message {number} has no text", 'write {"role": "user", "content": "..."}')
    return turns, names + listed


def read_messages(path: Path, image_root: Path) -> Reading:
    """ms-swift's {"messages", "images"} and OpenAI's content parts; our own record passes through unchanged.

    Pictures are local paths below `image_root`; parts of a turn are joined without a separator, as every peer does.
    Raises: UserError when the file as a whole cannot be read.
    """
    counts: Counter[str] = Counter()

    def adapt(item: dict[str, Any], where: str, number: int) -> list[Sample]:
        _count_ignored(item, ("messages", "images", "split", *_PASSED_ON), where, counts)
        pictures = _as_list(item.get("images"))
        listed = [entry.get("path", "") if isinstance(entry, dict) else entry for entry in pictures]
        turns, names = _messages_turns(item.get("messages"), listed, where)
        return [build(turns, names, item, where, number, image_root)]

    return collect(path, adapt, counts)
