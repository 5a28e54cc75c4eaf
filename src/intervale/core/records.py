"""The one record of every data set: a conversation with pictures, as a line of JSON.

    {"messages": [{"role": "user", "content": "<image>\\nQ"}, {"role": "assistant", "content": "A"}],
     "images": ["images/a.jpg"], "id": "vqa-1", "choices": ["..."], "answer": 0, "tags": {"question_type": "taste"}}

`prepare` writes it, `train` and `evaluate` read it, and both refuse what does not keep to it, with file, line and fix.
Nothing here opens a picture. Cost: one JSON parse a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError, nearest
from intervale.core.files import parse_json, read_text

IMAGE = "<image>"
ROLES = ("system", "user", "assistant")
_KEYS = ("messages", "images", "id", "choices", "answer", "tags")


@dataclass(frozen=True)
class Message:
    """One turn; `content` holds an `<image>` where each picture stands."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One item. `where` is its file and line, for errors; `root` is the folder its images are relative to."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    where: str = ""
    root: Path = Path()

    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to (without) its last assistant turn: what `evaluate` asks."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=len(self.messages))
        return self.messages[:last]

    def reference(self) -> str:
        """The last assistant turn, or an empty string."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")

    def question(self) -> str:
        """The last user turn without its picture marks."""
        asked = next((m.content for m in reversed(self.prompt()) if m.role == "user"), "")
        return asked.replace(IMAGE, "").strip()


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, not {json.dumps(value, ensure_ascii=False)[:80]}", "write it in quotes")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{where}: {name} holds half of a surrogate pair, which is no character", "write the text as UTF-8")
    return value


def _messages(raw: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: 'messages' must be a non-empty list", 'write [{"role": "user", "content": "..."}, ...]')
    messages = []
    for number, entry in enumerate(raw, 1):
        if not isinstance(entry, dict) or set(entry) != {"role", "content"}:
            raise UserError(f"{where}: message {number} must have exactly 'role' and 'content'", 'write {"role": "user", "content": "..."}')
        role = entry["role"]
        if role not in ROLES:
            raise UserError(f"{where}: message {number} has the role {role!r}{nearest(str(role), ROLES)}", f"use one of {', '.join(ROLES)}")
        messages.append(Message(role, _text(entry["content"], f"the content of message {number}", where)))
    check_roles(messages, where)
    return tuple(messages)


def check_roles(messages: Iterable[Message], where: str) -> None:
    """An optional system turn, then user and assistant by turns. Raises: UserError."""
    expected = "user"
    for number, message in enumerate(messages, 1):
        if message.role == "system" and number == 1:
            continue
        if message.role != expected:
            raise UserError(
                f"{where}: message {number} is from {message.role!r} where {expected!r} must speak",
                "order the turns as (system,) user, assistant, user, assistant ...",
            )
        expected = "assistant" if expected == "user" else "user"


def _images(raw: Any, where: str) -> tuple[str, ...]:
    if not isinstance(raw, list):
        raise UserError(f"{where}: 'images' must be a list of paths", 'write "images": ["images/a.jpg"]')
    return tuple(_text(name, f"image {number}", where) for number, name in enumerate(raw, 1))


def _choices(item: dict[str, Any], where: str) -> tuple[tuple[str, ...], int | None]:
    raw, answer = item.get("choices") or [], item.get("answer")
    if not isinstance(raw, list):
        raise UserError(f"{where}: 'choices' must be a list of texts", 'write "choices": ["a", "b"]')
    choices = tuple(_text(c, f"choice {n}", where) for n, c in enumerate(raw, 1))
    if answer is None:
        return choices, None
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: 'answer' is {answer!r}, but there are {len(choices)} choices", "give the index of the right choice, from 0"
        )
    return choices, answer


def parse_record(item: Any, where: str, root: Path, number: int = 1) -> Record:
    """A decoded JSON object as a Record. Raises: UserError that names `where` and the field."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: a line must be a JSON object", 'start it with {"messages": ...')
    for key in item:
        if key not in _KEYS:
            raise UserError(
                f"{where}: unknown key {key!r}{nearest(key, _KEYS)}", f"use only {', '.join(_KEYS)}; own labels go under 'tags'"
            )
    messages, images = _messages(item.get("messages"), where), _images(item.get("images") or [], where)
    marks = sum(m.content.count(IMAGE) for m in messages)
    if marks != len(images):
        raise UserError(f"{where}: {marks} {IMAGE} marks but {len(images)} images", f"put one {IMAGE} in a user turn for every picture")
    if any(IMAGE in m.content for m in messages if m.role != "user"):
        raise UserError(f"{where}: {IMAGE} outside a user turn", "pictures belong to user turns")
    choices, answer = _choices(item, where)
    tags = item.get("tags") or {}
    if not isinstance(tags, dict):
        raise UserError(f"{where}: 'tags' must be an object of texts", 'write "tags": {"question_type": "taste"}')
    name = item.get("id")
    return Record(
        id=str(number) if name is None else _text(str(name), "the id", where),
        messages=messages,
        images=images,
        choices=choices,
        answer=answer,
        tags={_text(str(k), "a tag's name", where): _text(str(v), f"the tag {k!r}", where) for k, v in tags.items()},
        where=where,
        root=root,
    )


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def read_records(path: Path, before: int = 0) -> list[Record]:
    """Every record of a JSONL file, in order; those without an id are numbered on from `before`.

    Raises: UserError at the first fault (`check` lists them all).
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder", f"name the file, for example {path / 'train.jsonl'}")
    records: list[Record] = []
    seen: dict[str, str] = {}
    for number, (where, line) in enumerate(read_lines(path), 1):
        record = parse_record(parse_json(line, where), where, path.parent, before + number)
        if record.id in seen:
            raise UserError(f"{where}: the id {record.id!r} stands already at {seen[record.id]}", "give every item an id of its own")
        seen[record.id] = where
        records.append(record)
    if not records:
        raise UserError(f"{path}: no items", "a data set needs at least one line")
    return records


def to_json(record: Record) -> str:
    """The record as its line of JSON (no newline)."""
    item: dict[str, Any] = {"messages": [{"role": m.role, "content": m.content} for m in record.messages]}
    item["images"] = list(record.images)
    item["id"] = record.id
    if record.choices:
        item["choices"] = list(record.choices)
    if record.answer is not None:
        item["answer"] = record.answer
    if record.tags:
        item["tags"] = record.tags
    return json.dumps(item, ensure_ascii=False)


def data_digest(records: Iterable[Record]) -> str:
    """A short name for exactly these items in this order: sha256 over their lines, 16 hex digits."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(to_json(record).encode() + b"\n")
    return digest.hexdigest()[:16]
