"""FoodieQA's folder to what will be asked: every item of every task and language, and what is left out, with the reason.

Promises: the items and what is left out add up to the file; faults are told all at once before anything is asked; no item is
repaired. Cost: a parse of the files and the header of every picture (with `skip_bad` a full decode, so that a damaged one is found now).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intervale.core.embedded import embedded
from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import IMAGE, Record, read_records
from intervale.data.foodie_items import Item, has_english, read_item
from intervale.data.foodieqa import FILES, find_source, sample_of
from intervale.data.formats import Fault, entries, fault_of
from intervale.data.images import load_picture, picture_size
from intervale.evaluate.foodieqa import TASKS, languages_of, plain_record
from intervale.evaluate.identity import picture_keys

NO_ENGLISH = "no English"
_SHOWN = 20
_DECODERS = 4


@dataclass(frozen=True)
class Part:
    """The items of one task in one language: (facts, plain record). `source` is the JSON file, `in_file` its number of items."""

    task: str
    language: str
    source: Path
    in_file: int
    items: tuple[tuple[Item, Record], ...]
    left_out: tuple[Fault, ...]
    not_chosen: int

    @property
    def plains(self) -> list[Record]:
        """The plain records alone."""
        return [plain for _, plain in self.items]

    def as_trained(self) -> list[Record]:
        """The items in the words of `prepare foodieqa`: a training file that came from there has the same ones."""
        found = []
        for number, (item, plain) in enumerate(self.items, 1):
            sample = sample_of(item, self.task, self.language, None, number, plain.root)
            found.append(replace(sample.record, images=plain.images, root=plain.root, where=plain.where))
        return found


@dataclass(frozen=True)
class SuiteData:
    """All parts, the (width, height) of every picture in them, upright, and the digests of each record's pictures, by their names."""

    parts: tuple[Part, ...]
    sizes: dict[Path, tuple[int, int]]
    keys: dict[tuple[str, ...], tuple[str, ...]]


def tasks_in(src: Path, wanted: Sequence[str]) -> list[str]:
    """The tasks to read: those named, or all whose file is in the folder. Raises: UserError when a named one, or any, is not there."""
    if wanted:
        return [task for task in TASKS if task in wanted]
    if src.is_file():
        names = {name: task for task, own in FILES.items() for name in own}
        if src.name not in names:
            raise UserError(f"{src}: not one of {', '.join(names)}", "say which task the file holds with --tasks")
        return [names[src.name]]
    found = [task for task in TASKS if any((src / name).is_file() for name in FILES[task])]
    if not found:
        find_source(src, TASKS[0])  # tells what was looked for
    return found


def read_suite(
    src: Path,
    tasks: Sequence[str] = (),
    languages: Sequence[str] = ("zh", "en"),
    *,
    only: Path | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> SuiteData:
    """Read the benchmark's folder (or a file of it, or the embedded foodemoji).

    `only` is a prepared JSONL file whose ids are asked; `limit` takes the first items of a task. Raises: UserError that lists every
    fault, unless `skip_bad` leaves those items out; for a language that no task has.
    """
    src = embedded(src) or src
    chosen = tasks_in(src, tasks)
    ids = {record.id for record in read_records(only)} if only else None
    parts: list[Part] = []
    sizes: dict[Path, tuple[int, int]] = {}
    for task in chosen:
        source = find_source(src, task)
        mine = [language for language in languages_of(task) if language in languages]
        if not mine and len(chosen) == 1:
            raise UserError(f"{task} is asked in {', '.join(languages_of(task))} only", "choose another --langs")
        found, unread = entries(source)
        for language in mine:
            parts.append(_part(source, task, language, found, unread, ids, limit))
    parts = [_looked_at(part, sizes, skip_bad) for part in parts]
    if not skip_bad:
        _refuse([fault for part in parts for fault in part.left_out if fault.kind != NO_ENGLISH])
    if not any(part.items for part in parts):
        raise UserError(f"{src}: no item is left to ask", "choose other --tasks, --langs or --items")
    plains = [plain for part in parts for plain in part.plains]
    keys = dict(zip((plain.images for plain in plains), picture_keys(plains), strict=True))  # all lie below one folder
    return SuiteData(tuple(parts), sizes, keys)


def _part(
    source: Path, task: str, language: str, found: list[tuple[str, Any]], unread: list[Fault], ids: set[str] | None, limit: int | None
) -> Part:
    """The items of a file in one language; the first of `limit` are counted among those that were chosen and can be asked."""
    items: list[tuple[Item, Record]] = []
    left_out = list(unread)
    seen: dict[str, str] = {}
    not_chosen = 0
    for where, raw in found:
        try:
            if not isinstance(raw, dict):
                raise UserError(f"{where}: an item must be a JSON object", "correct the item, or remove it")
            if language == "en" and not has_english(raw, task):
                left_out.append(Fault(where, NO_ENGLISH, "there is no question (or no choices) in English", "ask it with --langs zh"))
                continue
            item = read_item(raw, task, language, where, Counter())
            if item.id in seen:
                raise UserError(f"{where}: the id {item.id!r} stands already at {seen[item.id]}", "give every item an id of its own")
            if task == "mivqa" and len(item.names) != 4:
                raise UserError(f"{where}: {len(item.names)} pictures, but the protocol's prompts speak of four", "leave the item out")
            if len(item.choices) > 4:
                raise UserError(f"{where}: {len(item.choices)} choices, but the protocol reads the letters A to D", "leave the item out")
            if any(IMAGE in text for text in (item.question, item.dish, *item.choices)):
                raise UserError(f"{where}: {IMAGE} in a question, a choice or a dish", "write it without the mark")
            plain = plain_record(item, task, language, source.parent, [str(name) for name in item.names])
            for name in item.names:
                if not isinstance(name, str):
                    raise UserError(f"{where}: a picture must be a path, not {str(name)[:80]!r}", 'write "images/a.jpg"')
                inside(source.parent, name, where)
        except UserError as error:
            left_out.append(fault_of(error, where, "item"))
            continue
        seen[item.id] = where
        if (ids is not None and not {item.id, item.id + "-en"} & ids) or (limit is not None and len(items) >= limit):
            not_chosen += 1
            continue
        items.append((item, plain))
    return Part(task, language, source, len(found) + len(unread), tuple(items), tuple(left_out), not_chosen)


def _size(path: Path, where: str, decode: bool) -> tuple[int, int]:
    return load_picture(path, where).size if decode else picture_size(path, where)


def _looked_at(part: Part, sizes: dict[Path, tuple[int, int]], decode: bool) -> Part:
    """The part without the items whose pictures cannot be used, which are faults."""
    wanted: dict[Path, str] = {}
    for _, plain in part.items:
        for image in plain.images:
            wanted.setdefault(inside(plain.root, image, plain.where), f"{plain.where}: {image}")
    new = [path for path in wanted if path not in sizes]
    bad: dict[Path, UserError] = {}

    def look(path: Path) -> None:
        try:
            sizes[path] = _size(path, wanted[path], decode)
        except UserError as error:
            bad[path] = error

    with ThreadPoolExecutor(_DECODERS) as pool:
        list(pool.map(look, new))
    items, left_out = [], list(part.left_out)
    for item, plain in part.items:
        paths = [inside(plain.root, image, plain.where) for image in plain.images]
        broken = next((path for path in paths if path not in sizes), None)
        if broken is None:
            items.append((item, plain))
        else:
            error = bad.get(broken) or UserError(f"{plain.where}: {broken.name}: no such picture", "check the path")
            left_out.append(fault_of(error, plain.where, "picture"))
    return Part(part.task, part.language, part.source, part.in_file, tuple(items), tuple(left_out), part.not_chosen)


def _refuse(faults: Sequence[Fault]) -> None:
    """Raise a UserError that lists the faults: an item that stands in two languages is told once."""
    told = list(dict.fromkeys(f"{fault.where}: {fault.what}" for fault in faults))
    if told:
        more = [f"... and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
        raise UserError(
            f"{len(told)} faulty items; nothing was asked:\n       " + "\n       ".join(told[:_SHOWN] + more),
            "correct the file, or leave them out with --skip-bad (the report lists and counts them)",
        )
